"""``python -m benchmarks.gpu.worker PART``: one part of the run in a process of its own, rows as they come.

Each line of the file is a row, or what the parent has to know: {"begin": case}, {"dropped": case}, {"note": text}. A
case that fails gives a row with the reason; one that kills the process or hangs is found by its ``begin``, and the
parent starts the part again behind it.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.part import BEGIN, Context, Unit, reason

LEAST_LIMIT = 45.0  # seconds that a case may take in any case before it counts as hung
BROKEN = 3  # exit status: the device does not answer any more


def units(part: str, context: Context) -> list[Unit]:
    """The cases of a part, most important first; a part is ``module`` or ``module:kind``."""
    module, _, kind = part.partition(":")
    found = importlib.import_module(f"benchmarks.gpu.{module}")
    return list(found.units(context, kind) if kind else found.units(context))


def run(cases: Sequence[Unit], clock: Clock, write: Callable[[dict[str, Any]], None], alive: Callable[[], None]) -> int:
    """All cases that fit. ``alive`` raises where the device is lost; returns the exit status."""
    for case in cases:
        if not clock.has(case.seconds, case.name):
            write({"dropped": case.name})
            continue
        write({"begin": case.name})
        print(f"{BEGIN}{case.name}", flush=True)
        faulthandler.dump_traceback_later(case.limit or max(LEAST_LIMIT, 4 * case.seconds), exit=True)
        try:
            rows = case.run()
        except Exception as error:  # whatever it is, the other cases go on
            traceback.print_exc()
            rows = [{"op": "broken", "case": case.name, "gate": f"failed: {reason(error)}"}]
        finally:
            faulthandler.cancel_dump_traceback_later()
        for row in rows:
            write(row)
        try:
            alive()
        except Exception as error:
            write({"note": f"the device is lost after {case.name}: {reason(error)}"})
            return BROKEN
    return 0


def _alive(context: Context) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0, help="how many cases are done already")
    parser.add_argument("--cores", help="comma-separated: the cores to stay on")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if given.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, map(int, given.cores.split(",")))
    clock = Clock(given.seconds)
    on_host = given.dry_run or given.part.startswith("host")
    context = Context(torch.device("cpu" if on_host else "cuda"), given.dry_run)
    with given.rows.open("a") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        status = run(units(given.part, context)[given.skip :], clock, write, lambda: _alive(context))
    os._exit(status)  # nothing that a rival left behind (threads, compilers) may hold the process


if __name__ == "__main__":
    main()

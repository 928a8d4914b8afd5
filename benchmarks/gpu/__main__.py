"""``make gpu``, or ``python -m benchmarks.gpu``: everything that has to be seen on a GPU, in ten minutes.

Facts of the machine; the persistent LSTM, whose library is carried along or built, and every Triton host function
against float64, which decides ``verified.json``; what the device can do; the LSTM, the lookup, MIMO and layers beside
their rivals; the tests that have a device. On cores of their own, or afterwards where there are few, the compiled core
is built, and the tests and benchmarks of the processor run. Every part is a process: what fails or hangs costs no other
part its rows. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness, table
from benchmarks.gpu import cuda, process, tables
from benchmarks.gpu.clock import Clock, Share, shares
from benchmarks.gpu.part import Row

KERNELS = process.ROOT / "kernels" / "fastseq_kernels"
DTYPES = ("bfloat16", "float32", "float16", "tf32")
# processes for each family and dtype: about as many as its compilations need beside the others
SHARDS = {
    ("lstm", "bfloat16"): 3,
    ("lstm", "float32"): 3,
    ("vq", "bfloat16"): 2,
    ("vq", "float32"): 2,
    ("lstm", "float16"): 1,
    ("vq", "float16"): 1,
    ("lstm", "tf32"): 1,
    **{(family, dtype): 1 for family in ("mimo", "adt") for dtype in ("bfloat16", "float32", "float16")},
    **{(family, dtype): 1 for family in ("compressed", "graph") for dtype in DTYPES},
    **{("persist", dtype): 3 for dtype in ("bfloat16", "float16")},
    **{(family, dtype): 1 for family in ("lookup", "screen") for dtype in ("bfloat16", "float32", "float16")},
    **{("persist_lowrank", dtype): 1 for dtype in ("bfloat16", "float16")},
}
# families of csrc/cuda, and what they verify
COMPILED = {
    "persist": "lstm_persist",
    "persist_lowrank": "lstm_persist_lowrank",
    "lookup": "vq_lookup",
    "screen": "vq_screen",
}


def parity(compiled: bool) -> tuple[str, ...]:
    """The parts of the kernels of csrc/cuda, or of all else."""
    shards = {shard: of for shard, of in SHARDS.items() if (shard[0] in COMPILED) == compiled}
    return tuple(f"parity:{family}-{dtype}-{n}/{of}" for (family, dtype), of in shards.items() for n in range(of))


PERSIST_PARITY, PARITY = parity(True), parity(False)
DRY = {  # share -> its parts, where not the first alone
    "persist-parity": (
        "parity:persist-bfloat16-0/1",
        "parity:persist_lowrank-bfloat16-0/1",
        "parity:lookup-float32-0/1",
        "parity:screen-float32-0/1",
    ),
    "parity": ("parity:lstm-bfloat16-0/1", "parity:vq-float32-0/1"),
}
SUITES = tuple(f"host:cuda-{n}/4" for n in range(4))
# in the order in which they run: parts that go side by side, since nothing is timed in them, or one that is timed
STAGES: dict[tuple[str, ...], Share] = {
    PERSIST_PARITY: Share("persist-parity", 0, 60, 130),
    ("persist:times",): Share("persist", 1, 60, 170),
    ("persist:sanitizer",): Share("sanitizer", 3, 40, 95),
    PARITY: Share("parity", 4, 60, 170),
    ("limits",): Share("limits", 2, 20, 60),
    ("lstm",): Share("lstm", 5, 45, 170),
    ("vq",): Share("vq", 6, 30, 110),
    ("lookup",): Share("lookup", 7, 10, 20),
    ("mimo",): Share("mimo", 8, 15, 45),
    ("layers",): Share("layers", 9, 20, 60),
    SUITES: Share("tests", 10, 40, 180),
}
PERSISTENT = ("persist-parity", "persist", "sanitizer")  # shares that need the library of csrc/cuda
FACTS_SECONDS = 60.0
CUDA_SECONDS = 300.0  # to have the library of csrc/cuda
HOST_CORES = 8  # so many and more: half of them are the host's own
LANE_CORES = 2  # of each process of the host's tests
LEAST_HOST_SECONDS = 30.0


class Run(NamedTuple):
    """One run: where it writes, and what is left of its time."""

    folder: Path
    clock: Clock
    dry: bool
    only: tuple[str, ...]
    rows: list[Row]
    notes: list[str]
    lock: threading.Lock
    keep: Callable[[list[Row]], None]

    def part(self, name: str, seconds: float, cores: Sequence[int] | None, threads: int) -> list[Row]:
        """Run a part and keep what it wrote."""
        more = {"TRITON_INTERPRET": "1"} if self.dry and name.startswith("parity") else {}
        env = process.environment(threads, more)
        found = process.run(name, seconds, self.folder, env, self.dry, cores, seen=self.seen)
        with self.lock:
            self.notes.extend(found.notes)
            self.notes.extend(f"dropped, no time: {name} {case}" for case in found.dropped)
        print(f"{name}: {len(found.rows)} rows; {self.clock.left:.0f} s left", flush=True)
        return found.rows

    def seen(self, rows: list[Row]) -> None:
        with self.lock:
            self.rows.extend(rows)
            self.keep(rows)

    def parts(self, names: Sequence[str], seconds: float, cores: Sequence[int]) -> None:
        """Run parts side by side."""
        threads = 1 if self.dry else max(1, len(cores) // len(names))
        with ThreadPoolExecutor(len(names)) as pool:
            for future in [pool.submit(self.part, name, seconds, cores, threads) for name in names]:
                future.result()

    def wants(self, name: str) -> bool:
        return not self.only or name in self.only


def device_lane(run: Run, cores: list[int], scale: float, stages: dict[tuple[str, ...], Share], last: str = "") -> None:
    """The stages, up to ``last`` or all, each with its share of what is left. ``stages`` loses what is done."""
    for parts, share in list(stages.items()):
        scaled = [s._replace(least=s.least * scale, wanted=s.wanted * scale) for s in stages.values()]
        seconds = shares(scaled, max(0.0, run.clock.left - process.GRACE * scale))[share.name]
        del stages[parts]
        if not seconds:
            run.notes.append(f"dropped, no time: {share.name}")
        elif run.dry:
            run.parts(DRY.get(share.name, parts[:1]), seconds, cores)
        else:
            run.parts(parts, seconds, cores)
        if share.name == last:
            return


def host_lane(run: Run, cores: list[int]) -> None:
    """The compiled core first; then its benchmarks on two cores, and its tests on the others."""
    if not run.wants("host"):
        return
    seconds = run.clock.left - process.GRACE
    if seconds < LEAST_HOST_SECONDS:
        run.notes.append("dropped, no time: build, tests and benchmarks of the processor")
        return
    built = run.part("host:build", seconds, cores, len(cores))
    if not built or built[-1]["gate"] != "passed":
        run.notes.append("no tests and no benchmarks of the processor: the compiled core is not there")
        return
    lanes = [cores[n : n + LANE_CORES] for n in range(0, len(cores), LANE_CORES)] or [cores]
    names = [f"host:cpu-{n}/{len(lanes)}" for n in range(len(lanes))]

    def one(number: int) -> None:
        if number == 0 and not run.dry:
            run.part("host:benchmarks", max(1.0, run.clock.left - process.GRACE), lanes[0], len(lanes[0]))
        left = run.clock.left - process.GRACE
        if left > LEAST_HOST_SECONDS or run.dry:
            run.part(names[number], left, lanes[number], len(lanes[number]))

    with ThreadPoolExecutor(len(lanes)) as pool:
        list(pool.map(one, range(1 if run.dry else len(lanes))))


def persistent(run: Run, cores: list[int]) -> bool:
    """Whether the library of csrc/cuda is there; it is built where that can be. Says where it is from, or why not."""
    rows = run.part("cuda", min(CUDA_SECONDS, run.clock.left), cores, len(cores))
    run.notes.extend(f"kernels for CUDA: {row['told']}" for row in rows if "told" in row)
    wrong = [row["gate"] for row in rows if row["gate"] != "passed"]
    if not rows or wrong:
        run.notes.append(f"what is compiled for CUDA is left out: {(wrong or ['no answer'])[0]}")
    return bool(rows) and not wrong


def lanes(run: Run, scale: float, after_parity: Callable[[], None]) -> None:
    """The parity on all cores; then device and host side by side where there are cores for both, else in turn.

    Args:
        after_parity: what has been verified is written down, so that what comes next can choose it.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    stages = {parts: share for parts, share in STAGES.items() if run.wants(share.name)}
    if any(share.name in PERSISTENT for share in stages.values()) and not persistent(run, cores):
        stages = {parts: share for parts, share in stages.items() if share.name not in PERSISTENT}
    last = [share.name for share in stages.values() if "parity" in share.name][-1:]
    if last:
        device_lane(run, cores, scale, stages, last[0])
        after_parity()
    if len(cores) < HOST_CORES or run.dry or not run.wants("host"):
        device_lane(run, cores, scale, stages)
        host_lane(run, cores)
        return
    half = len(cores) // 2
    beside = threading.Thread(target=host_lane, args=(run, cores[half:]))
    beside.start()
    device_lane(run, cores[:half], scale, stages)
    beside.join()


def summary(rows: Sequence[Row]) -> list[Row]:
    """The parity in one row per module, and what was wrong: hundreds of passed cases need no row each."""
    if not any(r["op"] == "plan" for r in rows):
        return []
    verdicts = importlib.import_module("benchmarks.gpu.parity").verdicts(rows)
    found = []
    for module, verdict in verdicts.items():
        cases = sum(r["op"] == "parity" and r.get("module") == module and r["gate"] == "passed" for r in rows)
        row: Row = {"op": "parity", "table": "parity", "case": module, "dtypes": verdict.dtypes, "cases": cases}
        found.append({**row, "gate": "; ".join(verdict.reasons[:3]) or "passed"})
    return found


def verify(rows: Sequence[Row], facts: Row, path: Path) -> list[str]:
    """Write ``verified.json``; returns lines to print."""
    from fastseq_kernels._sources import source_hash

    def source(module: str) -> str:
        return cuda.source() or "" if module in COMPILED.values() else source_hash(module)

    return list(importlib.import_module("benchmarks.gpu.parity").record(rows, facts, path, source))


def bad(rows: Sequence[Row]) -> list[str]:
    """Ours that failed the gate, wrong kernels, failed tests, and cases that raised before they had a provider."""
    ours = [r for r in rows if r.get("provider") == "fastseq" or r["op"] in ("parity", "tests", "broken")]
    reasons = [r for r in ours if r.get("gate", "passed") != "passed" and not r["gate"].startswith(harness.ABSENT)]
    return [f"{r['op']} {r.get('label', '')} {r.get('case', '')}: {r['gate']}" for r in reasons]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = [share.name for share in STAGES.values()] + ["host"]
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it (default: 10)")
    parser.add_argument("--parts", help=f"comma-separated, of {', '.join(names)} (default: all)")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="where the rows go (default: benchmarks/results)")
    parser.add_argument("--verified", type=Path, metavar="FILE", default=KERNELS / "verified.json")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="a new one, for all that the parts say")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; keeps rows only in --rows")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: write docs/gpu.md from the rows")
    given = parser.parse_args()
    given.only = tuple(given.parts.split(",")) if given.parts else ()
    for name in given.only:
        if name not in names:
            parser.error(f"--parts: {name} is none of {', '.join(names)}")
    if given.logs:
        try:
            given.logs.mkdir(parents=True)
        except OSError as error:
            parser.error(f"--logs: {error}")
    return given


def machine(run: Run) -> Row:
    """The facts.

    Raises:
        SystemExit: there is no GPU that torch can use.
    """
    found = process.run("facts", FACTS_SECONDS, run.folder, process.environment(1, {}), run.dry)
    if not found.rows or "device" not in found.rows[0]:
        said = [*(r["gate"] for r in found.rows if "gate" in r), *found.notes] or ["no answer"]
        raise SystemExit(f"make gpu: no GPU that this torch can use ({said[0]})")
    return found.rows[0]


def main() -> None:
    given = arguments()
    sys.path[:0] = [str(process.ROOT), str(KERNELS.parent)]  # as the parts have it
    if given.markdown:
        tables.write_markdown(harness.RESULTS, process.ROOT / "docs" / "gpu.md")
        return
    with contextlib.ExitStack() as stack:
        folder = given.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        seconds = 60 * given.minutes
        run = Run(folder, Clock(seconds), given.dry_run, given.only, [], [], threading.Lock(), lambda rows: None)
        facts = machine(run)
        shared = {key: value for key, value in facts.items() if key not in ("op", "date")}
        target = given.rows or (None if given.dry_run else harness.results_file(facts["device"]))

        def keep(rows: list[Row]) -> None:
            measured = [r for r in rows if r["op"] not in ("parity", "plan")]
            host = [{k: v for k, v in r.items() if k != "processor"} for r in measured if "processor" in r]
            if target:
                harness.append([{**r, **shared} for r in measured if "processor" not in r], target)
                harness.append(host, given.rows or harness.results_file())

        run = run._replace(keep=keep)
        print("\n".join(f"{key}: {value}" for key, value in facts.items() if key != "op"), flush=True)

        def write_verified() -> None:
            if not given.dry_run or given.verified != KERNELS / "verified.json":
                run.notes.extend(verify(run.rows, facts, given.verified))

        lanes(run, given.minutes / 10, write_verified)
    told = summary(run.rows)
    keep_parity = [{**r, **shared} for r in told]
    if target:
        harness.append(keep_parity, target)
    rows = [r for r in run.rows if r["op"] not in ("parity", "plan")] + told
    for drawn in tables.of_rows(rows):
        print(f"\n{table.text(drawn)}")
    print("\n".join(["", *run.notes]))
    wrong = bad(rows)
    if wrong:
        sys.exit("\n".join([f"{len(wrong)} wrong:", *wrong]))


if __name__ == "__main__":
    main()

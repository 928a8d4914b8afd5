"""Parts in processes of their own, with a time limit; a part that dies goes on behind the case it died in."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.part import BEGIN

ROOT = Path(__file__).resolve().parents[2]
GRACE = 10.0  # seconds beyond its share before a part is ended
POLL = 2.0  # seconds between two looks at what a part has written
RESTARTS = 3
LEAST_RESTART = 15.0  # seconds that must be left to start a part again


class Result(NamedTuple):
    """What became of a part."""

    rows: list[dict[str, Any]]
    dropped: list[str]
    notes: list[str]


def environment(threads: int, more: Mapping[str, str]) -> dict[str, str]:
    """Of a part: this tree is importable, and nothing is downloaded by what it starts."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    always = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **always, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), **more}


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float, tell: Callable[[], None]) -> int | None:
    """The exit status, or None where it did not end within ``seconds``."""
    clock = Clock(seconds)
    while True:
        try:
            return process.wait(min(POLL, clock.left))
        except subprocess.TimeoutExpired:
            if not clock.left:
                return None
            tell()


def read(path: Path) -> tuple[Result, int]:
    """What a part wrote, and how many cases it has begun or dropped. A line that was cut off does not count."""
    rows, dropped, notes, done = [], [], [], 0
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "begin" in row or "dropped" in row:
            done += 1
            dropped += [row["dropped"]] if "dropped" in row else []
        elif "note" in row:
            notes.append(row["note"])
        else:
            rows.append(row)
    return Result(rows, dropped, notes), done


def run(
    part: str,
    seconds: float,
    folder: Path,
    env: Mapping[str, str],
    dry: bool = False,
    cores: Sequence[int] | None = None,
    command: Sequence[str] | None = None,
    seen: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> Result:
    """One part to its end or to the end of its seconds.

    Args:
        env: from ``environment``. cores: that it may use. command: instead of the worker, for tests.
        seen: is given the rows as they come, so that they are kept when this process is ended too.
    """
    stem = re.sub(r"\W", "-", part)
    path, log = folder / f"{stem}.jsonl", folder / f"{stem}.log"
    clock, more, told = Clock(seconds), [], 0

    def tell() -> None:
        nonlocal told
        rows = read(path)[0].rows
        seen(rows[told:])
        told = len(rows)

    for attempt in range(RESTARTS + 1):
        done = read(path)[1]
        line = [*(command or (sys.executable, "-m", "benchmarks.gpu.worker")), part, "--seconds", f"{clock.left:.1f}"]
        line += ["--rows", str(path), "--skip", str(done), *(["--dry-run"] if dry else [])]
        line += ["--cores", ",".join(map(str, cores))] if cores else []
        with log.open("ab") as out:
            process = subprocess.Popen(line, cwd=ROOT, env=dict(env), stdout=out, stderr=out, start_new_session=True)
            try:
                status = _wait(process, clock.left + GRACE, tell)
            finally:
                _end(process)
        tell()
        if status == 0:
            break
        if status is None:
            more.append(f"{part}: ended in {where(path)}, its time was over")
            break
        more.append(f"{part}: process ended with {status} in {where(path)}: {_tail(log)}")
        if read(path)[1] == done or clock.left < LEAST_RESTART or attempt == RESTARTS:
            break  # it does not get further
        time.sleep(0.5)
    found = read(path)[0]
    return found._replace(notes=[*found.notes, *more])


def where(path: Path) -> str:
    """The case that a part was in when it ended."""
    lines = path.read_text().splitlines() if path.exists() else []
    begun = [line for line in lines if line.startswith('{"begin"') and line.endswith("}")]
    return str(json.loads(begun[-1])["begin"]) if begun else "its start"


def _tail(log: Path) -> str:
    """The last line of a traceback, or of what else was said in the last case; "Timeout" is what a hung one leaves."""
    said = log.read_text(errors="replace").rpartition(f"\n{BEGIN}")[2]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "exception" in line or line.startswith("Timeout (")]
    return ((errors or lines or ["nothing was said"])[-1])[:300]

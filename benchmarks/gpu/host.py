"""What belongs to the host: tests, on the device and on the processor, the build of the compiled core, its benchmarks.

Tests run file by file in a pytest of their own, so that a file that hangs or is dropped costs no other its result.
``host:cuda-0/4`` is the first of four parts of the files that have tests on a device; ``host:cpu-0/4`` likewise.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import cuda
from benchmarks.gpu.part import Context, Row, Unit
from benchmarks.gpu.process import ROOT
from benchmarks.harness import ABSENT

FIRST = ("tests/kernels/test_gpu.py", "tests/ops", "tests/nn")
SECONDS = {"cuda": 20.0, "cpu": 25.0}  # of a file, roughly
LONGEST = 240.0  # of a file or a benchmark, before it counts as hung
LIMIT = LONGEST + 30.0
SELECT = {"cuda": "gpu", "cpu": "not gpu and not sanitizer"}  # by pytest's markers
DRY_FILES = ["tests/ops/test_tolerance.py::test_bits"]
BENCHMARKS = {
    "lstm": ["lstm", "--mode", "train,infer", "--cases", "T50_B16_H128,T100_B1_H256", "--rounds", "5"],
    "vq": ["vq", "--mode", "lookup", "--cases", "N4096_K512_D64,N16384_K1024_D64", "--rounds", "5"],
}
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed)\b")
NO_TESTS = 5  # pytest's exit status where everything was deselected


def files(suite: str) -> list[str]:
    """Test files, those of the operators first; of "cuda" those marked, the first by function."""
    found = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/**/test_*.py"))]
    if suite == "cuda":
        found = [f for f in found if re.search(r"mark\.gpu\b|\bdevice: str\b", (ROOT / f).read_text())]
        found.remove(FIRST[0])
        found += [f"{FIRST[0]}::{name}" for name in re.findall(r"^def (test_\w+)", (ROOT / FIRST[0]).read_text(), re.M)]
    place = {name: next((n for n, start in enumerate(FIRST) if name.startswith(start)), len(FIRST)) for name in found}
    return sorted(found, key=lambda name: place[name])


def pytest(file: str, suite: str) -> list[Row]:
    row: Row = {"op": "tests", "table": "tests", "suite": suite, "case": file}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, "-m", SELECT[suite], file], cwd=ROOT, capture_output=True, text=True, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        return [{**row, "gate": f"failed: not done after {LONGEST:.0f} s"}]
    if done.returncode == NO_TESTS:
        return []
    if done.returncode:
        print(done.stdout, done.stderr)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    counts = {name.rstrip("s") if name.startswith("error") else name: int(n) for n, name in COUNTS.findall(lines[-1])}
    failures = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    verdict = "passed" if done.returncode == 0 else f"failed: {'; '.join(failures[:3]) or lines[-1]}"[:300]
    return [{**row, **counts, "seconds": round(time.perf_counter() - begin, 1), "gate": verdict}]


def build(context: Context) -> list[Row]:
    """The compiled core, with what is installed here; the kernels for CUDA stay as they are: others run them now."""
    row: Row = {"op": "tests", "table": "tests", "suite": "build", "case": "compiled core"}
    for package in ("setuptools", "pybind11"):
        if importlib.util.find_spec(package) is None:
            return [{**row, "gate": f"{ABSENT[0]}{package}"}]
    command = [sys.executable, "setup.py", "--quiet", "build_clib", "build_ext", "--build-lib"]
    begin = time.perf_counter()
    if not context.dry:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "FASTSEQ_BUILD": os.environ.get("FASTSEQ_BUILD") or "torch"}
            done = subprocess.run([*command, folder], cwd=ROOT, env=environment, capture_output=True, text=True)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing was said"]
                return [{**row, "gate": f"{ABSENT[1]}{said[-1][:200]}"}]
            cuda.place(Path(folder), keep=("core", "torch"))
    return [{**row, "seconds": round(time.perf_counter() - begin, 1), "gate": "passed"}]


def benchmark(name: str) -> list[Row]:
    """Rows of ``benchmarks.run`` on this processor: they say themselves where they are from."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "benchmarks.run", *BENCHMARKS[name], "--rows", str(target)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
        rows = [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else []
    if not rows:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        return [{"op": "tests", "table": "tests", "suite": "benchmarks", "case": name, "gate": f"failed: {said[-1]}"}]
    return [{**row, "processor": row["device"]} for row in rows]


def units(context: Context, kind: str) -> list[Unit]:
    suite, _, part = kind.partition("-")
    if suite == "build":
        return [Unit("build of the compiled core", 60.0, functools.partial(build, context), LIMIT)]
    if suite == "benchmarks":
        return [Unit(f"benchmarks {n}", 60.0, functools.partial(benchmark, n), LIMIT) for n in BENCHMARKS]
    for package in ("pytest", "hypothesis"):
        if importlib.util.find_spec(package) is None:
            row: Row = {"op": "tests", "table": "tests", "suite": suite, "case": "all", "gate": f"{ABSENT[0]}{package}"}
            return [Unit(suite, 0.0, functools.partial(list, [row]))]
    first, count = (int(n) for n in part.split("/"))
    chosen = DRY_FILES if context.dry else files(suite)[first::count]
    os.environ.pop("FASTSEQ_BACKEND", None)
    return [Unit(f"{suite} {f}", SECONDS[suite], functools.partial(pytest, f, suite), LIMIT) for f in chosen]

"""The library of csrc/cuda on this machine: carried along, or built for this device where nvcc is; else why neither."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import Context, Row, Unit
from benchmarks.gpu.process import ROOT
from benchmarks.harness import ABSENT

PACKAGE = ROOT / "fastseq"
LIBRARY, RECORD = "_cuda.abi3.so", "_build.json"
SECONDS = 240.0  # that the build may take
_BUILD = """
import setuptools, sys
real, setuptools.setup = setuptools.setup, lambda **options: None
found = {"__name__": "__main__"}
exec(open("setup.py").read(), found)
alone = [e for e in found["extensions"] if e.name == "fastseq._cuda"]
arguments = ["--quiet", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1] + "/objects"]
real(ext_modules=alone, cmdclass={"build_ext": found["BuildDoors"]}, script_args=arguments)
"""
FAMILY = {9: "90a"}  # major of the capability -> as nvcc should have it, where not by its number


def record(folder: Path | None = None) -> dict[str, Any]:
    """What the build in this folder, or in the package, wrote; empty where none was."""
    path = (folder or PACKAGE) / RECORD
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def source() -> str | None:
    """The hash of the source that was compiled."""
    found: str | None = (record().get("cuda") or {}).get("source")
    return found


def why_no_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(home, "bin", "nvcc").exists() if home else shutil.which("nvcc")
    return None if found else "nvcc is not on PATH and CUDA_HOME is not set"


def compile_alone(folder: Path, archs: str, seconds: float, **more: str) -> str | None:
    """``folder/fastseq``: a library of csrc/cuda and its record of the build, or what was said last."""
    (folder / "fastseq").mkdir()
    environment = {**os.environ, "FASTSEQ_BUILD": "cuda", "FASTSEQ_CUDA_ARCHS": archs, **more}
    command = [sys.executable, "-c", _BUILD, str(folder)]
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    if run.returncode:
        print(run.stdout, run.stderr)
    said = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()] or ["nothing was said"]
    return said[-1] if run.returncode else None


def source_here() -> str:
    """The hash of the source in this tree, as setup.py makes it."""
    found = hashlib.sha256()
    names = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))
    for name in (n for n in names if n.startswith(("csrc/cuda/", "csrc/torch_cuda/"))):
        found.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return found.hexdigest()[:16]


def place(folder: Path, keep: Sequence[str]) -> None:
    """Put what was built in ``folder/fastseq`` into the package: the libraries there, and of its record what it says of
    the parts ``keep``; the rest of the record stays."""
    made, old = record(folder / "fastseq"), record()
    for path in (folder / "fastseq").glob("*.so"):
        new = PACKAGE / f".{path.name}"
        shutil.copy2(path, new)
        new.replace(PACKAGE / path.name)  # at once: others may load it
    built = [n for n in ("core", "torch", "cuda") if n in (made if n in keep else old).get("built", ())]
    missing = {n: why for record in (old, made) for n, why in record.get("missing", {}).items() if n not in built}
    found = {**made, **old} if keep == ("cuda",) else {**old, **made}
    found["cuda"] = (made if "cuda" in keep else old).get("cuda")
    new = PACKAGE / f".{RECORD}"
    new.write_text(json.dumps({**found, "built": built, "missing": missing}, indent=1) + "\n")
    new.replace(PACKAGE / RECORD)


def ready(context: Context) -> list[Row]:
    """One row: whether the library is there now."""
    row: Row = {"op": "tests", "table": "tests", "suite": "build", "case": "kernels for CUDA"}
    begin = time.perf_counter()
    if context.dry:
        return [{**row, "gate": "passed", "told": "the kernels are emulated"}]
    if (PACKAGE / LIBRARY).exists() and source() is not None:
        stale = "" if source() == source_here() else f", NOT of the source in this tree, {source_here()}"
        return [{**row, "gate": "passed", "told": f"carried along: {source()}{stale}"}]
    major, minor = torch.cuda.get_device_capability()
    archs = FAMILY.get(major, f"{major}{minor}")
    reason = why_no_nvcc()
    packages = [name for name in ("setuptools", "pybind11") if importlib.util.find_spec(name) is None]
    if reason is not None or packages:
        why = reason or f"not installed: {', '.join(packages)}"
        return [{**row, "gate": f"{ABSENT[1]}fastseq/{LIBRARY} with {RECORD} was not carried along, and {why}"}]
    with tempfile.TemporaryDirectory() as folder:
        reason = compile_alone(Path(folder), archs, SECONDS)
        if reason is not None:
            return [{**row, "gate": f"{ABSENT[1]}it does not build: {reason[:200]}"}]
        place(Path(folder), ("cuda",))
    seconds = round(time.perf_counter() - begin, 1)
    return [{**row, "seconds": seconds, "gate": "passed", "told": f"built for {archs} in {seconds} s: {source()}"}]


def loads(context: Context) -> list[Row]:
    """One row: whether a process that begins now finds its tiles."""
    row: Row = {"op": "tests", "table": "tests", "suite": "build", "case": "kernels for CUDA load"}
    if context.dry:
        return [{**row, "gate": "passed"}]
    code = "from fastseq.ops import _cuda, lstm_persist; print(_cuda.why_not_loaded or len(lstm_persist.TILES))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    said = (done.stdout.strip() or done.stderr.strip() or "nothing was said").splitlines()[-1]
    return [{**row, "gate": "passed" if said.isdigit() else f"{ABSENT[1]}{said[:200]}"}]


def units(context: Context) -> list[Unit]:
    call = functools.partial(ready, context)
    return [Unit("build", 1.0, call, SECONDS + 60), Unit("load", 1.0, functools.partial(loads, context), 60.0)]

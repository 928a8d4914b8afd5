"""The decisions of setup.py, and a package whose library of csrc/cuda is built for one target."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import setuptools

from benchmarks.gpu.cuda import compile_alone
from benchmarks.gpu.cuda import why_no_nvcc as why_no_nvcc

ROOT = Path(__file__).parents[2]
TARGET = "80"
_COMPILE = """
import json, setuptools, sys
setuptools.setup = lambda **options: None
found = {"__name__": "__main__"}
exec(open("setup.py").read(), found)
every, only = found["kernel_objects"](found["cuda"]), json.loads(sys.argv[1])
objects = {s: o for s, o in every.items() if only is None or s in only}
found["kernel_objects"] = lambda cuda: objects
found["compile_kernels"](found["cuda"])
print(json.dumps({"objects": objects, "flags": found["NVCC_FLAGS"], "nvcc": found["cuda"].version}))
"""


class Compiled(NamedTuple):
    objects: dict[str, str]  # of each source
    flags: list[str]
    nvcc: str


def kernels(arch: str, only: list[str] | None = None) -> Compiled:
    """The objects of csrc/cuda for one GPU, as setup.py makes them and where it keeps them; those of ``only``."""
    environment = {**os.environ, "FASTSEQ_BUILD": "cuda", "FASTSEQ_CUDA_ARCHS": arch}
    command = [sys.executable, "-c", _COMPILE, json.dumps(only)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout + run.stderr
    return Compiled(**json.loads(run.stdout.splitlines()[-1]))


def decisions(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    """The globals of setup.py after it has decided; nothing is built."""
    for name in ("FASTSEQ_BUILD", "FASTSEQ_BUILD_TEST_ISA", "FASTSEQ_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path("setup.py")


def build(folder: Path) -> None:
    """``folder/fastseq``: this package, but with a library of csrc/cuda for TARGET, and its record of the build.

    Nothing runs its kernels, so they are not optimised, which takes a quarter of the time."""
    reason = compile_alone(folder, TARGET, 1200, NVCC_APPEND_FLAGS="-Xcicc -O0 -Xptxas -O0")
    assert reason is None, reason
    for path in (ROOT / "fastseq").iterdir():
        if not path.name.startswith(("_cuda", "_build.json", "__pycache__")):
            (folder / "fastseq" / path.name).symlink_to(path)


def python(folder: Path, code: str) -> str:
    """What ``code`` prints in another Python, which imports the package of ``folder``."""
    environment = {k: v for k, v in os.environ.items() if k not in ("FASTSEQ_BACKEND", "TRITON_INTERPRET")}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT / "kernels")])
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def said(folder: Path, code: str, calls: Collection[str]) -> dict[str, str]:
    """The line that ``python`` prints of each call, all in one process, after ``code``."""
    lines = python(folder, code + "\n".join(f"print({call})" for call in calls)).splitlines()
    return dict(zip(calls, lines, strict=True))

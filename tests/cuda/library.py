"""The decisions of setup.py, and a package whose library of csrc/cuda is built for one target."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

from benchmarks.gpu.cuda import compile_alone
from benchmarks.gpu.cuda import why_no_nvcc as why_no_nvcc

ROOT = Path(__file__).parents[2]
TARGET = "80"


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
    """``folder/fastseq``: this package, but with a library of csrc/cuda for TARGET, and its record of the build."""
    reason = compile_alone(folder, TARGET, 1200)
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

"""The decisions of setup.py, and a package whose library of csrc/cuda is built for one target."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
TARGET = "80"
_BUILD = """
import setuptools, sys
real, setuptools.setup = setuptools.setup, lambda **options: None
found = {"__name__": "__main__"}
exec(open("setup.py").read(), found)
alone = [e for e in found["extensions"] if e.name == "fastseq._cuda"]
arguments = ["--quiet", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1] + "/objects"]
real(ext_modules=alone, cmdclass={"build_ext": found["BuildDoors"]}, script_args=arguments)
"""


def decisions(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    """The globals of setup.py after it has decided; nothing is built."""
    for name in ("FASTSEQ_BUILD", "FASTSEQ_BUILD_TEST_ISA", "FASTSEQ_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path("setup.py")


def why_no_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(home, "bin", "nvcc").exists() if home else shutil.which("nvcc")
    return None if found else "nvcc is not on PATH and CUDA_HOME is not set"


def compile_alone(folder: Path, archs: str, seconds: float) -> str | None:
    """``folder/fastseq``: a library of csrc/cuda and its record of the build, or what was said last."""
    (folder / "fastseq").mkdir()
    environment = {**os.environ, "FASTSEQ_BUILD": "cuda", "FASTSEQ_CUDA_ARCHS": archs}
    command = [sys.executable, "-c", _BUILD, str(folder)]
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    said = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()] or ["nothing was said"]
    return said[-1] if run.returncode else None


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

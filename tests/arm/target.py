"""64-bit ARM on another machine: this project cross-compiled, Debian's Python for that processor, and an emulator.

Everything is kept in ``build/arm`` from run to run; without it about 50 MB are downloaded, for which no rights of the
system administrator are needed.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "arm"
TRIPLE = "aarch64-linux-gnu"
TOOLS = {f"{TRIPLE}-g++": f"g++-{TRIPLE}", "qemu-aarch64": "qemu-user", "apt-get": "apt", "dpkg-deb": "dpkg"}
PACKAGES = ["python3", "libpython3-dev", "libstdc++6"]  # with what they need, down to the C library
PLATFORMS = ["manylinux_2_28_aarch64", "manylinux2014_aarch64"]


def missing() -> str | None:
    """What to install before anything here works, or None."""
    packages = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    return f"tests/arm needs Debian or Ubuntu with: apt install {' '.join(packages)}" if packages else None


def run(command: Sequence[str | Path], cwd: Path = ROOT, stdin: str | None = None, **environment: str) -> str:
    """The standard output of a command that must succeed."""
    merged = {**os.environ, **environment}
    done = subprocess.run(list(map(str, command)), env=merged, cwd=cwd, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def system() -> Path:
    """The folder that is / to the emulated programs: Debian's Python and C library, unpacked."""
    root, apt = HOME / "root", HOME / "apt"
    if (HOME / "unpacked").exists():
        return root
    for folder in (root, apt / "lists" / "partial", apt / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()  # nothing is installed there: all that is needed comes with it
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt,
    }
    (apt / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    environment = {"APT_CONFIG": str(apt / "apt.conf")}
    run(["apt-get", "--quiet", "update"], **environment)
    run(["apt-get", "--quiet", "--yes", "--download-only", "install", *PACKAGES], **environment)
    for package in sorted((apt / "archives").glob("*.deb")):
        run(["dpkg-deb", "--extract", package, root])
    shutil.rmtree(apt)
    (HOME / "unpacked").touch()
    return root


def python_version() -> str:
    """Of the emulated Python, as 3.11."""
    return (system() / "usr" / "bin" / "python3").resolve().name.removeprefix("python")


def site() -> Path:
    """numpy and safetensors for the emulated Python, in the versions of this one."""
    folder = HOME / "site"
    if not folder.exists():
        wanted = [f"{name}=={importlib.metadata.version(name)}" for name in ("numpy", "safetensors")]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target", str(folder)]
        command += [f"--python-version={python_version()}", *(f"--platform={name}" for name in PLATFORMS), *wanted]
        run(command)
    return folder


def build() -> Path:
    """The packages, compiled by ``setup.py`` as it would be there, with warnings as errors."""
    folder, include = HOME / "lib", system() / "usr" / "include"
    environment = {
        "CC": f"{TRIPLE}-gcc",
        "CXX": f"{TRIPLE}-g++",
        "CFLAGS": "-Werror",
        "CXXFLAGS": "-Werror",
        "CPPFLAGS": f"-I{include / f'python{python_version()}'} -idirafter {include}",
        "FASTSEQ_BUILD": "core",
        "FASTSEQ_BUILD_TEST_ISA": "0",
        "SETUPTOOLS_EXT_SUFFIX": ".so",  # this Python's says another processor
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
    }
    run([sys.executable, "setup.py", "--quiet", "build", "--build-lib", folder], **environment)
    return folder


def compiled(source: Path, program: Path, *flags: str | Path) -> Path:
    """A program for the emulator from one source in C or C++."""
    compiler = f"{TRIPLE}-gcc" if source.suffix == ".c" else f"{TRIPLE}-g++"
    run([compiler, "-Wall", "-Wextra", "-Werror", source, "-o", program, *flags])
    return program


def emulate(program: Path, *arguments: str | Path, stdin: str | None = None, **environment: str) -> str:
    """The standard output of a program for 64-bit ARM, in a folder where Python does not find this machine's build."""
    return run(["qemu-aarch64", "-L", system(), program, *arguments], cwd=HOME, stdin=stdin, **environment)


def python(*arguments: str | Path, **environment: str) -> str:
    """The standard output of the emulated Python, which finds the packages of ``build`` and ``site``."""
    path = f"{HOME / 'lib'}{os.pathsep}{site()}"
    interpreter = system() / "usr" / "bin" / "python3"
    return emulate(interpreter, *arguments, PYTHONPATH=path, OPENBLAS_NUM_THREADS="1", **environment)

"""An empty environment: its own Python and what is installed there, no compiler on PATH, no source nearby."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEPT = ("HOME", "LANG", "TMPDIR", "SSL_CERT_FILE")  # and what configures pip


class Environment:
    """In ``folder``, with ``packages`` from pip."""

    def __init__(self, folder: Path, *packages: str | Path) -> None:
        self.bin = folder / "bin"
        self.work = folder / "work"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.work.mkdir()
        self.install(*packages)
        assert not [name for name in ("cc", "gcc", "g++", "clang") if shutil.which(name, path=str(self.bin))]

    def install(self, *packages: str | Path) -> None:
        self.run("python", "-m", "pip", "install", "--quiet", *packages)

    def run(self, *command: str | Path) -> str:
        """The standard output of a command that must succeed, in a folder with nothing of ours but copied tests."""
        kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith("PIP_")}
        program, *rest = map(str, command)
        done = subprocess.run(
            [str(self.bin / program), *rest],
            env={**kept, "PATH": str(self.bin)},
            cwd=self.work,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{program} {' '.join(rest)}\n{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def copy_tests(self) -> None:
        for name in ("tests", "csrc/core"):  # some tests read there beyond which sizes work is cut into blocks
            shutil.copytree(ROOT / name, self.work / name, ignore=shutil.ignore_patterns("__pycache__"))

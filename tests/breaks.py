"""Deliberate breaks of a copy of the sources, each of which a test must find: who watches the tests.

A patch says in its head what it breaks, which test finds it (``Caught by:``) and what the failure says (``Failure:``).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
REFRESH = """{name} no longer applies. Make the same change by hand in {source}/, then:
    head -4 {folder}/{name} > /tmp/head; git diff -U1 {source} > /tmp/diff
    cat /tmp/head /tmp/diff > {folder}/{name}; git checkout {source}
{said}"""
Ran = subprocess.CompletedProcess[str]
FOUND = (1, -signal.SIGABRT)  # a test failed; or what it runs ended itself, and told on standard error why


class Break(NamedTuple):
    test: str
    says: str


def read(patch: Path) -> Break:
    text = patch.read_text()
    found = [re.search(rf"^{name}: (.*)$", text, re.M) for name in ("Caught by", "Failure")]
    assert all(found), f"{patch.name} must say 'Caught by:' and 'Failure:' before its patch"
    return Break(*(match[1] for match in found if match))


def pytest_of(test: str, root: Path, *options: str, **environment: str) -> Ran:
    """One test in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, test]
    return subprocess.run(command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True)


class Breaks(NamedTuple):
    """The patches of a folder."""

    folder: Path
    copied: tuple[str, ...]  # from ROOT, before the copy is broken
    source: str  # which of these the patches change
    run: Callable[[str, Path], Ran]  # a test by name, on the copy at that path

    @property
    def patches(self) -> list[Path]:
        return sorted(self.folder.glob("*.patch"))

    def broken(self, patch: Path, root: Path) -> None:
        """Copies the sources to ``root`` and breaks the copy."""
        for name in self.copied:
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        command = ["git", "apply", "-C1", str(patch)]
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        folder = os.path.relpath(self.folder, ROOT)
        assert done.returncode == 0, REFRESH.format(
            name=patch.name, source=self.source, folder=folder, said=done.stderr
        )

    def attempt(self, patch: Path, root: Path) -> Ran | str:
        """What the test of a break printed, or why there was nothing to run."""
        try:
            self.broken(patch, root)
            return self.run(read(patch).test, root)
        except AssertionError as error:
            return str(error)

    def outcomes(self, folders: pytest.TempPathFactory) -> dict[str, Ran | str]:
        """Of all breaks, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            roots = [folders.mktemp(patch.stem) for patch in self.patches]
            done = pool.map(self.attempt, self.patches, roots)
            return dict(zip((patch.stem for patch in self.patches), done, strict=True))


def check_caught(patch: Path, done: Ran | str) -> None:
    expected = read(patch)
    assert not isinstance(done, str), done
    said = f"{done.stdout[-3000:]}{done.stderr[:1000]}"
    assert done.returncode in FOUND, f"{expected.test} does not find this break\n{said}"
    assert re.search(expected.says, done.stdout + done.stderr), said

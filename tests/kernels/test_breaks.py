"""Deliberate breaks of the kernels, each of which a test must find: who watches the tests.

A file of ``breaks`` says in words what it breaks, which test finds it and what the failure says, and holds a patch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton", reason="triton is not installed")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("each break runs in a process of its own", allow_module_level=True)

ROOT = Path(__file__).parents[2]
BREAKS = sorted(Path(__file__).with_name("breaks").glob("*.patch"))
REFRESH = """{name} no longer applies. Make the same change by hand in kernels/, then:
    head -4 tests/kernels/breaks/{name} > /tmp/head; git diff -U1 kernels > /tmp/diff
    cat /tmp/head /tmp/diff > tests/kernels/breaks/{name}; git checkout kernels
{said}"""


class Break(NamedTuple):
    test: str
    says: str


def read(patch: Path) -> Break:
    text = patch.read_text()
    found = [re.search(rf"^{name}: (.*)$", text, re.M) for name in ("Caught by", "Failure")]
    assert all(found), f"{patch.name} must say 'Caught by:' and 'Failure:' before its patch"
    return Break(*(match[1] for match in found if match))


def broken(patch: Path, root: Path) -> None:
    """Copies the kernels to ``root`` and breaks the copy."""
    shutil.copytree(ROOT / "kernels", root / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    command = ["git", "apply", "-C1", str(patch)]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, REFRESH.format(name=patch.name, said=done.stderr)


def run(test: str, kernels: Path) -> subprocess.CompletedProcess[str]:
    """One test on these kernels; those of the compile gate need the compiler, all others the interpreter."""
    environment = {**os.environ, "PYTHONPATH": f"{kernels}{os.pathsep}{ROOT}"}
    if "test_budget" not in test:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_there_are_breaks() -> None:
    assert len(BREAKS) >= 4


def attempt(patch: Path, root: Path) -> subprocess.CompletedProcess[str] | str:
    """What the test of a break printed, or why there was nothing to run."""
    try:
        broken(patch, root)
        return run(read(patch).test, root / "kernels")
    except AssertionError as error:
        return str(error)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str] | str]:
    """Of all breaks, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        roots = [tmp_path_factory.mktemp(patch.stem) for patch in BREAKS]
        return dict(zip((patch.stem for patch in BREAKS), pool.map(attempt, BREAKS, roots), strict=True))


@pytest.mark.parametrize("patch", BREAKS, ids=lambda patch: patch.stem)
def test_is_caught(patch: Path, outcomes: dict[str, Any]) -> None:
    expected, done = read(patch), outcomes[patch.stem]
    assert not isinstance(done, str), done
    assert done.returncode == 1, f"{expected.test} does not find this break\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    assert re.search(expected.says, done.stdout), done.stdout[-3000:]


def test_a_patch_that_does_not_apply_says_how_to_refresh_it(tmp_path: Path) -> None:
    patch = tmp_path / "stale.patch"
    name = "kernels/fastseq_kernels/lstm.py"
    patch.write_text(f"--- a/{name}\n+++ b/{name}\n@@ -1,1 +1,1 @@\n-not there\n+so\n")
    with pytest.raises(AssertionError, match="stale.patch no longer applies. Make the same change by hand"):
        broken(patch, tmp_path / "copy")

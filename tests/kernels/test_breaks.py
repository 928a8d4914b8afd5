"""Breaks of the Triton kernels; see ``tests.breaks``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.breaks import ROOT, Breaks, Ran, check_caught, pytest_of

pytest.importorskip("triton", reason="triton is not installed")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("each break runs in a process of its own", allow_module_level=True)


def run(test: str, root: Path) -> Ran:
    """Those of the compile gate need the compiler, all others the interpreter."""
    interpreted = {} if "test_budget" in test else {"TRITON_INTERPRET": "1"}
    return pytest_of(test, ROOT, PYTHONPATH=f"{root / 'kernels'}{os.pathsep}{ROOT}", **interpreted)


BREAKS = Breaks(Path(__file__).with_name("breaks"), ("kernels",), "kernels", run)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran | str]:
    return BREAKS.outcomes(tmp_path_factory)


def test_there_are_breaks() -> None:
    assert len(BREAKS.patches) >= 4


@pytest.mark.parametrize("patch", BREAKS.patches, ids=lambda patch: patch.stem)
def test_is_caught(patch: Path, outcomes: dict[str, Ran | str]) -> None:
    check_caught(patch, outcomes[patch.stem])


def test_a_patch_that_does_not_apply_says_how_to_refresh_it(tmp_path: Path) -> None:
    patch = tmp_path / "stale.patch"
    name = "kernels/fastseq_kernels/lstm.py"
    patch.write_text(f"--- a/{name}\n+++ b/{name}\n@@ -1,1 +1,1 @@\n-not there\n+so\n")
    with pytest.raises(AssertionError, match="stale.patch no longer applies. Make the same change by hand in kernels/"):
        BREAKS.broken(patch, tmp_path / "copy")

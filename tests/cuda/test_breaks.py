"""Breaks of csrc/cuda; see ``tests.breaks``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.breaks import ROOT, Breaks, Ran, check_caught, pytest_of


def run(test: str, root: Path) -> Ran:
    """The copy of the tests, which compiles the copy of csrc beside it; the package is the one here."""
    path = os.pathsep.join([str(root), str(ROOT), str(ROOT / "kernels")])
    return pytest_of(test, root, "--noconftest", "-s", PYTHONPATH=path, OMP_NUM_THREADS="1")  # -s: what aborts is heard


BREAKS = Breaks(Path(__file__).with_name("breaks"), ("csrc", "tests"), "csrc/cuda", run)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran | str]:
    return BREAKS.outcomes(tmp_path_factory)


def test_there_are_breaks() -> None:
    assert len(BREAKS.patches) >= 4


@pytest.mark.parametrize("patch", BREAKS.patches, ids=lambda patch: patch.stem)
def test_applies(patch: Path, tmp_path: Path) -> None:
    BREAKS.broken(patch, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("patch", BREAKS.patches, ids=lambda patch: patch.stem)
def test_is_caught(patch: Path, outcomes: dict[str, Ran | str]) -> None:
    check_caught(patch, outcomes[patch.stem])

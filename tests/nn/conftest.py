"""What two processes did together, for all tests that compare them: they are started once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nn import training_ranks, two_ranks

SECONDS = 180


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank returned, of every scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    return _results(folder, *_on_two_ranks(two_ranks.__name__, folder))


@pytest.fixture(scope="session")
def killed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank returned of a training in which one was killed, and that was started again."""
    folder = tmp_path_factory.mktemp("killed")
    status, output = _on_two_ranks(training_ranks.__name__, folder)
    assert status != 0 and "exitcode: -9" in output and not list(folder.glob("*.pt")), output
    return _results(folder, *_on_two_ranks(training_ranks.__name__, folder))


def _on_two_ranks(module: str, folder: Path) -> tuple[int, str]:
    """The exit status and what was printed."""
    run = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module, str(folder))
    process = subprocess.Popen(
        [sys.executable, "-m", *run],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = f"{process.communicate()[0]}\nno end after {SECONDS} s"
    return process.returncode, output


def _results(folder: Path, status: int, output: str) -> list[dict[str, Any]]:
    files = [folder / f"{rank}.pt" for rank in range(2)]
    assert status == 0 and all(f.exists() for f in files), output
    return [torch.load(f, weights_only=False) for f in files]

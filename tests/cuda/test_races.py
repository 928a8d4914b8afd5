"""The thread sanitizer: barriers within a block, that blocks share nothing but stamped words, and their exchange."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda import emulated

# with two places for h and with one, weights in registers and in shared memory too, and a cluster
TILES = [0, 9, emulated.FIRST_CLUSTER]
LOWRANK_TILES = [7]  # one matrix down for each gate, two blocks of rows, in reverse


def ran(source: str, folder: Path, tile: int) -> subprocess.CompletedProcess[str]:
    """A program of this folder under the sanitizer; the first race ends it."""
    program = folder / "races"
    emulated.compile_cpp(source, program, tile, "-fsanitize=thread", "-g")
    # the sanitizer of older compilers cannot run where the system puts programs at addresses drawn from many bits
    fixed = [shutil.which("setarch") or "setarch", "-R"]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [*fixed, str(program), str(tile)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("tile", TILES)
def test_no_race(tile: int, tmp_path: Path) -> None:
    found = ran("races.cpp", tmp_path, tile)
    assert found.returncode == 0, found.stderr[-4000:]


@pytest.mark.parametrize("tile", LOWRANK_TILES)
def test_no_race_of_low_rank(tile: int, tmp_path: Path) -> None:
    found = ran("races_lowrank.cpp", tmp_path, tile)
    assert found.returncode == 0, found.stderr[-4000:]


def test_no_race_of_the_lookup(tmp_path: Path) -> None:
    found = ran("vq_races.cpp", tmp_path, 0)
    assert found.returncode == 0, found.stderr[-4000:]


def test_no_race_of_the_screen(tmp_path: Path) -> None:
    found = ran("vq_screen_races.cpp", tmp_path, 0)
    assert found.returncode == 0, found.stderr[-4000:]


def test_the_exchange_of_threads_that_are_late(tmp_path: Path) -> None:
    """What goes from block to block is what one thread alone finds, although nothing but the words orders it."""
    found = ran("threads.cpp", tmp_path, 0)
    assert found.returncode == 0, found.stderr[-4000:]

"""The kernels under the thread sanitizer: barriers within a block, and that blocks share nothing but stamped words."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda import emulated

# with two places for h and with one, weights in registers and in shared memory too
TILES = [0, 9]


@pytest.mark.parametrize("tile", TILES)
def test_no_race(tile: int, tmp_path: Path) -> None:
    program = tmp_path / "races"
    emulated.compile_cpp("races.cpp", program, tile, "-fsanitize=thread", "-g")
    # the sanitizer of older compilers cannot run where the system puts programs at addresses drawn from many bits
    fixed = [shutil.which("setarch") or "setarch", "-R"]
    ran = subprocess.run([*fixed, str(program), str(tile)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]

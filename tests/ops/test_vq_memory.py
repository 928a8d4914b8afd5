"""What a lookup allocates at most: some bytes per row and per number of the codebook, never a matrix of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastseq._core", reason="fastseq._core is not built")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ROOT = Path(__file__).parents[2]
N, K, D = 16384, 4096, 2
MATRIX = 4 * N * K  # bytes of all scores in float32: 256 MB
# Results, scratch and what the allocator keeps. Each thread has room for a block of rows and what that leaves open.
ALLOWED = 64 * (N * D + K * D) + (8 << 20)

# The largest resident size so far, before and after: scratch is filled at once, so all of it counts. Not ru_maxrss,
# which a process inherits from the one that started it.
MEASURE = """
import numpy as np
from fastseq import _core
random = np.random.default_rng(0)
N, K, D = {sizes}
x, c = (random.standard_normal((1, n, D), dtype=np.float32) for n in (N, K))
index = random.integers(0, K, (1, N))
_core.vq_nearest(x[:, :64].copy(), c[:, :64].copy())
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
{call}
print((peak() - before) * 1024)
"""
CALLS = {
    "plain": "_core.vq_nearest(x, c, distance=True, screen=0, threads=2)",
    "screened": "_core.vq_nearest(x, c, distance=True, screen=1, threads=2)",
    "several": "_core.vq_nearest(x, c, best=3, threads=2)",
    "quantize": "_core.vq_quantize(x, c, sums=True, threads=2)",
    "sums": "_core.vq_sums(x, index, K, threads=2)",
    "residual": "_core.vq_residual(x[0], [c[0], c[0]], sums=True, threads=2)",
}


def extra(call: str) -> int:
    """Bytes by which the call raises the peak of a process."""
    code = MEASURE.format(sizes=(N, K, D), call=call)
    environment = {**os.environ, "FASTSEQ_POISON": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_peak(call: str) -> None:
    assert 10 * ALLOWED < MATRIX
    assert extra(call) <= ALLOWED


def test_a_matrix_would_be_seen() -> None:
    assert extra("(x[0] @ c[0].T).argmax(1)") > MATRIX / 2

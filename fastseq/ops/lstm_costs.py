"""What the loop over time of an LSTM costs by each way through a GPU: a small model, and the numbers in it.

Microseconds of a call are ``start + T * step``, fitted to result rows of an H100 (``benchmarks/results``); what is an
estimate is marked so.
"""

from __future__ import annotations

import math
from typing import NamedTuple

EXCHANGE = 0.7  # estimate: one write to and one read from the second-level cache, seen by another multiprocessor
CELL = 0.3  # estimate: the pointwise part, a barrier or two
READ = 57e3  # bytes a multiprocessor reads of the second-level cache; measured, all reading the same 64 KiB
READ_ALL = 7.4e6  # the same of all of them together
MULTIPLY = 1.1e6  # multiply-adds of a multiprocessor with few rows; measured with tl.dot of 16 rows
PRODUCT = 3e8  # multiply-adds of a product of matrices; measured 3.5e8 of large ones
SHARED = 225e3  # bytes of shared memory that a multiprocessor reads
PERSIST_START = 15.0  # estimate: scratch set to zero, the launch, weights on their way onto the chip
BACKWARD = 1.5  # of triton's ways, over forward; measured 1.4 to 1.6


class Loop(NamedTuple):
    """Microseconds of a step of the persistent kernels."""

    step: float  # in any case
    block: float  # of 8 rows of the tile, whether there are so many or not
    weights: float  # of a million weights of a block of threads, for each 8 rows of the tile
    numbers: float  # of 100,000 numbers that every block reads: rows that there are, times units


# By whether blocks are a cluster, and the pass. Fitted to the rows of all tiles, B = 1 to 256 and H = 256 to 2048.
LOOPS = {
    (0, "forward"): Loop(1.30, 0.50, 2.97, 4.86),
    (0, "backward"): Loop(2.01, 0.07, 7.52, 3.82),
    (0, "int8"): Loop(1.23, 0.67, 0.0, 6.15),
    (1, "forward"): Loop(0.68, 0.46, 2.31, 11.1),
    (1, "backward"): Loop(0.94, 0.29, 0.0, 6.88),
    (1, "int8"): Loop(0.68, 0.55, 0.0, 10.6),
}

RESIDENT = (26.0, 2.35)  # start and step; measured at B = 16, H = 128
GRAPH_START = 60.0
LEAST_T = 64  # steps from which CUDA graphs are used
LAUNCHES = 15.0  # a step that is launched on its own; measured 13 to 18


LOWRANK_CELLS = 0.25  # estimate: 4 cells of a lane for each 8 rows, and their words from and to memory

MOST_WORK = 1 << 24  # rows times squared units up to which our ways were measured beside torch's LSTM
CUDNN_LAUNCHES = (20.0, 23.0)  # a step, forward and backward, outside of its persistent kernels; measured 16 to 30
CUDNN_ROW = (0.1, 0.1)  # a step and row inside, from 16 rows on; measured 1.6 to 2.2 at 16 rows, 6.5 to 8 at 64
CUDNN_STEP = (0.1, 1.7)  # and what a step has beside that
CUDNN_START = (0.0, 500.0)


class Cost(NamedTuple):
    """Microseconds."""

    start: float
    step: float

    def of(self, T: int) -> float:
        return self.start + T * self.step


class Tile(NamedTuple):
    """A compiled shape of the persistent kernels; see ``PersistTile``."""

    units: int
    rows: int
    depth: int
    threads: int
    cluster: int  # 0 or 1
    int8_depth: int  # with weights of 8 bits, or 0

    def grid(self, B: int, H: int) -> tuple[int, int]:
        """Blocks of threads along the units and along the rows."""
        blocks = math.ceil(H / self.units)
        return 1 << (blocks - 1).bit_length() if self.cluster else blocks, math.ceil(B / self.rows)


def persist(
    tile: Tile, B: int, H: int, directions: int = 1, backward: bool = False, int8: bool = False, room: int = 1 << 30
) -> Cost:
    """The persistent kernels: every block reads all of h of its rows, or in backward its part of everyone's sums. A
    device that has room for so many blocks runs clusters one after the other."""
    blocks, groups = tile.grid(B, H)
    width, deep = blocks * tile.units, tile.rows / 8
    loop = LOOPS[tile.cluster, "backward" if backward else "int8" if int8 else "forward"]
    read = min(B, tile.rows) * width / 1e5
    step = loop.step + deep * (loop.block + loop.weights * 4 * tile.units * width / 1e6) + loop.numbers * read
    rounds = math.ceil(blocks * groups * directions / max(blocks, room)) if tile.cluster else 1
    return Cost(rounds * PERSIST_START, rounds * step)


class LowRankTile(NamedTuple):
    """A compiled shape of the persistent low-rank kernels; see ``PersistLowRankTile``."""

    units: int
    rows: int
    rank: int
    downs: int
    threads: int

    def grid(self, B: int, H: int) -> tuple[int, int]:
        """Blocks of threads along the units and along the rows."""
        return math.ceil(H / self.units), math.ceil(B / self.rows)


def persist_lowrank(tile: LowRankTile, B: int, H: int) -> Cost:
    """The persistent low-rank kernels, either pass: every block reads the sums of all, float32, of its rows; those of
    its own warps go through shared memory. One block has nobody to wait for."""
    blocks, groups = tile.grid(B, H)
    sums = tile.rows * tile.downs * tile.rank * 4
    read = max(blocks * sums / READ, (blocks + 1) * blocks * groups * sums / READ_ALL)
    product = tile.rows * tile.units * (4 + tile.downs) * tile.rank / MULTIPLY
    own = 2 * tile.threads // 32 * sums / SHARED
    cells = CELL + tile.rows / 8 * LOWRANK_CELLS
    return Cost(PERSIST_START, (EXCHANGE + read if blocks > 1 else 0.0) + product + own + cells)


def triton_lowrank(H: int, rank: int, downs: int, route: str, backward: bool = False) -> Cost:
    """The low-rank kernels in triton by one of their routes, all of it an estimate: beside what the cells of
    ``RESIDENT`` take, both products of 16 rows, with factors from shared memory or from the second-level cache."""
    numbers = (4 + downs) * H * rank
    if route == "steps":
        cost = Cost(0.0, 2 * LAUNCHES)
    else:
        step = RESIDENT[1] + 16 * numbers / MULTIPLY + 2 * numbers / (SHARED if route == "resident" else READ)
        cost = Cost(RESIDENT[0], step)
    return cost._replace(step=cost.step * BACKWARD) if backward else cost


def triton(T: int, B: int, H: int, resident: bool, backward: bool = False, graphs: bool = True) -> Cost:
    """The way that ``fastseq_kernels`` takes in 16 bits; ``resident``: one multiprocessor holds weight_hh. ``graphs``:
    there is one for many steps, which int8 weights do not have."""
    if resident:
        cost = Cost(*RESIDENT)
    elif T >= LEAST_T and graphs:
        work = B * H * H / 1e6
        cost = Cost(GRAPH_START, 2.0 + 1.9e-3 * H + (0.28 if B > 1 else 0.0) + 0.017 * work)
    else:
        cost = Cost(0.0, LAUNCHES)
    return cost._replace(step=cost.step * BACKWARD) if backward else cost


def cudnn(B: int, H: int, float16: bool, backward: bool = False) -> Cost:
    """torch's own LSTM, one layer and direction: persistent kernels where torch allows them, launches elsewhere."""
    if not (float16 and B % 8 == 0 and B <= 128 and H % 128 == 0 and H <= 1024):
        return Cost(0.0, CUDNN_LAUNCHES[backward])
    rows = max(B, 16) * (1.3 if H > 512 else 1.0)
    return Cost(CUDNN_START[backward], CUDNN_STEP[backward] + CUDNN_ROW[backward] * rows)

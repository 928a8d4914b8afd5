"""A screen on tensor cores: few candidates for each row, among which the definition's index certainly is.

The bound on what the rounding to 16 bits did is proven in ``_pieces``. Per row and class of codes (their number modulo
LANES) the least score and its code are kept, and the second least of all classes; what the bound leaves between them
is decided by the definition's own chain in ``_resolve_kernel``, or by a sweep where there is too much of it.

Cost for (N, K, D) = (65536, 8192, 256), 0.27 TFLOP a product, on an H100: the screen takes 0.70 ms in bfloat16 (half of
cuBLAS's rate: one program a multiprocessor, which looks for minima or multiplies), 1.16 ms with two products. Tiles of
128 or 256 codes by 64 or 128 columns in 2 to 4 stages, rows on the chip or not, took 0.98 to 1.28 times as long.
Memory: pieces of the codebook, and a bounded scratch for the pieces of some rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import Target, cdiv, launch, power_of_two, target
from fastseq_kernels._pieces import (
    BLOCK_N,
    LANES,
    MOST,
    Codes,
    pieces_of,
    products_of,
    split_codes,
    split_rows,
)

_PIECES = 64 << 20  # bytes, of the rows that share one scratch
_MOST_ROWS = 1 << 17  # that share it
_CANDIDATES = 4  # more make a row open


class Lookup(NamedTuple):
    """One call: what is looked up, where, and what is written."""

    x: Tensor  # [G, N, D]
    codebook: Tensor  # [G, K, D]
    starts: Tensor  # float32 [G, K] of ``turned_codes``
    turned: Tensor  # float32 [G, D, K] of the same
    dot: bool
    mask: Tensor | None  # bool [G, N]
    index: Tensor  # [G, N] out
    score: Tensor | None  # float32 [G, N] out


class Tiles(NamedTuple):
    """What one program of the screen holds."""

    block_k: int  # codes
    block_d: int  # columns that are multiplied together
    whole: bool  # all columns of the rows stay on the chip
    num_stages: int


class Screened(NamedTuple):
    """Rows first .. first + rows - 1 after their screen; those in ``open`` still need a sweep."""

    first: int
    rows: int
    open: Tensor  # int32 [G, rows]
    count: Tensor  # int32 [G] how many are open


@triton.jit
def _products(row_ptrs, code_ptrs, row_piece, code_piece, score, ROW_PIECES: tl.constexpr, CODE_PIECES: tl.constexpr):
    """score minus rows times codes: what is small first."""
    hi, code_hi = tl.load(row_ptrs), tl.load(code_ptrs)
    if CODE_PIECES == 2:
        score = tl.dot(hi, tl.load(code_ptrs + code_piece), score, input_precision="ieee")
    if ROW_PIECES == 2:
        score = tl.dot(tl.load(row_ptrs + row_piece), code_hi, score, input_precision="ieee")
    return tl.dot(hi, code_hi, score, input_precision="ieee")


@triton.jit
def _two_least(score, h, LANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Per class of codes [BLOCK_N, LANES] the least score, its place in the lowest bits, and the second least.

    A thread holds all codes of a class, so that nothing leaves its registers. Scores of a class differ in their lowest
    bits, so the second least is the least of those that differ from the first.
    """
    GROUPS: tl.constexpr = BLOCK_K // LANES
    score = tl.reshape(score + h[None, :], [BLOCK_N, GROUPS, LANES])
    bits = (score.to(tl.int32, bitcast=True) & -GROUPS) | tl.arange(0, GROUPS)[None, :, None]
    score = bits.to(tl.float32, bitcast=True)
    least = tl.min(score, axis=1)
    return least, tl.min(tl.where(score == least[:, None, :], float("inf"), score), axis=1)


@triton.jit(do_not_specialize=["padded", "codes", "span", "chunks"])
def _screen_kernel(
    rows_ptr,  # [G, ROW_PIECES, padded, WIDTH]
    codes_ptr,  # [G, CODE_PIECES, codes, WIDTH] negated
    h_ptr,  # float32 [G, codes]
    least_ptr,  # float32 [G, splits, padded, LANES] out
    place_ptr,  # int32 [G, splits, padded, LANES] out   the codes that these belong to
    second_ptr,  # float32 [G, splits, padded] out
    padded,
    codes,
    WIDTH,
    chunks,  # of BLOCK_D columns
    span,  # tiles of codes per split
    ROW_PIECES: tl.constexpr,
    CODE_PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    GROUPS: tl.constexpr = BLOCK_K // LANES
    g, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_K)
    row_ptrs = rows_ptr + (g * ROW_PIECES * padded + n)[:, None] * WIDTH + d[None, :]
    code_ptrs = codes_ptr + (g * CODE_PIECES * codes + j)[None, :] * WIDTH + d[:, None]
    row_piece, code_piece = padded.to(tl.int64) * WIDTH, codes.to(tl.int64) * WIDTH
    least = tl.full([BLOCK_N, LANES], float("inf"), tl.float32)
    second = tl.full([BLOCK_N, LANES], float("inf"), tl.float32)
    tile = tl.zeros([BLOCK_N, LANES], tl.int32)
    last = tl.minimum(split * span + span, codes // BLOCK_K)
    # Not flatten=True: triton 3.7 then reads the sums in a branch before it has waited for wgmma.
    for t in range(split * span, last):
        h = tl.load(h_ptr + g * codes + t * BLOCK_K + j)
        tile_ptrs = code_ptrs + tl.cast(t, tl.int64) * BLOCK_K * WIDTH
        score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if WHOLE:
            score = _products(row_ptrs, tile_ptrs, row_piece, code_piece, score, ROW_PIECES, CODE_PIECES)
        else:
            for chunk in range(chunks):
                d0 = chunk * BLOCK_D
                here, there = row_ptrs + d0, tile_ptrs + d0
                score = _products(here, there, row_piece, code_piece, score, ROW_PIECES, CODE_PIECES)
        low, next_low = _two_least(score, h, LANES, BLOCK_N, BLOCK_K)
        second = tl.minimum(tl.minimum(second, next_low), tl.maximum(low, least))
        tile = tl.where(low < least, t, tile)
        least = tl.minimum(low, least)
    place = tile * BLOCK_K + (least.to(tl.int32, bitcast=True) & (GROUPS - 1)) * LANES + tl.arange(0, LANES)[None, :]
    at = (g * tl.num_programs(1) + split) * padded + n
    lanes = at[:, None] * LANES + tl.arange(0, LANES)[None, :]
    tl.store(least_ptr + lanes, least)
    tl.store(place_ptr + lanes, place)
    tl.store(second_ptr + at, tl.min(second, axis=1))


@triton.jit
def _chain(row_ptrs, code_ptrs, start, active, D, BLOCK: tl.constexpr):
    """The definition's score of one code for each row; NaN counts as +inf."""
    score = start
    for d in tl.range(0, D, loop_unroll_factor=8):
        x = tl.load(row_ptrs + d, mask=active, other=0.0).to(tl.float32)
        c = tl.load(code_ptrs + d, mask=active, other=0.0).to(tl.float32)
        score = tl.fma(-x, c, score)
    return tl.where(score == score, score, float("inf"))


@triton.jit
def _merged(least_ptr, place_ptr, second_ptr, g, i, padded, splits, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """All splits together, merged as tiles of codes were: what a row gets does not depend on their number."""
    least = tl.full([BLOCK, LANES], float("inf"), tl.float32)
    place = tl.full([BLOCK, LANES], 0x7FFFFFFF, tl.int32)
    second = tl.full([BLOCK], float("inf"), tl.float32)
    for split in range(splits):
        at = (g * splits + split) * padded + i
        lanes = at[:, None] * LANES + tl.arange(0, LANES)[None, :]
        low = tl.load(least_ptr + lanes)
        second = tl.minimum(second, tl.load(second_ptr + at))
        second = tl.minimum(second, tl.min(tl.maximum(low, least), axis=1))
        place = tl.where(low < least, tl.load(place_ptr + lanes), place)
        least = tl.minimum(low, least)
    return least, place, second


@triton.jit
def _append(list_ptr, count_ptr, n, wanted):
    """Adds the rows n whose ``wanted`` is 1 to a list that all programs share, in any order."""
    total = tl.sum(wanted)
    if total > 0:
        at = tl.atomic_add(count_ptr, total) + tl.cumsum(wanted, axis=0) - 1
        tl.store(list_ptr + at, n, mask=wanted != 0)


@triton.jit(do_not_specialize=["N", "K", "first", "rows", "padded", "splits", "most"])
def _resolve_kernel(
    x_ptr,  # [G, N, D]
    codebook_ptr,  # [G, K, D]
    starts_ptr,  # float32 [G, K]
    mask_ptr,  # bool [G, N] or None
    least_ptr,  # float32 [G, splits, padded, LANES]
    place_ptr,  # int32 [G, splits, padded, LANES]
    second_ptr,  # float32 [G, splits, padded]
    width_ptr,  # float32 [G, padded]
    index_ptr,  # [G, N] out
    score_ptr,  # float32 [G, N] out, or None
    open_ptr,  # int32 [G, rows] out   rows that need a sweep, in any order
    count_ptr,  # int32 [G] in/out
    N,
    K,
    D,
    first,
    rows,
    padded,
    splits,
    most,  # candidates
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = first + i
    counts = i < rows
    if mask_ptr is not None:
        counts = counts & (tl.load(mask_ptr + g * N + n, mask=counts, other=0) != 0)
    least, place, second = _merged(least_ptr, place_ptr, second_ptr, g, i, padded, splits, LANES, BLOCK)
    best = tl.min(least, axis=1)
    limit = best + tl.load(width_ptr + g * padded + i)
    left = least <= limit[:, None]
    candidates = tl.sum(left.to(tl.int32), axis=1)
    closed = (second > limit) & (limit < MOST) & (candidates <= most) & (candidates > 0)
    left = left & (counts & closed)[:, None]
    several = candidates > (1 if score_ptr is None else 0)
    index = tl.full([BLOCK], -1, tl.int32)
    score = tl.full([BLOCK], float("inf"), tl.float32)
    for _ in range(tl.max(tl.where(counts & closed, candidates, 0))):  # from the lowest code on
        code = tl.min(tl.where(left, place, 0x7FFFFFFF), axis=1)
        active = code < 0x7FFFFFFF
        left = left & (place != code[:, None])
        scored = active & several
        if tl.max(scored.to(tl.int32)) > 0:
            start = tl.load(starts_ptr + g * K + code, mask=scored, other=0.0)
            row_ptrs, code_ptrs = x_ptr + (g * N + n) * D, codebook_ptr + (g * K + code) * D
            found = _chain(row_ptrs, code_ptrs, start, scored, D, BLOCK)
            better = scored & (found < score)
            index = tl.where(better, code, index)
            score = tl.where(better, found, score)
        index = tl.where(active & (candidates == 1), code, index)
    done = (i < rows) & (closed | (counts == 0))
    tl.store(index_ptr + g * N + n, index, mask=done)
    if score_ptr is not None:
        tl.store(score_ptr + g * N + n, score, mask=done)
    open_rows = (counts & (closed == 0)).to(tl.int32)
    _append(open_ptr + g * rows, count_ptr + g, n, open_rows)


def tiles_for(D: int, products: int, chip: Target) -> Tiles:
    """What fits on the chip. Rows stay there, where two tiles of codes have room beside them.

    Buffers of what is loaded: one per stage where the tensor core reads shared memory (sm_90), one more on sm_100, one
    less where it reads registers. On sm_90 a tile of 128 x 256 still is without spills, and needs fewer bytes for a
    product; 128 x 128 lets two programs share a multiprocessor where D is short, so that one multiplies while the
    other looks for minima. Found by compiling, not by timing.
    """
    row_pieces, code_pieces = pieces_of(products)
    more = {90: 0, 100: 1}.get(chip.capability, -1)
    room, width = chip.shared - 4096, power_of_two(D, least=32)
    resident = 2 * BLOCK_N * width * row_pieces
    stages = (room - resident) // (2 * 128 * width * code_pieces) - more
    short = width - D < width // 4 and stages >= 2 + (more < 0)
    if short and (chip.capability == 90 or (more < 0 and width * row_pieces <= 128)):  # 32 registers of rows
        return Tiles(128, width, True, min(stages, 4))
    block_k = 256 if chip.capability == 90 else 128
    most_d = 32 if more < 0 and products == 3 else 64  # longer ones spill registers
    for block_d in (min(width, most_d), 32):
        stages = room // (2 * block_d * (BLOCK_N * row_pieces + block_k * code_pieces)) - more
        if stages >= 2 + (more < 0):
            return Tiles(block_k, block_d, False, min(stages, 4))
    raise AssertionError(f"no tile for {chip}")


def screened(call: Lookup) -> Iterator[Screened]:
    """Writes index and score of all rows but those that stay open, some rows after another."""
    G, N, D = call.x.shape
    products, _ = products_of(call.x, call.codebook)
    tiles = tiles_for(D, products, target(call.x.device))
    width = cdiv(D, tiles.block_d) * tiles.block_d
    codes = split_codes(call.codebook, call.starts, call.dot, call.x, width, tiles.block_k)
    room = _PIECES // (2 * width * pieces_of(products)[0] * G * BLOCK_N)
    most = min(max(1, room) * BLOCK_N, _MOST_ROWS)
    for first in range(0, N, most):
        yield _screen_rows(call, codes, tiles, first, min(most, N - first))


def _screen_rows(call: Lookup, codes: Codes, tiles: Tiles, first: int, rows: int) -> Screened:
    (G, N, D), K = call.x.shape, call.codebook.shape[1]
    device = call.x.device
    pieces, bound = split_rows(call.x, codes, call.dot, first, rows)
    padded, width = pieces.shape[2:]
    along = cdiv(K, tiles.block_k)
    splits = min(along, max(1, target(device).multiprocessors // (padded // BLOCK_N * G)))
    span = cdiv(along, splits)
    splits = cdiv(along, span)
    least = torch.empty(G, splits, padded, LANES, dtype=torch.float32, device=device)
    place = torch.empty(G, splits, padded, LANES, dtype=torch.int32, device=device)
    second = torch.empty(G, splits, padded, dtype=torch.float32, device=device)
    launch(
        _screen_kernel,
        (padded // BLOCK_N, splits, G),
        *(pieces, codes.pieces, codes.h, least, place, second),
        *(padded, along * tiles.block_k, width, width // tiles.block_d, span),
        ROW_PIECES=pieces.shape[1],
        CODE_PIECES=codes.pieces.shape[1],
        WHOLE=tiles.whole,
        LANES=LANES,
        BLOCK_N=BLOCK_N,
        BLOCK_K=tiles.block_k,
        BLOCK_D=tiles.block_d,
        num_warps=8,
        num_stages=tiles.num_stages,
    )
    opened = torch.empty(G, rows, dtype=torch.int32, device=device)
    count = torch.zeros(G, dtype=torch.int32, device=device)
    launch(
        _resolve_kernel,
        (padded // 32, G),
        *(call.x, call.codebook, call.starts, call.mask, least, place, second, bound),
        *(call.index, call.score, opened, count, N, K, D, first, rows, padded, splits, _CANDIDATES),
        LANES=LANES,
        BLOCK=32,
        num_warps=1,
    )
    return Screened(first, rows, opened, count)

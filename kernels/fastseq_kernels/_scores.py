"""The exact scores of vector quantization (``fastseq.reference.vq.vq_scores``) as device functions.

A score is one chain of fused multiply-adds over D in ascending order that begins with c*c/2. Nothing may reorder it,
so a tile of rows and codes advances by one column at a time, operands straight from the L1 cache into registers. A
thread holds several rows times several codes: with 8 x 4 it loads 12 numbers for 32 multiply-adds. Codes are read as
columns of [D, K] with their signs turned, both made once per call: neighbours are neighbours in memory, and the minus
of the chain costs nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch

_UNROLL = 8  # columns whose loads are under way together in ``_prepare_kernel``


@triton.jit(do_not_specialize=["K"])
def _prepare_kernel(
    codes_ptr,  # [G, K, D]
    starts_ptr,  # float32 [G, K] out
    turned_ptr,  # float32 [G, D, K] out, or None
    K,
    D,
    DOT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(K, BLOCK)
    g = (tl.program_id(0) // tiles).to(tl.int64)
    k = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    total = tl.zeros([BLOCK], tl.float64)
    for d0 in range(0, D, UNROLL):
        for j in tl.static_range(UNROLL):  # one after the other: the order of the definition
            at = inside & (d0 + j < D)
            c = tl.load(codes_ptr + (g * K + k) * D + (d0 + j), mask=at, other=0.0).to(tl.float32)
            if turned_ptr is not None:
                tl.store(turned_ptr + (g * D + (d0 + j)) * K + k, -c, mask=at)
            wide = c.to(tl.float64)
            total += wide * wide  # exact products, so fused or not is the same
    half = (0.5 * total).to(tl.float32)
    tl.store(starts_ptr + g * K + k, tl.where(half < float("inf"), 0.0 if DOT else half, float("inf")), mask=inside)


def _prepare(codebook: Tensor, dot: bool, turned: Tensor | None) -> Tensor:
    K, D = codebook.shape[-2:]
    starts = torch.empty(codebook.shape[:-1], dtype=torch.float32, device=codebook.device)
    block = 32  # one code a thread; small, so that few codes use many multiprocessors
    grid = (cdiv(K, block) * codebook.shape[:-2].numel(),)
    sizes = {"DOT": dot, "UNROLL": _UNROLL, "BLOCK": block}
    launch(_prepare_kernel, grid, codebook, starts, turned, K, D, **sizes, num_warps=1)
    return starts


def half_squares(codebook: Tensor, dot: bool = False) -> Tensor:
    """What the scores of each code begin with, float32: c*c/2, or zero with ``dot``; +inf where c*c/2 is not finite.

    Args:
        codebook: [..., K, D], contiguous.
    """
    return _prepare(codebook, dot, None)


def turned_codes(codebook: Tensor, dot: bool = False) -> tuple[Tensor, Tensor]:
    """``half_squares`` [..., K], and the codes as ``best_code`` reads them: float32 [..., D, K], signs turned.

    Args:
        codebook: [..., K, D], contiguous.
    """
    *lead, K, D = codebook.shape
    turned = torch.empty(*lead, D, K, dtype=torch.float32, device=codebook.device)
    return _prepare(codebook, dot, turned), turned


@triton.jit
def best_code(
    row_ptrs,  # [BLOCK_N] the first column of each row
    row_step,  # from a column to the next, in elements
    alive,  # bool [BLOCK_N] the rows that may be read, or None: all
    turned_ptr,  # float32, column d of code k at k + d * code_step; of ``turned_codes``
    code_step,
    starts_ptr,  # float32 [K] of ``turned_codes``
    first,
    last,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES_N: tl.constexpr,
    LANES_K: tl.constexpr,
):
    """The smallest score of codes first..last-1 for each row, and the lowest code that has it.

    Scores that are NaN count as +inf. Where all are +inf the code is 0, whatever ``first`` is; so sweeps over parts in
    ascending order are merged by taking the later one where its score is less. What rows get that are not alive means
    nothing. A row that is not finite is the caller's business: the definition gives it code 0.

    Threads lie side by side as LANES_N rows and LANES_K codes, LANES_N * LANES_K = 32 * num_warps, and each holds
    BLOCK_N / LANES_N times BLOCK_K / LANES_K. BLOCK_N and BLOCK_K must be less than the number of threads: for
    larger ones triton spreads their loads over the threads and exchanges them in every step.
    """
    HELD_N: tl.constexpr = BLOCK_N // LANES_N
    HELD_K: tl.constexpr = BLOCK_K // LANES_K
    TILE: tl.constexpr = [HELD_N, HELD_K, LANES_N, LANES_K]  # the last dimensions are what triton gives to threads
    row_ptrs = tl.reshape(row_ptrs, [HELD_N, 1, LANES_N, 1])
    if alive is not None:
        alive = tl.reshape(alive, [HELD_N, 1, LANES_N, 1])
    lanes = tl.reshape(tl.arange(0, BLOCK_K), [1, HELD_K, 1, LANES_K])
    # Each thread keeps one best for each of its rows, and threads are compared once at the end.
    best = tl.full([HELD_N, LANES_N, LANES_K], float("inf"), tl.float32)
    place = tl.zeros([HELD_N, LANES_N, LANES_K], tl.int32)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + lanes
        # Beyond the end the last code is read again, which costs no masks; a start of +inf keeps it from being taken.
        code_ptrs = turned_ptr + tl.minimum(k, last - 1)
        score = tl.broadcast_to(tl.load(starts_ptr + k, mask=k < last, other=float("inf")), TILE)
        for d in tl.range(0, D, loop_unroll_factor=4):
            x = tl.load(row_ptrs + tl.cast(d, tl.int64) * row_step, mask=alive).to(tl.float32)
            c = tl.load(code_ptrs + tl.cast(d, tl.int64) * code_step)
            score = tl.fma(tl.broadcast_to(x, TILE), tl.broadcast_to(c, TILE), score)
        least = tl.min(score, axis=1)  # within each thread; passes over NaN
        k = tl.min(tl.where(score == tl.reshape(least, [HELD_N, 1, LANES_N, LANES_K]), k, 2147483647), axis=1)
        less = least < best  # never where all were NaN; the earlier code stays among equals
        best, place = tl.where(less, least, best), tl.where(less, k, place)
    least = tl.min(best, axis=2)
    index = tl.min(tl.where(best == least[:, :, None], place, 2147483647), axis=2)
    return tl.reshape(least, [BLOCK_N]), tl.reshape(index, [BLOCK_N])

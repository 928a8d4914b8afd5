"""The exact scores of vector quantization (``fastseq.reference.vq.vq_scores``) as device functions.

A score is one chain of fused multiply-adds over D in ascending order that begins with c*c/2. Nothing may reorder it,
so a tile of rows and codes advances by one column at a time: BLOCK_N + BLOCK_K loads, mostly from the L1 cache, for
BLOCK_N * BLOCK_K multiply-adds. Loads are whole lines where neighbours in a tile are neighbours in memory, so give
codes as columns of [D, K], and rows as columns of [D, N] where they are a copy anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch

_UNROLL = 8  # columns whose loads are under way together in ``_half_squares_kernel``


@triton.jit(do_not_specialize=["rows"])
def _half_squares_kernel(
    codes_ptr,  # [rows, D]
    out_ptr,  # [rows]
    rows,
    D,
    DOT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < rows
    total = tl.zeros([BLOCK], tl.float64)
    for d0 in range(0, D, UNROLL):
        for j in tl.static_range(UNROLL):  # one after the other: the order of the definition
            c = tl.load(codes_ptr + k * D + (d0 + j), mask=inside & (d0 + j < D), other=0.0).to(tl.float64)
            total += c * c  # exact products, so fused or not is the same
    half = (0.5 * total).to(tl.float32)
    tl.store(out_ptr + k, tl.where(half < float("inf"), 0.0 if DOT else half, float("inf")), mask=inside)


def half_squares(codebook: Tensor, dot: bool = False) -> Tensor:
    """What the scores of each code begin with, float32: c*c/2, or zero with ``dot``; +inf where c*c/2 is not finite.

    Args:
        codebook: [..., K, D], contiguous.
    """
    D = codebook.shape[-1]
    out = torch.empty(codebook.shape[:-1], dtype=torch.float32, device=codebook.device)
    block = 32  # one code a thread; small, so that few codes use many multiprocessors
    launch(
        _half_squares_kernel,
        (cdiv(out.numel(), block),),
        *(codebook, out, out.numel(), D),
        DOT=dot,
        UNROLL=_UNROLL,
        BLOCK=block,
        num_warps=1,
    )
    return out


@triton.jit
def best_code(
    row_ptrs,  # [BLOCK_N] the first column of each row
    row_step,  # from a column to the next, in elements
    alive,  # bool [BLOCK_N] the rows that may be read
    codes_ptr,  # code k, column d at k * code_stride + d * code_step
    code_stride,
    code_step,
    starts_ptr,  # float32 [K] of ``half_squares``
    first,
    last,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The smallest score of codes first..last-1 for each row, and the lowest code that has it.

    Scores that are NaN count as +inf. Where all are +inf the code is 0, whatever ``first`` is; so sweeps over parts in
    ascending order are merged by taking the later one where its score is less. A row that is not finite is the
    caller's business: the definition gives it code 0. Columns are multiplied as float32.
    """
    # Each lane keeps its own best, and lanes are compared once at the end.
    best = tl.full([BLOCK_N, BLOCK_K], float("inf"), tl.float32)
    place = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = k < last
        code_ptrs = codes_ptr + k.to(tl.int64) * code_stride
        start = tl.load(starts_ptr + k, mask=inside, other=float("inf"))
        score = tl.broadcast_to(start[None, :], [BLOCK_N, BLOCK_K])
        for d in tl.range(0, D, loop_unroll_factor=4):
            x = tl.load(row_ptrs + tl.cast(d, tl.int64) * row_step, mask=alive, other=0.0).to(tl.float32)
            c = tl.load(code_ptrs + tl.cast(d, tl.int64) * code_step, mask=inside, other=0.0).to(tl.float32)
            x, c = tl.broadcast_to(-x[:, None], [BLOCK_N, BLOCK_K]), tl.broadcast_to(c[None, :], [BLOCK_N, BLOCK_K])
            score = tl.fma(x, c, score)
        less = score < best  # never where it is NaN; the earlier code stays among equals
        best = tl.where(less, score, best)
        place = tl.where(less, tl.broadcast_to(k[None, :], [BLOCK_N, BLOCK_K]), place)
    least = tl.min(best, axis=1)
    index = tl.min(tl.where(best == least[:, None], place, 2147483647), axis=1)
    return least, index

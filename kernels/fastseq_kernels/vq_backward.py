"""Gradients of vector quantization: of the rows in one kernel, of the codebook through sums by code.

Both wait for memory. The rows: x, the codes and the gradient are read once from memory, dx is written once; a rotation
goes over its rows three times (lengths, products, result), the second and third from the L1 cache. The codebook: what
is added up per code is formed while it is added (``vq_sums.sums_by_key``), so nothing of size [G, N, D] is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two
from fastseq_kernels.vq_sums import keys_of, sums_by_key

STRAIGHT, ROTATION, CODES = range(3)  # what ``gradient`` counts
EPS = 1e-6  # least length that the rotation divides by


@triton.jit
def lengths_of(x_ptrs, codes_ptrs, alive, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Lengths of rows and of codes, [BLOCK_N] each."""
    xx, cc = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside = alive[:, None] & (d < D)[None, :]
        x = tl.load(x_ptrs[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        c = tl.load(codes_ptrs[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        xx += tl.sum(x * x, axis=1)
        cc += tl.sum(c * c, axis=1)
    return tl.sqrt_rn(xx), tl.sqrt_rn(cc)


@triton.jit
def turn_of(
    given_ptrs, x_ptrs, codes_ptrs, over_row, over_code, alive, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Of the directions u of rows and v of codes: d*(u+v), d*v and the length of u+v, [BLOCK_N] each.

    ``over_row`` and ``over_code`` are one over the lengths. u+v is formed and then squared: 2 + 2 u*v would cancel
    where a row is opposite to its code.
    """
    ww, dw, dv = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        at = d0 + tl.arange(0, BLOCK_D)
        inside = alive[:, None] & (at < D)[None, :]
        x = tl.load(x_ptrs[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
        c = tl.load(codes_ptrs[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
        d = tl.load(given_ptrs[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
        v = c * over_code[:, None]
        w = x * over_row[:, None] + v
        ww += tl.sum(w * w, axis=1)
        dw += tl.sum(d * w, axis=1)
        dv += tl.sum(d * v, axis=1)
    return dw, dv, tl.sqrt_rn(ww)


@triton.jit(do_not_specialize=["rows"])
def _rows_kernel(
    given_ptr,  # [rows, D] gradient of the quantized rows, or None
    commitment_ptr,  # [rows] gradient of the squared distances, or None
    x_ptr,  # [rows, D]
    codes_ptr,  # [rows, D]
    index_ptr,  # int64 [rows]
    dx_ptr,  # [rows, D] out
    rows,
    D,
    ROTATED: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < rows
    used = tl.load(index_ptr + n, mask=inside, other=-1) >= 0  # other rows are not read, their gradient is zero
    x_ptrs, codes_ptrs, dx_ptrs = x_ptr + n * D, codes_ptr + n * D, dx_ptr + n * D
    scale = tl.zeros([BLOCK_N], tl.float32)
    if commitment_ptr is not None:
        scale = 2 * tl.load(commitment_ptr + n, mask=used, other=0.0).to(tl.float32)
    if ROTATED:
        given_ptrs = given_ptr + n * D
        short, long = lengths_of(x_ptrs, codes_ptrs, used, D, BLOCK_N, BLOCK_D)
        over_row, over_code = 1.0 / tl.maximum(short, EPS), 1.0 / tl.maximum(long, EPS)
        ratio = long * over_row
        dw, dv, length = turn_of(given_ptrs, x_ptrs, codes_ptrs, over_row, over_code, used, D, BLOCK_N, BLOCK_D)
        over_sum = 1.0 / tl.maximum(length, EPS)
        along, back = 2 * dw * over_sum * over_sum, 2 * dv
    for d0 in range(0, D, BLOCK_D):
        at = d0 + tl.arange(0, BLOCK_D)
        read = used[:, None] & (at < D)[None, :]
        dx = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if given_ptr is not None:
            dx += tl.load(given_ptr + n[:, None] * D + at[None, :], mask=read, other=0.0).to(tl.float32)
        if ROTATED or commitment_ptr is not None:
            x = tl.load(x_ptrs[:, None] + at[None, :], mask=read, other=0.0).to(tl.float32)
            c = tl.load(codes_ptrs[:, None] + at[None, :], mask=read, other=0.0).to(tl.float32)
            if ROTATED:
                u = x * over_row[:, None]
                w = u + c * over_code[:, None]
                dx = ratio[:, None] * (dx - w * along[:, None] + u * back[:, None])
            if commitment_ptr is not None:
                dx += scale[:, None] * (x - c)
        tl.store(dx_ptrs[:, None] + at[None, :], dx, mask=inside[:, None] & (at < D)[None, :])


def tiles_of(D: int) -> dict[str, int]:
    """1024 numbers of each tensor at a time, 8 a thread: with 16, three tensors and what a rotation keeps spill."""
    block_d = power_of_two(D, most=512)
    return {"BLOCK_N": power_of_two(1024 // block_d, most=128), "BLOCK_D": block_d}


def _dx(given: Tensor | None, dcommitment: Tensor | None, x: Tensor, codes: Tensor, index: Tensor, way: int) -> Tensor:
    """Of rows [rows, D]."""
    rows, D = x.shape
    dx = torch.empty_like(x)
    tiles = tiles_of(D)
    launch(
        _rows_kernel,
        (cdiv(rows, tiles["BLOCK_N"]),),
        *(given, dcommitment, x, codes, index, dx, rows, D),
        ROTATED=way == ROTATION and given is not None,
        EPS=EPS,
        **tiles,
        num_warps=4,
    )
    return dx


def vq_backward(
    dquantized: Tensor | None,
    dcommitment: Tensor | None,
    dcodebook_error: Tensor | None,
    x: Tensor,
    codes: Tensor,
    index: Tensor,
    K: int,
    gradient: int,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """``reference.vq_backward``: dx of x's dtype and dcodebook in float32, each without elements where not needed."""
    G, N, D = x.shape
    flat = [None if t is None else t.view(G * N, D) for t in (dquantized, x, codes)]
    dquantized, rows, chosen = flat
    assert rows is not None and chosen is not None
    dx, dcodebook = x.new_empty(0), torch.empty(0, dtype=torch.float32, device=x.device)
    if need_x:
        given = None if gradient == CODES else dquantized
        dx = _dx(given, dcommitment, rows, chosen, index, gradient).view(G, N, D)
    if need_codebook:
        given = dquantized if gradient == CODES else None
        if given is None and dcodebook_error is None:
            return dx, torch.zeros(G, K, D, dtype=torch.float32, device=x.device)
        parts = (given, None, None, None) if dcodebook_error is None else (given, dcodebook_error, rows, chosen)
        dcodebook = sums_by_key(keys_of(index, K), G * K, *parts)[1].view(G, K, D)
    return dx, dcodebook

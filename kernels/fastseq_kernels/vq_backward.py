"""Gradients of vector quantization: of the rows in one kernel, of the codebook through sums by code.

Both wait for memory. The rows: x, the codes and the gradient are read once and dx is written once; a rotation, which
needs products over D, holds whole rows in registers. The codebook: what is added up per code is formed while it is
added (``vq_sums.sums_by_key``), so nothing of size [G, N, D] is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two
from fastseq_kernels.vq_sums import keys_of, sums_by_key

STRAIGHT, ROTATION, CODES = range(3)  # what ``gradient`` counts
EPS = 1e-6  # least length that the rotation divides by
MOST_D = 8192  # of a rotation


@triton.jit
def rotated(d, x, c, EPS: tl.constexpr):
    """Gradients d of rows x, turned and scaled as codes c must be to become their rows; whole rows [BLOCK_N, BLOCK_D].

    With u and v the directions of row and code, u+v is formed and then squared: 2 + 2 u*v would cancel where a row is
    opposite to its code.
    """
    short, long = tl.maximum(tl.sqrt_rn(tl.sum(x * x, axis=1)), EPS), tl.sqrt_rn(tl.sum(c * c, axis=1))
    u = x * (1.0 / short)[:, None]
    v = c * (1.0 / tl.maximum(long, EPS))[:, None]
    w = u + v
    over = 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(w * w, axis=1)), EPS)
    along, back = 2 * tl.sum(d * w, axis=1) * over * over, 2 * tl.sum(d * v, axis=1)
    return (long / short)[:, None] * (d - w * along[:, None] + u * back[:, None])


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
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (n < rows)[:, None] & (d < D)[None, :]
    used = tl.load(index_ptr + n, mask=n < rows, other=-1) >= 0  # other rows are not read, their gradient is zero
    read, place = inside & used[:, None], n[:, None] * D + d[None, :]
    dx = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if given_ptr is not None:
        dx += tl.load(given_ptr + place, mask=read, other=0.0).to(tl.float32)
    if ROTATED or commitment_ptr is not None:
        x = tl.load(x_ptr + place, mask=read, other=0.0).to(tl.float32)
        c = tl.load(codes_ptr + place, mask=read, other=0.0).to(tl.float32)
        if ROTATED:
            dx = rotated(dx, x, c, EPS)
        if commitment_ptr is not None:
            scale = 2 * tl.load(commitment_ptr + n, mask=used, other=0.0).to(tl.float32)
            dx += scale[:, None] * (x - c)
    tl.store(dx_ptr + place, dx, mask=inside)


class Tiles(NamedTuple):
    """How the kernels over rows are launched."""

    blocks: dict[str, int]
    columns: int  # tiles of D
    num_warps: int


def tiles_of(D: int, whole: bool) -> Tiles:
    """1024 numbers of each tensor at a time, 8 a thread; 16 a thread where ``whole`` rows are longer."""
    block_d = power_of_two(D, most=None if whole else 512)
    blocks = {"BLOCK_N": power_of_two(1024 // block_d, most=128), "BLOCK_D": block_d}
    return Tiles(blocks, cdiv(D, block_d), max(4, block_d // 512))


def rotation_why_not(gradient: int, given: Tensor | None, D: int) -> str | None:
    """Why a gradient cannot be had, or None: a rotation keeps whole rows in registers."""
    if gradient == ROTATION and given is not None and D > MOST_D:
        return f"a rotation of {D} dimensions, more than {MOST_D}"
    return None


def _dx(given: Tensor | None, dcommitment: Tensor | None, x: Tensor, codes: Tensor, index: Tensor, way: int) -> Tensor:
    """Of rows [rows, D]."""
    rows, D = x.shape
    dx = torch.empty_like(x)
    turn = way == ROTATION and given is not None
    tiles = tiles_of(D, turn)
    grid = (cdiv(rows, tiles.blocks["BLOCK_N"]), tiles.columns)
    args = (given, dcommitment, x, codes, index, dx, rows, D)
    launch(_rows_kernel, grid, *args, ROTATED=turn, EPS=EPS, **tiles.blocks, num_warps=tiles.num_warps)
    return dx


def vq_backward_why_not(
    dquantized: Tensor | None, dcommitment: Tensor | None, dcodebook_error: Tensor | None, x: Tensor, *rest: Any
) -> str | None:
    """The reason against this call, or None."""
    return rotation_why_not(rest[3], dquantized, x.shape[2])


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

"""Rows and codes in pieces of 16 bits for the screen (``vq_screen``), and the bound on what that rounds.

Notation: u = 2^-24; x a row, c a code, m a centre; s the definition's score as it is rounded. Scores of a row may all
move by the same amount, so with x' = x - m and c' = c - m, s is compared with s' = h - x'*c', h = c'*c'/2 (with
``dot``: h = -m*c'). Rows and codes enter the products as X and C, each one number of 16 bits or the sum of two, hi and
lo. t is what the tensor core finds for s'. Then t differs from s, but for what depends on the row alone, by at most

    e = |x'-X| |c'| + |X| |c'-C|            rounding to pieces (Cauchy and Schwarz); x' is rounded too, by u |x'|
      + |lo of X| |lo of C|                  the product that is left out
      + P D 2^-22 (|h| + A B)                sums: each of P*D products loses at most 2^-23 of the largest sum, by
                                             truncation, and that is taken twice; sums stay below |h| + A B, for they
                                             may begin with h, and A and B are |hi| + |lo| of the row and of the code
      + (GROUPS + 4) 2^-23 (|h| + A B)       rounding h, adding it, places in the lowest bits, and the comparison
      + (D + 2) u (c*c/2 + |x| |c|) 1.002    the definition's own chain, of x and c as they are (with dot: no c*c/2)
      + 2^-109                               numbers below the least normal one, which may count as zero

All lengths are measured, with the largest one of all codes. If k is the least of all t and w the definition's code,
t_w <= s_w + e <= s_k + e <= t_k + 2e: so w is among the codes with t <= t_k + 2e. A row is left open, and swept
exactly, where sums could overflow or are not finite (then e does not hold), where there are many candidates, and where
they may be hidden: only the least t of each class of codes (its number modulo LANES) is kept, and the second least of
all classes.

Pieces: x and codes of one 16-bit type are exact, so one product; bfloat16 rows and other codes need two (codes in two
pieces, m = 0); else three, about the mean of the codes. Never TF32, so no switch of torch changes anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch

MOST_D = 8192  # longer sums of squares are too inexact for the bound
LANES = 16  # classes of codes
BLOCK_N = 128  # rows of a tile of the screen
_NEVER = 2.0**126  # the score of codes that are not finite
_SLACK = 1.0  # what the bound is multiplied by; a test divides it to see wrong codes

_MORE: tl.constexpr = tl.constexpr(1 + 2.0**-9)  # over sums of up to MOST_D squares in float32, and over e itself
_LEAST: tl.constexpr = tl.constexpr(2.0**-113)  # over MOST_D squares that are not normal
_FLUSH: tl.constexpr = tl.constexpr(2.0**-118)  # over the length of MOST_D numbers that are not normal
MOST: tl.constexpr = tl.constexpr(2.0**100)  # scores beyond are left to the sweep


@triton.jit
def _nearest_bfloat16(a):
    """The nearest bfloat16 as a float32, of two the even one; a is finite and its result too."""
    bits = a.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _split(a, PIECES: tl.constexpr, EXACT: tl.constexpr):
    """hi, lo and what is left, float32. EXACT: a is a number of the pieces' type already."""
    hi = a if EXACT else _nearest_bfloat16(a)
    lo = _nearest_bfloat16(a - hi) if PIECES == 2 else a - hi  # exact differences
    return hi, lo, (a - hi) - lo


@triton.jit
def _length(squares):
    """At least the length of numbers whose squares, rounded, sum to ``squares``."""
    return tl.sqrt(squares * _MORE + _LEAST) * _MORE


@triton.jit(do_not_specialize=["K", "padded"])
def _codes_kernel(
    codes_ptr,  # [G, K, D]
    starts_ptr,  # float32 [G, K] +inf where the code is not finite
    centre_ptr,  # float32 [G, D] or None
    pieces_ptr,  # [G, PIECES, padded, WIDTH] out   negated; zero beyond K and D, and of codes that are not finite
    h_ptr,  # float32 [G, padded] out
    lengths_ptr,  # float32 [G, 5, padded] out   of c', c' - C, lo, c; and |h|
    K,
    padded,
    D,
    WIDTH,
    never,
    PIECES: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    good = tl.load(starts_ptr + g * K + k, mask=k < K, other=float("inf")) < float("inf")
    h = tl.zeros([BLOCK_K], tl.float64)
    moved2, left2, lo2, code2 = (tl.zeros([BLOCK_K], tl.float32),) * 4
    for d0 in range(0, WIDTH, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        read = good[:, None] & (d < D)[None, :]
        c = tl.load(codes_ptr + (g * K + k)[:, None] * D + d[None, :], mask=read, other=0.0).to(tl.float32)
        centre = tl.zeros([BLOCK_D], tl.float32)
        if centre_ptr is not None:
            centre = tl.load(centre_ptr + g * D + d, mask=d < D, other=0.0)
        exactly = c.to(tl.float64) - centre.to(tl.float64)[None, :]
        other_factor = tl.broadcast_to(-centre.to(tl.float64)[None, :], [BLOCK_K, BLOCK_D]) if DOT else 0.5 * exactly
        h += tl.sum(tl.where(read, other_factor * exactly, 0.0), axis=1)
        moved = tl.where(read, c - centre[None, :], 0.0)
        hi, lo, left = _split(moved, PIECES, EXACT)
        moved2 += tl.sum(moved * moved, axis=1)
        left2 += tl.sum(left * left, axis=1)
        lo2 += tl.sum(lo * lo, axis=1)
        code2 += tl.sum(c * c, axis=1)
        at = (g * PIECES * padded + k)[:, None] * WIDTH + d[None, :]
        tl.store(pieces_ptr + at, (-hi).to(pieces_ptr.dtype.element_ty))
        if PIECES == 2:
            at += padded.to(tl.int64) * WIDTH
            tl.store(pieces_ptr + at, (-lo).to(pieces_ptr.dtype.element_ty))
    half = h.to(tl.float32)
    tl.store(h_ptr + g * padded + k, tl.where(good, half, never))
    out = lengths_ptr + g * 5 * padded + k
    moved = _length(moved2)
    left = 0.0 if EXACT else _length(left2) + 2.0**-24 * moved + _FLUSH
    lo = _length(lo2) if PIECES == 2 else 0.0
    tl.store(out, tl.where(good, moved, 0.0))
    tl.store(out + padded, tl.where(good, left, 0.0))
    tl.store(out + 2 * padded, tl.where(good, lo, 0.0))
    tl.store(out + 3 * padded, tl.where(good, _length(code2), 0.0))
    tl.store(out + 4 * padded, tl.where(good, tl.abs(half), 0.0))


@triton.jit(do_not_specialize=["N", "first", "rows", "padded", "slack"])
def _rows_kernel(
    x_ptr,  # [G, N, D]
    centre_ptr,  # float32 [G, D] or None
    most_ptr,  # float32 [G, 5] the largest of the codes' lengths
    pieces_ptr,  # [G, PIECES, padded, WIDTH] out   of rows first .. first + rows - 1; zero beyond these and D
    width_ptr,  # float32 [G, padded] out   2e; +inf where it does not hold
    N,
    D,
    WIDTH,
    first,
    rows,
    padded,
    slack,
    PRODUCTS: tl.constexpr,
    PIECES: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    moved2, left2, lo2, row2 = (tl.zeros([BLOCK_N], tl.float32),) * 4
    for d0 in range(0, WIDTH, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        read = (i < rows)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + (g * N + first + i)[:, None] * D + d[None, :], mask=read, other=0.0).to(tl.float32)
        moved = x
        if centre_ptr is not None:
            moved = tl.where(read, x - tl.load(centre_ptr + g * D + d, mask=d < D, other=0.0)[None, :], 0.0)
        hi, lo, left = _split(moved, PIECES, EXACT)
        moved2 += tl.sum(moved * moved, axis=1)
        left2 += tl.sum(left * left, axis=1)
        lo2 += tl.sum(lo * lo, axis=1)
        row2 += tl.sum(x * x, axis=1)
        at = (g * PIECES * padded + i)[:, None] * WIDTH + d[None, :]
        tl.store(pieces_ptr + at, hi.to(pieces_ptr.dtype.element_ty))
        if PIECES == 2:
            at += padded.to(tl.int64) * WIDTH
            tl.store(pieces_ptr + at, lo.to(pieces_ptr.dtype.element_ty))
    moved, row = _length(moved2), _length(row2)
    left = tl.zeros_like(moved) if EXACT else _length(left2) + 2.0**-24 * moved + _FLUSH
    lo = _length(lo2) if PIECES == 2 else tl.zeros_like(moved)
    most = most_ptr + g * 5
    code_moved, code_left, code_lo = tl.load(most), tl.load(most + 1), tl.load(most + 2)
    code, h = tl.load(most + 3), tl.load(most + 4)

    within = moved + left  # |X|
    sums = (within + 2 * lo) * (code_moved + code_left + 2 * code_lo)  # A B
    chain = row * code if DOT else row * code + 0.5 * code * code
    dimensions = tl.cast(D, tl.float32)
    e = left * code_moved + within * code_left + lo * code_lo
    e += (PRODUCTS * dimensions * 2.0**-22 + (GROUPS + 4) * 2.0**-23) * (h + sums)
    e += (dimensions + 2.0) * 2.0**-24 * chain * 1.002 + 2.0**-109
    holds = h + sums + chain < MOST  # not where it is NaN
    tl.store(width_ptr + g * padded + i, tl.where(holds, 2 * e * _MORE * slack, float("inf")))


def pieces_of(products: int) -> tuple[int, int]:
    """Of rows and of codes."""
    return (2 if products == 3 else 1), (1 if products == 1 else 2)


def products_of(x: Tensor, codebook: Tensor) -> tuple[int, torch.dtype]:
    """How many products a score takes, and the type of their pieces."""
    if x.dtype == codebook.dtype and x.dtype != torch.float32:
        return 1, x.dtype
    return (2 if x.dtype == torch.bfloat16 else 3), torch.bfloat16


def _centre(codebook: Tensor, starts: Tensor) -> Tensor:
    """The mean of the finite codes, or near it: any centre is right."""
    good = starts < torch.inf
    total = torch.where(good[..., None], codebook, 0).sum(1, dtype=torch.float32)
    return (total / good.sum(1, keepdim=True).clamp_min(1)).nan_to_num(0.0, 0.0, 0.0)


class Codes(NamedTuple):
    """A codebook, prepared."""

    pieces: Tensor  # [G, pieces, codes, width]
    h: Tensor  # float32 [G, codes]
    most: Tensor  # float32 [G, 5]
    centre: Tensor | None
    products: int
    groups: int  # of LANES codes in a tile


def split_codes(codebook: Tensor, starts: Tensor, dot: bool, x: Tensor, width: int, block_k: int) -> Codes:
    """All codes for rows of x's dtype, in pieces of ``width`` columns and tiles of ``block_k``."""
    G, K, D = codebook.shape
    products, dtype = products_of(x, codebook)
    codes, pieces = cdiv(K, block_k) * block_k, pieces_of(products)[1]
    centre = _centre(codebook, starts) if products == 3 else None
    found = torch.empty(G, pieces, codes, width, dtype=dtype, device=x.device)
    h = torch.empty(G, codes, dtype=torch.float32, device=x.device)
    lengths = torch.empty(G, 5, codes, dtype=torch.float32, device=x.device)
    launch(
        _codes_kernel,
        (codes // 16, G),
        *(codebook, starts, centre, found, h, lengths, K, codes, D, width, _NEVER),
        PIECES=pieces,
        EXACT=products == 1,
        DOT=dot,
        BLOCK_K=16,
        BLOCK_D=32,
        num_warps=4,
    )
    return Codes(found, h, lengths.amax(-1), centre, products, block_k // LANES)


def split_rows(x: Tensor, codes: Codes, dot: bool, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Pieces [G, pieces, padded, width] of rows first .. first + rows - 1, and their 2e, float32 [G, padded]."""
    G, N, D = x.shape
    pieces, width = pieces_of(codes.products)[0], codes.pieces.shape[-1]
    padded = cdiv(rows, BLOCK_N) * BLOCK_N
    found = torch.empty(G, pieces, padded, width, dtype=codes.pieces.dtype, device=x.device)
    bound = torch.empty(G, padded, dtype=torch.float32, device=x.device)
    launch(
        _rows_kernel,
        (padded // 32, G),
        *(x, codes.centre, codes.most, found, bound, N, D, width, first, rows, padded, _SLACK),
        PRODUCTS=codes.products,
        PIECES=pieces,
        EXACT=codes.products < 3,
        DOT=dot,
        GROUPS=codes.groups,
        BLOCK_N=32,
        BLOCK_D=32,
        num_warps=4,
    )
    return found, bound

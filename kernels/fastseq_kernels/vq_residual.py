"""Residual vector quantization: all levels of a tile of rows in one program, and the gradient of the rows.

What is left of a tile lies in a scratch of the program, twice: a level reads one copy and writes the other. The sweep
over the codes takes it a column at a time (``_scores.best_code``), so it comes from memory, of which the L1 cache holds
64 rows of up to 256 numbers. The number of programs is bounded by the device, each takes one tile after the other, and
the scratch stays small. Where sums are wanted each level keeps its own copy of all rows instead.

The work is the sweep, K * D multiply-adds a row and level in 32 bit: of 64 rows and 64 codes at a time 12 loads for 32
multiply-adds. The codes come from the L2 cache, 4 bytes for 64 multiply-adds. From ``_LEAST_WORK`` multiply-adds a
level on, where the ten launches of a lookup on tensor cores cost less than they save, each level is such a lookup
(``vq_nearest.lookup``) and one kernel that takes its codes away. The results are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two, target
from fastseq_kernels._scores import best_code, turned_codes
from fastseq_kernels.vq_backward import EPS, ROTATION, rotated, rotation_why_not, tiles_of
from fastseq_kernels.vq_nearest import lookup
from fastseq_kernels.vq_sums import empty_keys, sums_by_key

_LEAST_WORK = 1 << 32  # multiply-adds, 0.2 to 0.3 ms of a sweep on sm_90, by estimate
_AUTOMATIC = 2  # of a lookup: screen where it is faster
_PROGRAMS = 2  # of the sweep, per multiprocessor: what their registers leave room for


@triton.jit
def _enter(x_ptrs, rest_ptrs, read, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy rows to the scratch as float32; the number of values in each that are not finite, [BLOCK_N]."""
    wild = tl.zeros([BLOCK_N], tl.int32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        in_d = (d < D)[None, :]
        x = tl.load(x_ptrs[:, None] + d[None, :], mask=read[:, None] & in_d, other=0.0).to(tl.float32)
        tl.store(rest_ptrs[:, None] + d[None, :], x, mask=read[:, None] & in_d)
        wild += tl.sum((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, axis=1)
    return wild


@triton.jit
def _subtract(rest_ptrs, left_ptrs, code_ptrs, read, used, kept, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """What the codes of those rows that are used leave of the rows that are read, written where ``kept``; its squared
    length where used, and the number of values in it that are not finite, [BLOCK_N] each."""
    apart, wild = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.int32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside = read[:, None] & (d < D)[None, :]
        c = tl.load(code_ptrs[:, None] + d[None, :], mask=inside & used[:, None], other=0.0).to(tl.float32)
        left = tl.load(rest_ptrs[:, None] + d[None, :], mask=inside, other=0.0) - c
        tl.store(left_ptrs[:, None] + d[None, :], left, mask=inside & kept)
        apart += tl.sum(left * left, axis=1)
        wild += tl.sum((tl.abs(left) < float("inf")).to(tl.int32) ^ 1, axis=1)
    return tl.where(used, apart, 0.0), wild


@triton.jit
def _add_up(index_ptrs, codes_ptr, offsets_ptr, out_ptrs, inside, M, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum of the codes of all levels in their order, in float32. Its last rounding is that of the result's dtype."""
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for m in range(0, M):
            index = tl.load(index_ptrs + m, mask=inside, other=-1)
            code_ptrs = codes_ptr + (tl.load(offsets_ptr + m) + index) * D
            read = (index >= 0)[:, None] & (d < D)[None, :]
            total += tl.load(code_ptrs[:, None] + d[None, :], mask=read, other=0.0).to(tl.float32)
        tl.store(out_ptrs[:, None] + d[None, :], total, mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["N", "M", "codes"])
def _levels_kernel(
    x_ptr,  # [N, D]
    codes_ptr,  # [codes, D] of all levels, one after the other
    turned_ptr,  # float32 [D, codes] see turned_codes
    starts_ptr,  # float32 [codes]
    offsets_ptr,  # int64 [M + 1] where the codes of each level begin
    mask_ptr,  # bool [N] or None
    levels_ptr,  # int64 [N] or None
    rest_ptr,  # float32 scratch: [M, N, D], the rows before each level, and a tile; or [programs, 2, BLOCK_N, D]
    quantized_ptr,  # [N, D] out
    index_ptr,  # int64 [N, M] out
    distance_ptr,  # float32 [M, N] out
    keys_ptr,  # [M, N] out: place among the codes of all levels, ``codes`` where none; or None
    N,
    D,
    M,
    codes,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES_N: tl.constexpr,
    LANES_K: tl.constexpr,
):
    row = tl.arange(0, BLOCK_N)  # within the tile; what is the same for all rows of it stays out of the vectors
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        first_row = tl.cast(tile, tl.int64) * BLOCK_N
        inside = row < N - first_row
        depth = tl.zeros([BLOCK_N], tl.int32) + M  # levels that each row uses
        if levels_ptr is not None:
            depth = tl.minimum(tl.load(levels_ptr + first_row + row, mask=inside, other=0), M).to(tl.int32)
        if mask_ptr is not None:
            depth = tl.where(tl.load(mask_ptr + first_row + row, mask=inside, other=0) != 0, depth, 0)
        depth = tl.where(inside, depth, 0)

        at = first_row
        if keys_ptr is None:
            at = tl.cast(tl.program_id(0), tl.int64) * 2 * BLOCK_N
        rest, other = rest_ptr + at * D, rest_ptr + (at + BLOCK_N) * D
        wild = _enter(x_ptr + first_row * D + row * D, rest + row * D, depth > 0, D, BLOCK_N, BLOCK_D)
        for m in range(0, M):
            # The sweep and the subtraction read what other threads of this program wrote.
            tl.debug_barrier()
            used = depth > m
            first = tl.load(offsets_ptr + m)
            K = (tl.load(offsets_ptr + m + 1) - first).to(tl.int32)
            index = tl.zeros([BLOCK_N], tl.int32)
            # Rows that are not used are swept all the same: their scratch is there, and masks would cost a fifth.
            if tl.max(used.to(tl.int32), axis=0) > 0:
                turned, starts = turned_ptr + first, starts_ptr + first
                _, index = best_code(
                    rest + row * D, 1, None, turned, codes, starts, 0, K, D, BLOCK_N, BLOCK_K, LANES_N, LANES_K
                )
            index = tl.where(wild == 0, index, 0)  # such a row takes code 0
            place = tl.cast(m, tl.int64) * N + first_row
            if keys_ptr is not None:
                tl.store(keys_ptr + place + row, tl.where(used, first + index, codes), mask=inside)
                other = rest + tl.cast(N, tl.int64) * D
            tl.store(index_ptr + first_row * M + m + row * M, tl.where(used, index, -1).to(tl.int64), mask=inside)
            code_ptrs = codes_ptr + (first + index) * D
            kept = m + 1 < M
            apart, wild = _subtract(rest + row * D, other + row * D, code_ptrs, used, used, kept, D, BLOCK_N, BLOCK_D)
            tl.store(distance_ptr + place + row, apart, mask=inside)
            rest, other = other, rest
        tl.debug_barrier()  # index is read back by other threads than wrote it; the scratch is free again
        index_ptrs, out_ptrs = index_ptr + first_row * M + row * M, quantized_ptr + first_row * D + row * D
        _add_up(index_ptrs, codes_ptr, offsets_ptr, out_ptrs, inside, M, D, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["N", "M", "m", "first", "codes"])
def _take_kernel(
    rest_ptr,  # float32 [N, D]
    codes_ptr,  # [codes, D] of all levels
    found_ptr,  # int64 [N] the code of each row within the level, -1 where none
    left_ptr,  # float32 [N, D] out, but after the last level
    index_ptr,  # int64 [N, M] out
    distance_ptr,  # float32 [M, N] out
    keys_ptr,  # [M, N] out, or None; see ``_levels_kernel``
    N,
    D,
    M,
    m,
    first,  # where the codes of the level begin
    codes,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    index = tl.load(found_ptr + n, mask=inside, other=-1)
    used = index >= 0
    place = tl.cast(m, tl.int64) * N + n
    if keys_ptr is not None:
        tl.store(keys_ptr + place, tl.where(used, first + index, codes), mask=inside)
    tl.store(index_ptr + n * M + m, index, mask=inside)
    code_ptrs, kept = codes_ptr + (first + index) * D, m + 1 < M
    apart, _ = _subtract(rest_ptr + n * D, left_ptr + n * D, code_ptrs, inside, used, kept, D, BLOCK_N, BLOCK_D)
    tl.store(distance_ptr + place, apart, mask=inside)


@triton.jit(do_not_specialize=["N", "M"])
def _sum_kernel(
    codes_ptr,  # [codes, D] of all levels
    offsets_ptr,  # int64 [M + 1]
    index_ptr,  # int64 [N, M]
    quantized_ptr,  # [N, D] out
    N,
    D,
    M,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    index_ptrs, out_ptrs = index_ptr + n * M, quantized_ptr + n * D
    _add_up(index_ptrs, codes_ptr, offsets_ptr, out_ptrs, n < N, M, D, BLOCK_N, BLOCK_D)


def _offsets(sizes: Sequence[int], device: torch.device) -> Tensor:
    """int64 [M + 1]: where the codes of each level begin, and their number. Made on the device, so also in the capture
    of a CUDA graph."""
    if len(set(sizes)) == 1:
        return torch.arange(0, (len(sizes) + 1) * sizes[0], sizes[0], dtype=torch.int64, device=device)
    ends = torch.cat([torch.full((1,), size, dtype=torch.int64, device=device) for size in (0, *sizes)])
    return ends.cumsum(0)


def _tiles(D: int) -> dict[str, int]:
    """64 rows and 64 codes, 32 of their scores a thread; of rows 16 columns at a time, 8 numbers a thread, because 32
    columns make sm_80 spill where D is not divisible by 16."""
    return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": power_of_two(D, most=16), "LANES_N": 8, "LANES_K": 16}


class _Found(NamedTuple):
    """What one of the two ways writes; without sums there are no keys."""

    quantized: Tensor  # [N, D] of x's dtype
    index: Tensor  # int64 [N, M]
    distance: Tensor  # float32 [M, N]
    keys: Tensor | None  # [M * N] see ``empty_keys``


def _at_once(
    x: Tensor, copies: Tensor, offsets: Tensor, mask: Tensor | None, levels: Tensor | None, found: _Found
) -> Tensor:
    """All levels in one kernel. Returns float32 [M * N and more, D], the rows before each level, where keys are asked
    for."""
    (N, D), M, tiles = x.shape, found.index.shape[1], _tiles(x.shape[1])
    starts, turned = turned_codes(copies)
    programs = min(cdiv(N, tiles["BLOCK_N"]), _PROGRAMS * target(x.device).multiprocessors)
    rows = programs * 2 * tiles["BLOCK_N"]
    if found.keys is not None:
        rows = M * N + tiles["BLOCK_N"]  # the sweep of the last tile reads beyond N
    rest = torch.empty(rows, D, dtype=torch.float32, device=x.device)
    launch(
        _levels_kernel,
        (programs,),
        *(x, copies, turned, starts, offsets, mask, levels, rest, *found, N, D, M, copies.shape[0]),
        **tiles,
        num_warps=4,
    )
    return rest


def _one_by_one(
    x: Tensor,
    codebooks: Sequence[Tensor],
    copies: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    levels: Tensor | None,
    found: _Found,
) -> Tensor:
    """``_at_once`` with a lookup on tensor cores for each level."""
    (N, D), M, tiles = x.shape, len(codebooks), _tiles(x.shape[1])
    blocks = {name: tiles[name] for name in ("BLOCK_N", "BLOCK_D")}
    grid = (cdiv(N, tiles["BLOCK_N"]),)
    kept = 2 if found.keys is None else M
    rest = torch.empty(kept, N, D, dtype=torch.float32, device=x.device)
    rest.select(0, 0).copy_(x)
    first = 0
    for m, book in enumerate(codebooks):
        used = mask if levels is None else levels > m if mask is None else mask & (levels > m)
        now, left = rest.select(0, m % kept), rest.select(0, (m + 1) % kept)
        index, _ = lookup(
            now.unsqueeze(0),
            book.to(torch.float32).unsqueeze(0),
            None if used is None else used.unsqueeze(0),
            False,
            _AUTOMATIC,
            torch.int64,
            False,
        )
        where = (found.index, found.distance, found.keys, N, D, M, m, first, copies.shape[0])
        launch(_take_kernel, grid, now, copies, index, left, *where, **blocks, num_warps=4)
        first += book.shape[0]
    launch(_sum_kernel, grid, copies, offsets, found.index, found.quantized, N, D, M, **blocks, num_warps=4)
    return rest.view(kept * N, D)


def vq_residual(
    x: Tensor, codebooks: Sequence[Tensor], mask: Tensor | None, levels: Tensor | None, sums: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``fastseq::vq_residual``; quantized has x's dtype, the codes theirs, distance, counts and sums are float32."""
    (N, D), M, device = x.shape, len(codebooks), x.device
    copies, offsets = torch.cat(list(codebooks)), _offsets([len(c) for c in codebooks], device)
    codes = copies.shape[0]
    found = _Found(
        torch.empty_like(x),
        torch.empty(N, M, dtype=torch.int64, device=device),
        torch.empty(M, N, dtype=torch.float32, device=device),
        empty_keys(M * N, codes, device) if sums else None,
    )
    if D > 16 and N * D * (codes // M) >= _LEAST_WORK:
        rest = _one_by_one(x, codebooks, copies, offsets, mask, levels, found)
    else:
        rest = _at_once(x, copies, offsets, mask, levels, found)
    counts, total = (torch.empty(0, dtype=torch.float32, device=device) for _ in range(2))
    if found.keys is not None:
        counts, total = sums_by_key(found.keys, codes, rest.narrow(0, 0, M * N))
    return *found[:3], counts, total, copies if keep else copies.new_empty(0)


@triton.jit(do_not_specialize=["N", "M"])
def _rows_kernel(
    given_ptr,  # [N, D] gradient of the quantized rows, or None
    commitment_ptr,  # [M, N] gradient of the squared distances, or None
    x_ptr,  # [N, D]
    codes_ptr,  # [K_1 + ... + K_M, D]
    offsets_ptr,  # int64 [M + 1]
    index_ptr,  # int64 [N, M]
    dx_ptr,  # [N, D] out
    N,
    D,
    M,
    ROTATED: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_n, in_d = n < N, (d < D)[None, :]
    inside, place = in_n[:, None] & in_d, n[:, None] * D + d[None, :]
    rest, dx = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if given_ptr is not None:
        given = tl.load(given_ptr + place, mask=inside, other=0.0).to(tl.float32)
    for m in range(0, M):
        index = tl.load(index_ptr + n * M + m, mask=in_n, other=-1)
        used = (index >= 0)[:, None]
        code_ptrs = codes_ptr + (tl.load(offsets_ptr + m) + index) * D
        c = tl.load(code_ptrs[:, None] + d[None, :], mask=used & in_d, other=0.0).to(tl.float32)
        left = rest - c
        if given_ptr is not None:
            turned = given
            if ROTATED:
                turned = rotated(given, rest, c, EPS)
            dx += tl.where(used, turned, 0.0)
        if commitment_ptr is not None:
            commitment = tl.load(commitment_ptr + tl.cast(m, tl.int64) * N + n, mask=in_n, other=0.0).to(tl.float32)
            dx += tl.where(used, 2 * commitment[:, None] * left, 0.0)
        rest = left
    tl.store(dx_ptr + place, dx, mask=inside)


def vq_residual_backward_why_not(
    dquantized: Tensor | None, dcommitment: Tensor | None, x: Tensor, *rest: Any
) -> str | None:
    """The reason against this call, or None."""
    return rotation_why_not(rest[-1], dquantized, x.shape[1])


def vq_residual_backward(
    dquantized: Tensor | None,
    dcommitment: Tensor | None,
    x: Tensor,
    codes: Tensor,
    sizes: Sequence[int],
    index: Tensor,
    gradient: int,
) -> Tensor:
    """``reference.vq_residual_backward``, dx of x's dtype; codes [K_1 + ... + K_M, D] of all levels, ``sizes`` K_m."""
    N, D = x.shape
    dx = torch.empty_like(x)
    turn = gradient == ROTATION and dquantized is not None
    tiles = tiles_of(D, turn)
    launch(
        _rows_kernel,
        (cdiv(N, tiles.blocks["BLOCK_N"]), tiles.columns),
        *(dquantized, dcommitment, x, codes, _offsets(sizes, x.device), index, dx, N, D, len(sizes)),
        ROTATED=turn,
        EPS=EPS,
        **tiles.blocks,
        num_warps=tiles.num_warps,
    )
    return dx

"""Rows of several examples: examples gathered into slots, the sum over slots of a linear layer, and both backward.

All of it waits for memory: what is gathered is read where it lies and written once. An adjoint needs to know where an
example lies: a stable sort of the index puts these places side by side, by slot and example and in ascending order of
rows, and each result is the sum over its own list, in that order. So bits are the same from run to run, without
atomics. An index out of range reads nothing and counts as zeros. The layer's product is cuBLAS's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two
from fastseq_kernels.vq_sums import _bounds_kernel, keys_of

_RUN_TIME = ["rows", "tiles", "label_rows", "B", "N", "S"]  # sizes that must not compile anew
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}  # by bytes of an element


@triton.jit
def _places(first, N, S, M, BLOCK: tl.constexpr):
    """a, n, s and m of rows first .. first + BLOCK - 1 of [A, N, S, M]: 64 bits only where a program divides once."""
    m = (first % M).to(tl.int32) + tl.arange(0, BLOCK)
    s = (first // M % S).to(tl.int32) + m // M
    n = ((first // M) // S % N).to(tl.int32) + s // S
    a = ((first // M) // S) // N + n // N
    return a, n % N, s % S, m % M


@triton.jit
def _examples(index_ptr, n, m, N, B, inside):
    """The example in slot m of row n, and whether there is one."""
    example = tl.load(index_ptr + tl.cast(m, tl.int64) * N + n, mask=inside, other=-1)
    return example, (example >= 0) & (example < B)


@triton.jit
def _copy(
    from_ptr,
    index_ptr,
    to_ptr,
    tile,
    rows,
    B,
    N,
    S,
    C,
    otherwise,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of rows of [A, N, S, M, C] from [A, B, S, C]."""
    first = tile.to(tl.int64) * ROWS
    a, n, s, m = _places(first, N, S, M, ROWS)
    row = first + tl.arange(0, ROWS)
    example, used = _examples(index_ptr, n, m, N, B, row < rows)
    source = (a * B + example) * S + s
    for c0 in range(0, C, COLUMNS):
        c = c0 + tl.arange(0, COLUMNS)
        in_c = (c < C)[None, :]
        value = tl.load(from_ptr + source[:, None] * C + c[None, :], mask=used[:, None] & in_c, other=otherwise)
        tl.store(to_ptr + row[:, None] * C + c[None, :], value, mask=(row < rows)[:, None] & in_c)


@triton.jit(do_not_specialize=_RUN_TIME)
def _gather_kernel(
    x_ptr,  # [A, B, S, C] whole numbers of any size
    index_ptr,  # int32 [M, N]
    out_ptr,  # [A, N, S, M, C] out
    labels_ptr,  # [B, L] whole numbers, or None
    taken_ptr,  # [N, M, L] out, or None
    rows,  # A * N * S * M
    tiles,  # of these rows
    label_rows,  # N * M
    B,
    N,
    S,
    C,
    L,
    M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LABELS_R: tl.constexpr,
    LABELS_C: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile < tiles:
        _copy(x_ptr, index_ptr, out_ptr, tile, rows, B, N, S, C, 0, M, BLOCK_R, BLOCK_C)
    else:
        if labels_ptr is not None:  # -1 where there is no example: a label that losses ignore
            tile -= tiles
            _copy(labels_ptr, index_ptr, taken_ptr, tile, label_rows, B, N, 1, L, -1, M, LABELS_R, LABELS_C)


@triton.jit(do_not_specialize=_RUN_TIME)
def _combine_kernel(
    parts_ptr,  # [A, B, S, M, G]
    index_ptr,  # int32 [M, N]
    bias_ptr,  # [G] or None
    out_ptr,  # [A, N, S, G] out
    rows,  # A * N * S
    B,
    N,
    S,
    G,
    M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    a, n, s, _ = _places(first, N, S, 1, BLOCK_R)
    row, g = first + tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for m in range(M):
        example, used = _examples(index_ptr, n, m, N, B, row < rows)
        source = ((a * B + example) * S + s) * M + m
        mask = used[:, None] & (g < G)[None, :]
        total += tl.load(parts_ptr + source[:, None] * G + g[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + g, mask=g < G, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + row[:, None] * G + g[None, :], total, mask=(row < rows)[:, None] & (g < G)[None, :])


@triton.jit(do_not_specialize=_RUN_TIME)
def _sum_kernel(
    d_ptr,  # [A, N, S, C] where EACH, else [A, N, S, M, C]
    order_ptr,  # int64 [M * N] places in the index, those of an example side by side
    starts_ptr,  # int64 [M * B + 1] where the list of each slot and example begins
    out_ptr,  # [A, B, S, M, C] out where EACH, else [A, B, S, C]
    rows,  # of out
    B,
    N,
    S,
    C,
    M: tl.constexpr,
    EACH: tl.constexpr,  # slots apart, of one gradient; else their sum, of one gradient for each
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    SLOTS: tl.constexpr = M if EACH else 1
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    a, b, s, m = _places(first, B, S, SLOTS, BLOCK_R)
    row, c = first + tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for other in range(M // SLOTS):
        slot = (m + other).to(tl.int64)
        at = tl.load(starts_ptr + slot * B + b, mask=row < rows, other=0)
        stop = tl.load(starts_ptr + slot * B + b + 1, mask=row < rows, other=0)
        for _ in range(tl.max(stop - at)):
            n = tl.load(order_ptr + at, mask=at < stop, other=0) - slot * N
            source = (a * N + n) * S + s
            if not EACH:
                source = source * M + slot
            mask = (at < stop)[:, None] & in_c
            total += tl.load(d_ptr + source[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            at += 1
    tl.store(out_ptr + row[:, None] * C + c[None, :], total, mask=(row < rows)[:, None] & in_c)


def _tiles(width: int) -> dict[str, int]:
    """1024 numbers at a time, 8 a thread."""
    columns = power_of_two(width, most=512)
    return {"BLOCK_R": 1024 // columns, "BLOCK_C": columns}


def _as_whole(t: Tensor) -> Tensor:
    """Its bits: a copy knows no types."""
    return t.view(_WHOLE[t.dtype.itemsize])


def mimo_gather(x: Tensor, index: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """``reference.mimo_gather`` of any dtype, and the labels [N, M, L] of [B, L]; for an index out of range zeros, and
    -1 as label."""
    (A, B, S, C), (M, N) = x.shape, index.shape
    out = torch.empty(A, N, S, M * C, dtype=x.dtype, device=x.device)
    taken = torch.empty(0, dtype=torch.int64, device=x.device)
    given: tuple[Tensor | None, ...] = (None, None)
    L, rows, label_rows = 1, A * N * S * M, 0
    if labels is not None:
        L, label_rows = labels.shape[1], N * M
        taken = torch.empty(N, M, L, dtype=labels.dtype, device=x.device)
        given = _as_whole(labels), _as_whole(taken)
    bits, of_labels = _as_whole(x), _tiles(L)
    width = bits.shape[3]  # twice C where an element has 16 bytes
    blocks = {**_tiles(width), "LABELS_R": of_labels["BLOCK_R"], "LABELS_C": of_labels["BLOCK_C"]}
    tiles = cdiv(rows, blocks["BLOCK_R"])
    launch(
        _gather_kernel,
        (tiles + cdiv(label_rows, blocks["LABELS_R"]),),
        *(bits, index, _as_whole(out), *given, rows, tiles, label_rows, B, N, S, width, L),
        M=M,
        **blocks,
        num_warps=4,
    )
    return out, taken


class _Lists(NamedTuple):
    """Where the examples lie in the rows."""

    order: Tensor  # int64 [M * N] places in the index, by slot, then example, then row
    starts: Tensor  # int64 [M * B + 1]


def _lists(index: Tensor, B: int) -> _Lists:
    (M, N), device = index.shape, index.device
    keys, order = torch.sort(keys_of(index, B), stable=True)
    starts = torch.empty(M * B + 1, dtype=torch.int64, device=device)
    counts = torch.empty(M * B, dtype=torch.float32, device=device)
    bounds = (keys, starts, counts, M * N, M * B, (M * N).bit_length())
    launch(_bounds_kernel, (cdiv(M * B + 1, 128),), *bounds, BLOCK=128, num_warps=4)
    return _Lists(order, starts)


def _sum(d: Tensor, index: Tensor, out: Tensor, each: bool) -> Tensor:
    """Fill out [A, B, S, ...] with sums over lists."""
    (M, N), (B, S) = index.shape, out.shape[1:3]
    C = out.shape[3] // M if each else out.shape[3]
    rows = out.shape[0] * B * S * (M if each else 1)
    if out.numel():
        blocks = _tiles(C)
        grid = (cdiv(rows, blocks["BLOCK_R"]), cdiv(C, blocks["BLOCK_C"]))
        launch(_sum_kernel, grid, d, *_lists(index, B), out, rows, B, N, S, C, M=M, EACH=each, **blocks, num_warps=4)
    return out


def mimo_gather_backward(d: Tensor, index: Tensor, B: int) -> Tensor:
    """``reference.mimo_gather_backward``, summed in float32."""
    A, _, S, width = d.shape
    return _sum(d, index, torch.empty(A, B, S, width // index.shape[0], dtype=d.dtype, device=d.device), False)


def mimo_combine(parts: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    """``reference.mimo_combine``, summed in float32."""
    (A, B, S, width), (M, N) = parts.shape, index.shape
    G, rows = width // M, A * N * S
    out = torch.empty(A, N, S, G, dtype=parts.dtype, device=parts.device)
    blocks = _tiles(G)
    grid = (cdiv(rows, blocks["BLOCK_R"]), cdiv(G, blocks["BLOCK_C"]))
    launch(_combine_kernel, grid, parts, index, bias, out, rows, B, N, S, G, M=M, **blocks, num_warps=4)
    return out


def mimo_combine_backward(d: Tensor, index: Tensor, B: int) -> Tensor:
    """``reference.mimo_combine_backward``, summed in float32."""
    A, _, S, G = d.shape
    return _sum(d, index, torch.empty(A, B, S, index.shape[0] * G, dtype=d.dtype, device=d.device), True)


def _once(index: Tensor, B: int) -> bool:
    """Whether the layer is computed once for each example: with fewer rows that is as much work, and more to move."""
    return index.shape[1] >= 2 * B


def mimo_project_detail(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> str:
    """The way that a call takes."""
    B, N = x.shape[1], index.shape[1]
    return f"products of {B} examples, then {N} rows" if _once(index, B) else f"{N} rows, then their products"


def mimo_project_backward_detail(d: Tensor, x: Tensor, weight: Tensor, index: Tensor, *needs: bool) -> str:
    """The way that a call takes."""
    B, N = x.shape[1], index.shape[1]
    return f"{N} rows, then products of {B} examples" if _once(index, B) else f"products of {N} rows, then their sums"


def _columns(weight: Tensor, M: int) -> Tensor:
    """The weight of the layer that makes all parts: [G, M*C] -> [M*G, C]."""
    G, width = weight.shape
    return weight.view(G, M, width // M).transpose(0, 1).reshape(M * G, width // M)


def mimo_project(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """``reference.mimo_project``; products as ``torch.backends.cuda.matmul`` allows."""
    (A, B, S, C), (M, N), G = x.shape, index.shape, weight.shape[0]
    if _once(index, B):
        parts = torch.mm(x.view(A * B * S, C), _columns(weight, M).mT)
        return mimo_combine(parts.view(A, B, S, M * G), index, bias)
    rows = mimo_gather(x, index, None)[0].view(A * N * S, M * C)
    out = torch.mm(rows, weight.mT) if bias is None else torch.addmm(bias, rows, weight.mT)
    return out.view(A, N, S, G)


def mimo_project_backward(
    d: Tensor, x: Tensor, weight: Tensor, index: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.mimo_project_backward``, each result without elements where it is not needed."""
    (A, B, S, C), (M, N), G = x.shape, index.shape, weight.shape[0]
    dx, dweight, dbias = (x.new_empty(0) for _ in range(3))
    if needs_bias:
        dbias = d.sum((0, 1, 2))
    if _once(index, B) and (needs_x or needs_weight):
        parts = mimo_combine_backward(d, index, B).view(A * B * S, M * G)
        if needs_x:
            dx = torch.mm(parts, _columns(weight, M)).view(A, B, S, C)
        if needs_weight:
            columns = torch.mm(parts.mT, x.view(A * B * S, C))
            dweight = columns.view(M, G, C).transpose(0, 1).reshape(G, M * C)
        return dx, dweight, dbias
    rows = d.view(A * N * S, G)
    if needs_x:
        dx = mimo_gather_backward(torch.mm(rows, weight).view(A, N, S, M * C), index, B)
    if needs_weight:
        dweight = torch.mm(rows.mT, mimo_gather(x, index, None)[0].view(A * N * S, M * C))
    return dx, dweight, dbias

"""Sums of the rows of each code, with the same bits from run to run: no atomics.

A stable sort by code puts the rows of a code side by side. Each run of one code is cut into chunks of CHUNK rows,
counted from its own first row. The first chunk of a code has a program of its own. Later chunks are found without a
list: the sorted rows are cut into windows of CHUNK, and in a window at most one chunk begins that is not the first of
its code, always of the code to which the first row of the window belongs. So codes + rows / CHUNK programs are enough
whatever the index holds, which the host knows without asking the device. A second pass adds the later chunks of the
few codes that have them, in order. Each row is read once; the sort moves 12 bytes a row, a few times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two

CHUNK = 128  # rows that one program adds


@triton.jit(do_not_specialize=["N", "K", "rows", "none"])
def _keys_kernel(
    index_ptr,  # int64 [rows] code of each row within its codebook
    keys_ptr,  # [rows] out
    N,  # rows of one codebook
    K,
    rows,
    none,  # the key of rows that do not count
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i, mask=i < rows, other=-1)
    key = tl.where((index >= 0) & (index < K), i // N * K + index, none)
    tl.store(keys_ptr + i, key, mask=i < rows)


@triton.jit
def _lower_bound(keys_ptr, key, rows, steps):
    """Number of sorted keys that are less than ``key``."""
    low = tl.zeros_like(key)
    high = low + rows
    for _ in range(steps):
        middle = (low + high) // 2
        unsure = low < high
        less = tl.load(keys_ptr + middle, mask=unsure, other=0) < key
        low = tl.where(unsure & less, middle + 1, low)
        high = tl.where(unsure & (less == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["rows", "codes", "steps"])
def _bounds_kernel(
    keys_ptr,  # [rows] sorted
    starts_ptr,  # int64 [codes + 1] out
    counts_ptr,  # float32 [codes] out
    rows,
    codes,
    steps,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start, stop = _lower_bound(keys_ptr, k, rows, steps), _lower_bound(keys_ptr, k + 1, rows, steps)
    tl.store(starts_ptr + k, start, mask=k <= codes)
    tl.store(counts_ptr + k, (stop - start).to(tl.float32), mask=k < codes)


@triton.jit(do_not_specialize=["rows", "codes"])
def _chunk_kernel(
    given_ptr,  # [rows, D] what is added up, or None
    error_ptr,  # [rows] or None; adds 2 * error * (chosen - x)
    x_ptr,  # [rows, D] or None
    chosen_ptr,  # [rows, D] the code of each row, or None
    keys_ptr,  # [rows] sorted
    order_ptr,  # int64 [rows] which row each sorted key is of
    starts_ptr,  # int64 [codes + 1]
    sums_ptr,  # float32 [codes, D] out: of the first chunk of each code
    parts_ptr,  # float32 [rows / CHUNK, D] out: of the chunk that begins in each window
    rows,
    codes,
    D,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    own = p < codes
    window = p - codes
    key = p
    if p >= codes:
        key = tl.load(keys_ptr + window * CHUNK).to(tl.int64)
    counted = key < codes
    start = tl.load(starts_ptr + key, mask=counted, other=0)
    stop = tl.load(starts_ptr + key + 1, mask=counted, other=0)
    begin = start
    if p >= codes:
        begin = start + (window * CHUNK - start + CHUNK - 1) // CHUNK * CHUNK
        stop = tl.where(begin > start, stop, begin)  # a first chunk is another program's
    end = tl.minimum(begin + CHUNK, stop)

    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i0 in range(begin, end, BLOCK_N):
        i = i0 + tl.arange(0, BLOCK_N)
        row = tl.load(order_ptr + i, mask=i < end, other=0)
        place = row[:, None] * D + d[None, :]
        inside = (i < end)[:, None] & in_d[None, :]
        if given_ptr is not None:
            total += tl.load(given_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if error_ptr is not None:
            error = tl.load(error_ptr + row, mask=i < end, other=0.0).to(tl.float32)
            chosen = tl.load(chosen_ptr + place, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
            total += 2 * error[:, None] * (chosen - x)
    chunk = tl.sum(total, axis=0)
    if own:
        tl.store(sums_ptr + p * D + d, chunk, mask=in_d)
    else:
        tl.store(parts_ptr + window * D + d, chunk, mask=in_d & (begin < stop))


@triton.jit
def _join_kernel(
    starts_ptr,  # int64 [codes + 1]
    parts_ptr,  # float32 [rows / CHUNK, D]
    sums_ptr,  # float32 [codes, D] in and out
    D,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, stop = tl.load(starts_ptr + k), tl.load(starts_ptr + k + 1)
    if stop - start > CHUNK:
        first = start // CHUNK + 1  # the windows of the second chunk and of the last
        last = first + (stop - start - 1) // CHUNK
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for i0 in range(first, last, BLOCK_N):
            i = i0 + tl.arange(0, BLOCK_N)
            inside = (i < last)[:, None] & (d < D)[None, :]
            total += tl.load(parts_ptr + i[:, None] * D + d[None, :], mask=inside, other=0.0)
        sums = tl.load(sums_ptr + k * D + d, mask=d < D, other=0.0) + tl.sum(total, axis=0)
        tl.store(sums_ptr + k * D + d, sums, mask=d < D)


def _tiles(D: int) -> dict[str, int]:
    block_d = power_of_two(D, most=128)
    return {"CHUNK": CHUNK, "BLOCK_N": power_of_two(1024 // block_d, most=64), "BLOCK_D": block_d}


def empty_keys(rows: int, codes: int, device: torch.device) -> Tensor:
    """Unwritten keys of rows: 0 .. codes - 1, and ``codes`` where a row does not count."""
    return torch.empty(rows, dtype=torch.int32 if codes < 2**31 - 1 else torch.int64, device=device)


def sums_by_key(
    keys: Tensor,
    codes: int,
    given: Tensor | None,
    error: Tensor | None = None,
    x: Tensor | None = None,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Number and sum of the rows of each key, float32 [codes] and [codes, D]; the key ``codes`` does not count.

    What is added up is given + 2 * error * (chosen - x), without the part that is None.

    Args:
        keys: [rows], see ``empty_keys``. given, x, chosen: [rows, D]. error: [rows].
    """
    rows, like = keys.shape[0], given if given is not None else x
    assert like is not None
    D, device = like.shape[1], like.device
    counts = torch.empty(codes, dtype=torch.float32, device=device)
    sums = torch.empty(codes, D, dtype=torch.float32, device=device)
    starts = torch.empty(codes + 1, dtype=torch.int64, device=device)
    windows = cdiv(rows, CHUNK)
    parts = torch.empty(windows, D, dtype=torch.float32, device=device)
    keys, order = torch.sort(keys, stable=True)
    bounds = (keys, starts, counts, rows, codes, rows.bit_length())
    launch(_bounds_kernel, (cdiv(codes + 1, 128),), *bounds, BLOCK=128, num_warps=4)
    tiles = _tiles(D)
    columns = cdiv(D, tiles["BLOCK_D"])
    added = (given, error, x, chosen, keys, order, starts, sums, parts, rows, codes, D)
    launch(_chunk_kernel, (codes + windows, columns), *added, **tiles, num_warps=4)
    if windows > 1:
        launch(_join_kernel, (codes, columns), starts, parts, sums, D, **tiles, num_warps=4)
    return counts, sums


def keys_of(index: Tensor, K: int) -> Tensor:
    """Keys g * K + index of [G, N], see ``empty_keys``; what is not in 0 .. K - 1 does not count."""
    G, N = index.shape
    keys = empty_keys(G * N, G * K, index.device)
    launch(_keys_kernel, (cdiv(G * N, 1024),), index, keys, N, K, G * N, G * K, BLOCK=1024, num_warps=4)
    return keys


def vq_sums(x: Tensor, index: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """``reference.vq_sums`` in float32: counts [G, K] and sums [G, K, D]."""
    G, N, D = x.shape
    counts, sums = sums_by_key(keys_of(index, K), G * K, x.view(G * N, D))
    return counts.view(G, K), sums.view(G, K, D)

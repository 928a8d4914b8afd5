"""The lookup of vector quantization: the index that ``fastseq.reference.vq`` defines, for every row and any codes.

Short codes, few rows, and whatever the screen on tensor cores (``vq_screen``) leaves open are swept: a program holds a
tile of rows and goes through codes with the definition's own chain of fused multiply-adds. Few rows share the codes
among programs, whose results meet in the least key of score and code. So a row's result depends neither on other rows
nor on how the work was shared.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two, target
from fastseq_kernels._pieces import MOST_D
from fastseq_kernels._scores import best_code, turned_codes
from fastseq_kernels.vq_screen import Lookup, Screened, screened

_BLOCK_N, _BLOCK_K = 64, 64  # of a sweep
_LANES_N, _LANES_K = 8, 16  # its threads: 8 rows times 4 codes each, as many best scores, and their places
_MERGE_N = 32
_LEAST_D = 17  # shorter codes are swept: the tensor core would wait for the minima
_LEAST_WORK = 1 << 28  # multiply-adds, about 20 us of a sweep: less is over before a screen's launches, by estimate
_LEAST_K = 128  # fewer codes cost a row less than its pieces and candidates, by estimate
_SCRATCH = 64 << 20  # bytes, of sorted scores
_INDEX = {16: torch.int16, 32: torch.int32, 64: torch.int64}


@triton.jit
def _key(score, code):
    """int64, ordered as scores and then as codes; zeros of either sign are equal."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | code


@triton.jit(do_not_specialize=["N", "K", "first", "rows", "span"])
def _sweep_kernel(
    x_ptr,  # [G, N, D]
    turned_ptr,  # float32 [G, D, K]
    starts_ptr,  # float32 [G, K]
    list_ptr,  # int32 [G, rows] the rows to look up, or None: first .. first + rows - 1
    count_ptr,  # int32 [G] how many of them, or None
    keys_ptr,  # int64 [G, rows] in/out: the least of what any program found
    N,
    K,
    D,
    first,
    rows,
    span,  # codes per split
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES_N: tl.constexpr,
    LANES_K: tl.constexpr,
):
    g, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    count = rows
    if count_ptr is not None:
        count = tl.load(count_ptr + g)
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK_N), tl.num_programs(0)):
        i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        alive = i < count
        n = first + i
        if list_ptr is not None:
            n = tl.load(list_ptr + g * rows + i, mask=alive, other=0)
        score, place = best_code(
            x_ptr + (g * N + n) * D,
            1,
            alive,
            turned_ptr + g * D * K,
            K,
            starts_ptr + g * K,
            split * span,
            tl.minimum(split * span + span, K),
            D,
            BLOCK_N,
            BLOCK_K,
            LANES_N,
            LANES_K,
        )
        tl.atomic_min(keys_ptr + g * rows + i, _key(score, place), mask=alive, sem="relaxed")


@triton.jit
def finite_rows(row_ptrs, alive, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which rows are finite, bool [BLOCK_N]."""
    worst = tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(row_ptrs[:, None] + d[None, :], mask=alive[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        worst = tl.maximum(worst, tl.max(tl.where(tl.abs(x) < float("inf"), 0.0, 1.0), axis=1))
    return worst == 0


@triton.jit(do_not_specialize=["N", "first", "rows"])
def _write_kernel(
    x_ptr,  # [G, N, D]
    mask_ptr,  # bool [G, N] or None
    list_ptr,  # as of the sweep
    count_ptr,
    keys_ptr,  # int64 [G, rows]
    index_ptr,  # [G, N] out
    score_ptr,  # float32 [G, N] out, or None
    N,
    D,
    first,
    rows,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    count = rows
    if count_ptr is not None:
        count = tl.load(count_ptr + g)
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK_N), tl.num_programs(0)):
        i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        alive = i < count
        n = first + i
        if list_ptr is not None:
            n = tl.load(list_ptr + g * rows + i, mask=alive, other=0)
        key = tl.load(keys_ptr + g * rows + i, mask=alive, other=0)
        bits, place = (key >> 32).to(tl.int32), key.to(tl.int32)
        score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        finite = finite_rows(x_ptr + (g * N + n) * D, alive, D, BLOCK_N, BLOCK_D)
        score, place = tl.where(finite, score, float("inf")), tl.where(finite, place, 0)
        if mask_ptr is not None:
            counts = tl.load(mask_ptr + g * N + n, mask=alive, other=0) != 0
            score, place = tl.where(counts, score, float("inf")), tl.where(counts, place, -1)
        tl.store(index_ptr + g * N + n, place, mask=alive)
        if score_ptr is not None:
            tl.store(score_ptr + g * N + n, score, mask=alive)


@triton.jit(do_not_specialize=["N", "K", "first", "rows"])
def _keys_kernel(
    x_ptr,  # [G, N, D]
    turned_ptr,  # float32 [G, D, K]
    starts_ptr,  # float32 [G, K]
    keys_ptr,  # int64 [G, rows, K] out   of rows first .. first + rows - 1; ordered as scores, then as codes
    N,
    K,
    D,
    first,
    rows,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    g = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    alive, inside = i < rows, k < K
    row_ptrs = x_ptr + (g * N + first + i) * D
    start = tl.load(starts_ptr + g * K + k, mask=inside, other=float("inf"))
    score = tl.broadcast_to(start[None, :], [BLOCK_N, BLOCK_K])
    finite = alive
    for d in range(D):
        x = tl.load(row_ptrs + d, mask=alive, other=0.0).to(tl.float32)
        c = tl.load(turned_ptr + (g * D + d) * K + k, mask=inside, other=0.0)
        finite = finite & (tl.abs(x) < float("inf"))
        rows_x = tl.broadcast_to(x[:, None], [BLOCK_N, BLOCK_K])
        score = tl.fma(rows_x, tl.broadcast_to(c[None, :], [BLOCK_N, BLOCK_K]), score)
    score = tl.where((score == score) & finite[:, None], score, float("inf"))
    at = (g * rows + i)[:, None] * K + k[None, :]
    tl.store(keys_ptr + at, _key(score, k[None, :]), mask=alive[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows", "N", "K", "best"])
def gather_kernel(
    x_ptr,  # [G, N, D]
    codebook_ptr,  # [G, K, D]
    index_ptr,  # [G, rows] rows = N * best; -1: a row that does not count
    codes_ptr,  # [G, rows, D] out, or None: the chosen codes, zero in rows that do not count
    distance_ptr,  # float32 [G, rows] out, or None: squared, zero in rows that do not count
    rows,
    N,
    K,
    D,
    best,
    SEVERAL: tl.constexpr,  # best > 1
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # N * best may pass 2^31
    inside = i < rows
    k = tl.load(index_ptr + g * rows + i, mask=inside, other=-1).to(tl.int64)
    live = k >= 0
    code_ptrs = codebook_ptr + (g * K + tl.maximum(k, 0)) * D
    row_ptrs = x_ptr + (g * N + (i // best if SEVERAL else i)) * D
    total = tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        read = live[:, None] & (d < D)[None, :]
        c = tl.load(code_ptrs[:, None] + d[None, :], mask=read, other=0.0).to(tl.float32)
        if codes_ptr is not None:
            at = (g * rows + i)[:, None] * D + d[None, :]
            tl.store(codes_ptr + at, c, mask=inside[:, None] & (d < D)[None, :])
        if distance_ptr is not None:
            apart = tl.load(row_ptrs[:, None] + d[None, :], mask=read, other=0.0).to(tl.float32) - c
            total += tl.sum(apart * apart, axis=1)
    if distance_ptr is not None:
        tl.store(distance_ptr + g * rows + i, total, mask=inside)


def sweep(call: Lookup, part: Screened | None = None) -> None:
    """Writes index and score of all rows, or of those that a screen left open."""
    (G, N, D), K = call.x.shape, call.codebook.shape[1]
    device = call.x.device
    many = target(device).multiprocessors
    if part is None:
        first, rows, listed, tiles = 0, N, (None, None), cdiv(N, _BLOCK_N)
        splits = min(cdiv(K, 2 * _BLOCK_K), max(1, 4 * many // max(1, tiles * G)))
        grids = (tiles, cdiv(N, _MERGE_N))
    else:  # how many rows is known on the device alone: programs share what there is
        first, rows, listed = part.first, part.rows, (part.open, part.count)
        splits = cdiv(K, _BLOCK_K)
        grids = (cdiv(8 * many, splits), many)
    span = cdiv(cdiv(K, splits), _BLOCK_K) * _BLOCK_K
    keys = torch.full((G, rows), torch.iinfo(torch.int64).max, device=device)
    launch(
        _sweep_kernel,
        (grids[0], splits, G),
        *(call.x, call.turned, call.starts, *listed, keys, N, K, D, first, rows, span),
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        LANES_N=_LANES_N,
        LANES_K=_LANES_K,
        num_warps=4,
    )
    launch(
        _write_kernel,
        (grids[1], G),
        *(call.x, call.mask, *listed, keys, call.index, call.score, N, D, first, rows),
        BLOCK_N=_MERGE_N,
        BLOCK_D=power_of_two(D, most=64),
        num_warps=4,
    )


def lookup(
    x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, screen: int, dtype: torch.dtype, want_score: bool
) -> tuple[Tensor, Tensor | None]:
    """Index [G, N] of that dtype, and the score [G, N] where it is wanted."""
    G, N, D = x.shape
    K = codebook.shape[1]
    index = torch.empty(G, N, dtype=dtype, device=x.device)
    score = torch.empty(G, N, dtype=torch.float32, device=x.device) if want_score else None
    call = Lookup(x, codebook, *turned_codes(codebook, dot), dot, mask, index, score)
    able = _LEAST_D <= D <= MOST_D
    if able and (screen == 1 or (screen == 2 and K >= _LEAST_K and G * N * K * D >= _LEAST_WORK)):
        for part in screened(call):
            sweep(call, part)
    else:
        sweep(call)
    return index, score


def _several(
    x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, best: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Index and score [G, N, best]: the least of all scores of some rows at a time, as keys that are never equal."""
    (G, N, D), K = x.shape, codebook.shape[1]
    index = torch.empty(G, N, best, dtype=dtype, device=x.device)
    score = torch.empty(G, N, best, dtype=torch.float32, device=x.device)
    starts, turned = turned_codes(codebook, dot)
    most = max(1, _SCRATCH // (8 * K * G))
    for first in range(0, N, most):
        rows = min(most, N - first)
        keys = torch.empty(G, rows, K, dtype=torch.int64, device=x.device)
        launch(
            _keys_kernel,
            (cdiv(rows, _BLOCK_N), cdiv(K, _BLOCK_K), G),
            *(x, turned, starts, keys, N, K, D, first, rows),
            BLOCK_N=_BLOCK_N,
            BLOCK_K=_BLOCK_K,
            num_warps=4,
        )
        least = keys.topk(best, dim=-1, largest=False, sorted=True).values
        bits = (least >> 32).to(torch.int32)
        score[:, first : first + rows] = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
        index[:, first : first + rows] = least & 0xFFFFFFFF
    if mask is not None:
        index.masked_fill_(~mask[..., None], -1)
        score.masked_fill_(~mask[..., None], torch.inf)
    return index, score


def gather(
    x: Tensor, codebook: Tensor, index: Tensor, codes: Tensor | None, distance: Tensor | None, best: int = 1
) -> None:
    """Writes the codes that ``index`` [G, N * best] names, and their squared distances from the rows."""
    G, N, D = x.shape
    block = power_of_two(D, least=16, most=128)
    launch(
        gather_kernel,
        (cdiv(N * best, 1024 // block), G),
        *(x, codebook, index, codes, distance, N * best, N, codebook.shape[1], D, best),
        SEVERAL=best > 1,
        BLOCK_N=1024 // block,
        BLOCK_D=block,
        num_warps=4,
    )


def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    dot: bool,
    best: int,
    bits: int,
    distance: bool,
    score: bool,
    screen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastseq::vq_nearest``; distances and scores in float32."""
    G, N, _ = x.shape
    none = torch.empty(0, dtype=torch.float32, device=x.device)
    if best == 1:
        index, scores = lookup(x, codebook, mask, dot, screen, _INDEX[bits], score)
        index, scores = index[..., None], none if scores is None else scores[..., None]
    else:
        index, scores = _several(x, codebook, mask, dot, best, _INDEX[bits])
    apart = none
    if distance:
        apart = torch.empty(G, N, best, dtype=torch.float32, device=x.device)
        gather(x, codebook, index, None, apart, best)
    return index, apart, scores if score else none.clone()

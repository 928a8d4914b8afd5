"""What an ensemble says and how right it is: two reads of the logits, all members of a row in one program.

The first read finds each member's maximum and sum of exponentials, the second the mean probability, which is written
only where it is asked for. Figures over rows are sums of chunks, each a program's, in float64 and in a fixed order:
bits are the same from run to run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two
from fastseq_kernels.mimo_nll import finite, labelled, log_total, online, width_of

_RUN_TIME = ["B", "K", "chunk", "ignore", "bins"]  # sizes that must not compile anew
_TILE = 1024  # numbers of a tile of several rows, 8 a thread; of one row twice as many
_CHUNK = 512  # rows that one program adds up, at least
_MOST_CHUNKS = 256
_MOST_MEMBERS = 1024


@triton.jit
def _first_of(x, most, place, AXIS: tl.constexpr):
    """The place of the first of the largest numbers along AXIS; any valid place where none is a number."""
    found = tl.min(tl.where(x == tl.expand_dims(most, AXIS), place, 2147483647), axis=AXIS)
    return tl.where(found == 2147483647, 0, found)


@triton.jit(do_not_specialize=_RUN_TIME)
def _rows_kernel(
    logits_ptr,  # [B, M, K]
    labels_ptr,  # int64 [B] or None
    probability_ptr,  # float32 [B, K] out, or None
    prediction_ptr,  # int64 [B] out
    confidence_ptr,  # float32 [B] out
    members_ptr,  # int64 [B, M] out
    disagreement_ptr,  # float32 [B] out
    nll_ptr,  # float32 [B] out
    brier_ptr,  # float32 [B] out
    B,
    K,
    ignore,
    log_members,  # log(M)
    M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    m = tl.arange(0, BLOCK_M)
    in_b, is_member = b < B, (m < M)[None, :]
    inside = in_b[:, None] & is_member
    logits = logits_ptr + (b[:, None] * M + m[None, :]) * K

    most = tl.full([BLOCK_B, BLOCK_M], float("-inf"), tl.float32)
    total, member = tl.zeros([BLOCK_B, BLOCK_M], tl.float32), tl.zeros([BLOCK_B, BLOCK_M], tl.int32)
    undefined = tl.full([BLOCK_B, BLOCK_M], 2147483647, tl.int32)  # where the first NaN is: a maximum may pass it over
    for k0 in range(0, K, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K))[None, None, :]
        x = tl.load(logits[:, :, None] + k, mask=inside[:, :, None] & (k < K), other=float("-inf")).to(tl.float32)
        here = tl.max(x, axis=2)
        member = tl.where(here > most, _first_of(x, here, k, 2), member)
        undefined = tl.minimum(undefined, tl.min(tl.where(x != x, k, 2147483647), axis=2))
        most, total = online(most, total, x, 2)
    member = tl.where(undefined < K, undefined, member)
    most = tl.where(inside, most, 0.0)
    logsum = log_total(most, tl.where(inside, total, 1.0))
    tl.store(members_ptr + b[:, None] * M + m[None, :], member.to(tl.int64), mask=inside)
    differ = tl.zeros([BLOCK_B], tl.int32)  # ordered pairs
    for other in range(M):
        theirs = tl.sum(tl.where((m == other)[None, :], member, 0), axis=1)
        differ += tl.sum(((member != theirs[:, None]) & is_member).to(tl.int32), axis=1)
    pairs: tl.constexpr = M * (M - 1) if M > 1 else 1
    tl.store(disagreement_ptr + b, tl.div_rn(differ.to(tl.float32), tl.full([BLOCK_B], pairs, tl.float32)), mask=in_b)

    best = tl.full([BLOCK_B], -1.0, tl.float32)
    squares, prediction = tl.zeros([BLOCK_B], tl.float32), tl.zeros([BLOCK_B], tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = inside[:, :, None] & (k < K)[None, None, :]
        x = tl.load(logits[:, :, None] + k[None, None, :], mask=mask, other=float("-inf")).to(tl.float32)
        p = tl.sum(tl.exp((x - most[:, :, None]) - logsum[:, :, None]), axis=1) * (1.0 / M)
        in_k = in_b[:, None] & (k < K)[None, :]
        p = tl.where(in_k, p, -1.0)
        here = tl.max(p, axis=1)
        prediction = tl.where(here > best, _first_of(p, here, k[None, :], 1), prediction)
        best = tl.maximum(best, here)
        squares += tl.sum(tl.where(in_k, p * p, 0.0), axis=1)
        if probability_ptr is not None:
            tl.store(probability_ptr + b[:, None] * K + k[None, :], p, mask=in_k)
    tl.store(prediction_ptr + b, prediction.to(tl.int64), mask=in_b)
    tl.store(confidence_ptr + b, tl.where(best < 0, squares, best), mask=in_b)  # no number where none is one

    nll, brier = tl.zeros([BLOCK_B], tl.float32), tl.zeros([BLOCK_B], tl.float32)
    if labels_ptr is not None:
        label, given = labelled(labels_ptr, b, in_b, ignore, K)
        read = given[:, None] & is_member
        picked = tl.load(logits + label[:, None], mask=read, other=float("-inf")).to(tl.float32)
        picked = (picked - most) - logsum
        largest, sums = online(tl.full([BLOCK_B], float("-inf"), tl.float32), tl.zeros_like(nll), picked, 1)
        said = tl.sum(tl.exp(picked), axis=1) * (1.0 / M)
        nll = tl.where(given, log_members - (finite(largest) + tl.log(tl.where(given, sums, 1.0))), 0.0)
        brier = tl.where(given, squares - 2 * said + 1, 0.0)
    tl.store(nll_ptr + b, nll, mask=in_b)
    tl.store(brier_ptr + b, brier, mask=in_b)


@triton.jit
def _counted(labels_ptr, prediction_ptr, b, inside, ignore, K):
    """Label, whether there is one, and whether the prediction is right."""
    label, given = labelled(labels_ptr, b, inside, ignore, K)
    return label, given, given & (tl.load(prediction_ptr + b, mask=given, other=-1) == label)


@triton.jit(do_not_specialize=_RUN_TIME)
def _histogram_kernel(
    labels_ptr,  # int64 [B]
    prediction_ptr,  # int64 [B]
    confidence_ptr,  # float32 [B]
    out_ptr,  # float64 [chunks, 3, bins] out
    B,
    K,
    chunk,
    ignore,
    bins,
    BLOCK_B: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(first + chunk, B)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    rows, sure, good = (tl.zeros([BLOCK_B, BLOCK_I], tl.float64),) * 3
    for b0 in range(first, end, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        _, given, right = _counted(labels_ptr, prediction_ptr, b, b < end, ignore, K)
        confidence = tl.load(confidence_ptr + b, mask=given, other=0.0)
        number = tl.where(confidence == confidence, confidence, 0.0)  # NaN as an integer is anything
        place = tl.minimum(tl.maximum((number * bins).to(tl.int32), 0), bins - 1)
        mine = given[:, None] & (place[:, None] == i[None, :])
        rows += mine.to(tl.float64)
        sure += tl.where(mine, confidence[:, None], 0.0).to(tl.float64)
        good += (mine & right[:, None]).to(tl.float64)
    out = out_ptr + tl.program_id(0).to(tl.int64) * 3 * bins + i
    tl.store(out, tl.sum(rows, axis=0), mask=i < bins)
    tl.store(out + bins, tl.sum(sure, axis=0), mask=i < bins)
    tl.store(out + 2 * bins, tl.sum(good, axis=0), mask=i < bins)


@triton.jit(do_not_specialize=_RUN_TIME)
def _totals_kernel(
    labels_ptr,  # int64 [B] or None
    prediction_ptr,  # int64 [B]
    members_ptr,  # int64 [B, M]
    disagreement_ptr,  # float32 [B]
    nll_ptr,  # float32 [B]
    brier_ptr,  # float32 [B]
    out_ptr,  # float64 [chunks, 5 + M] out
    B,
    K,
    chunk,
    ignore,
    M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    first, m = tl.program_id(0).to(tl.int64) * chunk, tl.arange(0, BLOCK_M)
    end = tl.minimum(first + chunk, B)
    rows, nll, brier, good, apart = (tl.zeros([BLOCK_B], tl.float64),) * 5
    own = tl.zeros([BLOCK_B, BLOCK_M], tl.float64)
    for b0 in range(first, end, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        counted = b < end
        if labels_ptr is not None:
            label, counted, right = _counted(labels_ptr, prediction_ptr, b, b < end, ignore, K)
            good += right.to(tl.float64)
            read = counted[:, None] & (m < M)[None, :]
            member = tl.load(members_ptr + b[:, None] * M + m[None, :], mask=read, other=-1)
            own += (read & (member == label[:, None])).to(tl.float64)
        rows += counted.to(tl.float64)
        nll += tl.load(nll_ptr + b, mask=counted, other=0.0).to(tl.float64)
        brier += tl.load(brier_ptr + b, mask=counted, other=0.0).to(tl.float64)
        apart += tl.load(disagreement_ptr + b, mask=counted, other=0.0).to(tl.float64)
    out = out_ptr + tl.program_id(0) * (5 + M)
    tl.store(out, tl.sum(rows, axis=0))
    tl.store(out + 1, tl.sum(nll, axis=0))
    tl.store(out + 2, tl.sum(brier, axis=0))
    tl.store(out + 3, tl.sum(good, axis=0))
    tl.store(out + 4, tl.sum(apart, axis=0))
    tl.store(out + 5 + m, tl.sum(own, axis=0), mask=m < M)


def _tiles(M: int, K: int) -> dict[str, int]:
    members = power_of_two(M)
    width = width_of(K, max(1, 2 * _TILE // members))
    return {"BLOCK_B": max(1, _TILE // (members * width)), "BLOCK_M": members, "BLOCK_K": width, "num_warps": 4}


def _over_rows(
    labels: Tensor | None, found: tuple[Tensor, ...], K: int, bins: int, ignore: int
) -> tuple[Tensor, Tensor]:
    """Histogram and totals of the results of all rows: prediction to Brier score."""
    prediction, confidence, members, disagreement, nll, brier = found
    (B, M), device = members.shape, members.device
    chunk = max(_CHUNK, cdiv(B, _MOST_CHUNKS))
    chunks = max(1, cdiv(B, chunk))
    options: dict[str, Any] = {"dtype": torch.float64, "device": device}
    totals = torch.empty(chunks, 5 + M, **options)
    columns = power_of_two(M)
    tile = {"BLOCK_B": max(1, 1024 // columns), "BLOCK_M": columns}
    given = (labels, prediction, members, disagreement, nll, brier, totals, B, K, chunk, ignore)
    launch(_totals_kernel, (chunks,), *given, M=M, **tile, num_warps=4)
    if labels is None:
        return torch.zeros(3, bins, **options), totals.sum(0)
    histogram = torch.empty(chunks, 3, bins, **options)
    given = (labels, prediction, confidence, histogram, B, K, chunk, ignore, bins)
    launch(_histogram_kernel, (chunks, cdiv(bins, 32)), *given, BLOCK_B=32, BLOCK_I=32, num_warps=4)
    return histogram.sum(0), totals.sum(0)


def ensemble_stats_why_not(logits: Tensor, *rest: Any) -> str | None:
    """The reason against this call, or None."""
    M = logits.shape[1]
    return None if M <= _MOST_MEMBERS else f"an ensemble of {M} members, more than {_MOST_MEMBERS}"


def ensemble_stats(
    logits: Tensor, labels: Tensor | None, bins: int, ignore: int, probability: bool
) -> tuple[Tensor, ...]:
    """``reference.ensemble_stats`` in float32; a label out of range counts as ignored."""
    (B, M, K), device = logits.shape, logits.device
    wide = {"dtype": torch.float32, "device": device}
    mean = torch.empty((B, K) if probability else 0, **wide)
    confidence, disagreement, nll, brier = (torch.empty(B, **wide) for _ in range(4))
    prediction, members = (torch.empty(size, dtype=torch.int64, device=device) for size in ((B,), (B, M)))
    found = (prediction, confidence, members, disagreement, nll, brier)
    tiles = _tiles(M, K)
    given = (logits, labels, mean if probability else None, *found, B, K, ignore, math.log(M))
    launch(_rows_kernel, (cdiv(B, tiles["BLOCK_B"]),), *given, M=M, **tiles)
    return (mean, *found, *_over_rows(labels, found, K, bins, ignore))

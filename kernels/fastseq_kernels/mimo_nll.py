"""Cross-entropy of every slot and its gradient, in one read of the logits each.

Forward keeps the running maximum and the sum of exponentials of a row while its blocks go by; backward makes each
gradient from one logit, that maximum and the log of that sum. Nothing else of the size of the logits exists. The mean
of a slot is a sum over chunks of rows, each a program's, in float64 and in a fixed order: bits are the same from run to
run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two

_RUN_TIME = ["rows", "N", "K", "chunk", "ignore"]  # sizes that must not compile anew
_WIDTHS = (16, 64, 256, 1024, 4096)  # of a tile of classes: few, since each is a binary
_CHUNK = 1024  # rows that one program adds up, at least
_MOST_CHUNKS = 256


@triton.jit
def finite(x):
    """x, or 0 where it is infinite: what may be subtracted inside an exponential."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def online(most, total, x, AXIS: tl.constexpr):
    """The maximum and the sum of exponentials over it, of what they were and one more block x."""
    longer = tl.maximum(most, tl.max(x, axis=AXIS))
    over = finite(longer)
    total = total * tl.exp(most - over) + tl.sum(tl.exp(x - tl.expand_dims(over, AXIS)), axis=AXIS)
    return longer, total


@triton.jit
def log_total(most, total):
    """The log of the sum of exponentials over the maximum; NaN where that is infinite."""
    return tl.where(tl.abs(most) == float("inf"), float("nan"), tl.log(total))


@triton.jit
def labelled(labels_ptr, at, inside, ignore, K):
    """Labels, and which of them count."""
    label = tl.load(labels_ptr + at, mask=inside, other=-1)
    return label, inside & (label != ignore) & (label >= 0) & (label < K)


@triton.jit(do_not_specialize=_RUN_TIME)
def _rows_kernel(
    logits_ptr,  # [rows, K]
    labels_ptr,  # int64 [rows]
    nll_ptr,  # float32 [rows] out
    top_ptr,  # float32 [rows] out
    logsum_ptr,  # float32 [rows] out
    rows,
    K,
    ignore,
    sure,  # share of the target that is the label's
    spread,  # and what each class has of the rest
    SMOOTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    logits = logits_ptr + row * K
    most = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total, gaps = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k < K)[None, :]
        x = tl.load(logits[:, None] + k[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        before = finite(most)
        most, total = online(most, total, x, 1)
        if SMOOTH:  # of distances from the maximum so far: k0 of them become longer
            over = finite(most)
            gaps += tl.sum(tl.where(mask, x - over[:, None], 0.0), axis=1) - k0 * (over - before)
    logsum = log_total(most, total)
    label, given = labelled(labels_ptr, row, inside, ignore, K)
    nll = sure * (logsum - (tl.load(logits + label, mask=given, other=0.0).to(tl.float32) - most))
    if SMOOTH:
        nll += spread * (K * logsum - gaps)
    tl.store(nll_ptr + row, tl.where(given, nll, 0.0), mask=inside)
    tl.store(top_ptr + row, tl.where(total == total, most, float("nan")), mask=inside)
    tl.store(logsum_ptr + row, logsum, mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def _fold_kernel(
    values_ptr,  # [N, M] or None
    labels_ptr,  # int64 [N, M], or None where there are counts
    counts_ptr,  # float64 [N, M] how many each value is the sum of, or None where there are labels
    sums_ptr,  # float64 [chunks, M] out, or None
    given_ptr,  # float64 [chunks, M] out   of the labels that count
    loss_ptr,  # float32 [] out, or None   the sum over slots of their means, of one chunk
    N,
    M,
    K,
    chunk,
    ignore,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    m = tl.arange(0, BLOCK_M)
    first = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(first + chunk, N)
    total, count = tl.zeros([BLOCK_N, BLOCK_M], tl.float64), tl.zeros([BLOCK_N, BLOCK_M], tl.float64)
    for n0 in range(first, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside, at = (n < end)[:, None] & (m < M)[None, :], n[:, None] * M + m[None, :]
        if values_ptr is not None:
            total += tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float64)
        if labels_ptr is not None:
            _, given = labelled(labels_ptr, at, inside, ignore, K)
            count += given.to(tl.float64)
        else:
            count += tl.load(counts_ptr + at, mask=inside, other=0.0)
    sums, counts = tl.sum(total, axis=0), tl.sum(count, axis=0)
    out = tl.program_id(0) * M + m
    tl.store(given_ptr + out, counts, mask=m < M)
    if sums_ptr is not None:
        tl.store(sums_ptr + out, sums, mask=m < M)
    if loss_ptr is not None:
        tl.store(loss_ptr, tl.sum(sums / tl.maximum(counts, 1.0), axis=0).to(tl.float32))


@triton.jit(do_not_specialize=_RUN_TIME)
def _gradient_kernel(
    logits_ptr,  # [rows, K]
    labels_ptr,  # int64 [rows]
    top_ptr,  # float32 [rows]
    logsum_ptr,  # float32 [rows]
    dloss_ptr,  # [] or None
    counts_ptr,  # float64 [M] labels that count, where there is dloss
    dnll_ptr,  # [rows] or None
    d_ptr,  # [rows, K] out
    rows,
    M,
    K,
    ignore,
    sure,
    spread,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = row < rows
    label, given = labelled(labels_ptr, row, inside, ignore, K)
    weight = tl.zeros([BLOCK_N], tl.float32)
    if dloss_ptr is not None:
        count = tl.load(counts_ptr + row % M, mask=given, other=1.0).to(tl.float32)
        weight += tl.load(dloss_ptr).to(tl.float32) / count
    if dnll_ptr is not None:
        weight += tl.load(dnll_ptr + row, mask=given, other=0.0).to(tl.float32)
    top = tl.load(top_ptr + row, mask=given, other=0.0)
    logsum = tl.load(logsum_ptr + row, mask=given, other=0.0)
    at = row[:, None] * K + k[None, :]
    x = tl.load(logits_ptr + at, mask=given[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    target = tl.where(k[None, :] == label[:, None], sure, 0.0) + spread
    p = tl.exp((x - top[:, None]) - logsum[:, None])
    d = tl.where(given[:, None], weight[:, None] * (p - target), 0.0)
    tl.store(d_ptr + at, d, mask=inside[:, None] & (k < K)[None, :])


def width_of(K: int, most: int) -> int:
    """Columns of a tile of K classes: one of a few, and ``most`` of them at most."""
    return min(most, next((w for w in _WIDTHS if w >= K), _WIDTHS[-1]))


def _tiles(K: int) -> dict[str, int]:
    """8 numbers a thread, 16 where rows are long."""
    width = width_of(K, _WIDTHS[-1])
    return {"BLOCK_N": max(1, 1024 // width), "BLOCK_K": width, "num_warps": 8 if width > 1024 else 4}


class _Call(NamedTuple):
    """What the target is made of."""

    labels: Tensor  # int64 [N, M]
    K: int
    smoothing: float
    ignore: int

    @property
    def shares(self) -> tuple[float, float]:
        """Of the label, and of each class of the rest."""
        return 1 - self.smoothing, self.smoothing / max(1, self.K)


def _folded(call: _Call, nll: Tensor | None, loss: Tensor | None) -> Tensor:
    """How many labels of each slot count, float64 [1, M]; fills the loss where there is one."""
    (N, M), device = call.labels.shape, call.labels.device
    columns = power_of_two(M)
    options: dict[str, Any] = {"BLOCK_N": max(1, 1024 // columns), "BLOCK_M": columns, "num_warps": 4}
    chunk = max(_CHUNK, cdiv(N, _MOST_CHUNKS))
    chunks = max(1, cdiv(N, chunk))
    counts = torch.empty(chunks, M, dtype=torch.float64, device=device)
    if chunks == 1:
        launch(_fold_kernel, (1,), nll, call.labels, None, None, counts, loss, N, M, call.K, N, call.ignore, **options)
        return counts
    sums = None if nll is None else torch.empty_like(counts)
    first = (nll, call.labels, None, sums, counts, None, N, M, call.K, chunk, call.ignore)
    launch(_fold_kernel, (chunks,), *first, **options)
    whole = torch.empty(1, M, dtype=torch.float64, device=device)
    launch(_fold_kernel, (1,), sums, None, counts, None, whole, loss, chunks, M, call.K, chunks, call.ignore, **options)
    return whole


def mimo_nll(logits: Tensor, labels: Tensor, smoothing: float, ignore: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``reference.mimo_nll`` in float32; a label out of range counts as ignored."""
    N, M, K = logits.shape
    call = _Call(labels, K, smoothing, ignore)
    nll, top, logsum = (torch.empty(N, M, dtype=torch.float32, device=logits.device) for _ in range(3))
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    tiles = _tiles(K)
    given = (logits, labels, nll, top, logsum, N * M, K, ignore, *call.shares)
    launch(_rows_kernel, (cdiv(N * M, tiles["BLOCK_N"]),), *given, SMOOTH=smoothing > 0, **tiles)
    _folded(call, nll, loss)
    return loss, nll, top, logsum


def mimo_nll_backward(
    dloss: Tensor | None,
    dnll: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    top: Tensor,
    logsum: Tensor,
    smoothing: float,
    ignore: int,
) -> Tensor:
    """``reference.mimo_nll_backward``, of the logits' dtype; a label out of range counts as ignored."""
    N, M, K = logits.shape
    call = _Call(labels, K, smoothing, ignore)
    counts = None if dloss is None else _folded(call, None, None)
    d, tiles = torch.empty_like(logits), _tiles(K)
    grid = (cdiv(N * M, tiles["BLOCK_N"]), cdiv(K, tiles["BLOCK_K"]))
    given = (logits, labels, top, logsum, dloss, counts, dnll, d, N * M, M, K, ignore, *call.shares)
    launch(_gradient_kernel, grid, *given, **tiles)
    return d

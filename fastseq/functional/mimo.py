"""``mimo_*``: several examples in one row (MIMO, Havasi et al., ICLR 2021). Checks and layout around the operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastseq import _check, reference
from fastseq.functional.mimo_arguments import checked_index
from fastseq.ops import mimo as _mimo
from fastseq.ops import mimo_nll as _nll
from fastseq.ops._triton import in_low_precision

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_REAL = (torch.float32, torch.float64, *_LOW_PRECISION)
_REDUCTIONS = ("mean", "sum", "none")


def mimo_index(batch: int, M: int, R: int = 1, rho: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw which of ``batch`` examples slot m of row n holds, as the authors' code does.

    The examples, each R times, are shuffled; the first ``int(batch * R * (1 - rho))`` rows (in float32, as theirs) are
    shuffled again for each slot, the others hold one example in all slots. Every example lies exactly R times in every
    slot.

    Args:
        batch: examples, >= 1. M: slots, >= 2. R: batch repetition, >= 1. rho: input repetition, in [0, 1].
        generator: of the CPU; None means torch's default.

    Returns:
        int32 [M, batch * R] on the CPU.

    Raises:
        ArgumentError: naming the argument.
    """
    for name, value, least in (("batch", batch, 1), ("M", M, 2), ("R", R, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            _check.fail("mimo_index", name, f"an integer >= {least}", repr(value))
    _check.probability("mimo_index", "rho", rho)
    if batch * R >= 2**31:
        _check.fail("mimo_index", "batch * R", "below 2**31 rows", batch * R)
    return reference.mimo_index(batch, M, R, rho, generator)


def mimo_gather(x: Tensor, index: Tensor, *, batch_dim: int = 0, channel_dim: int = -1) -> Tensor:
    """The examples of each row side by side, the channels of slot 0 first.

    Args:
        x: any tensor, B examples along ``batch_dim`` and C channels along ``channel_dim``, which comes later.
        index: int32 or int64 [M, N] in 0..B-1, see ``mimo_index``.

    Returns:
        x with N instead of B and M*C instead of C. Differentiable where x is of floating point.

    Raises:
        ArgumentError: naming the argument. An index out of range: ValueError on the CPU; on a GPU it counts as an
            example of zeros.
    """
    f = "mimo_gather"
    batch, channel = _dims(f, x, batch_dim, channel_dim)
    size = x.shape
    folded = (math.prod(size[:batch]), size[batch], math.prod(size[batch + 1 : channel]), math.prod(size[channel:]))
    index = checked_index(f, index, x.device)
    # a gradient is a sum, which the CPU has no 16-bit kernel for
    dtype = _arithmetic(f, "x", x) if x.requires_grad and torch.is_grad_enabled() else x.dtype
    out = _mimo.gather(x.to(dtype).reshape(folded).contiguous(), index).to(x.dtype)
    rows = (index.shape[1], *size[batch + 1 : channel], index.shape[0] * size[channel])
    return out.view(*size[:batch], *rows, *size[channel + 1 :])


def mimo_labels(labels: Tensor, index: Tensor) -> Tensor:
    """The labels, or lengths, of every slot.

    Args:
        labels: [B, ...] of any dtype. index: int32 or int64 [M, N] in 0..B-1.

    Returns:
        [N, M, ...]. On a GPU an index out of range gives -1.

    Raises:
        ArgumentError: naming the argument. An index out of range: ValueError on the CPU.
    """
    f = "mimo_labels"
    if labels.dim() < 1:
        _check.fail(f, "labels", "[B, ...]", list(labels.shape))
    index = checked_index(f, index, labels.device)
    flat = labels.reshape(1, labels.shape[0], 1, labels.shape[1:].numel()).contiguous()
    out: Tensor = torch.ops.fastseq.mimo_gather(flat, index, None)[0]
    return out.view(index.shape[1], index.shape[0], *labels.shape[1:])


def mimo_combine(
    parts: Tensor, index: Tensor, bias: Tensor | None = None, *, batch_dim: int = 0, channel_dim: int = -1
) -> Tensor:
    """The sum over slots of what a linear layer made of each example for each slot: the second half of
    ``mimo_project``, for layers of any kind.

    Args:
        parts: B examples along ``batch_dim`` and M*G channels along ``channel_dim``, those of slot 0 first.
        index: int32 or int64 [M, N] in 0..B-1. bias: [G].

    Returns:
        parts with N instead of B and G instead of M*G: ``bias + sum over m of parts[index[m, n], ..., m*G + g]``.
    """
    f = "mimo_combine"
    batch, channel = _dims(f, parts, batch_dim, channel_dim)
    index, size = checked_index(f, index, parts.device), parts.shape
    M = index.shape[0]
    if size[channel] % M:
        _check.fail(f, "parts", f"M*G channels, a multiple of M = {M}", list(size))
    inner = math.prod(size[channel + 1 :])
    folded = (math.prod(size[:batch]), size[batch], math.prod(size[batch + 1 : channel]), size[channel] * inner)
    G = size[channel] // M
    if bias is not None:
        _check.shape(f, "bias", bias, "G", G)
        bias = bias.repeat_interleave(inner) if inner != 1 else bias
    dtype = _arithmetic(f, "parts", parts)
    wide = None if bias is None else bias.to(dtype).contiguous()
    out = _mimo.combine(parts.to(dtype).reshape(folded).contiguous(), index, wide).to(parts.dtype)
    return out.view(*size[:batch], index.shape[1], *size[batch + 1 : channel], G, *size[channel + 1 :])


def mimo_project(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *, batch_dim: int = 0) -> Tensor:
    """``linear(mimo_gather(x, index), weight, bias)``, computed once for each of the B examples and gathered then: a
    layer of R-fold repeated batches for 1/R of the products. Gradients are exact. Where that is not less work (few rows
    for each example, or few channels) the rows are multiplied after all, as gathered.

    Args:
        x: [..., C], B examples along ``batch_dim``, which is not the last.
        weight: [G, M*C], the columns of slot 0 first. bias: [G] or None. Both of x's dtype.
        index: int32 or int64 [M, N] in 0..B-1, see ``mimo_index``.

    Returns:
        x with N instead of B and G instead of C. Differentiable in x, weight and bias. bfloat16 and float16 are
        computed in float32 on the CPU.

    Raises:
        ArgumentError: naming the argument. An index out of range: ValueError on the CPU; on a GPU it counts as an
            example of zeros.
    """
    f = "mimo_project"
    batch, channel = _dims(f, x, batch_dim, -1)
    index, size = checked_index(f, index, x.device), x.shape
    M, N = index.shape
    if weight.dim() != 2 or weight.shape[1] != M * size[-1]:
        _check.fail(f, "weight", f"[G, M*C] = [G, {M * size[-1]}]", list(weight.shape))
    G = weight.shape[0]
    if bias is not None:
        _check.shape(f, "bias", bias, "G", G)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check.device(f, name, value, x.device)
            _check.dtype(f, name, value, x.dtype)
    dtype = _arithmetic(f, "x", x)
    folded = (math.prod(size[:batch]), size[batch], math.prod(size[batch + 1 : channel]), size[-1])
    wide = None if bias is None else bias.to(dtype).contiguous()
    out = _mimo.project(x.to(dtype).reshape(folded).contiguous(), weight.to(dtype).contiguous(), wide, index)
    return out.to(x.dtype).view(*size[:batch], N, *size[batch + 1 : -1], G)


def mimo_nll(
    logits: Tensor,
    labels: Tensor,
    index: Tensor | None = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of every slot, and the loss of the paper: the sum over slots of the mean over rows. Nothing of the
    size of the logits is kept for backward but the logits (a float32 copy of them, where they have 16 bits on the CPU).

    Args:
        logits: [..., M, K].
        labels: integers [..., M] in 0..K-1 or ``ignore_index``; or [B], those of the examples, beside ``index``.
        index: [M, N], where logits are [N, M, K] and labels are those of the B examples.
        reduction: "mean": the sum over slots of each slot's mean over its labels that are not ignored (torch's
            cross_entropy of all rows and slots together is this divided by M); "sum" over everything; "none".
        label_smoothing: in [0, 1], as in torch.

    Returns:
        A number, or [..., M] with "none"; float32 for logits of 16 bits. Differentiable in logits.

    Raises:
        ArgumentError: naming the argument. A label out of range: ValueError on the CPU; on a GPU it is ignored.
    """
    f = "mimo_nll"
    if logits.dim() < 2 or logits.shape[-1] < 1:
        _check.fail(f, "logits", "[..., M, K] with K >= 1", list(logits.shape))
    _check.one_of(f, "reduction", reduction, _REDUCTIONS)
    _check.probability(f, "label_smoothing", label_smoothing)
    if index is not None:
        if logits.dim() != 3 or labels.dim() != 1:
            got = f"logits {list(logits.shape)} and labels {list(labels.shape)}"
            _check.fail(f, "index", "beside logits [N, M, K] and labels [B]", got)
        labels = mimo_labels(labels, index)
    if labels.shape != logits.shape[:-1]:
        _check.fail(f, "labels", f"[..., M] = {list(logits.shape[:-1])}", list(labels.shape))
    if labels.is_floating_point() or labels.dtype == torch.bool:
        _check.fail(f, "labels", "integers", labels.dtype)
    _check.device(f, "labels", labels, logits.device)
    dtype = _arithmetic(f, "logits", logits)
    flat = labels
    if logits.dim() != 3:  # a view costs as much as a small call, here and in backward
        logits, flat = logits.reshape(-1, *logits.shape[-2:]), labels.reshape(-1, labels.shape[-1])
    if logits.dtype != dtype:
        logits = logits.to(dtype)
    if flat.dtype != torch.int64:
        flat = flat.to(torch.int64)
    loss, nll = _nll.nll(logits.contiguous(), flat.contiguous(), label_smoothing, ignore_index)
    if reduction == "mean":
        return loss
    return nll.sum() if reduction == "sum" else nll.view(labels.shape)


def _dims(f: str, x: Tensor, batch_dim: int, channel_dim: int) -> tuple[int, int]:
    """Both from 0 on; the batch comes first."""
    found = []
    for name, dim in (("batch_dim", batch_dim), ("channel_dim", channel_dim)):
        if isinstance(dim, bool) or not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
            _check.fail(f, name, f"a dimension of {list(x.shape)}", repr(dim))
        found.append(dim % x.dim())
    if found[0] >= found[1]:
        _check.fail(f, "batch_dim", f"before the channels, dimension {found[1]} of {list(x.shape)}", batch_dim)
    return found[0], found[1]


def _arithmetic(f: str, name: str, x: Tensor) -> torch.dtype:
    if x.dtype not in _REAL:
        _check.fail(f, name, "float32, float64, bfloat16 or float16", x.dtype)
    return torch.float32 if x.dtype in _LOW_PRECISION and not in_low_precision(x.device) else x.dtype

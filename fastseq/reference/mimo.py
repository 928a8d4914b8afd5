"""Definitions for MIMO (Havasi et al., ICLR 2021): several examples in one row, each in a slot of its own.

``index`` [M, N] says which of B distinct examples slot m of row n holds. Layout of x and results: [A, B, S, C], the
examples second; A are the steps where time comes first, S what lies between examples and channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mimo_index(batch: int, M: int, R: int = 1, rho: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw the examples of every slot, as the paper's own code does.

    0..batch-1 repeated R times is shuffled once. The first ``int(batch * R * (1 - rho))`` rows (in float32) are
    shuffled again for each slot; the others hold one example in all slots. So each example lies R times in each slot.

    Returns:
        int32 [M, batch * R].
    """
    N = batch * R
    shuffled = torch.arange(batch).repeat(R)[torch.randperm(N, generator=generator)]
    apart = int(
        torch.tensor(N, dtype=torch.float32) * torch.tensor(1 - rho, dtype=torch.float32)
    )  # in float32, as they do
    slots = [
        torch.cat((shuffled[:apart][torch.randperm(apart, generator=generator)], shuffled[apart:])) for _ in range(M)
    ]
    return torch.stack(slots).to(torch.int32)


def mimo_gather(x: Tensor, index: Tensor) -> Tensor:
    """The examples of each row side by side: x [A, B, S, C], index [M, N] -> [A, N, S, M*C]."""
    taken = x[:, index.long()]  # [A, M, N, S, C]
    return taken.permute(0, 2, 3, 1, 4).flatten(3)


def mimo_gather_backward(d: Tensor, index: Tensor, B: int) -> Tensor:
    """The adjoint of ``mimo_gather``: d [A, N, S, M*C] -> [A, B, S, C], each example the sum over where it lies."""
    M = index.shape[0]
    slots = d.unflatten(3, (M, d.shape[3] // M)).permute(0, 3, 1, 2, 4)  # [A, M, N, S, C]
    out = d.new_zeros(d.shape[0], B, d.shape[2], d.shape[3] // M)
    return out.index_add(1, index.long().flatten(), slots.flatten(1, 2))


def mimo_combine(parts: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum over slots of what a linear layer made of each example for each slot.

    Args:
        parts: [A, B, S, M*G]. index: [M, N]. bias: [G].

    Returns:
        [A, N, S, G]: ``bias + sum over m of parts[a, index[m, n], s, m]``.
    """
    M = index.shape[0]
    slots = parts.unflatten(3, (M, parts.shape[3] // M))
    out = sum(slots[:, index[m].long(), :, m] for m in range(M))
    assert isinstance(out, Tensor)
    return out if bias is None else out + bias


def mimo_combine_backward(d: Tensor, index: Tensor, B: int) -> Tensor:
    """The adjoint of ``mimo_combine``: d [A, N, S, G] -> [A, B, S, M*G]."""
    zeros = d.new_zeros(d.shape[0], B, *d.shape[2:])
    parts = torch.stack([zeros.index_add(1, slot.long(), d) for slot in index], 3)
    return parts.flatten(3)


def slot_columns(weight: Tensor, M: int) -> Tensor:
    """The weight of the layer that makes all parts: [G, M*C] -> [M*G, C]."""
    slots = weight.view(weight.shape[0], M, weight.shape[1] // M)
    return slots.transpose(0, 1).flatten(0, 1)


def mimo_project(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """A linear layer on rows of ``mimo_gather``, computed once for each example and gathered then.

    Args:
        x: [A, B, S, C]. weight: [G, M*C], the columns of one slot after those of another. bias: [G]. index: [M, N].

    Returns:
        [A, N, S, G], equal to ``mimo_gather(x, index) @ weight.T + bias``.
    """
    return mimo_combine(x @ slot_columns(weight, index.shape[0]).mT, index, bias)


def mimo_project_backward(d: Tensor, x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias from d [A, N, S, G]."""
    M, C = index.shape[0], x.shape[3]
    parts = mimo_combine_backward(d, index, x.shape[1])
    dx = parts @ slot_columns(weight, M)
    dcolumns = parts.flatten(0, 2).mT @ x.flatten(0, 2)  # [M*G, C]
    dweight = dcolumns.unflatten(0, (M, weight.shape[0])).transpose(0, 1).reshape(weight.shape[0], M * C)
    return dx, dweight, d.sum((0, 1, 2))


def softmax_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits [..., K] their largest, a constant, and the log of the sum of exponentials of the distances from it.

    ``log_softmax`` is ``(logits - top) - logsum``; their sum, logsumexp, would lose digits of large logits.
    """
    top = logits.detach().amax(-1)
    return top, (logits - top[..., None]).exp().sum(-1).log()


def mimo_nll(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, ignore: int = -100
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of every slot, and the loss of the paper: the sum over slots of the mean over rows.

    Args:
        logits: [N, M, K]. labels: int64 [N, M] in 0..K-1, or ``ignore``.
        smoothing: share of the target that is spread evenly over the classes, in [0, 1].

    Returns:
        A tuple of four

        - loss []: a slot's mean is over its labels that are not ignored, 0 where there are none.
        - nll [N, M]: 0 where ignored, NaN where a logit is NaN or +inf or all are -inf.
        - top, logsum [N, M]: of ``softmax_sums``, not differentiable.
    """
    top, logsum = softmax_sums(logits)
    logp = (logits - top[..., None]) - logsum[..., None]
    given = labels != ignore
    nll = -(1 - smoothing) * logp.gather(2, torch.where(given, labels, 0)[..., None]).squeeze(2)
    if smoothing:
        nll = nll - smoothing * logp.mean(2)
    nll = torch.where(given, nll, 0)
    return (nll.sum(0) / given.sum(0).clamp_min(1)).sum(), nll, top, logsum.detach()


def mimo_nll_backward(
    dloss: Tensor | None,
    dnll: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    top: Tensor,
    logsum: Tensor,
    smoothing: float = 0.0,
    ignore: int = -100,
) -> Tensor:
    """dlogits [N, M, K] from dloss [] and dnll [N, M], either may be None; 0 in rows whose label is ignored."""
    given = labels != ignore
    weight = torch.zeros_like(logsum)
    if dloss is not None:
        weight = weight + dloss / given.sum(0).clamp_min(1)
    if dnll is not None:
        weight = weight + dnll
    target = torch.nn.functional.one_hot(torch.where(given, labels, 0), logits.shape[2]).to(logits.dtype)
    target = (1 - smoothing) * target + smoothing / logits.shape[2]
    p = ((logits - top[..., None]) - logsum[..., None]).exp()
    return torch.where(given[..., None], weight[..., None] * (p - target), 0)


def ensemble_stats(
    logits: Tensor, labels: Tensor | None = None, bins: int = 15, ignore: int = -100
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What an ensemble says, and how right it is.

    Args:
        logits: [B, M, K] of M members. labels: int64 [B] in 0..K-1, or ``ignore``.
        bins: of the confidence, of equal width: bin i is [i / bins, (i + 1) / bins), the last one holds 1 too.

    Returns:
        A tuple of nine

        - probability [B, K]: the mean over members of the softmax.
        - prediction [B]: its largest, the first among equals. confidence [B]: that probability.
        - member_prediction [B, M]: of each member.
        - disagreement [B]: the share of the pairs of members whose predictions differ; 0 for one member.
        - nll [B]: ``-log`` of the mean over members of the label's probability, by logsumexp.
        - brier [B]: ``sum over k of (probability - [k is the label])^2``. Both are 0 without a label.
        - histogram, float64 [3, bins]: rows with a label, their confidence, and how many of them are right.
        - totals, float64 [5 + M], over rows with a label: how many, sums of nll and of brier, how many are right, the
          sum of disagreement, and how often each member is right. Over all rows and only disagreement without
          ``labels``.

        Where a member has a NaN, a +inf or nothing but -inf, probability, confidence, nll and brier of the row are NaN,
        its prediction is 0 and its bin the first. A member predicts its first NaN, as ``argmax`` does.
    """
    B, M, K = logits.shape
    logp = logits.log_softmax(2)
    probability = logp.exp().mean(1)
    confidence, prediction = probability.max(1) if K else (logits.new_zeros(B), logits.new_zeros(B).long())
    members = logits.argmax(2)
    differ = (members[:, :, None] != members[:, None, :]).sum((1, 2)).to(logits.dtype)
    disagreement = differ / max(1, M * (M - 1))
    given = torch.zeros_like(prediction, dtype=torch.bool) if labels is None else labels != ignore
    safe = torch.zeros_like(prediction) if labels is None else torch.where(given, labels, 0)
    picked = logp.gather(2, safe[:, None, None].expand(B, M, 1)).squeeze(2)
    nll = torch.where(given, torch.tensor(M, dtype=logits.dtype).log() - picked.logsumexp(1), 0)
    label_probability = probability.gather(1, safe[:, None]).squeeze(1)
    brier = torch.where(given, probability.square().sum(1) - 2 * label_probability + 1, 0)
    right = (prediction == safe) & given
    place = (confidence.nan_to_num() * bins).long().clamp(0, bins - 1)[given]  # NaN as an integer is anything
    rows = torch.stack([torch.ones_like(nll), confidence, right.to(nll.dtype)]).double()[:, given]
    histogram = rows.new_zeros(3, bins).index_add(1, place, rows)
    counted = given if labels is not None else torch.ones_like(given)
    sums = [counted, nll, brier, right, torch.where(counted, disagreement, 0)]
    member_right = ((members == safe[:, None]) & given[:, None]).double().sum(0)
    totals = torch.cat([torch.stack([v.double().sum() for v in sums]), member_right])
    return probability, prediction, confidence, members, disagreement, nll, brier, histogram, totals

"""The rivals of the MIMO operators in plain torch: formatting as torch-uncertainty does it, loss, statistics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rows(x: Tensor, index: Tensor) -> Tensor:
    """[T, B, C] -> [T, N, M*C]: one selection per slot, stacked, then channels side by side."""
    slots = torch.stack([torch.index_select(x, 1, slot) for slot in index])
    return slots.permute(1, 2, 0, 3).reshape(x.shape[0], index.shape[1], -1)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over slots of the mean over rows, as torch-uncertainty takes it times M."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * logits.shape[1]


def stats(logits: Tensor, labels: Tensor, bins: int = 15) -> tuple[Tensor, ...]:
    """What ``fastseq.functional.ensemble_stats`` returns, in its order, for rows that all have a label."""
    B, M, _ = logits.shape
    logp = logits.log_softmax(2)
    probability = logp.exp().mean(1)
    confidence, prediction = probability.max(1)
    members = logits.argmax(2)
    disagreement = (members[:, :, None] != members[:, None, :]).sum((1, 2)).float() / (M * (M - 1))
    picked = logp.gather(2, labels[:, None, None].expand(B, M, 1)).squeeze(2)
    log_m = torch.tensor(float(M)).log()
    loss = log_m - picked.logsumexp(1)
    of_label = probability.gather(1, labels[:, None]).squeeze(1)
    brier = probability.square().sum(1) - 2 * of_label + 1
    right = prediction == labels
    place = (confidence * bins).long().clamp_max(bins - 1)
    each = torch.stack([torch.ones_like(loss), confidence, right.to(loss.dtype)]).double()
    histogram = each.new_zeros(3, bins).index_add(1, place, each)
    sums = torch.stack([v.double().sum() for v in (torch.ones_like(loss), loss, brier, right, disagreement)])
    totals = torch.cat([sums, (members == labels[:, None]).double().sum(0)])
    return probability, prediction, confidence, members, disagreement, loss, brier, histogram, totals

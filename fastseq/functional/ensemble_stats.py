"""``ensemble_stats``: what an ensemble says and how right it is, in one pass over its logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _check
from fastseq.ops import ensemble_stats as _ops  # noqa: F401  (gives torch the operator)
from fastseq.ops._triton import in_low_precision

_LOW_PRECISION = (torch.bfloat16, torch.float16)


class EnsembleStats(NamedTuple):
    """Results per row of ``ensemble_stats``, and over all rows. Figures over rows count those with a label."""

    probability: Tensor | None  # [B, K], the mean over members of the softmax
    prediction: Tensor  # int64 [B]
    confidence: Tensor  # [B], the probability of the prediction
    member_prediction: Tensor  # int64 [B, M]
    disagreement: Tensor  # [B], share of the pairs of members that predict differently
    nll: Tensor  # [B], -log of the label's probability; 0 without a label
    brier: Tensor  # [B], squared distance of the probabilities to the label's; 0 without a label
    histogram: Tensor  # float64 [3, bins]: rows, sum of confidence and right ones in each bin of the confidence
    totals: Tensor  # float64 [5 + M]: rows; sums of nll, brier, right ones, disagreement; right ones of each member

    @property
    def mean_nll(self) -> Tensor:
        return self.totals[1] / self.totals[0]

    @property
    def mean_brier(self) -> Tensor:
        return self.totals[2] / self.totals[0]

    @property
    def accuracy(self) -> Tensor:
        return self.totals[3] / self.totals[0]

    @property
    def mean_disagreement(self) -> Tensor:
        return self.totals[4] / self.totals[0]

    @property
    def member_accuracy(self) -> Tensor:
        """[M]."""
        return self.totals[5:] / self.totals[0]

    @property
    def ece(self) -> Tensor:
        """Expected calibration error, the mean over rows of their bin's ``|accuracy - confidence|``."""
        return (self.histogram[2] - self.histogram[1]).abs().sum() / self.totals[0]


def ensemble_stats(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    bins: int = 15,
    ignore_index: int = -100,
    return_probability: bool = True,
) -> EnsembleStats:
    """Mean probability, its negative log-likelihood, Brier score and calibration, and what single members say.

    The likelihood is that of the mean of probabilities, by logsumexp; equal bits for any number of threads. No
    gradient: train with ``mimo_nll``.

    Args:
        logits: [B, M, K] of M members, M >= 1; bfloat16 and float16 are computed in float32.
        labels: integers [B] in 0..K-1, or ``ignore_index`` for rows that no figure counts.
        bins: of equal width, 1..4096. Bin i holds confidences in [i / bins, (i + 1) / bins), the last one 1 too.

    Raises:
        ArgumentError: naming the argument. A label out of range: ValueError on the CPU; on a GPU it is ignored.
    """
    f = "ensemble_stats"
    if logits.dim() != 3 or logits.shape[1] < 1 or logits.shape[2] < 1:
        _check.fail(f, "logits", "[B, M, K] with M, K >= 1", list(logits.shape))
    if logits.dtype not in (torch.float32, torch.float64, *_LOW_PRECISION):
        _check.fail(f, "logits", "float32, float64, bfloat16 or float16", logits.dtype)
    if isinstance(bins, bool) or not isinstance(bins, int) or not 1 <= bins <= 4096:
        _check.fail(f, "bins", "an integer in 1..4096", repr(bins))
    if labels is not None:
        _check.shape(f, "labels", labels, "B", logits.shape[0])
        if labels.is_floating_point() or labels.dtype == torch.bool:
            _check.fail(f, "labels", "integers", labels.dtype)
        _check.device(f, "labels", labels, logits.device)
        labels = labels.to(torch.int64).contiguous()
    values = logits.detach()
    if values.dtype in _LOW_PRECISION and not in_low_precision(values.device):
        values = values.float()
    found = torch.ops.fastseq.ensemble_stats(values.contiguous(), labels, bins, ignore_index, return_probability)
    return EnsembleStats(found[0] if return_probability else None, *found[1:])

"""Metrics of ensembles for torchmetrics: of the mean over members of the probabilities, summed over batches and ranks.

All hold the same sums, so that a ``MetricCollection`` of them updates one for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import _check, functional

try:
    from torchmetrics import Metric  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    raise ImportError("the metrics of fastseq.calibration need torchmetrics: pip install torchmetrics") from None


class _EnsembleMetric(Metric):  # type: ignore[misc,unused-ignore]  # not there without torchmetrics
    """
    Args:
        bins: of the confidence, of equal width, 1..4096. ignore_index: label of rows that do not count.
        options: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False
    totals: Tensor
    histogram: Tensor

    def __init__(self, bins: int = 15, ignore_index: int = -100, **options: Any) -> None:
        super().__init__(**options)
        if isinstance(bins, bool) or not isinstance(bins, int) or not 1 <= bins <= 4096:
            _check.fail(type(self).__name__, "bins", "an integer in 1..4096", repr(bins))
        self.bins, self.ignore_index = bins, ignore_index
        # rows; sums of nll, brier, right ones and disagreement
        self.add_state("totals", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(3, bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """
        Args:
            logits: [B, M, K] of M members, or [B, K] of one. labels: integers [B] in 0..K-1, or ``ignore_index``.
        """
        logits = logits.unsqueeze(1) if logits.dim() == 2 else logits
        found = functional.ensemble_stats(
            logits, labels, bins=self.bins, ignore_index=self.ignore_index, return_probability=False
        )
        self.totals = self.totals + found.totals[:5]
        self.histogram = self.histogram + found.histogram

    def _mean(self, figure: int) -> Tensor:
        return self.totals[figure] / self.totals[0]


class EnsembleNLL(_EnsembleMetric):
    """Negative log-likelihood of the mean probability."""

    higher_is_better = False

    def compute(self) -> Tensor:
        return self._mean(1)


class EnsembleBrier(_EnsembleMetric):
    """Squared distance of the mean probabilities to the label's, summed over classes: 0..2."""

    higher_is_better = False

    def compute(self) -> Tensor:
        return self._mean(2)


class EnsembleAccuracy(_EnsembleMetric):
    """Share of the rows whose largest mean probability is the label's."""

    higher_is_better = True

    def compute(self) -> Tensor:
        return self._mean(3)


class Disagreement(_EnsembleMetric):
    """Share of the pairs of members that predict differently; 0 for one member."""

    higher_is_better = None

    def compute(self) -> Tensor:
        return self._mean(4)


class EnsembleECE(_EnsembleMetric):
    """Expected calibration error: ``|accuracy - confidence|`` of each bin of confidence, weighted by its rows."""

    higher_is_better = False

    def compute(self) -> Tensor:
        return (self.histogram[2] - self.histogram[1]).abs().sum() / self.totals[0]

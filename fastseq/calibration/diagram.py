"""``reliability_diagram``: accuracy against confidence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import _check


def reliability_diagram(stats: Any, *, title: str = "") -> Any:
    """A matplotlib figure: accuracy of the predictions of each bin of confidence, and how many these are.

    Args:
        stats: ``fastseq.functional.EnsembleStats``, a metric of this package, or their histogram [3, bins]: rows, sum
            of confidence and right ones of each bin; those of several batches can be added.

    Raises:
        ImportError: without matplotlib. ArgumentError: no histogram.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("reliability_diagram needs matplotlib: pip install matplotlib") from None
    histogram = stats if isinstance(stats, Tensor) else getattr(stats, "histogram", None)
    if not isinstance(histogram, Tensor) or histogram.dim() != 2 or histogram.shape[0] != 3:
        got = list(histogram.shape) if isinstance(histogram, Tensor) else type(stats).__name__
        _check.fail("reliability_diagram", "stats", "EnsembleStats, a metric or a histogram [3, bins]", got)
    rows, confidence, right = histogram.detach().double().cpu()
    bins, total = rows.shape[0], rows.sum().clamp_min(1)
    ece = float((right - confidence).abs().sum() / total)
    edges = torch.arange(bins) / bins
    some = rows > 0
    accuracy = torch.where(some, right / rows.clamp_min(1), 0)

    figure = Figure(figsize=(4.5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bar: dict[str, Any] = {"width": 1 / bins, "align": "edge", "edgecolor": "white"}
    above.bar(edges.tolist(), accuracy.tolist(), color="tab:blue", label="accuracy", **bar)
    means = (confidence[some] / rows[some]).tolist()
    above.plot(means, accuracy[some].tolist(), "o", color="tab:orange", label="at the mean confidence")
    above.plot([0, 1], [0, 1], "--", color="0.4", label="calibrated")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=title)
    above.legend(title=f"ECE {ece:.4f}")
    below.bar(edges.tolist(), (rows / total).tolist(), color="0.7", **bar)
    below.set(xlabel="confidence", ylabel="share of rows")
    return figure

"""What a model that ends in an ensemble of members says, part by part."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseq import _check

Array = np.ndarray[Any, Any]


class Ensemble(NamedTuple):
    """Mean probabilities [..., K] of the members, and the share of their pairs that name different classes [...]."""

    probability: Array
    disagreement: Array


def split_ensemble(y: Array) -> Ensemble:
    """The parts of what an ``ensemble`` layer gives, as views.

    Args:
        y: [..., K + 1], the result of a model or stream whose last layer is an ``ensemble``.

    Raises:
        ArgumentError: y has no place for a class and the disagreement.
    """
    if not isinstance(y, np.ndarray) or y.ndim < 1 or y.shape[-1] < 2 or not np.issubdtype(y.dtype, np.floating):
        got = f"{y.dtype} {list(y.shape)}" if isinstance(y, np.ndarray) else type(y).__name__
        _check.fail("split_ensemble", "y", "an array of floats [..., K + 1] of at least one class", got)
    return Ensemble(y[..., :-1], y[..., -1])

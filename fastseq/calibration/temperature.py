"""One temperature for all members of an ensemble, fitted on held-out data (Guo et al., ICML 2017)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastseq import _check

_logger = logging.getLogger("fastseq")
_RANGE = (1e-2, 1e2)
_GRID = 33  # temperatures tried first: a factor of 1.33 from one to the next
_GOLDEN = (math.sqrt(5) - 1) / 2
_STEPS = 44  # after which the interval is below 1e-9


def fit_temperature(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> float:
    """The temperature T for which ``-log mean over members of softmax(logits / T)`` of the labels is least.

    A grid over log T and a golden section in its best cell, in float64: the mean of several members' probabilities can
    have more than one minimum, and no gradient is needed.

    Where every one of N examples is predicted right, likelihood only grows as T falls. Then, and the log says so, the
    targets are those of Platt scaling: each label with probability 1 - 1 / (N + 1), the rest even over the classes.

    Args:
        logits: [B, K], or [B, M, K] of M members; of data that was not trained on.
        labels: integers [B] in 0..K-1, or ``ignore_index``.

    Returns:
        T in [0.01, 100]; at an end of it, with a warning in the log, where the data ask for more.

    Raises:
        ArgumentError: naming the argument.
    """
    f = "fit_temperature"
    if logits.dim() not in (2, 3) or not logits.numel() or not logits.is_floating_point():
        _check.fail(
            f, "logits", "floating point, [B, K] or [B, M, K], not empty", f"{logits.dtype} {list(logits.shape)}"
        )
    _check.shape(f, "labels", labels, "B", logits.shape[0])
    if labels.is_floating_point() or labels.dtype == torch.bool:
        _check.fail(f, "labels", "integers", labels.dtype)
    _check.device(f, "labels", labels, logits.device)
    given = labels != ignore_index
    if not bool(given.any()):
        _check.fail(f, "labels", "some that are not ignored", f"{labels.shape[0]} times {ignore_index}")
    K = logits.shape[-1]
    values, labels = logits.detach()[given].double(), labels[given].long()
    if int(labels.min()) < 0 or int(labels.max()) >= K:
        _check.fail(f, "labels", f"in 0..K-1 = 0..{K - 1}", f"{int(labels.min())}..{int(labels.max())}")
    if not bool(values.isfinite().all()):
        _check.fail(f, "logits", "finite", "others")
    values = values if values.dim() == 3 else values.unsqueeze(1)
    place = labels[:, None, None].expand(-1, values.shape[1], 1)

    def nll(log_t: float, spread: float = 0.0) -> float:
        """But for the log of the number of members, which is the same for all."""
        logp = (values / math.exp(log_t)).log_softmax(2)
        of_labels = -float(logp.gather(2, place).squeeze(2).logsumexp(1).mean())
        return (1 - spread) * of_labels - spread * float(logp.logsumexp(1).mean()) if spread else of_labels

    best = _least(nll)
    N = len(labels)
    if best == _RANGE[0]:
        _logger.warning("fit_temperature: likelihood grows as T falls; targets smoothed by 1 / (N + 1), N = %d", N)
        best = _least(lambda log_t: nll(log_t, 1 / (N + 1)))
    if best in _RANGE:
        _logger.warning("fit_temperature: likelihood grows beyond T = %g, the end of the range", best)
    return best


def _least(nll: Callable[[float], float]) -> float:
    """The temperature for which a function of its logarithm is least; 1 where all are alike."""
    low, high = (math.log(t) for t in _RANGE)
    grid = [low + (high - low) * n / (_GRID - 1) for n in range(_GRID)]
    scores = [nll(t) for t in grid]
    if max(scores) - min(scores) <= 1e-12 * max(1.0, abs(max(scores))):
        return 1.0  # as where all logits are equal
    best = min(range(_GRID), key=scores.__getitem__)
    if best in (0, _GRID - 1):
        return _RANGE[best > 0]
    return math.exp(_golden_section(nll, grid[best - 1], grid[best + 1]))


def _golden_section(value: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that falls and then rises between the two is least."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = value(left), value(right)
    for _ in range(_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = value(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = value(right)
    return (low + high) / 2


class Temperature(nn.Module):
    """Divides logits by a temperature, which is a buffer: ``Temperature().fit(logits, labels)``.

    Args:
        temperature: > 0.
    """

    temperature: Tensor

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        _check.positive("Temperature", "temperature", temperature)
        self.register_buffer("temperature", torch.tensor(float(temperature), dtype=torch.float32))

    def fit(self, logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Temperature:
        """Set the temperature to ``fit_temperature``'s."""
        self.temperature.fill_(fit_temperature(logits, labels, ignore_index=ignore_index))
        return self

    def forward(self, logits: Tensor) -> Tensor:
        return logits / self.temperature

    def extra_repr(self) -> str:
        return f"{float(self.temperature):.4g}"

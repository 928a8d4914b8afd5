"""Definition of LAMB: Adam with a rate of its own for each weight (You et al., ICLR 2020, arXiv 1904.00962)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def lamb(
    weight: Tensor,
    gradients: Sequence[Tensor],
    rates: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    max_ratio: float | None = None,
    adapt: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps with these gradients, Algorithm 2 of the paper with phi(z) = z.

    Args:
        weight: [...]. gradients: of each step, like weight. rates: of each step.
        max_ratio: that ``|weight| / |update|``, the rate of a weight, may be at most; it is 1 where either norm is 0.
        adapt: False for 1 always, which is AdamW.

    Returns:
        weight and both moments after the last step.
    """
    m, v = weight * 0, weight * 0
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient.square()
        update = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps) + weight_decay * weight
        ratio: float | Tensor = 1.0
        w, u = weight.norm(), update.norm()
        if adapt and w > 0 and u > 0:
            ratio = w / u if max_ratio is None else (w / u).clamp(max=max_ratio)
        weight = weight - rate * ratio * update
    return weight, m, v

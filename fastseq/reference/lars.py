"""Definition of LARS: momentum with a rate of its own for each weight (You et al. 2017, arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def lars(
    weight: Tensor,
    gradients: Sequence[Tensor],
    rates: Sequence[float],
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 1e-3,
    eps: float = 1e-8,
    nesterov: bool = False,
    max_ratio: float | None = None,
    adapt: bool = True,
) -> tuple[Tensor, Tensor]:
    """Steps with these gradients. The rate stands outside the momentum, as in ``torch.optim.SGD``; in the paper inside.

    Args:
        weight: [...]. gradients: of each step, like weight. rates: of each step.
        trust_coefficient: of ``|weight| / (|gradient| + weight_decay * |weight| + eps)``, the rate of a weight;
            1 in its place where one of these norms is 0. max_ratio: that it may be at most. adapt: False for 1 always.

    Returns:
        weight and momentum after the last step.
    """
    moved = weight * 0
    for gradient, rate in zip(gradients, rates, strict=True):
        ratio: float | Tensor = 1.0
        w, g = weight.norm(), gradient.norm()
        if adapt and w > 0 and g > 0:
            found = trust_coefficient * w / (g + weight_decay * w + eps)
            ratio = found if max_ratio is None else found.clamp(max=max_ratio)
        update = ratio * (gradient + weight_decay * weight)
        moved = momentum * moved + update
        weight = weight - rate * (update + momentum * moved if nesterov else moved)
    return weight, moved

"""LARS (You, Gitman and Ginsburg 2017) for large batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import _check
from fastseq.recipes.layerwise import LayerWise, Tensors, move, norms, scale_


class LARS(LayerWise):
    """SGD with momentum, where each weight tensor has a rate of its own: in proportion to its norm over its gradient's.

    ``fastseq.reference.lars`` defines it. Every option may differ between groups; a group with ``adapt=False`` steps
    as ``torch.optim.SGD`` does, bit for bit, which is what biases and norms want (``layerwise_groups``). A step never
    waits for the GPU, and with ``lr`` as a tensor there it can be captured in a graph.

    Args:
        params: parameters, or groups of them.
        lr: >= 0; the usual values are far above those of SGD, since ``trust_coefficient`` divides them.
        momentum: in [0, 1].
        weight_decay: >= 0, of the gradient; the norm of what it adds counts in the ratio.
        trust_coefficient: > 0, the share of its norm that a weight tensor moves by at a rate of 1.
        eps: >= 0, added to the norm of the gradient.
        nesterov: look ahead by the momentum.
        max_ratio: > 0, that the ratio may be at most, or None.
        adapt: False for a ratio of 1.
        maximize: go up.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        nesterov: bool = False,
        max_ratio: float | None = None,
        adapt: bool = True,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "max_ratio": max_ratio,
            "adapt": adapt,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        _check.probability("LARS", "momentum", options["momentum"])
        _check.positive("LARS", "trust_coefficient", options["trust_coefficient"])

    def _update(self, group: dict[str, Any], weights: list[Tensor], gradients: Tensors) -> None:
        decay, momentum = group["weight_decay"], group["momentum"]
        updates = torch._foreach_add(gradients, weights, alpha=decay) if decay else gradients
        if group["adapt"]:
            w, g = norms(weights), norms(gradients)
            updates = updates if decay else [u.clone() for u in updates]
            below = g + decay * w + group["eps"]
            scale_(updates, group["trust_coefficient"] * w, below, (w > 0) & (g > 0), group["max_ratio"])
        if momentum:
            moved = [self._momentum(weight) for weight in weights]
            torch._foreach_mul_(moved, momentum)
            torch._foreach_add_(moved, updates)
            updates = torch._foreach_add(updates, moved, alpha=momentum) if group["nesterov"] else moved
        move(weights, updates, group["lr"])

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        moved: Tensor = state["momentum_buffer"]
        return moved

"""LAMB (You et al., ICLR 2020) for large batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import _check
from fastseq.recipes.layerwise import LayerWise, Tensors, move, norms, scale_


class LAMB(LayerWise):
    """Adam, where each weight tensor has a rate of its own: in proportion to its norm over that of its update.

    ``fastseq.reference.lamb`` defines it. Every option may differ between groups; a group with ``adapt=False`` steps as
    ``torch.optim.AdamW`` does, which is what biases and norms want (``layerwise_groups``).

    Args:
        params: parameters, or groups of them.
        lr: >= 0, the share of its norm that a weight tensor moves by in a step.
        betas: in [0, 1), of the first and the second moment.
        eps: >= 0, added to the root of the second moment.
        weight_decay: >= 0, added to the update before its norm is taken.
        max_ratio: > 0, that the ratio may be at most, or None.
        adapt: False for a ratio of 1.
        maximize: go up.
        capturable: count steps on the device, so that a step never waits for it; with ``lr`` as a tensor there, it can
            be captured in a graph.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        max_ratio: float | None = None,
        adapt: bool = True,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_ratio": max_ratio,
            "adapt": adapt,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        for beta in options["betas"]:
            _check.not_negative("LAMB", "betas", beta)
            if beta >= 1:
                _check.fail("LAMB", "betas", "two numbers in [0, 1)", options["betas"])

    def _update(self, group: dict[str, Any], weights: list[Tensor], gradients: Tensors) -> None:
        states = [self._moments(weight, group["capturable"]) for weight in weights]
        steps, first, second = ([s[name] for s in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        one, two = (_correction(steps, beta, group["capturable"]) for beta in group["betas"])
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)

        below = torch._foreach_div(second, two)
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, group["eps"])
        updates = torch._foreach_div(first, one)
        torch._foreach_div_(updates, below)
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        if group["adapt"]:
            w, u = norms(weights), norms(updates)
            scale_(updates, w, u, (w > 0) & (u > 0), group["max_ratio"])
        move(weights, updates, group["lr"])

    def _moments(self, weight: Tensor, capturable: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device if capturable else "cpu")
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state


def _correction(steps: list[Tensor], beta: float, capturable: bool) -> Any:
    """1 - beta ** step of each, in float64 since the difference is small: on the device, or as numbers."""
    if not capturable:
        return [1 - beta ** float(step) for step in steps]
    found = torch._foreach_pow(beta, [step.double() for step in steps])
    return torch._foreach_add(torch._foreach_neg(found), 1)

"""What LARS and LAMB share: the parameters of a step as lists, the ratio of norms, and who is left out of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastseq import _check

Tensors = list[Tensor] | tuple[Tensor, ...]


def layerwise_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Two parameter groups for ``LARS`` or ``LAMB``: biases and norms keep the plain rate and are not decayed.

    These are the parameters of fewer than two dimensions; their norm says nothing of how far a step may go.

    Args:
        model: parameters without requires_grad are left out.
        options: entries of both groups, such as ``lr``; ``weight_decay`` is for the first one alone.

    Returns:
        [matrices and kernels, the rest], for ``LARS(groups, lr=1.0)``.
    """
    own = [p for p in model.parameters() if p.requires_grad]
    adapted = {"params": [p for p in own if p.dim() > 1], **options}
    return [adapted, {"params": [p for p in own if p.dim() < 2], **options, "weight_decay": 0.0, "adapt": False}]


class LayerWise(Optimizer):
    """The step of a group is that of a list of weights at once (``torch._foreach_*``), without waiting for a GPU."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, with the options checked."""
        self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient.

        Args:
            closure: computes the loss anew, with its gradients; or None.

        Returns:
            What the closure returns.

        Raises:
            ArgumentError: a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in self._lists(group["params"]):
                gradients = [w.grad for w in weights if w.grad is not None]
                self._update(group, weights, torch._foreach_neg(gradients) if group["maximize"] else gradients)
        return loss

    def _lists(self, parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
        """Those with a gradient, by device and dtype."""
        found: dict[Any, list[Tensor]] = {}
        for p in parameters:
            if p.grad is None:
                continue
            if p.grad.layout is not torch.strided or p.is_complex():
                got = f"one of layout {p.grad.layout} and dtype {p.dtype}"
                _check.fail(type(self).__name__, f"the gradient of {list(p.shape)}", "dense and real", got)
            found.setdefault((p.device, p.dtype), []).append(p)
        return found.values()

    def _check_options(self, options: dict[str, Any]) -> None:
        name, lr = type(self).__name__, options["lr"]
        _check.not_negative(name, "lr", float(lr) if isinstance(lr, Tensor) else lr)
        for option in ("weight_decay", "eps"):
            _check.not_negative(name, option, options[option])
        if options["max_ratio"] is not None:
            _check.positive(name, "max_ratio", options["max_ratio"])

    @abstractmethod
    def _update(self, group: dict[str, Any], weights: list[Tensor], gradients: Tensors) -> None:
        """Step these weights, of one device and dtype; gradients are not written."""


def norms(tensors: Tensors) -> Tensor:
    """One of each, [len(tensors)]; of 16-bit ones in float32."""
    dtype = torch.float32 if tensors[0].dtype.itemsize < 4 else None
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))


def scale_(updates: Tensors, above: Tensor, below: Tensor, present: Tensor, max_ratio: float | None) -> None:
    """Multiply each by its ratio ``above / below`` [len(updates)], at most ``max_ratio``; by 1 if not ``present``."""
    ratio = above / below
    if max_ratio is not None:
        ratio.clamp_(max=max_ratio)
    torch._foreach_mul_(updates, list(torch.where(present, ratio, 1.0).unbind()))


def move(weights: list[Tensor], updates: Tensors, lr: float | Tensor) -> None:
    """Subtract ``lr * updates``; a rate on their device stays there, so that a captured graph sees it change."""
    if isinstance(lr, Tensor) and lr.device == weights[0].device:
        torch._foreach_sub_(weights, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_add_(weights, updates, alpha=-float(lr))

"""What may be done to an input, and what a model answers to it: shared by ADT and by the attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq import _check

Model = Callable[..., Any]  # the perturbed rows, and further inputs of which the caller knows: to logits
Objective = Callable[[Any, Tensor], Tensor]  # outputs, labels -> a number of each row, to be made large


@dataclass(frozen=True)
class Threat:
    """Which perturbations are possible: each number by at most ``eps`` of its spread, within ``clamp``.

    Args:
        eps: > 0, in units of ``normalise``.
        clamp: the least and the largest value of an input, or None.
        normalise: None for eps in units of the input; "batch" for the standard deviation of each channel over the
            batch and its valid steps; or a tensor of spreads, broadcast to the input.
    """

    eps: float
    clamp: tuple[float, float] | None = None
    normalise: Tensor | str | None = None

    def __post_init__(self) -> None:
        _check.positive("Threat", "eps", self.eps)
        if self.clamp is not None and not (len(self.clamp) == 2 and self.clamp[0] < self.clamp[1]):
            _check.fail("Threat", "clamp", "(low, high) with low < high, or None", self.clamp)
        if isinstance(self.normalise, str):
            _check.one_of("Threat", "normalise", self.normalise, ("batch",))

    @property
    def limits(self) -> tuple[float, float]:
        """Of the clamp, infinite without one."""
        return self.clamp or (-torch.inf, torch.inf)

    def radius(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The largest perturbation of each number, like x; 0 where ``mask`` says that nothing is valid."""
        if not x.is_floating_point():
            _check.fail("Threat", "x", "of floating point (perturb embeddings, not tokens)", x.dtype)
        wide = x.new_empty((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        valid = valid_numbers(x, mask)
        spread: Tensor = wide.new_ones(())
        if isinstance(self.normalise, Tensor):
            spread = self.normalise.to(wide)
        elif self.normalise is not None:
            spread = _spread(x.to(wide.dtype), valid)
        try:
            return (self.eps * (spread if mask is None else spread * valid)).expand(x.shape)
        except RuntimeError:
            _check.fail("Threat", "normalise", f"broadcast to the input, {list(x.shape)}", list(spread.shape))

    def project(self, x: Tensor, adversarial: Tensor, radius: Tensor) -> Tensor:
        """The nearest possible one."""
        out = torch.minimum(torch.maximum(adversarial, x - radius), x + radius)
        return out.clamp(*self.limits)


def valid_numbers(x: Tensor, mask: Tensor | None) -> Tensor:
    """Bool, like x. mask: bool, [B, T] of [B, T, ...] or broadcast to x; True where x is valid; None for everywhere."""
    if mask is None:
        return torch.ones((), dtype=torch.bool, device=x.device).expand(x.shape)
    _check.dtype("Threat", "mask", mask, torch.bool)
    wide = mask.reshape(*mask.shape, *(1,) * (x.dim() - mask.dim()))
    try:
        return wide.expand(x.shape)
    except RuntimeError:
        _check.fail("Threat", "mask", f"[B, T] of or broadcast to the input, {list(x.shape)}", list(mask.shape))


def channel_dim(x: Tensor) -> int:
    """1 of images [B, C, H, W], else the last."""
    return 1 if x.dim() == 4 else x.dim() - 1


def _spread(x: Tensor, valid: Tensor) -> Tensor:
    others = [d for d in range(x.dim()) if d != channel_dim(x)]
    count = valid.sum(others, keepdim=True).clamp_min(1)
    mean = (x * valid).sum(others, keepdim=True) / count
    return (((x - mean) * valid).square().sum(others, keepdim=True) / count).sqrt()


@contextmanager
def quiet(module: nn.Module | None) -> Iterator[None]:
    """In eval mode and without gradients of parameters; both as found afterwards, of each module and parameter."""
    modules = [] if module is None else [(m, m.training) for m in module.modules()]
    learning = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    try:
        for m, _ in modules:
            m.training = False
        for p in learning:
            p.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for m, training in modules:
            m.training = training
        for p in learning:
            p.requires_grad_(True)


def network(model: Model, module: nn.Module | None) -> tuple[Model, nn.Module | None]:
    """What to call for gradients of the input, and whose mode to mind. Inside DistributedDataParallel, its module."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module, module or model.module
    return model, module or (model if isinstance(model, nn.Module) else None)


def input_gradient(
    model: Model, x: Tensor, labels: Tensor, args: tuple[Any, ...], objective: Objective, share: float = 1.0
) -> Tensor:
    """Of ``share`` times the sum of the objective over rows, so of each row its own. Call it inside ``quiet``."""
    x = x.detach().requires_grad_(True)
    rows = objective(model(x, *args), labels)
    if rows.shape != labels.shape[:1]:
        _check.fail("objective", "result", f"a number of each row, [{len(labels)}]", list(rows.shape))
    return torch.autograd.grad(share * rows.sum(), x)[0]


def folded(samples: int, *values: Any) -> list[Any]:
    """Each tensor's rows ``samples`` times, sample after sample; others as they are."""
    return [v.repeat(samples, *(1,) * (v.dim() - 1)) if isinstance(v, Tensor) and v.dim() else v for v in values]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each row; where labels have positions too (logits [B, K, T], labels [B, T]), its mean over those but -100."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    if losses.dim() == 1:
        return losses
    live = torch.ones_like(losses) if labels.is_floating_point() else (labels != -100).to(losses)
    return losses.flatten(1).sum(1) / live.flatten(1).sum(1).clamp_min(1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The highest wrong logit over the right one, at most 50 over it (Carlini and Wagner 2017); means as above."""
    classes, right = logits.movedim(1, -1), labels.clamp_min(0)[..., None]
    wrong = classes.scatter(-1, right, -torch.inf).amax(-1)
    over = (wrong - classes.gather(-1, right)[..., 0]).clamp_max(50.0)
    if over.dim() == 1:
        return over
    live = (labels != -100).to(over)
    return (over * live).flatten(1).sum(1) / live.flatten(1).sum(1).clamp_min(1)

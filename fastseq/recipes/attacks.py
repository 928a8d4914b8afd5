"""Attacks on a trained model, to see what it withstands. All are bounded by a ``Threat`` and leave the model alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq import _check
from fastseq.recipes.threat import (
    Model,
    Objective,
    Threat,
    cross_entropy,
    folded,
    input_gradient,
    margin,
    network,
    quiet,
)

__all__ = ["cw", "feature", "fgsm", "mim", "pgd", "spsa", "withstood"]


def fgsm(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *args: Any, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """One step as far as possible by the sign of the gradient (Goodfellow et al. 2015). Arguments: see ``pgd``."""
    chosen: dict[str, Any] = {"steps": 1, "step": 1.0, "start": False, **options}
    return pgd(model, x, labels, threat, *args, mask=mask, **chosen)


def pgd(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *args: Any,
    mask: Tensor | None = None,
    steps: int = 20,
    step: float = 0.25,
    start: bool = True,
    decay: float | None = None,
    objective: Objective = cross_entropy,
    module: nn.Module | None = None,
    seed: int = 0,
) -> Tensor:
    """Steps by the sign of the gradient, from a random start (Madry et al. 2018).

    Args:
        model: called as ``model(x, *args)``; in eval mode while it is attacked, as found afterwards, without gradients
            of its parameters.
        x: [B, ...], of floating point. labels: [B, ...], as the objective takes them.
        mask: bool, True where x is valid; [B, T] of [B, T, ...], or broadcast to x. None for everywhere.
        steps: >= 1. step: > 0, as a part of eps.
        start: at random; else at x. seed: of the start.
        decay: of the momentum of gradients that are scaled to a mean of 1 in each row; None for no momentum.
        objective: outputs and labels to a number of each row, which is made large.
        module: the network behind ``model``, where that is a plain function.

    Returns:
        Like x, detached.

    Raises:
        ArgumentError: naming the argument.
    """
    _check.count("pgd", "steps", steps)
    _check.positive("pgd", "step", step)
    if decay is not None:
        _check.not_negative("pgd", "decay", decay)
    model, module = network(model, module)
    x, radius = x.detach(), threat.radius(x, mask).to(x.dtype)
    adversarial, moved = x, torch.zeros_like(x)
    if start:
        noise = torch.rand(x.shape, generator=generator(x, seed), device=x.device, dtype=x.dtype)
        adversarial = threat.project(x, x + radius * (2 * noise - 1), radius)
    with quiet(module):
        for _ in range(steps):
            g = input_gradient(model, adversarial, labels, args, objective)
            if decay is not None:
                size = g.abs().flatten(1).mean(1).clamp_min(torch.finfo(g.dtype).tiny)
                g = moved = decay * moved + g / _as_rows(size, g)
            adversarial = threat.project(x, adversarial + step * radius * g.sign(), radius)
    return adversarial


def mim(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *args: Any, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """``pgd`` with momentum, from x (Dong et al. 2018)."""
    chosen: dict[str, Any] = {"decay": 1.0, "start": False, **options}
    return pgd(model, x, labels, threat, *args, mask=mask, **chosen)


def cw(
    model: Model, x: Tensor, labels: Tensor, threat: Threat, *args: Any, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """``pgd`` on the margin of Carlini and Wagner (2017), which is not flat where the model is sure."""
    chosen: dict[str, Any] = {"objective": margin, "steps": 30, **options}
    return pgd(model, x, labels, threat, *args, mask=mask, **chosen)


def spsa(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *args: Any,
    mask: Tensor | None = None,
    steps: int = 20,
    samples: int = 64,
    rate: float = 0.1,
    sigma: float = 0.01,
    objective: Objective = margin,
    module: nn.Module | None = None,
    seed: int = 0,
) -> Tensor:
    """Adam on gradients that are estimated from outputs alone (Uesato et al. 2018): what masks gradients meets it.

    Args:
        samples: random directions of a step, each looked at forwards and backwards. rate: of Adam, as a part of eps.
        sigma: > 0, how far to look, as a part of eps. Others: see ``pgd``.

    Raises:
        ArgumentError: naming the argument.
    """
    _check.count("spsa", "steps", steps)
    _check.count("spsa", "samples", samples)
    _check.positive("spsa", "rate", rate)
    _check.positive("spsa", "sigma", sigma)
    model, module = network(model, module)
    x, radius = x.detach(), threat.radius(x, mask).to(x.dtype)
    moved, draws = torch.zeros_like(x), generator(x, seed)  # in units of the radius
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    both = folded(2, labels, *args)
    with quiet(module), torch.no_grad():
        for t in range(1, steps + 1):
            g = torch.zeros_like(x)
            for _ in range(samples):
                way = torch.randint(0, 2, x.shape, generator=draws, device=x.device).to(x.dtype) * 2 - 1
                at = torch.cat([x + radius * (moved + sigma * way), x + radius * (moved - sigma * way)])
                up, down = objective(model(at, *both[1:]), both[0]).chunk(2)
                g += _as_rows((up - down) / (2 * sigma * samples), x) * way
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g.square()
            moved = moved + rate * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
            moved = moved.clamp(-1, 1)
    return threat.project(x, x + radius * moved, radius)


def feature(
    features: Model, x: Tensor, labels: Tensor, threat: Threat, *args: Any, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """``pgd`` that pulls the features of each row to those of the next one in the batch with another label.

    Args:
        features: the model up to its last hidden layer, ``features(x, *args)`` to [B, ...]; give ``module`` where it is
            a plain function. labels: [B]; a row without another label in the batch keeps its features as the aim.
    """
    call, module = network(features, options.get("module"))
    count = len(labels)
    rows = torch.arange(count, device=labels.device)
    ahead = (rows[None] - rows[:, None]) % max(1, count)
    same = labels[None] == labels[:, None]
    aim = torch.where(same & (ahead > 0), count, torch.where(ahead == 0, count - 0.5, ahead)).argmin(1)
    with quiet(module), torch.no_grad():
        there = call(x, *args).flatten(1)[aim]

    def similar(found: Tensor, _: Tensor) -> Tensor:
        return F.cosine_similarity(found.flatten(1), there)

    chosen: dict[str, Any] = {"objective": similar, "steps": 50, "step": 0.125, **options}
    return pgd(features, x, labels, threat, *args, mask=mask, **chosen)


@torch.no_grad()
def withstood(
    model: Model, labels: Tensor, attacked: Iterable[Tensor], *args: Any, module: nn.Module | None = None
) -> Tensor:
    """Bool [B]: which rows the model gets right in every one of these versions, in eval mode.

    Args:
        attacked: versions of the same rows, of several attacks, each like x.
    """
    model, module = network(model, module)
    right = torch.ones(labels.shape[:1], dtype=torch.bool, device=labels.device)
    with quiet(module), torch.no_grad():
        for rows in attacked:
            hit = model(rows, *args).argmax(1) == labels
            right &= hit | (labels == -100) if hit.dim() == 1 else (hit | (labels == -100)).flatten(1).all(1)
    return right


def generator(x: Tensor, seed: int) -> torch.Generator:
    """On the device of x."""
    return torch.Generator(x.device).manual_seed(seed)


def _as_rows(numbers: Tensor, x: Tensor) -> Tensor:
    """[B] against x."""
    return numbers.view(-1, *(1,) * (x.dim() - 1))

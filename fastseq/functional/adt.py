"""``adt_*``: ADT's explicit distribution of perturbations (Dong et al., NeurIPS 2020), ``fastseq.reference.adt_*``.

Gradients are in closed form, so a step on the distribution needs no graph and no more of the model than the gradient of
its input. Inputs of 16 bits are perturbed in float32 and rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastseq import _check, reference

Clamp = tuple[float, float]  # the least and the largest value that a perturbed input may have
NO_CLAMP = (-math.inf, math.inf)


def adt_sample(x: Tensor, mu: Tensor, rho: Tensor, noise: Tensor, eps: Tensor, clamp: Clamp = NO_CLAMP) -> Tensor:
    """Perturbed inputs: ``x + eps * tanh(mu + softplus(rho) * noise)``, clamped.

    Args:
        x: [B, ...], of floating point. mu, rho: like x, float32 where x has 16 bits.
        noise: [S, B, ...], S samples of N(0, 1). eps: the largest perturbation, broadcast to x.
        clamp: the least and the largest value.

    Returns:
        [S, B, ...] in the dtype of x. Differentiable in mu and rho, once.

    Raises:
        ArgumentError: for a wrong shape or dtype.
    """
    _check_sizes("adt_sample", x, mu, rho, noise)
    out: Tensor = _Sample.apply(x, mu, rho, noise, eps, clamp)
    return out


def adt_backward(
    g: Tensor, adversarial: Tensor, x: Tensor, mu: Tensor, rho: Tensor, noise: Tensor, eps: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of mu and rho of ``(g * adt_sample).sum() + (weight * entropy).sum()``, over all samples.

    Args:
        g: gradient of the perturbed inputs, [S, B, ...]. adversarial: what ``adt_sample`` returned for the rest.
        weight: of the entropy of each number, broadcast to mu; see ``adt_entropy``.

    Returns:
        Like mu and rho.

    Raises:
        ArgumentError: for a wrong shape or dtype.
    """
    _check_sizes("adt_backward", x, mu, rho, noise)
    for name, value in (("g", g), ("adversarial", adversarial)):
        _check.shape("adt_backward", name, value, "S, B, ...", *noise.shape)
    with torch.no_grad():
        return _backward(g, adversarial, x, mu, rho, noise, eps, weight)


def adt_entropy(mu: Tensor, rho: Tensor, noise: Tensor, eps: Tensor) -> Tensor:
    """-log density of each number of the perturbations of ``adt_sample``, [S, B, ...]; its mean is the entropy.

    Differentiable in mu and rho. Where eps is 0 nothing is perturbed, and the result is 0.

    Raises:
        ArgumentError: for a wrong shape or dtype.
    """
    _check_sizes("adt_entropy", mu, mu, rho, noise)
    off = eps == 0
    return reference.adt_entropy(mu, rho, noise, torch.where(off, 1.0, eps)).masked_fill(off, 0.0)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mu: Tensor, rho: Tensor, noise: Tensor, eps: Tensor, clamp: Clamp) -> Tensor:
        return _moved(x, _direction(mu, rho, noise), eps).clamp_(*clamp).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5], output)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mu, rho, noise, eps, out = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            raise RuntimeError("adt_sample: x has no gradient, only mu and rho; detach it")
        return (None, *_backward(g, out, x, mu, rho, noise, eps, mu.new_zeros(())), None, None, None)


def _direction(mu: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """tanh(u), [S, B, ...]."""
    return torch.addcmul(mu, noise, F.softplus(rho)).tanh_()


def _moved(x: Tensor, direction: Tensor, eps: Tensor) -> Tensor:
    """Before the clamp."""
    return torch.addcmul(x.to(direction.dtype), direction, eps.to(direction.dtype))


def _backward(
    g: Tensor, adversarial: Tensor, x: Tensor, mu: Tensor, rho: Tensor, noise: Tensor, eps: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    direction = _direction(mu, rho, noise)
    g = g.to(mu.dtype)
    clipped = _moved(x, direction, eps).to(x.dtype) != adversarial
    du = torch.addcmul(g, g * direction, direction, value=-1).mul_(eps).masked_fill_(clipped, 0.0)
    du.addcmul_(direction, weight.to(mu.dtype), value=-2)
    sigmoid = rho.sigmoid()
    # sigmoid(rho) / softplus(rho) goes to 1 where both go to zero
    of_log_sigma = torch.where(rho < -80, 1.0, sigmoid / F.softplus(rho.clamp_min(-80)))
    dmu = du.sum(0)
    return dmu, du.mul_(noise).sum(0).mul_(sigmoid).add_(weight * of_log_sigma, alpha=len(noise))


def _check_sizes(function: str, x: Tensor, mu: Tensor, rho: Tensor, noise: Tensor) -> None:
    if not x.is_floating_point():
        _check.fail(function, "x", "of floating point", x.dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, value in (("mu", mu), ("rho", rho)):
        _check.shape(function, name, value, "B, ...", *x.shape)
        _check.dtype(function, name, value, wide)
    _check.dtype(function, "noise", noise, wide)
    if noise.shape[1:] != x.shape:
        _check.fail(function, "noise", f"[S, B, ...] = [S, {', '.join(map(str, x.shape))}]", list(noise.shape))

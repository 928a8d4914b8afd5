"""``adt_*``: ADT's explicit distribution of perturbations (Dong et al., NeurIPS 2020), ``fastseq.reference.adt_*``.

Gradients are in closed form, so a step on the distribution needs no graph and no more of the model than the gradient of
its input. Inputs of 16 bits are perturbed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastseq import _check, reference

Clamp = tuple[float, float]  # the least and the largest value that a perturbed input may have


def adt_direction(mu: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """``tanh(mu + softplus(rho) * noise)``: perturbations in units of the largest.

    Args:
        mu, rho: [B, ...], float32 or float64. noise: [S, B, ...], S samples of N(0, 1), of the same dtype.

    Returns:
        [S, B, ...]. No gradients.

    Raises:
        ArgumentError: for a wrong shape or dtype.
    """
    _check_sizes("adt_direction", mu, rho, noise)
    with torch.no_grad():
        return torch.addcmul(mu, noise, F.softplus(rho)).tanh_()


def adt_moved(x: Tensor, direction: Tensor, eps: Tensor, clamp: Clamp | None = None) -> Tensor:
    """``x + eps * direction``, clamped, in the dtype of x: [S, B, ...]. No gradients.

    Args:
        x: [B, ...]. direction: of ``adt_direction``. eps: the largest perturbation, broadcast to x, >= 0.
        clamp: the least and the largest value, or None.
    """
    with torch.no_grad():
        out = torch.addcmul(x.to(direction.dtype), direction, eps.to(direction.dtype))
        return (out if clamp is None else out.clamp_(*clamp)).to(x.dtype)


def adt_backward(
    g: Tensor,
    x: Tensor,
    direction: Tensor,
    rho: Tensor,
    noise: Tensor,
    eps: Tensor,
    weight: Tensor,
    clamp: Clamp | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of mu and rho of ``(g * adt_moved).sum() + (weight * adt_entropy).sum()``, over all samples.

    Args:
        g: gradient of the perturbed inputs, [S, B, ...]. x, eps, clamp: as in ``adt_moved``.
        direction, rho, noise: as in ``adt_direction``. weight: of the entropy of each number, broadcast to rho.

    Returns:
        Like rho, both. Overwrites nothing; no gradients.

    Raises:
        ArgumentError: for a wrong shape or dtype.
    """
    _check_sizes("adt_backward", rho, rho, noise)
    for name, value in (("g", g), ("direction", direction)):
        _check.shape("adt_backward", name, value, "S, B, ...", *noise.shape)
    with torch.no_grad():
        eps, weight = eps.to(rho.dtype), weight.to(rho.dtype)
        dmu, drho = torch.zeros_like(rho), torch.zeros_like(rho)
        for gs, a, r in zip(g.to(rho.dtype), direction, noise, strict=True):  # one at a time stays in the cache
            du = torch.addcmul(gs, gs * a, a, value=-1).mul_(eps)
            if clamp is not None:
                moved = torch.addcmul(x.to(a.dtype), a, eps)
                du.masked_fill_((moved < clamp[0]) | (moved > clamp[1]), 0.0)
            du.addcmul_(a, weight, value=-2)
            dmu.add_(du)
            drho.addcmul_(du, r)
        sigmoid = rho.sigmoid()
        # sigmoid(rho) / softplus(rho) goes to 1 where both go to zero
        of_log_sigma = torch.where(rho < -80, 1.0, sigmoid / F.softplus(rho.clamp_min(-80)))
        return dmu, drho.mul_(sigmoid).add_(weight * of_log_sigma, alpha=len(noise))


def adt_sample(x: Tensor, mu: Tensor, rho: Tensor, noise: Tensor, eps: Tensor, clamp: Clamp | None = None) -> Tensor:
    """``adt_moved`` by ``adt_direction``, [S, B, ...]; differentiable in mu and rho, once. Arguments: as there.

    Raises:
        ArgumentError: for a wrong shape or dtype.
    """
    _check_sizes("adt_sample", mu, rho, noise)
    _check.shape("adt_sample", "x", x, "B, ...", *mu.shape)
    function: Any = _Sample
    out: Tensor = function.apply(x.detach(), mu, rho, noise, eps, clamp)
    return out


def adt_entropy(mu: Tensor, rho: Tensor, noise: Tensor, eps: Tensor) -> Tensor:
    """-log density of each number of the perturbations, [S, B, ...]; its mean over samples is the entropy.

    Differentiable in mu and rho. Where eps is 0 nothing is perturbed, and the result is 0. Arguments: as above.

    Raises:
        ArgumentError: for a wrong shape or dtype.
    """
    _check_sizes("adt_entropy", mu, rho, noise)
    off = eps == 0
    return reference.adt_entropy(mu, rho, noise, torch.where(off, 1.0, eps)).masked_fill(off, 0.0)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mu: Tensor, rho: Tensor, noise: Tensor, eps: Tensor, clamp: Clamp | None
    ) -> Tensor:
        direction = adt_direction(mu, rho, noise)
        ctx.save_for_backward(x, direction, rho, noise, eps)
        ctx.clamp = clamp
        return adt_moved(x, direction, eps, clamp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, direction, rho, noise, eps = ctx.saved_tensors
        return (None, *adt_backward(g, x, direction, rho, noise, eps, rho.new_zeros(()), ctx.clamp), None, None, None)


def _check_sizes(function: str, mu: Tensor, rho: Tensor, noise: Tensor) -> None:
    if mu.dtype not in (torch.float32, torch.float64):
        _check.fail(function, "mu", "of float32 or float64", mu.dtype)
    _check.shape(function, "rho", rho, "B, ...", *mu.shape)
    _check.dtype(function, "rho", rho, mu.dtype)
    _check.dtype(function, "noise", noise, mu.dtype)
    if noise.shape[1:] != mu.shape:
        _check.fail(function, "noise", f"[S, B, ...] = [S, {', '.join(map(str, mu.shape))}]", list(noise.shape))

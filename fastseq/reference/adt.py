"""Definition of ADT's explicit distribution of perturbations (Dong et al., NeurIPS 2020, arXiv 2002.05999).

A perturbation is eps * tanh(u) with u = mu + sigma * r, r of N(0, 1) and sigma = softplus(rho), an own mu and rho for
each number of the input. Gradients are those of autograd; ``adt_backward`` has them in closed form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def adt_sample(
    x: Tensor, mu: Tensor, rho: Tensor, noise: Tensor, eps: Tensor, low: float = -math.inf, high: float = math.inf
) -> Tensor:
    """Perturbed inputs [S, B, ...], within [low, high].

    Args:
        x, mu, rho: [B, ...]. noise: r, [S, B, ...], S samples. eps: the largest perturbation, broadcast to x.
    """
    return (x + eps * (mu + F.softplus(rho) * noise).tanh()).clamp(low, high)


def adt_entropy(mu: Tensor, rho: Tensor, noise: Tensor, eps: Tensor) -> Tensor:
    """-log of the density of each number of the perturbations, [S, B, ...]; its mean over samples is the entropy.

    log(1 - tanh(u) ** 2) is taken as 2 * (log 2 - |u| - log(1 + exp(-2 |u|))), which no width of floats cuts off.
    """
    sigma = F.softplus(rho)
    u = (mu + sigma * noise).abs()
    slope = 2 * (math.log(2) - u - (-2 * u).exp().log1p())
    return noise.square() / 2 + math.log(2 * math.pi) / 2 + sigma.log() + slope + eps.log()


def adt_backward(
    g: Tensor,
    x: Tensor,
    mu: Tensor,
    rho: Tensor,
    noise: Tensor,
    eps: Tensor,
    weight: Tensor,
    low: float = -math.inf,
    high: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Gradients of mu and rho of (g * adt_sample).sum() + (weight * adt_entropy).sum(), like mu.

    Args:
        g: of the perturbed inputs, [S, B, ...]. weight: of the entropy of each number, broadcast to mu.
    """
    sigma = F.softplus(rho)
    u = mu + sigma * noise
    a, e = u.tanh(), (-2 * u.abs()).exp()
    moved = x + eps * a
    inside = (moved >= low) & (moved <= high)
    du = torch.where(inside, eps * (4 * e / (1 + e).square()) * g, torch.zeros_like(g)) - 2 * weight * a
    # sigmoid(rho) / softplus(rho), which goes to 1 where both go to zero
    tiny = sigma < torch.finfo(sigma.dtype).tiny
    of_log_sigma = torch.where(tiny, torch.ones_like(rho), rho.sigmoid() / sigma.masked_fill(tiny, 1.0))
    return du.sum(0), (du * noise).sum(0) * rho.sigmoid() + len(noise) * weight * of_log_sigma

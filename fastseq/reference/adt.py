"""Definition of ADT's explicit distribution of perturbations (Dong et al., NeurIPS 2020, arXiv 2002.05999).

A perturbation is eps * tanh(u) with u = mu + sigma * r, r of N(0, 1) and sigma = softplus(rho), an own mu and rho for
each number of the input. Gradients are those of autograd; ``adt_backward`` has them in closed form. The noise r is made
of counters by ``adt_noise``, so that it need not be kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq.reference.lstm import philox

LEAST = 1e-8  # added to the size of a total before it divides: of the authors' optimizer


def adt_noise(seed: Tensor, samples: int, B: int, N: int, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of N(0, 1), [samples, B, N], on the CPU: pairs sqrt(-2 log U) * (cos(2 pi V), sin(2 pi V)).

    Philox with the seed as key and the counter (c, sample, row, step); U and V = (2 * (word >> 9) + 1) * 2**-24. Words
    0 and 1 give number 128 * (c // 32) + c % 32 of the row and the one that is 32 further, words 2 and 3 those that are
    64 and 96 further (Box and Muller 1958).

    Args:
        seed: int64, one element. step: 0 .. 2**32 - 1.
    """
    blocks = -(-N // 128)
    grid = torch.meshgrid(torch.arange(samples), torch.arange(B), torch.arange(32 * blocks), indexing="ij")
    counter = torch.stack((grid[2], grid[0], grid[1], torch.full_like(grid[0], step)), -1)
    words = philox(counter, int(seed) & 0xFFFFFFFFFFFFFFFF)
    u, v = ((2 * (words >> 9) + 1).to(torch.float64) * 2.0**-24).unflatten(-1, (2, 2)).unbind(-1)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)
    noise: Tensor = pairs.unflatten(2, (blocks, 32)).transpose(-1, -2).flatten(2)
    return noise[..., :N].to(dtype, copy=True)


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

    ``log(1 - tanh(u) ** 2)`` is taken as ``2 * (log 2 - |u| - log(1 + exp(-2 |u|)))``, which no width of floats cuts
    off.
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
        g: of the perturbed inputs, [S, B, ...]. weight: of the entropy of each number, broadcast to mu; where eps is 0
            nothing is perturbed, and there is none.
    """
    weight = torch.where(eps == 0, 0.0, weight)
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


def adt_ascend(
    g: Tensor,
    x: Tensor,
    mu: Tensor,
    rho: Tensor,
    noise: Tensor,
    eps: Tensor,
    weight: Tensor,
    rate: float,
    low: float = -math.inf,
    high: float = math.inf,
    totals: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """mu and rho after a step of ``rate`` along the sign of ``adt_backward``'s d, and totals.

    With totals, [2, B, ...] of mu and rho, those of the steps before: along ``t / (|t| + LEAST)``, t = totals + d,
    which is what Adam with betas of 0 makes of gradients that nobody sets to zero. Returns t, or nothing, [0].
    """
    d = torch.stack(adt_backward(g, x, mu, rho, noise, eps, weight, low, high))
    if totals is None:
        way, kept = d.sign(), d.new_empty(0)
    else:
        kept = totals + d
        way = kept / (kept.abs() + LEAST)
    return mu + rate * way[0], rho + rate * way[1], kept

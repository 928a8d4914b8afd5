"""Gradient estimators: how a gradient passes from a code to the row that became it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_EPS = 1e-6  # least length that is divided by


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, whose gradient goes to x as it is (Bengio et al. 2013). x and codes: [..., D]."""
    return codes.detach() + (x - x.detach())


def rotate_to(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, whose gradient goes to x turned and scaled as x must be to become its code.

    Fifty et al. 2024, section 4.2: two reflections and the ratio of lengths, all held fixed.

    Args:
        x, codes: [..., D].

    Returns:
        [..., D], exactly the codes.
    """
    held, target = x.detach(), codes.detach()
    long = target.norm(dim=-1, keepdim=True)
    short = held.norm(dim=-1, keepdim=True).clamp_min(_EPS)
    u, v = held / short, target / long.clamp_min(_EPS)
    w = F.normalize(u + v, dim=-1, eps=_EPS)
    moved = x - held  # zero, with the gradient of x
    turned = moved - 2 * w * (moved * w).sum(-1, keepdim=True) + 2 * v * (moved * u).sum(-1, keepdim=True)
    rotated: Tensor = target + long / short * turned
    return rotated


def directional_reparam(x: Tensor, codes: Tensor, variance: float = 5e-3) -> Tensor:
    """x moved as far as its code lies, almost towards it: both get a gradient (DiVeQ, figure 1).

    Args:
        x, codes: [..., D].
        variance: of the normal noise that is added to the direction, >= 0.

    Returns:
        [..., D], the codes but for the noise.
    """
    way = codes - x
    noised = way + math.sqrt(variance) * torch.randn_like(way)
    moved: Tensor = x + F.normalize(noised, dim=-1, eps=_EPS).detach() * way.norm(dim=-1, keepdim=True)
    return moved

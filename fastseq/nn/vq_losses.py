"""Similarities of rows and codes, and the losses of vector quantization that need them or the codebook alone.

Similarities are a matrix of rows by codes. It is formed for the options that are defined on all of them and nowhere
else: sampling, cross-entropy and diversity.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST = 1e-8  # least squared distance under the root
_EPS = 1e-6  # least length that is divided by


def similarities(x: Tensor, codes: Tensor, dot: bool) -> Tensor:
    """Minus the distance of each row to each code, or with ``dot`` their inner product.

    Args:
        x: [G, N, D]. codes: [G, K, D], or [G, N, K, D] where each row has its own.

    Returns:
        [G, N, K] in float32 (float64 if either is), also under autocast; differentiable in both.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    x, codes = x.to(dtype), codes.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        if codes.dim() == 4:
            return (codes @ x[..., None])[..., 0] if dot else -F.pairwise_distance(x[..., None, :], codes)
        products = x @ codes.mT
        if dot:
            return products
        squared = x.square().sum(-1)[:, :, None] + codes.square().sum(-1)[:, None, :] - 2 * products
        return -squared.clamp_min(_LEAST).sqrt()


def add_noise(logits: Tensor, temperature: float) -> Tensor:
    """``logits / temperature`` plus Gumbel noise: its largest entry is a draw from the softmax (Gumbel 1954)."""
    uniform = torch.zeros_like(logits).uniform_(0, 1)
    return logits / temperature - (-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()


def cross_entropy(logits: Tensor, index: Tensor) -> Tensor:
    """Mean cross-entropy of logits [..., K] against index [...], over those that are not -1; 0 where all are."""
    total = F.cross_entropy(logits.flatten(0, -2), index.flatten(), ignore_index=-1, reduction="sum")
    return total / (index >= 0).sum().clamp_min(1)


def diversity_loss(logits: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """Minus the entropy of the softmax averaged over a batch, so that many codes are used.

    Args:
        logits: [G, B, T, K]. temperature: they are multiplied by it. mask: bool [G, B, T], the rows that count.

    Returns:
        A scalar, the mean over the places T of a sequence (of those where something counts).
    """
    share = (logits * temperature).softmax(-1)
    if mask is None:
        mean = share.mean((0, 1))
        return (mean * mean.clamp_min(1e-5).log()).sum(-1).mean()
    count = mask.sum((0, 1))
    mean = torch.where(mask[..., None], share, 0.0).sum((0, 1)) / count.clamp_min(1)[:, None]
    return (mean * mean.clamp_min(1e-5).log()).sum() / (count > 0).sum().clamp_min(1)


def orthogonal_loss(codes: Tensor, counted: Tensor | None) -> Tensor:
    """Mean squared cosine of pairs of codes, less the share of each with itself (Shin et al. 2021, equation 2).

    The sum over pairs is the squared norm of the second-moment matrix, of which the smaller form is taken.

    Args:
        codes: [G, K, D]. counted: [G, K], 1 for the codes that take part and 0 for others; None means all.

    Returns:
        A scalar.
    """
    G, K, D = codes.shape
    with torch.autocast(codes.device.type, enabled=False):
        unit = F.normalize(codes.float() if codes.dtype != torch.float64 else codes, dim=-1, eps=_EPS)
        if counted is not None:
            unit = unit * counted[..., None].to(unit.dtype)
        pairs = (unit @ unit.mT if K <= D else unit.mT @ unit).square().sum((-1, -2))
    if counted is None:
        return pairs.sum() / (G * K**2) - 1 / K
    number = counted.sum(-1).to(pairs.dtype).clamp_min(1)
    return (pairs / number**2 - 1 / number).mean()

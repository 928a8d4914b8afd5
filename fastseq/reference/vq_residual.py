"""Residual vector quantization (Zeghidour et al. 2021): each level quantizes what the levels before it left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.reference.vq import vq_backward, vq_quantize, vq_rotation, vq_straight_through


def vq_residual(
    x: Tensor,
    codebooks: Sequence[Tensor],
    mask: Tensor | None = None,
    levels: Tensor | None = None,
    gradient: str = "straight",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the nearest codes of all levels.

    Args:
        x: [N, D]. codebooks: M of [K_m, D]; they get no gradient.
        mask: bool [N], the rows that count. levels: integers [N], how many levels each row uses; None means M.
        gradient: what the codes of each level pass to x, "straight" or "rotation"; see ``vq_backward``.

    Returns:
        The sum [N, D], added in the order of the levels; index [N, M], -1 where a level is not used; squared distance
        of what is left and its code [M, N], 0 where not used, with gradient to x; what is left before each level
        [M, N, D].
    """
    function = {"straight": vq_straight_through, "rotation": vq_rotation}[gradient]
    rest, total = x, torch.zeros_like(x)
    indices, distances, residuals = [], [], []
    for m, codebook in enumerate(codebooks):
        used = torch.ones_like(x[:, 0], dtype=torch.bool) if mask is None else mask
        used = used if levels is None else used & (levels > m)
        codes, index, distance = vq_quantize(rest[None], codebook.detach()[None], used[None])
        total = total + function(rest[None], codes, index)[0]
        residuals.append(rest)
        indices.append(index[0])
        distances.append(distance[0])
        rest = rest - codes[0].detach()
    return total, torch.stack(indices, dim=-1), torch.stack(distances), torch.stack(residuals)


def vq_residual_backward(
    dquantized: Tensor | None,
    dcommitment: Tensor | None,
    x: Tensor,
    codebooks: Sequence[Tensor],
    index: Tensor,
    gradient: str,
) -> Tensor:
    """dx [N, D]: the sum over the levels of ``vq_backward``, each on what the levels before it left.

    Args:
        dquantized: [N, D]. dcommitment: [M, N]. x: [N, D]. codebooks: M of [K_m, D]. index: [N, M].
    """
    rest, dx = x, torch.zeros_like(x)
    for m, codebook in enumerate(codebooks):
        used = index[:, m]
        codes = torch.where((used >= 0)[:, None], codebook[used.clamp_min(0)], 0.0)
        given = dquantized, None if dcommitment is None else dcommitment[m]
        d, dd = (None if g is None else g[None] for g in given)
        dx = dx + vq_backward(d, dd, None, rest[None], codes[None], used[None], len(codebook), gradient)[0][0]
        rest = rest - codes
    return dx

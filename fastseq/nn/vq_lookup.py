"""The codes of the rows: the nearest, or those that a sample, a beam or a network of the caller chooses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import functional
from fastseq.functional import Quantized
from fastseq.nn import onnx
from fastseq.nn.estimators import rotate_to, straight_through

ESTIMATORS = {"rotation": rotate_to, "straight": straight_through}


def nearest(x: Tensor, codes: Tensor, metric: str, mask: Tensor | None, gradient: str, sums: bool) -> Quantized:
    """``functional.vq_quantize`` of x [G, N, D] and codes [G, K, D], which can also be exported to ONNX."""
    if onnx.exporting():
        return onnx.quantize(x, codes, metric == "dot", mask)
    return functional.vq_quantize(x, codes, metric=metric, mask=mask, gradient=gradient, sums=sums)


def chosen(x: Tensor, codes: Tensor, index: Tensor, mask: Tensor | None, gradient: str, sums: bool) -> Quantized:
    """What ``functional.vq_quantize`` returns, for given indices.

    Args:
        x: [G, N, D]. codes: [G, K, D], or [G, N, K, D] where each row has its own.
        index: [G, N], or [G, N, k]: several codes for each row.
        mask, gradient, sums: as for ``functional.vq_quantize``; sums of one code for each row.
    """
    K = codes.shape[-2]
    if index.dim() == 3:
        x = x[:, :, None].expand(*index.shape, x.shape[-1])
    taken = take(codes, index)
    commitment, error = (x - taken.detach()).square().sum(-1), (x.detach() - taken).square().sum(-1)
    quantized = ESTIMATORS[gradient](x, taken) if gradient in ESTIMATORS else taken
    if mask is not None:
        counted = mask if index.dim() == 2 else mask[..., None]
        commitment, error = (torch.where(counted, d, 0.0) for d in (commitment, error))
        quantized, index = torch.where(counted[..., None], quantized, 0.0), index.masked_fill(~counted, -1)
    counts, added = functional.vq_sums(x, index, K) if sums else (None, None)
    return Quantized(quantized, index, commitment, error, counts, added)


def take(codes: Tensor, index: Tensor) -> Tensor:
    """codes [G, K, D], or [G, N, K, D], at index [G, N] or [G, N, k]: [G, N, D] or [G, N, k, D]."""
    D = codes.shape[-1]
    if codes.dim() == 4:
        place = index.reshape(*index.shape[:2], -1)[..., None]
        found = codes.gather(2, place.expand(*place.shape[:3], D))
    else:
        found = codes.gather(1, index.flatten(1)[..., None].expand(-1, -1, D))
    return found.reshape(*index.shape, D)


def decode(codes: Tensor, indices: Tensor, heads: int) -> Tensor:
    """The codes of given indices, those of all heads one after the other.

    Args:
        codes: [G, K, D], G = 1 or ``heads``.
        indices: integers [...], or [..., heads] where there are several.

    Returns:
        [..., heads * D]; zeros where the index is -1.
    """
    G, K, D = codes.shape
    place = indices.long().clamp_min(0)
    if G > 1:
        place = place + torch.arange(G, device=indices.device) * K
    found = torch.where((indices >= 0)[..., None], F.embedding(place, codes.reshape(G * K, D)), 0.0)
    return found.flatten(-2) if heads > 1 else found

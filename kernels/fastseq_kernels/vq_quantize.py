"""Codes, index, squared distance and sums by code: the lookup, then one pass over the rows it found codes for."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq_kernels.vq_nearest import gather, lookup
from fastseq_kernels.vq_sums import vq_sums

_AUTOMATIC = 2  # screen where it is faster


def vq_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``fastseq::vq_quantize``; the codes have x's dtype, all else is float32."""
    G, N, _ = x.shape
    index, _ = lookup(x, codebook, mask, dot, _AUTOMATIC, torch.int64, False)
    codes = torch.empty_like(x)
    distance = torch.empty(G, N, dtype=torch.float32, device=x.device)
    gather(x, codebook, index, codes, distance)
    none = torch.empty(0, dtype=torch.float32, device=x.device)
    found = (none, none.clone())
    if sums:
        found = vq_sums(x, index, codebook.shape[1])
    return codes, index, distance, *found

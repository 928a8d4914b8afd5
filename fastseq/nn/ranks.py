"""Sums of several tensors over the processes of ``torch.distributed``, by one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.nn._ranks import ranks, sum_


def several() -> bool:
    """Whether this process is one of several."""
    return ranks()[1] > 1


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of each tensor over all processes; the tensors themselves where there is one process.

    Args:
        tensors: floating-point, on one device, with the same shapes on every rank.

    Returns:
        Tensors of the shapes and dtypes given, with the same bits on every rank.
    """
    if not several():
        return list(tensors)
    wide = tensors[0].dtype
    for t in tensors:
        wide = torch.promote_types(wide, t.dtype)
    packed = sum_(torch.cat([t.detach().to(wide).flatten() for t in tensors]))
    parts = packed.split([t.numel() for t in tensors])
    return [p.view(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]

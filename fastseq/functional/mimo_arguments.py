"""The index of rows of several examples, as a caller gives it and as the operators take it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq import _check


def checked_index(function: str, index: Tensor, device: torch.device) -> Tensor:
    """int32, contiguous. What int32 cannot hold stays out of range, for the operators to find."""
    if index.dim() != 2 or index.shape[0] < 1:
        _check.fail(function, "index", "[M, N] with M >= 1", list(index.shape))
    if index.dtype not in (torch.int32, torch.int64):
        _check.fail(function, "index", "int32 or int64", index.dtype)
    _check.device(function, "index", index, device)
    if index.dtype is torch.int64:
        index = index.clamp(-1, 2**31 - 1).to(torch.int32)
    return index.contiguous()

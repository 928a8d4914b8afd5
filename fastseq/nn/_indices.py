"""Checks of the indices that a decoder is given."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq._check import fail

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_indices(function: str, indices: Tensor, size: int, least: int = 0) -> None:
    """``indices`` are integers in least..size-1.

    Their values are read on the CPU alone, where that does not wait for a device, and not while a graph is made.
    """
    if indices.dtype not in _INTEGERS:
        fail(function, "indices", "integers", indices.dtype)
    if indices.device.type != "cpu" or not indices.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(end) for end in indices.aminmax())
    if low < least or high >= size:
        fail(function, "indices", f"in {least}..{size - 1}", f"values in {low}..{high}")

"""Codes of vector quantization as bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def vq_pack(index: Tensor, bits: int) -> Tensor:
    """Code i takes bits [i * bits, (i + 1) * bits) of its line, the lowest first; the last byte is filled with zeros.

    Args:
        index: int64 [L, N] in 0..2**bits - 1. bits: 1..32.

    Returns:
        uint8 [L, (N * bits + 7) // 8].
    """
    places = torch.arange(bits, device=index.device)
    stream = (index[..., None] >> places & 1).flatten(1)
    stream = F.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    packed: Tensor = (stream << torch.arange(8, device=index.device)).sum(-1)
    return packed.to(torch.uint8)


def vq_unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of ``vq_pack``: int64 [L, count]."""
    stream = (packed[..., None].long() >> torch.arange(8, device=packed.device) & 1).flatten(1)
    if stream[:, count * bits :].any():
        line = int(stream[:, count * bits :].any(1).nonzero()[0])
        raise ValueError(f"vq_unpack: packed is corrupted: bits after the last code of line {line} are not zero")
    stream = stream[:, : count * bits].unflatten(1, (count, bits)) if count else stream.new_zeros(len(packed), 0, bits)
    index: Tensor = (stream << torch.arange(bits, device=packed.device)).sum(-1)
    return index

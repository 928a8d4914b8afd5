"""``vq_pack`` and ``vq_unpack``: codes as bits, for files and wires."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq import _check
from fastseq.ops import vq_codes as _vq_codes  # noqa: F401  (gives torch the operators)

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def code_bits(K: int) -> int:
    """Bits that a code of K needs: 10 for 1024."""
    if isinstance(K, bool) or not isinstance(K, int) or not 1 <= K <= 2**32:
        _check.fail("code_bits", "K", "an integer in 1..2**32", repr(K))
    return max(1, (K - 1).bit_length())


def vq_pack(index: Tensor, bits: int) -> Tensor:
    """Codes without the bits that none of them needs: 10 instead of 64 for K = 1024.

    Each line of the last dimension begins on a byte, so a prefix of levels is a prefix of lines if the levels come
    first: pack ``indices.movedim(-1, 0)`` of a residual quantizer.

    Args:
        index: int64, int32, int16 or uint8 [..., N] in 0..2**bits - 1. Dropped levels (-1) cannot be packed.
        bits: 1..32, see ``code_bits``.

    Returns:
        uint8 [..., (N * bits + 7) // 8]; code i takes bits [i * bits, (i + 1) * bits) of its line, the lowest first.

    Raises:
        ArgumentError: naming the argument. ValueError or RuntimeError: an index out of range.
    """
    _bits("vq_pack", bits)
    if index.dtype not in _INTEGERS:
        _check.fail("vq_pack", "index", "int64, int32, int16 or uint8", index.dtype)
    if index.dim() < 1:
        _check.fail("vq_pack", "index", "[..., N]", list(index.shape))
    lines = index.reshape(index.shape[:-1].numel(), index.shape[-1]).to(torch.int64).contiguous()
    packed: Tensor = torch.ops.fastseq.vq_pack(lines, bits)
    return packed.view(*index.shape[:-1], packed.shape[-1])


def vq_unpack(packed: Tensor, bits: int, count: int, *, dtype: torch.dtype = torch.int64) -> Tensor:
    """The inverse of ``vq_pack``.

    Args:
        packed: uint8 [..., (count * bits + 7) // 8]. bits: as packed. count: N, codes of a line.
        dtype: int64, int32 or int16, which must hold 2**bits - 1.

    Returns:
        index [..., count].

    Raises:
        ArgumentError: naming the argument. ValueError or RuntimeError: bits after the last code are not zero, which
            ``vq_pack`` never leaves so. A code beyond the codebook is found where it is looked up.
    """
    _bits("vq_unpack", bits)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        _check.fail("vq_unpack", "count", "an integer >= 0", repr(count))
    _check.dtype("vq_unpack", "packed", packed, torch.uint8)
    if dtype not in _INTEGERS[:3] or 2**bits - 1 > torch.iinfo(dtype).max:
        _check.fail("vq_unpack", "dtype", f"int64, int32 or int16 and hold {bits} bits", dtype)
    size = (count * bits + 7) // 8
    if packed.dim() < 1 or packed.shape[-1] != size:
        _check.fail("vq_unpack", "packed", f"[..., (count * bits + 7) // 8] = [..., {size}]", list(packed.shape))
    lines = packed.reshape(packed.shape[:-1].numel(), size).contiguous()
    index: Tensor = torch.ops.fastseq.vq_unpack(lines, bits, count)
    return index.view(*packed.shape[:-1], count).to(dtype)


def _bits(function: str, bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 32:
        _check.fail(function, "bits", "an integer in 1..32", repr(bits))

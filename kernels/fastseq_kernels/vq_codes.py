"""Codes of vector quantization as bits, packed and back, equal to ``fastseq.reference.vq_codes`` bit for bit.

Each thread makes one byte, or one code, from the few codes or bytes that share bits with it; neighbours find these in
the L1 cache. The number of bits is a run-time argument: 32 of them would be 32 binaries for kernels that wait for
memory anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels import _launch
from fastseq_kernels._launch import cdiv, launch

_BLOCK = 512


@triton.jit(do_not_specialize=["bytes_of_all", "size", "N", "bits"])
def _pack_kernel(
    index_ptr,  # int64 [L, N]
    packed_ptr,  # uint8 [L, size] out
    bytes_of_all,  # L * size
    size,
    N,
    bits,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < bytes_of_all
    line, first_bit = at // size, at % size * 8
    first = first_bit // bits
    byte = tl.zeros([BLOCK], tl.int64)
    low = (tl.full([BLOCK], 1, tl.int64) << bits) - 1
    for j in range(7 // bits + 2):  # codes that can share bits with one byte
        i = first + j
        shift = i * bits - first_bit
        code = tl.load(index_ptr + line * N + i, mask=inside & (i < N) & (shift < 8), other=0) & low
        byte |= tl.where(shift < 0, code >> tl.maximum(-shift, 0), code << tl.minimum(tl.maximum(shift, 0), 8))
    tl.store(packed_ptr + at, (byte & 255).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["codes_of_all", "size", "N", "bits"])
def _unpack_kernel(
    packed_ptr,  # uint8 [L, size]
    index_ptr,  # int64 [L, N] out
    codes_of_all,  # L * N
    size,
    N,
    bits,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < codes_of_all
    line, first_bit = at // N, at % N * bits
    first, shift = first_bit // 8, first_bit % 8
    found = tl.zeros([BLOCK], tl.int64)
    for j in range((bits + 14) // 8):  # bytes that can share bits with one code; at most five
        needed = inside & (8 * j < shift + bits)
        byte = tl.load(packed_ptr + line * size + first + j, mask=needed, other=0).to(tl.int64)
        found |= byte << (8 * j)
    low = (tl.full([BLOCK], 1, tl.int64) << bits) - 1
    tl.store(index_ptr + at, (found >> shift) & low, mask=inside)


def vq_pack(index: Tensor, bits: int) -> Tensor:
    """``reference.vq_pack``. Of codes beyond 2**bits - 1 the lowest bits are taken, as there."""
    L, N = index.shape
    size = cdiv(N * bits, 8)
    packed = torch.empty(L, size, dtype=torch.uint8, device=index.device)
    launch(_pack_kernel, (cdiv(L * size, _BLOCK),), index, packed, L * size, size, N, bits, BLOCK=_BLOCK, num_warps=4)
    return packed


def vq_unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """``reference.vq_unpack``.

    Where a line ends within a byte the check of the bits that fill it up waits for the device. It is left out while a
    CUDA graph is captured, which nothing may wait in.

    Raises:
        ValueError: bits after the last code of a line are not zero.
    """
    L, size = packed.shape
    if not _captured(packed):
        _check_filling(packed, count * bits)
    index = torch.empty(L, count, dtype=torch.int64, device=packed.device)
    grid = (cdiv(L * count, _BLOCK),)
    launch(_unpack_kernel, grid, packed, index, L * count, size, count, bits, BLOCK=_BLOCK, num_warps=4)
    return index


def _captured(packed: Tensor) -> bool:
    """Whether values must not be read: in the capture of a CUDA graph, or where launches are only listed."""
    if _launch._recorded is not None:
        return True
    return packed.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_filling(packed: Tensor, used: int) -> None:
    """Raise if a line of bytes has a bit that is set after its first ``used``."""
    rest = packed[:, used // 8 :]
    if not rest.numel():
        return
    wrong = (rest[:, :1] >> (used % 8)).bool().any(1) | rest[:, 1:].bool().any(1)
    if wrong.any():
        line = int(wrong.nonzero()[0])
        raise ValueError(f"vq_unpack: packed is corrupted: bits after the last code of line {line} are not zero")

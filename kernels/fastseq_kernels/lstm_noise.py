"""Noise of the input and forget gates: Philox words equal to the CPU's bit for bit, and their logits.

The noise depends on no state, so it is added to the pre-activations before the loop over time, not in it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two
from fastseq_kernels._rows import Rows

_RUN_TIME = ["T", "B", "row_offset", "stream", "threshold"]  # sizes that must not compile anew


@triton.jit
def logit(word, mask_word, threshold):
    """log U - log(1 - U), U = (k + 1/2) 2^-24, k = word >> 8; 0 where the mask's own k is not below threshold."""
    k = (word >> 8).to(tl.int32)
    over, under = (2 * k + 1).to(tl.float32), (33554431 - 2 * k).to(tl.float32)  # 2^25 U, 2^25 (1 - U)
    return tl.where((mask_word >> 8).to(tl.int32) < threshold, tl.log(over / under), 0.0)


@triton.jit(do_not_specialize=_RUN_TIME)
def _noise_kernel(
    base_ptr,  # [elements, PLANES * H] what the noise is added to, or None
    out_ptr,  # [elements, PLANES * H] may be base
    seed_ptr,  # int64 [1]
    rows_ptr,  # int64 [B] number of each row, or None: 0 .. B-1
    lengths_ptr,  # int64 [B] or None
    offsets_ptr,  # int64 [T] or None
    T,
    B,
    H,
    row_offset,
    stream,
    threshold,
    PLANES: tl.constexpr,  # gates per element: 2, or 4, of which the last two are copied where out is not base
    COPY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tiles = tl.cdiv(B, BLOCK_B)
    t = (tl.program_id(0) // tiles).to(tl.int64)
    b = (tl.program_id(0) % tiles) * BLOCK_B + tl.arange(0, BLOCK_B)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    alive = b < B
    number = b.to(tl.int64)
    if rows_ptr is not None:
        number = tl.load(rows_ptr + b, mask=alive, other=0)
    if lengths_ptr is not None:
        alive = alive & (t < tl.load(lengths_ptr + b, mask=alive, other=0))
    first = t * B
    if offsets_ptr is not None:
        first = tl.load(offsets_ptr + t)
    place = (first + b)[:, None] * (PLANES * H) + h[None, :]
    inside = alive[:, None] & (h < H)[None, :]

    zero = tl.zeros([BLOCK_B, BLOCK_H], tl.uint32)
    unit, row = zero + h.to(tl.uint32)[None, :], zero + (number + row_offset).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), unit, zero + t.to(tl.uint32), row, zero + stream.to(tl.uint32))
    i, f = logit(w0, w1, threshold), logit(w2, w3, threshold)
    if base_ptr is not None:
        i += tl.load(base_ptr + place, mask=inside, other=0.0).to(tl.float32)
        f += tl.load(base_ptr + place + H, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, i, mask=inside)
    tl.store(out_ptr + place + H, f, mask=inside)
    if COPY:
        for plane in tl.static_range(2, PLANES):
            tl.store(out_ptr + place + plane * H, tl.load(base_ptr + place + plane * H, mask=inside), mask=inside)


def _run(
    base: Tensor | None,
    out: Tensor,
    rows: Rows,
    H: int,
    seed: Tensor,
    numbers: Tensor | None,
    row_offset: int,
    stream: int,
    probability: float,
) -> None:
    planes = 2 if base is None else 4
    block_h = power_of_two(H, most=128)
    block_b = 1 if rows.B == 1 else 512 // block_h
    grid = (cdiv(rows.B, block_b) * rows.T, cdiv(H, block_h))
    threshold = math.ceil(probability * 2**24 - 0.5)  # the least k with (k + 1/2) 2^-24 >= probability
    launch(
        _noise_kernel,
        grid,
        *(base, out, seed.to(out.device), None if numbers is None else numbers.to(out.device)),
        *(rows.lengths, rows.offsets, rows.T, rows.B, H, row_offset, stream, threshold),
        PLANES=planes,
        COPY=base is not None and base is not out,
        BLOCK_B=block_b,
        BLOCK_H=block_h,
        num_warps=4,
    )


def add_noise(
    x_gates: Tensor,
    out: Tensor,
    rows: Rows,
    seed: Tensor,
    numbers: Tensor | None,
    row_offset: int,
    stream: int,
    noise_probability: float,
) -> None:
    """out = x_gates with noise on the planes i and f; out may be x_gates. Elements of dead rows stay unwritten."""
    given = (seed, numbers, row_offset, stream, noise_probability)
    _run(x_gates, out, rows, x_gates.shape[-1] // 4, *given)


def lstm_noise(
    seed: Tensor,
    T: int,
    B: int,
    H: int,
    rows: Tensor | None,
    row_offset: int,
    stream: int,
    noise_probability: float,
) -> Tensor:
    """``reference.gate_noise`` in float32, on the device of seed."""
    out = torch.empty(T, B, 2 * H, device=seed.device)
    _run(None, out, Rows(T, B, None, None), H, seed, rows, row_offset, stream, noise_probability)
    return out

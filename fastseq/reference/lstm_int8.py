"""Definition of the LSTM with recurrent weights of 8 bits, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.reference.lstm import Outputs, lstm

_EXACT = 1024  # products of this many pairs sum to less than 2**24, so every partial sum is a float32


def lstm_int8(x_gates: Tensor, weight_hh: Tensor, scale: Tensor, h0: Tensor, c0: Tensor, *options: Any) -> Outputs:
    """``lstm`` with weights ``scale * weight_hh`` and h rounded to 1/127; their products are summed without error.

    Args:
        weight_hh: int8 [4*H, H]. scale: [4*H], of each row.
        options: those of ``lstm`` after weight_hr, in its order.

    Returns:
        As ``lstm``; h itself is not rounded.
    """
    weights = weight_hh.mT.to(torch.float32)
    wide = torch.promote_types(x_gates.dtype, torch.float32)  # a sum of integers can be larger than float16 holds

    def product(h: Tensor) -> Tensor:
        return (int8_product(quantized(h), weights).to(wide) * (scale / 127).to(wide)).to(x_gates.dtype)

    return lstm(x_gates, product, h0, c0, None, *options)


def quantized(h: Tensor) -> Tensor:
    """127 * h in float32, to the nearest integer, ties to even, in -127 .. 127; NaN counts as 0. int8."""
    return (h.to(torch.float32) * 127).clamp(-127, 127).round().nan_to_num(0).to(torch.int8)


def int8_product(q: Tensor, weights: Tensor) -> Tensor:
    """q [B, H] times weights [H, 4*H], both integers of 8 bits in any dtype: exact, int32."""
    total = torch.zeros(len(q), weights.shape[1], dtype=torch.int32, device=q.device)
    for a, b in zip(q.to(torch.float32).split(_EXACT, 1), weights.to(torch.float32).split(_EXACT), strict=True):
        total = total + (a @ b).to(torch.int32)
    return total

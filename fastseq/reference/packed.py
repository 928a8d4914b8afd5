"""Definition of products with weights kept in few bits, or as thin factors, and of the LSTM over them, for inference.

A matrix [N, K] is its gates, one or four (i, f, g, o), of N or N / 4 rows each. Every gate is kept in its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.reference.compression import integer_rows
from fastseq.reference.lstm import Outputs, lstm
from fastseq.reference.lstm_int8 import int8_product, quantized

BITS = {"int8": 8, "int4": 4}
LEAST = 2.0**-118  # a row of smaller numbers counts as zeros


class Part(NamedTuple):
    """An array of weights [N, K] as it is kept."""

    values: Tensor  # of a floating dtype or int8 [N, K], or uint8 [N, (K + 1) // 2], see ``nibbles``
    scale: Tensor | None = None  # float32 [N, groups], of integers
    group: int = 0  # neighbouring columns that share a scale; 0: all


class Gate(NamedTuple):
    """The rows of one gate [N, K]; with ``down`` [r, K], ``rows`` is the upper factor [N, r]."""

    rows: Part
    down: Part | None = None


Matrix = Sequence[Gate]


def store(weight: Tensor, storage: str, group: int = 0) -> Part:
    """``weight`` [N, K] kept as "int8" or "int4" by ``integer_rows``, or in the floating dtype of that name."""
    if storage not in BITS:
        return Part(weight.to(getattr(torch, storage)))
    group = group if group < weight.shape[1] else 0
    integers, scale = integer_rows(weight, BITS[storage], group or None)
    return Part(nibbles(integers) if storage == "int4" else integers, scale.float(), group)


def storage_of(part: Part) -> str:
    """The name that ``store`` made it by."""
    return "int4" if part.values.dtype == torch.uint8 else str(part.values.dtype).removeprefix("torch.")


def nibbles(integers: Tensor) -> Tensor:
    """Integers of 4 bits [N, K] as bytes [N, (K + 1) // 2]: plus 8, even columns in the low halves; 8 pads an odd K."""
    shifted = torch.nn.functional.pad(integers + 8, (0, integers.shape[1] % 2), value=8).to(torch.uint8)
    return shifted[:, ::2] | shifted[:, 1::2] << 4


def from_nibbles(packed: Tensor, K: int) -> Tensor:
    """The integers [N, K], int8, of ``nibbles``."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :K].to(torch.int8) - 8


def part_values(part: Part, K: int) -> Tensor:
    """The weights [N, K] that a part stands for: of its own dtype, float32 of integers."""
    if part.scale is None:
        return part.values
    integers = from_nibbles(part.values, K) if part.values.dtype == torch.uint8 else part.values
    return integers * part.scale.repeat_interleave(part.group or K, 1)[:, :K]


def matrix_values(matrix: Matrix, K: int) -> Tensor:
    """The weights [N, K] that a matrix stands for, at least float32."""
    found = []
    for rows, down in matrix:
        if down is None:
            found.append(_wide(part_values(rows, K)))
        else:
            found.append(_wide(part_values(rows, down.values.shape[0])) @ _wide(part_values(down, K)))
    return torch.cat(found)


def linear_packed(x: Tensor, matrix: Matrix, bias: Tensor | None = None, bounded: bool = False) -> Tensor:
    """``x @ matrix.T + bias``, where rows that meet integers are rounded to integers of 8 bits themselves.

    A row x is q * m / 127 with m its largest magnitude and q = 127 * x / m, rounded to the nearest, ties to even. What
    the lower factors make is rounded anew. Sums of products of integers are exact; those of all groups are added in
    ascending order, each times its scale. A row that is not finite becomes NaN.

    Args:
        x: [M, K]. bias: [N].
        bounded: x lies within -1 .. 1, and q is 127 * x.

    Returns:
        [M, N] in the dtype of x, by float32 where there are integers.
    """
    found = []
    for rows, down in matrix:
        found.append(
            part_product(x, rows, bounded) if down is None else part_product(part_product(x, down, bounded), rows)
        )
    y = torch.cat(found, 1)
    return y if bias is None else y + bias


def part_product(x: Tensor, part: Part, bounded: bool = False) -> Tensor:
    """``linear_packed`` of one array."""
    if part.scale is None:
        return x @ part.values.to(x.dtype).mT
    K = x.shape[1]
    group = part.group or K
    integers = from_nibbles(part.values, K) if part.values.dtype == torch.uint8 else part.values
    scale = part.scale / 127 if bounded else part.scale
    q, times = (quantized(x), None) if bounded else quantized_rows(x)
    y = torch.zeros(len(x), len(integers), device=x.device)
    for n, (a, w) in enumerate(zip(q.split(group, 1), integers.split(group, 1), strict=True)):
        y = y + int8_product(a, w.mT).to(torch.float32) * scale[:, n]
    return (y if times is None else y * times).to(x.dtype)


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and the float32 scale [M, 1] of every row: 0 of zeros, NaN of a row that is not finite."""
    wide = x.to(torch.float32)
    most = wide.abs().amax(1, keepdim=True)
    finite = most <= torch.finfo(torch.float32).max
    used = finite & (most >= LEAST)
    q = (torch.where(used, wide, 0) * (127 / torch.where(used, most, 1))).round().clamp(-127, 127)
    return q.to(torch.int8), torch.where(used, most / 127, torch.where(finite, 0.0, torch.nan))


def lstm_packed(
    x: Tensor,
    weight_hh: Matrix,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Matrix | None = None,
    bias: Tensor | None = None,
    weight_hr: Matrix | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    h_start: Tensor | None = None,
    c_start: Tensor | None = None,
    tau: float = 1.0,
    hard: bool = False,
    reverse: bool = False,
) -> Outputs:
    """``lstm`` over packed weights.

    Args:
        x: x_gates of ``lstm``, or with ``weight_ih``, a matrix of 4 gates, the input [T, B, I] or [N, I] of the layer.
        weight_hh: of 4 gates. Without projection ``|h| < 1``, which is ``bounded``; what a projection reads is too.
        weight_hr: [P, H], of 1 gate.
        others: as in ``lstm``.

    Returns:
        As ``lstm``; h itself is not rounded.
    """
    if weight_ih is not None:
        x = linear_packed(x.flatten(0, -2), weight_ih, bias).unflatten(0, x.shape[:-1])
    project: Any = None if weight_hr is None else lambda h: linear_packed(h, weight_hr, bounded=True)
    product = lambda h: linear_packed(h, weight_hh, bounded=weight_hr is None)  # noqa: E731
    options = (lengths, batch_sizes, reset, h_start, c_start, None, tau, hard, reverse)
    return lstm(x, product, h0, c0, project, *options)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.element_size() < 4 else values

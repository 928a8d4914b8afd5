"""What the compressed recurrences share on the host: their call, and the tensors that a forward fills."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq_kernels._rows import rows_of
from fastseq_kernels._steps import Recurrence
from fastseq_kernels.lstm_noise import add_noise

BLOCK_B = 16  # rows of a tile: what a matrix instruction takes


def recurrence(data: Tensor, weights: Tensor, h0: Tensor, c0: Tensor, state: Any, gate: Any) -> Recurrence:
    """One call; ``state`` is lengths, batch_sizes, reset, h_start, c_start, ``gate`` tau, hard, reverse."""
    lengths, batch_sizes, reset, h_start, c_start = state
    rows = rows_of(data, h0.shape[0], lengths, batch_sizes)
    return Recurrence(rows, weights, h0, c0, None, reset, h_start, c_start, *gate)


def fresh(call: Recurrence, *sizes: int, like: Tensor) -> Tensor:
    """Memory of all elements: zeros where some lie beyond a row's end, which no kernel writes."""
    padded = call.rows.lengths is not None and call.rows.offsets is None
    return like.new_zeros(sizes) if padded else like.new_empty(sizes)


class Outputs(NamedTuple):
    """What a forward fills."""

    x: Tensor  # the pre-activations with their noise; gates themselves where both are ours
    h: Tensor
    c: Tensor | None
    gates: Tensor | None
    h_n: Tensor  # h0 at first, which rows without steps keep
    c_n: Tensor  # likewise

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As the operators return them: what is not kept has no elements."""
        c = self.c_n.new_empty(0) if self.c is None else self.c
        return self.h, c, self.h.new_empty(0) if self.gates is None else self.gates, self.h_n, self.c_n


def outputs(call: Recurrence, x_gates: Tensor, noise: tuple[Any, ...], save: int) -> Outputs:
    """``noise`` is seed, rows, row_offset, stream, noise_probability; ``save`` as in ``lstm_forward``."""
    lead, x, gates = x_gates.shape[:-1], x_gates, None
    if noise[0] is not None:
        x = fresh(call, *x_gates.shape, like=x_gates)
        add_noise(x_gates, x, call.rows, *noise)
    if save >= 2:
        gates = fresh(call, *x_gates.shape, like=x_gates) if x is x_gates else x
    h = fresh(call, *lead, call.P, like=x_gates)
    c = fresh(call, *lead, call.H, like=call.c0) if save >= 1 else None
    h_n, c_n = (v.clone(memory_format=torch.contiguous_format) for v in (call.h0, call.c0))
    return Outputs(x, h, c, gates, h_n, c_n)

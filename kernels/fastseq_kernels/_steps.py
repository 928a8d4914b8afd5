"""What one call of an LSTM is given, and device functions about its rows and steps.

An element is one row at one step, counted as in ``_rows``. ``b`` is a block of rows, ``t`` a step or one step per row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._rows import Rows


@triton.jit
def steps_of(lengths_ptr, b, T, B):
    """Steps of each row, 0 beyond the batch. Lengths that live on the device are held within 0 .. T here."""
    steps = tl.where(b < B, T, 0)
    if lengths_ptr is not None:
        own = tl.load(lengths_ptr + b, mask=b < B, other=0)
        steps = tl.minimum(tl.maximum(own, 0), T.to(tl.int64)).to(tl.int32)
    return steps


@triton.jit
def element(offsets_ptr, t, b, T, B):
    """int64 number of the element of row b at step t; any number for a step outside of 0 .. T - 1."""
    if offsets_ptr is not None:
        return tl.load(offsets_ptr + t, mask=(t >= 0) & (t < T), other=0) + b
    else:
        return t.to(tl.int64) * B + b


@triton.jit
def is_cut(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE: tl.constexpr):
    """Whether no state crosses from the step before t, in the order of the recurrence, to t."""
    later = t + REVERSE
    inside = (later >= 0) & (later < steps)
    return inside & (tl.load(reset_ptr + element(offsets_ptr, later, b, T, B), mask=inside, other=0) != 0)


@triton.jit
def neighbours(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE: tl.constexpr):
    """Which rows live at step t, begin there, are cut; its elements, and those of the step before in its order."""
    before = t + 1 if REVERSE else t - 1
    begins = (before < 0) | (before >= steps)
    cut = begins & False
    if reset_ptr is not None:
        cut = is_cut(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)
    return t < steps, begins, cut, element(offsets_ptr, t, b, T, B), element(offsets_ptr, before, b, T, B)


@triton.jit
def steps_between(first, last, most, T, REVERSE: tl.constexpr):
    """The part of first .. last - 1, counted in the order of the recurrence, in which rows of ``most`` steps live."""
    if REVERSE:
        return tl.maximum(first, T - most), last
    else:
        return first, tl.minimum(last, most)


@triton.jit
def state_before(
    state_ptr,  # [N, width]
    first_ptr,  # [B, width]
    start_ptr,  # [width] or None: zeros
    place,  # element of the step before, or row of state_ptr
    b,
    begins,  # t is the row's first step
    cut,
    alive,
    width,
):
    """Pointers to the rows of the state that enters a step, and which of them may be read; the others are zeros."""
    pointers = tl.where(begins, first_ptr + b.to(tl.int64) * width, state_ptr + place * width)
    if start_ptr is not None:
        return tl.where(cut, start_ptr + tl.zeros_like(place), pointers), alive
    else:
        return pointers, alive & (cut == 0)


class Recurrence(NamedTuple):
    """What every route through an LSTM is given: ``fastseq.reference.lstm`` says what it means."""

    rows: Rows
    weight_hh: Tensor  # [4*H, P]
    h0: Tensor  # [B, P]
    c0: Tensor  # [B, H] float32
    weight_hr: Tensor | None  # [P, H]
    reset: Tensor | None  # bool, one per element
    h_start: Tensor | None  # [P]
    c_start: Tensor | None  # [H] float32
    tau: float
    hard: bool
    reverse: bool

    @property
    def H(self) -> int:
        return self.c0.shape[1]

    @property
    def P(self) -> int:
        return self.h0.shape[1]

    @property
    def places(self) -> tuple[Tensor | None, ...]:
        """Where rows end, where their elements lie and where segments begin, as every kernel takes them."""
        return self.rows.lengths, self.rows.offsets, self.reset


class Grads(NamedTuple):
    """Gradients of what the forward returned, or None for zeros."""

    h: Tensor | None
    c: Tensor | None
    gates: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None


class Found(NamedTuple):
    """What a route through the backward returns; the weights' gradients are products of these."""

    dx_gates: Tensor
    dh0: Tensor
    dc0: Tensor
    dh_start: Tensor | None  # float32 [B, P], a sum per row
    dc_start: Tensor | None  # float32 [B, H]
    dh: Tensor | None  # [N, P] the whole gradient of h, with a projection
    m: Tensor | None  # [N, H] the hidden values before a projection

"""The backward of the LSTM step by step: one launch per step, two with a projection.

The cell of step t needs the gradient of the whole h of step t, so a launch multiplies the gates' gradients of the step
after with its columns of weight_hh and goes on to the backward of the cell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._cell import cell_backward, load_gates, store_gates
from fastseq_kernels._launch import rnn_precision
from fastseq_kernels._steps import Found, Grads, Recurrence, element, is_cut, state_before, steps_of
from fastseq_kernels._tiles import add_product, tanh
from fastseq_kernels.lstm_step import Loop, Tile, repeated, row_sums, tile

_RUN_TIME = ["t", "T", "B"]  # sizes that must not compile anew


@triton.jit
def _gate_rows(
    rows,  # [BLOCK_B] pointers to rows of 4*H
    known,  # [BLOCK_B] rows to read, the others are zeros
    turned_ptr,  # [P, 4*H]
    p,
    H,
    P,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The pre-activations' gradients times the columns p of weight_hh: a product per gate, each by a warp of its own.

    As one product, tiles this small would give several warps the same work.
    """
    gates = tl.arange(0, 4) * H
    total = tl.zeros([4, BLOCK_B, BLOCK_N], tl.float32)
    lost = total
    column = turned_ptr + p.to(tl.int64) * (4 * H)
    for first in range(0, H, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside, at = k < H, gates[:, None] + k[None, :]
        here = known[None, :, None] & inside[None, None, :]
        there = inside[None, :, None] & (p < P)[None, None, :]
        a = tl.load(rows[None, :, None] + at[:, None, :], mask=here, other=0.0)
        w = tl.load(column[None, None, :] + at[:, :, None], mask=there, other=0.0)
        total, lost = add_product(total, lost, a, w, PRECISION)
    return tl.sum(total, axis=0)


@triton.jit
def _carried(
    dx_ptr,  # [N, 4*H] of the steps done so far
    turned_ptr,  # [P, 4*H]
    dh_n_ptr,  # [B, P] or None
    dh_start_ptr,  # [B, P] in and out, or None
    offsets_ptr,
    reset_ptr,
    after,  # [BLOCK_B] the step that took this state
    taken,  # [BLOCK_B] whether there was one; else the state is the row's last
    b,
    p,
    steps,
    T,
    B,
    H,
    P,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of a state from the step after it: that of the pre-activations times weight_hh."""
    rows = dx_ptr + element(offsets_ptr, after, b, T, B) * (4 * H)
    dh = _gate_rows(rows, taken, turned_ptr, p, H, P, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K)
    columns = (p < P)[None, :]
    own = b.to(tl.int64)[:, None] * P + p[None, :]
    if dh_n_ptr is not None:
        ends = ((b < B) & (taken == 0))[:, None] & columns
        dh = tl.where(taken[:, None], dh, tl.load(dh_n_ptr + own, mask=ends, other=0.0).to(tl.float32))
    else:
        dh = tl.where(taken[:, None], dh, 0.0)
    if reset_ptr is not None:
        cut = (is_cut(reset_ptr, offsets_ptr, after, b, steps, T, B, REVERSE) & taken)[:, None]
        if dh_start_ptr is not None:
            total = dh + tl.load(dh_start_ptr + own, mask=cut & columns, other=0.0)
            tl.debug_barrier()  # the sum is written where other threads of this program may have read it
            tl.store(dh_start_ptr + own, total, mask=cut & columns)
        dh = tl.where(cut, 0.0, dh)
    return dh


@triton.jit(do_not_specialize=_RUN_TIME)
def _carry_kernel(
    dx_ptr,  # [N, 4*H]
    turned_ptr,  # [P, 4*H]
    dh_ptr,  # [N, P] upstream or None
    dh_n_ptr,  # [B, P] or None
    dh_start_ptr,  # [B, P] in and out, or None
    out_ptr,  # [N, P] the whole gradient of h at step t, or [B, P] that of h0
    lengths_ptr,
    offsets_ptr,
    reset_ptr,
    t,
    T,
    B,
    H,
    P,
    FIRST: tl.constexpr,  # there is no step t: the state is h0
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    p = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = steps_of(lengths_ptr, b, T, B)
    if FIRST:
        after = steps - 1 if REVERSE else steps * 0
        taken = steps > 0
    else:
        after = steps * 0 + (t - 1 if REVERSE else t + 1)
        taken = (t < steps) & (after >= 0) & (after < steps)
    dh = _carried(
        *(dx_ptr, turned_ptr, dh_n_ptr, dh_start_ptr, offsets_ptr, reset_ptr, after, taken, b, p, steps, T, B, H, P),
        *(REVERSE, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
    )
    columns = (p < P)[None, :]
    if FIRST:
        tl.store(out_ptr + b.to(tl.int64)[:, None] * P + p[None, :], dh, mask=(b < B)[:, None] & columns)
    else:
        here = (t < steps)[:, None] & columns
        at = element(offsets_ptr, t, b, T, B)[:, None] * P + p[None, :]
        if dh_ptr is not None:
            dh += tl.load(dh_ptr + at, mask=here, other=0.0).to(tl.float32)
        written = here
        if lengths_ptr is not None and offsets_ptr is None:
            written = (b < B)[:, None] & columns
        tl.store(out_ptr + at, tl.where(here, dh, 0.0), mask=written)


@triton.jit
def step_backward(
    dh_ptr,  # [N, P] upstream or None; with a projection the whole gradient of h
    dc_ptr,  # [N, H] upstream or None
    dgates_ptr,  # [N, 4*H] upstream or None
    dh_n_ptr,  # [B, P] or None
    dh_start_ptr,  # [B, P] in and out, or None
    dc_start_ptr,  # [B, H] in and out, or None
    dc_state_ptr,  # [B, H] in: of the cell of step t; out: of the one before
    dx_ptr,  # [N, 4*H] in: the step after; out: this step
    m_ptr,  # [N, H] out with a projection, else None
    gates_ptr,  # [N, 4*H]
    c_ptr,  # [N, H]
    c0_ptr,  # [B, H]
    c_start_ptr,  # [H] or None
    weight_ptr,  # the transpose of weight_hh, [P, 4*H]; with a projection weight_hr [P, H]
    lengths_ptr,
    offsets_ptr,
    reset_ptr,
    inverse_tau,
    t,
    T,
    B,
    H,
    P,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    h = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = steps_of(lengths_ptr, b, T, B)
    alive = t < steps
    before = t + 1 if REVERSE else t - 1
    begins = (before < 0) | (before >= steps)
    cut = begins & False
    if reset_ptr is not None:
        cut = is_cut(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)
    place, place_before = element(offsets_ptr, t, b, T, B), element(offsets_ptr, before, b, T, B)
    c_state, c_known = state_before(c_ptr, c0_ptr, c_start_ptr, place_before, b, begins, cut, alive, H)

    columns = (h < H)[None, :]
    here = alive[:, None] & columns
    own = b.to(tl.int64)[:, None] * H + h[None, :]
    at_h, at = place[:, None] * H + h[None, :], place[:, None] * (4 * H) + h[None, :]
    i, f, g, o = load_gates(gates_ptr + at, H, here)
    c = tl.load(c_ptr + at_h, mask=here, other=0.0)
    c_before = tl.load(c_state[:, None] + h[None, :], mask=c_known[:, None] & columns, other=0.0)
    dc = tl.load(dc_state_ptr + own, mask=here, other=0.0)
    if dc_ptr is not None:
        dc += tl.load(dc_ptr + at_h, mask=here, other=0.0)
    di = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    df, dg, do = di, di, di
    if dgates_ptr is not None:
        di, df, dg, do = load_gates(dgates_ptr + at, H, here)

    if m_ptr is not None:
        rows = dh_ptr + place * P
        dm = row_sums(rows, alive, weight_ptr, h, H, P, H, 1, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K)
        written = (b < B)[:, None] & columns if lengths_ptr is not None and offsets_ptr is None else here
        tl.store(m_ptr + at_h, tl.where(here, o * tanh(c), 0.0), mask=written)
    else:
        after = steps * 0 + (t - 1 if REVERSE else t + 1)
        taken = alive & (after >= 0) & (after < steps)
        dm = _carried(
            *(dx_ptr, weight_ptr, dh_n_ptr, dh_start_ptr, offsets_ptr, reset_ptr, after, taken),
            *(b, h, steps, T, B, H, P, REVERSE, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
        )
        if dh_ptr is not None:
            dm += tl.load(dh_ptr + at_h, mask=here, other=0.0).to(tl.float32)

    di, df, dg, do, dc = cell_backward(dm, dc, i, f, g, o, c, c_before, di, df, dg, do, inverse_tau, HARD)
    if dc_start_ptr is not None:
        crossing = cut[:, None] & here
        sums = dc + tl.load(dc_start_ptr + own, mask=crossing, other=0.0)
    tl.debug_barrier()  # the sums and the cell's gradient are written where other threads may have read them
    if dc_start_ptr is not None:
        tl.store(dc_start_ptr + own, sums, mask=crossing)
    tl.store(dc_state_ptr + own, tl.where(cut[:, None], 0.0, dc), mask=here)
    written = here
    if lengths_ptr is not None and offsets_ptr is None:
        written = (b < B)[:, None] & columns
        di, df, dg, do = (
            tl.where(here, di, 0.0),
            tl.where(here, df, 0.0),
            tl.where(here, dg, 0.0),
            tl.where(here, do, 0.0),
        )
    store_gates(dx_ptr + at, H, di, df, dg, do, written)


@triton.jit(do_not_specialize=_RUN_TIME)
def _step_backward_kernel(
    dh_ptr,
    dc_ptr,
    dgates_ptr,
    dh_n_ptr,
    dh_start_ptr,
    dc_start_ptr,
    dc_state_ptr,
    dx_ptr,
    m_ptr,
    gates_ptr,
    c_ptr,
    c0_ptr,
    c_start_ptr,
    weight_ptr,
    lengths_ptr,
    offsets_ptr,
    reset_ptr,
    inverse_tau,
    t,
    T,
    B,
    H,
    P,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    step_backward(
        *(dh_ptr, dc_ptr, dgates_ptr, dh_n_ptr, dh_start_ptr, dc_start_ptr, dc_state_ptr, dx_ptr, m_ptr, gates_ptr),
        *(c_ptr, c0_ptr, c_start_ptr, weight_ptr, lengths_ptr, offsets_ptr, reset_ptr, inverse_tau, t, T, B, H, P),
        *(HARD, REVERSE, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
    )


def gate_tile(B: int, width: int, H: int, dtype: torch.dtype) -> Tile:
    """For the sums of H terms of four gates: more of them at once are too much for shared memory."""
    at = tile(B, width, H, dtype, planes=4)
    stages = min(at.num_stages + 1, {16: 4, 32: 3, 64: 2}[at.rows])
    return at._replace(terms=min(at.terms, 128 // dtype.itemsize), num_stages=stages)


class Backward(NamedTuple):
    """The loop of the backward, and what is around it."""

    loop: Loop
    found: Found
    carry: Callable[[Tensor, int, bool], None]  # the whole gradient of h at a step, or of h0 at the end


def backward_loop(call: Recurrence, grads: Grads, gates: Tensor, c: Tensor) -> Backward:
    """Everything that the loop needs, and where it writes."""
    (T, B, *_), H, P = call.rows, call.H, call.P
    dx = torch.empty_like(gates)
    dh0 = torch.empty_like(call.h0, memory_format=torch.contiguous_format)
    dc_state = torch.zeros_like(call.c0) if grads.c_n is None else grads.c_n.clone()
    start = call.reset is not None and (call.h_start is not None or call.c_start is not None)
    dh_start, dc_start = (call.c0.new_zeros(B, n) if start else None for n in (P, H))
    projected = call.weight_hr is not None
    dh = gates.new_empty(*gates.shape[:-1], P) if projected else grads.h
    m = gates.new_empty(*gates.shape[:-1], H) if projected else None
    options: dict[str, Any] = {"REVERSE": call.reverse, "PRECISION": rnn_precision(gates.dtype)}

    turned = call.weight_hh.mT.contiguous()  # neighbours in a sum are neighbours in memory
    carrying = {
        first: repeated(_carry_kernel, B, P, gate_tile(B, P, H, gates.dtype), gates.device, FIRST=first, **options)
        for first in (False, True)
    }

    def carry(out: Tensor, t: int, first: bool) -> None:
        given = (dx, turned, None if first else grads.h, grads.h_n, dh_start, out, *call.places)
        carrying[first](*given, t, T, B, H, P)

    weight = call.weight_hr if projected else turned
    upstream = (dh, grads.c, grads.gates, grads.h_n, dh_start, dc_start, dc_state, dx, m)
    tensors = (*upstream, gates, c, call.c0, call.c_start, weight, *call.places)
    at = tile(B, H, P, gates.dtype) if projected else gate_tile(B, H, H, gates.dtype)
    loop = Loop(_step_backward_kernel, tensors, call, at, {"HARD": call.hard, **options}, not call.reverse)
    return Backward(loop, Found(dx, dh0, dc_state, dh_start, dc_start, dh if projected else None, m), carry)


def backward(call: Recurrence, grads: Grads, gates: Tensor, c: Tensor) -> Found:
    """Gradients of the pre-activations and of all states."""
    loop, found, carry = backward_loop(call, grads, gates, c)
    step = loop.launcher()
    for t in map(loop.step, range(call.rows.T)):
        if found.dh is not None:
            carry(found.dh, t, False)
        step(t)
    carry(found.dh0, 0, True)
    return found

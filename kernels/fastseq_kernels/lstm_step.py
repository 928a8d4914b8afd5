"""The LSTM step by step, for every size and layout: one launch per step, two with a projection.

Forward: a program owns BLOCK_B rows and BLOCK_H units with all four gates; it multiplies the whole state of its rows
with its rows of weight_hh and goes on to the cell. Backward: the cell of step t needs the gradient of the whole h of
step t, so a launch multiplies the gates' gradients of the step after with its columns of weight_hh and goes on to the
backward of the cell. At few rows a step is the reading of weight_hh from the second-level cache, by all
multiprocessors; tiles are narrow so that there are programs for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two, rnn_precision
from fastseq_kernels._steps import Found, Grads, Recurrence, element, is_cut, state_before, steps_of
from fastseq_kernels._tiles import gate, sigmoid, tanh

_RUN_TIME = ["t", "T", "B"]  # sizes that must not compile anew
BLOCK_B = 16  # rows of a tile: what a matrix instruction takes


@triton.jit
def _gate_sums(
    state,  # [BLOCK_B] pointers to rows of P
    known,  # [BLOCK_B] rows to read, the others are zeros
    weight_ptr,  # [4*H, P]
    h,
    H,
    P,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The state times the rows of weight_hh of the units h, per gate."""
    i = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    f, g, o = i, i, i
    plane = tl.cast(H, tl.int64) * P
    for first in range(0, P, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        s = tl.load(state[:, None] + k[None, :], mask=known[:, None] & (k < P)[None, :], other=0.0)
        weight = weight_ptr + h.to(tl.int64)[None, :] * P + k[:, None]
        inside = (k < P)[:, None] & (h < H)[None, :]
        i = tl.dot(s, tl.load(weight, mask=inside, other=0.0), i, input_precision=PRECISION)
        f = tl.dot(s, tl.load(weight + plane, mask=inside, other=0.0), f, input_precision=PRECISION)
        g = tl.dot(s, tl.load(weight + 2 * plane, mask=inside, other=0.0), g, input_precision=PRECISION)
        o = tl.dot(s, tl.load(weight + 3 * plane, mask=inside, other=0.0), o, input_precision=PRECISION)
    return i, f, g, o


@triton.jit(do_not_specialize=_RUN_TIME)
def _step_kernel(
    x_gates_ptr,  # [N, 4*H] pre-activations, noise added
    weight_ptr,  # [4*H, P]
    h_ptr,  # [N, P] in: the step before; out unless m is given
    c_ptr,  # [N, H] in and out, or [2, B, H] for even and odd steps
    gates_ptr,  # [N, 4*H] out or None; may be x_gates
    m_ptr,  # [B, H] out with a projection, else None
    h0_ptr,  # [B, P]
    c0_ptr,  # [B, H]
    h_start_ptr,  # [P] or None
    c_start_ptr,  # [H] or None
    h_n_ptr,  # [B, P] out, the rows whose last step this is
    c_n_ptr,  # [B, H] out, likewise
    lengths_ptr,  # [B] or None
    offsets_ptr,  # int64 [T] or None
    reset_ptr,  # bool [N] or None
    inverse_tau,
    t,
    T,
    B,
    H,
    P,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    KEEP_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    steps = steps_of(lengths_ptr, b, T, B)
    alive = t < steps
    before = t + 1 if REVERSE else t - 1
    begins = (before < 0) | (before >= steps)
    cut = begins & False
    if reset_ptr is not None:
        cut = is_cut(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)
    place, place_before = element(offsets_ptr, t, b, T, B), element(offsets_ptr, before, b, T, B)
    c_place, c_before = place, place_before
    if not KEEP_C:
        c_place, c_before = (t % 2).to(tl.int64) * B + b, ((t + 1) % 2).to(tl.int64) * B + b
    state, known = state_before(h_ptr, h0_ptr, h_start_ptr, place_before, b, begins, cut, alive, P)
    c_state, c_known = state_before(c_ptr, c0_ptr, c_start_ptr, c_before, b, begins, cut, alive, H)

    columns = (h < H)[None, :]
    here = alive[:, None] & columns
    at = place[:, None] * (4 * H) + h[None, :]
    x_i = tl.load(x_gates_ptr + at, mask=here, other=0.0).to(tl.float32)
    x_f = tl.load(x_gates_ptr + at + H, mask=here, other=0.0).to(tl.float32)
    x_g = tl.load(x_gates_ptr + at + 2 * H, mask=here, other=0.0).to(tl.float32)
    x_o = tl.load(x_gates_ptr + at + 3 * H, mask=here, other=0.0).to(tl.float32)
    c = tl.load(c_state[:, None] + h[None, :], mask=c_known[:, None] & columns, other=0.0)
    i, f, g, o = _gate_sums(state, known, weight_ptr, h, H, P, PRECISION, BLOCK_B, BLOCK_H, BLOCK_K)

    i, f = gate(x_i + i, inverse_tau, HARD), gate(x_f + f, inverse_tau, HARD)
    g, o = tanh(x_g + g), sigmoid(x_o + o)
    c = f * c + i * g
    m = o * tanh(c)

    tl.debug_barrier()  # gates may be x_gates: other threads of this program have read their part of it
    written = here
    if lengths_ptr is not None and offsets_ptr is None:  # elements beyond a row's end exist and are zeros
        written = (b < B)[:, None] & columns
        i, f, g, o = tl.where(here, i, 0.0), tl.where(here, f, 0.0), tl.where(here, g, 0.0), tl.where(here, o, 0.0)
    if gates_ptr is not None:
        tl.store(gates_ptr + at, i, mask=written)
        tl.store(gates_ptr + at + H, f, mask=written)
        tl.store(gates_ptr + at + 2 * H, g, mask=written)
        tl.store(gates_ptr + at + 3 * H, o, mask=written)
    tl.store(c_ptr + c_place[:, None] * H + h[None, :], tl.where(here, c, 0.0), mask=written)
    last = here & ((t == 0) if REVERSE else (t + 1 == steps)[:, None])
    own = b.to(tl.int64)[:, None] * H + h[None, :]
    tl.store(c_n_ptr + own, c, mask=last)
    if m_ptr is not None:
        tl.store(m_ptr + own, m, mask=here)
    else:
        tl.store(h_ptr + place[:, None] * P + h[None, :], tl.where(here, m, 0.0), mask=written)
        tl.store(h_n_ptr + own, m, mask=last)


@triton.jit
def _row_sums(
    rows,  # [BLOCK_B] pointers to rows of K
    known,  # [BLOCK_B] rows to read, the others are zeros
    weight_ptr,  # [K, N] by its strides
    n,
    N,
    K,
    weight_row,
    weight_column,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows times the columns n of a matrix."""
    total = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(rows[:, None] + k[None, :], mask=known[:, None] & (k < K)[None, :], other=0.0)
        weight = weight_ptr + k.to(tl.int64)[:, None] * weight_row + n.to(tl.int64)[None, :] * weight_column
        w = tl.load(weight, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=_RUN_TIME)
def _project_kernel(
    m_ptr,  # [B, H]
    weight_ptr,  # [P, H]
    h_ptr,  # [N, P] out
    h_n_ptr,  # [B, P] out, the rows whose last step this is
    lengths_ptr,
    offsets_ptr,
    t,
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
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    p = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = steps_of(lengths_ptr, b, T, B)
    alive = t < steps
    rows = m_ptr + b.to(tl.int64) * H
    out = _row_sums(rows, alive, weight_ptr, p, P, H, 1, H, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K)
    here = alive[:, None] & (p < P)[None, :]
    written = here
    if lengths_ptr is not None and offsets_ptr is None:
        written = (b < B)[:, None] & (p < P)[None, :]
    place = element(offsets_ptr, t, b, T, B)
    tl.store(h_ptr + place[:, None] * P + p[None, :], tl.where(here, out, 0.0), mask=written)
    last = here & ((t == 0) if REVERSE else (t + 1 == steps)[:, None])
    tl.store(h_n_ptr + b.to(tl.int64)[:, None] * P + p[None, :], out, mask=last)


@triton.jit
def _carried(
    dx_ptr,  # [N, 4*H] of the steps done so far
    weight_ptr,  # [4*H, P]
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
    dh = _row_sums(rows, taken, weight_ptr, p, P, 4 * H, P, 1, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K)
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
    weight_ptr,  # [4*H, P]
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
        *(dx_ptr, weight_ptr, dh_n_ptr, dh_start_ptr, offsets_ptr, reset_ptr, after, taken, b, p, steps, T, B, H, P),
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
def cell_backward(dm, dc, i, f, g, o, c, c_before, di, df, dg, do, inverse_tau, HARD: tl.constexpr):
    """Gradients of the four pre-activations and of the cell before; di .. do are those of the gates from elsewhere."""
    tanh_c = tanh(c)
    dc += dm * o * (1.0 - tanh_c * tanh_c)
    di, df, dg, do = di + dc * g, df + dc * c_before, dg + dc * i, do + dm * tanh_c
    if HARD:
        di, df = di * 0.0, df * 0.0
    else:
        di, df = di * i * (1.0 - i) * inverse_tau, df * f * (1.0 - f) * inverse_tau
    return di, df, dg * (1.0 - g * g), do * o * (1.0 - o), dc * f


@triton.jit(do_not_specialize=_RUN_TIME)
def _step_backward_kernel(
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
    weight_ptr,  # [4*H, P]; with a projection weight_hr [P, H]
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
    i = tl.load(gates_ptr + at, mask=here, other=0.0).to(tl.float32)
    f = tl.load(gates_ptr + at + H, mask=here, other=0.0).to(tl.float32)
    g = tl.load(gates_ptr + at + 2 * H, mask=here, other=0.0).to(tl.float32)
    o = tl.load(gates_ptr + at + 3 * H, mask=here, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + at_h, mask=here, other=0.0)
    c_before = tl.load(c_state[:, None] + h[None, :], mask=c_known[:, None] & columns, other=0.0)
    dc = tl.load(dc_state_ptr + own, mask=here, other=0.0)
    if dc_ptr is not None:
        dc += tl.load(dc_ptr + at_h, mask=here, other=0.0)
    di = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    df, dg, do = di, di, di
    if dgates_ptr is not None:
        di = tl.load(dgates_ptr + at, mask=here, other=0.0).to(tl.float32)
        df = tl.load(dgates_ptr + at + H, mask=here, other=0.0).to(tl.float32)
        dg = tl.load(dgates_ptr + at + 2 * H, mask=here, other=0.0).to(tl.float32)
        do = tl.load(dgates_ptr + at + 3 * H, mask=here, other=0.0).to(tl.float32)

    if m_ptr is not None:
        rows = dh_ptr + place * P
        dm = _row_sums(rows, alive, weight_ptr, h, H, P, H, 1, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K)
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
    tl.store(dx_ptr + at, di, mask=written)
    tl.store(dx_ptr + at + H, df, mask=written)
    tl.store(dx_ptr + at + 2 * H, dg, mask=written)
    tl.store(dx_ptr + at + 3 * H, do, mask=written)


class Tile(NamedTuple):
    """How a kernel runs: units and terms of the sum per tile."""

    units: int
    terms: int
    num_warps: int
    num_stages: int


def tile(width: int, terms: int, dtype: torch.dtype) -> Tile:
    """For ``width`` units of a model and sums of ``terms``. Tiles grow where there are programs enough without.

    Products without tensor cores keep all terms of a tile in registers, so these are few.
    """
    units = power_of_two(width, 16, 16 if width <= 2048 else 32)
    if dtype == torch.float32 and rnn_precision(dtype) == "ieee":
        return Tile(units, 16, 4, 2)
    return Tile(units, power_of_two(terms, 16, 64 if dtype == torch.float32 else 128), 4, 3)


def _run(kernel: Any, rows: int, width: int, at: Tile, *args: Any, **constexprs: Any) -> None:
    """One launch over all rows and ``width`` units."""
    launch(
        kernel,
        (cdiv(rows, BLOCK_B), cdiv(width, at.units)),
        *args,
        BLOCK_B=BLOCK_B,
        BLOCK_K=at.terms,
        num_warps=at.num_warps,
        num_stages=at.num_stages,
        **constexprs,
    )


def forward(
    call: Recurrence, x_gates: Tensor, h: Tensor, c: Tensor | None, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Write h, and c and gates where they are kept; returns h_n and c_n. ``gates`` may be ``x_gates``."""
    (T, B, *_), H, P = call.rows, call.H, call.P
    h_n, c_n = call.h0.clone(), call.c0.clone()
    keep = c is not None
    c = call.c0.new_empty(2, B, H) if c is None else c
    m = None if call.weight_hr is None else x_gates.new_empty(B, H)
    at, at_p = tile(H, P, x_gates.dtype), tile(P, H, x_gates.dtype)
    precision = rnn_precision(x_gates.dtype)
    state = (call.h0, call.c0, call.h_start, call.c_start, h_n, c_n, *call.places, 1.0 / call.tau)
    for t in reversed(range(T)) if call.reverse else range(T):
        _run(
            *(_step_kernel, B, H, at, x_gates, call.weight_hh, h, c, gates, m, *state, t, T, B, H, P),
            HARD=call.hard,
            REVERSE=call.reverse,
            KEEP_C=keep,
            PRECISION=precision,
            BLOCK_H=at.units,
        )
        if m is not None:
            _run(
                *(_project_kernel, B, P, at_p, m, call.weight_hr, h, h_n, *call.places[:2], t, T, B, H, P),
                REVERSE=call.reverse,
                PRECISION=precision,
                BLOCK_N=at_p.units,
            )
    return h_n, c_n


def backward(call: Recurrence, grads: Grads, gates: Tensor, c: Tensor) -> Found:
    """Gradients of the pre-activations and of all states."""
    (T, B, *_), H, P = call.rows, call.H, call.P
    dx = torch.empty_like(gates)
    dh0 = torch.empty_like(call.h0, memory_format=torch.contiguous_format)
    dc_state = torch.zeros_like(call.c0) if grads.c_n is None else grads.c_n.clone()
    start = call.reset is not None and (call.h_start is not None or call.c_start is not None)
    dh_start, dc_start = (call.c0.new_zeros(B, n) if start else None for n in (P, H))
    projected = call.weight_hr is not None
    dh = gates.new_empty(*gates.shape[:-1], P) if projected else grads.h
    m = gates.new_empty(*gates.shape[:-1], H) if projected else None
    at, at_p = tile(H, P if projected else 4 * H, gates.dtype), tile(P, 4 * H, gates.dtype)
    options: dict[str, Any] = {"REVERSE": call.reverse, "PRECISION": rnn_precision(gates.dtype)}

    def carry(out: Tensor, t: int, first: bool) -> None:
        given = (dx, call.weight_hh, None if first else grads.h, grads.h_n, dh_start, out)
        _run(
            *(_carry_kernel, B, P, at_p, *given, *call.places, t, T, B, H, P),
            FIRST=first,
            BLOCK_N=at_p.units,
            **options,
        )

    upstream = (dh, grads.c, grads.gates, grads.h_n, dh_start, dc_start, dc_state, dx, m)
    weight = call.weight_hr if projected else call.weight_hh
    rest = (gates, c, call.c0, call.c_start, weight, *call.places, 1.0 / call.tau)
    for t in range(T) if call.reverse else reversed(range(T)):
        if dh is not None and projected:
            carry(dh, t, False)
        _run(
            *(_step_backward_kernel, B, H, at, *upstream, *rest, t, T, B, H, P),
            HARD=call.hard,
            BLOCK_N=at.units,
            **options,
        )
    carry(dh0, 0, True)
    return Found(dx, dh0, dc_state, dh_start, dc_start, dh if projected else None, m)

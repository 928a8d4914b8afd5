"""The cell of the LSTM as device functions: from pre-activations to the next state, and back. Arithmetic is float32."""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq_kernels._tiles import gate, sigmoid, tanh


@triton.jit
def load_planes(first, plane, mask):
    """Four blocks at distances of ``plane``, one per gate, as they are in memory."""
    i = tl.load(first, mask=mask, other=0.0)
    f = tl.load(first + plane, mask=mask, other=0.0)
    g = tl.load(first + 2 * plane, mask=mask, other=0.0)
    o = tl.load(first + 3 * plane, mask=mask, other=0.0)
    return i, f, g, o


@triton.jit
def load_gates(first, H, mask):
    """i, f, g, o of a block in float32; ``first`` points to i."""
    i, f, g, o = load_planes(first, H, mask)
    return i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)


@triton.jit
def store_gates(first, H, i, f, g, o, mask):
    """The inverse of ``load_gates``."""
    tl.store(first, i, mask=mask)
    tl.store(first + H, f, mask=mask)
    tl.store(first + 2 * H, g, mask=mask)
    tl.store(first + 3 * H, o, mask=mask)


@triton.jit
def cell(i, f, g, o, c, inverse_tau, HARD: tl.constexpr):
    """Activated gates, the next c, and o * tanh(c), from pre-activations and c."""
    i, f = gate(i, inverse_tau, HARD), gate(f, inverse_tau, HARD)
    g, o = tanh(g), sigmoid(o)
    c = f * c + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def cell_backward(dm, dc, i, f, g, o, c, c_before, di, df, dg, do, inverse_tau, HARD: tl.constexpr):
    """Gradients of the four pre-activations and of the cell before.

    dm is that of o * tanh(c), dc of c; di .. do are those of the activated gates from elsewhere.
    """
    tanh_c = tanh(c)
    dc += dm * o * (1.0 - tanh_c * tanh_c)
    di, df, dg, do = di + dc * g, df + dc * c_before, dg + dc * i, do + dm * tanh_c
    if HARD:
        di, df = di * 0.0, df * 0.0
    else:
        di, df = di * i * (1.0 - i) * inverse_tau, df * f * (1.0 - f) * inverse_tau
    return di, df, dg * (1.0 - g * g), do * o * (1.0 - o), dc * f


@triton.jit
def load_c(state_ptr, start_ptr, b, n, cut, live, H):
    """c of units n before a step, from [B, H] that is kept from step to step; the start state in rows that are cut."""
    own = state_ptr + b.to(tl.int64)[:, None] * H + n[None, :]
    c = tl.load(own, mask=live & (cut == 0)[:, None], other=0.0)
    if start_ptr is not None:
        start = tl.load(start_ptr + n, mask=n < H, other=0.0)
        c = tl.where(cut[:, None], start[None, :], c)
    return c


@triton.jit
def store_step(h_ptr, c_ptr, gates_ptr, h_n_ptr, state_ptr, place, b, n, H, live, ends, i, f, g, o, c, m):
    """Write what a step gives for units n: h, c and gates where kept, c for the next step, h_n in rows that end."""
    own, at = b.to(tl.int64)[:, None] * H + n[None, :], place[:, None] * H + n[None, :]
    tl.debug_barrier()  # other threads of this program may have read what is written here: c, and x where it is gates
    tl.store(h_ptr + at, m, mask=live)
    tl.store(state_ptr + own, c, mask=live)
    if c_ptr is not None:
        tl.store(c_ptr + at, c, mask=live)
    if gates_ptr is not None:
        store_gates(gates_ptr + place[:, None] * (4 * H) + n[None, :], H, i, f, g, o, live)
    tl.store(h_n_ptr + own, m, mask=live & ends)


@triton.jit
def step_backward(
    dh_ptr,
    dc_ptr,
    dgates_ptr,
    gates_ptr,
    c_ptr,
    c_rows,  # pointers to the rows of c before the step; those that are not ``known`` are zeros
    known,
    d_ptr,
    state_ptr,  # [B, H] gradient of c from the steps done so far
    start_ptr,  # [B, H] sum of it over the steps whose state was cut, or None
    place,
    b,
    n,
    alive,
    cut,
    dm,  # gradient of h from the step done before
    H,
    inverse_tau,
    HARD: tl.constexpr,
):
    """The backward of the cells of units n: writes and returns the gradients of their pre-activations."""
    in_h = (n < H)[None, :]
    live = alive[:, None] & in_h
    own, at = b.to(tl.int64)[:, None] * H + n[None, :], place[:, None] * H + n[None, :]
    at_gates = place[:, None] * (4 * H) + n[None, :]
    i, f, g, o = load_gates(gates_ptr + at_gates, H, live)
    c = tl.load(c_ptr + at, mask=live, other=0.0)
    c_before = tl.load(c_rows[:, None] + n[None, :], mask=known[:, None] & in_h, other=0.0)
    dc = tl.load(state_ptr + own, mask=live, other=0.0)
    if dh_ptr is not None:
        dm += tl.load(dh_ptr + at, mask=live, other=0.0).to(tl.float32)
    if dc_ptr is not None:
        dc += tl.load(dc_ptr + at, mask=live, other=0.0)
    di = tl.zeros_like(dm)
    df, dg, do = di, di, di
    if dgates_ptr is not None:
        di, df, dg, do = load_gates(dgates_ptr + at_gates, H, live)
    di, df, dg, do, dc = cell_backward(dm, dc, i, f, g, o, c, c_before, di, df, dg, do, inverse_tau, HARD)
    crossing = live & cut[:, None]
    sums = dc
    if start_ptr is not None:
        sums += tl.load(start_ptr + own, mask=crossing, other=0.0)
    tl.debug_barrier()  # the sums and dc are written where other threads may have read them
    if start_ptr is not None:
        tl.store(start_ptr + own, sums, mask=crossing)
    tl.store(state_ptr + own, tl.where(cut[:, None], 0.0, dc), mask=live)
    store_gates(d_ptr + at_gates, H, di, df, dg, do, live)
    return tl.where(live, di, 0.0), tl.where(live, df, 0.0), tl.where(live, dg, 0.0), tl.where(live, do, 0.0)

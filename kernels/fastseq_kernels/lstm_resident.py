"""The whole loop over time in one kernel: a program owns 16 rows and holds all of weight_hh, for sizes where it fits.

The weights are read once; h and c stay in registers. The inputs of the next step are read before the product of this
one, so that a step waits for no memory. Programs of different rows never meet, and a program ends with its longest
row. Axis 1 of the grid is the direction: a bidirectional pair runs side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._cell import cell, cell_backward, load_planes, store_gates
from fastseq_kernels._launch import Target, cdiv, launch, power_of_two, rnn_precision
from fastseq_kernels._steps import Found, Grads, Recurrence, element, is_cut, state_before, steps_of

_RUN_TIME = ["T", "B"]  # sizes that must not compile anew
BLOCK_B = 16  # rows of a tile: what a matrix instruction takes


@triton.jit
def _of(direction, a, b):
    """The argument of this direction. Not for None: a function cannot return it to Triton before 3.7."""
    return tl.where(direction == 0, a, b)


@triton.jit(do_not_specialize=_RUN_TIME)
def _resident_kernel(
    x_gates_ptr,  # [N, 4*H] pre-activations, noise added
    weight_ptr,  # [4*H, H]
    h_ptr,  # [N, H] out
    c_ptr,  # [N, H] out or None
    gates_ptr,  # [N, 4*H] out or None; may be x_gates
    h0_ptr,  # [B, H]
    c0_ptr,  # [B, H]
    h_start_ptr,  # [H] or None
    c_start_ptr,  # [H] or None
    h_n_ptr,  # [B, H] out
    c_n_ptr,  # [B, H] out
    x_gates_2,  # the same of the other direction, or None
    weight_2,
    h_2,
    c_2,
    gates_2,
    h0_2,
    c0_2,
    h_start_2,
    c_start_2,
    h_n_2,
    c_n_2,
    lengths_ptr,  # [B] or None
    offsets_ptr,  # int64 [T] or None
    reset_ptr,  # bool [N] or None
    inverse_tau,
    T,
    B,
    H,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,  # of a single direction; of two the first is forward
    BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least H
):
    reverse = REVERSE
    if BOTH:
        reverse = tl.program_id(1)
        x_gates_ptr, weight_ptr = _of(reverse, x_gates_ptr, x_gates_2), _of(reverse, weight_ptr, weight_2)
        h_ptr = _of(reverse, h_ptr, h_2)
        h0_ptr, c0_ptr = _of(reverse, h0_ptr, h0_2), _of(reverse, c0_ptr, c0_2)
        if c_ptr is not None:
            c_ptr = _of(reverse, c_ptr, c_2)
        if gates_ptr is not None:
            gates_ptr = _of(reverse, gates_ptr, gates_2)
        if h_start_ptr is not None:
            h_start_ptr = _of(reverse, h_start_ptr, h_start_2)
        if c_start_ptr is not None:
            c_start_ptr = _of(reverse, c_start_ptr, c_start_2)
        h_n_ptr, c_n_ptr = _of(reverse, h_n_ptr, h_n_2), _of(reverse, c_n_ptr, c_n_2)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    h = tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_H)
    columns = (h < H)[None, :]
    steps = steps_of(lengths_ptr, b, T, B)
    longest = tl.max(steps)
    in_weight = (k < H)[:, None] & columns
    w_i, w_f, w_g, w_o = load_planes(weight_ptr + h[None, :] * H + k[:, None], H * H, in_weight)
    own = b.to(tl.int64)[:, None] * H + h[None, :]
    in_batch = (b < B)[:, None] & columns
    state = tl.load(h0_ptr + own, mask=in_batch, other=0.0)
    kept = tl.load(c0_ptr + own, mask=in_batch, other=0.0)
    state_start, cell_start = tl.zeros_like(state), tl.zeros_like(kept)
    if h_start_ptr is not None:
        state_start += tl.load(h_start_ptr + h, mask=h < H, other=0.0)[None, :]
    if c_start_ptr is not None:
        cell_start += tl.load(c_start_ptr + h, mask=h < H, other=0.0)[None, :]

    way = 1 - 2 * reverse
    first = reverse * (longest - 1)
    place = element(offsets_ptr, first, b, T, B)[:, None]
    begin = ((first >= 0) & (first < steps))[:, None] & columns
    x_i, x_f, x_g, x_o = load_planes(x_gates_ptr + place * (4 * H) + h[None, :], H, begin)
    for s in range(0, longest):
        t = first + s * way
        alive = t < steps
        here = alive[:, None] & columns
        place = element(offsets_ptr, t, b, T, B)[:, None]
        if reset_ptr is not None:
            cut = is_cut(reset_ptr, offsets_ptr, t, b, steps, T, B, reverse)[:, None]
            state, kept = tl.where(cut, state_start, state), tl.where(cut, cell_start, kept)
        then = t + way
        ahead = ((then >= 0) & (then < steps))[:, None] & columns
        at_then = element(offsets_ptr, then, b, T, B)[:, None] * (4 * H) + h[None, :]
        then_i, then_f, then_g, then_o = load_planes(x_gates_ptr + at_then, H, ahead)

        i = tl.dot(state, w_i, input_precision=PRECISION) + x_i.to(tl.float32)
        f = tl.dot(state, w_f, input_precision=PRECISION) + x_f.to(tl.float32)
        g = tl.dot(state, w_g, input_precision=PRECISION) + x_g.to(tl.float32)
        o = tl.dot(state, w_o, input_precision=PRECISION) + x_o.to(tl.float32)
        i, f, g, o, c, m = cell(i, f, g, o, kept, inverse_tau, HARD)
        m = m.to(state.dtype)
        state, kept = tl.where(here, m, state), tl.where(here, c, kept)
        written = here
        if lengths_ptr is not None and offsets_ptr is None:  # elements beyond a row's end exist and are zeros
            written = in_batch
            i, f, g, o = tl.where(here, i, 0.0), tl.where(here, f, 0.0), tl.where(here, g, 0.0), tl.where(here, o, 0.0)
        if gates_ptr is not None:
            tl.debug_barrier()  # gates may be x_gates: other threads of this program have read their part of it
            store_gates(gates_ptr + place * (4 * H) + h[None, :], H, i, f, g, o, written)
        if c_ptr is not None:
            tl.store(c_ptr + place * H + h[None, :], tl.where(here, c, 0.0), mask=written)
        tl.store(h_ptr + place * H + h[None, :], tl.where(here, m, 0.0), mask=written)
        x_i, x_f, x_g, x_o = then_i, then_f, then_g, then_o
    tl.store(h_n_ptr + own, state, mask=in_batch)
    tl.store(c_n_ptr + own, kept, mask=in_batch)
    if lengths_ptr is not None and offsets_ptr is None:
        zero = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        for t in range(longest, T):
            place = element(offsets_ptr, t, b, T, B)[:, None]
            if gates_ptr is not None:
                store_gates(gates_ptr + place * (4 * H) + h[None, :], H, zero, zero, zero, zero, in_batch)
            if c_ptr is not None:
                tl.store(c_ptr + place * H + h[None, :], zero, mask=in_batch)
            tl.store(h_ptr + place * H + h[None, :], zero, mask=in_batch)


@triton.jit(do_not_specialize=_RUN_TIME)
def _resident_backward_kernel(
    dh_ptr,  # [N, H] upstream or None
    dc_ptr,  # [N, H] upstream or None
    dgates_ptr,  # [N, 4*H] upstream or None
    dh_n_ptr,  # [B, H] or None
    dc_n_ptr,  # [B, H] or None
    gates_ptr,  # [N, 4*H]
    c_ptr,  # [N, H]
    weight_ptr,  # [4*H, H]
    c0_ptr,  # [B, H]
    c_start_ptr,  # [H] or None
    dx_ptr,  # [N, 4*H] out
    dh0_ptr,  # [B, H] out
    dc0_ptr,  # [B, H] out
    dh_start_ptr,  # [B, H] out or None
    dc_start_ptr,  # [B, H] out or None
    dh_2,  # the same of the other direction, or None
    dc_2,
    dgates_2,
    dh_n_2,
    dc_n_2,
    gates_2,
    c_2,
    weight_2,
    c0_2,
    c_start_2,
    dx_2,
    dh0_2,
    dc0_2,
    dh_start_2,
    dc_start_2,
    lengths_ptr,
    offsets_ptr,
    reset_ptr,
    inverse_tau,
    T,
    B,
    H,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    reverse = REVERSE
    if BOTH:
        reverse = tl.program_id(1)
        gates_ptr, c_ptr = _of(reverse, gates_ptr, gates_2), _of(reverse, c_ptr, c_2)
        weight_ptr, c0_ptr = _of(reverse, weight_ptr, weight_2), _of(reverse, c0_ptr, c0_2)
        dx_ptr, dh0_ptr, dc0_ptr = (
            _of(reverse, dx_ptr, dx_2),
            _of(reverse, dh0_ptr, dh0_2),
            _of(reverse, dc0_ptr, dc0_2),
        )
        if dh_ptr is not None:
            dh_ptr = _of(reverse, dh_ptr, dh_2)
        if dc_ptr is not None:
            dc_ptr = _of(reverse, dc_ptr, dc_2)
        if dgates_ptr is not None:
            dgates_ptr = _of(reverse, dgates_ptr, dgates_2)
        if dh_n_ptr is not None:
            dh_n_ptr = _of(reverse, dh_n_ptr, dh_n_2)
        if dc_n_ptr is not None:
            dc_n_ptr = _of(reverse, dc_n_ptr, dc_n_2)
        if c_start_ptr is not None:
            c_start_ptr = _of(reverse, c_start_ptr, c_start_2)
        if dh_start_ptr is not None:
            dh_start_ptr = _of(reverse, dh_start_ptr, dh_start_2)
        if dc_start_ptr is not None:
            dc_start_ptr = _of(reverse, dc_start_ptr, dc_start_2)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    h = tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_H)
    columns = (h < H)[None, :]
    steps = steps_of(lengths_ptr, b, T, B)
    longest = tl.max(steps)
    in_weight = (k < H)[:, None] & columns
    w_i, w_f, w_g, w_o = load_planes(weight_ptr + k[:, None] * H + h[None, :], H * H, in_weight)
    own = b.to(tl.int64)[:, None] * H + h[None, :]
    in_batch = (b < B)[:, None] & columns
    dh = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    dc, dh_start, dc_start = dh, dh, dh
    if dh_n_ptr is not None:
        dh += tl.load(dh_n_ptr + own, mask=in_batch, other=0.0).to(tl.float32)
    if dc_n_ptr is not None:
        dc += tl.load(dc_n_ptr + own, mask=in_batch, other=0.0)

    way = 2 * reverse - 1  # from the last step of the recurrence to its first
    first = (1 - reverse) * (longest - 1)
    place = element(offsets_ptr, first, b, T, B)[:, None]
    begin = ((first >= 0) & (first < steps))[:, None] & columns
    i, f, g, o = load_planes(gates_ptr + place * (4 * H) + h[None, :], H, begin)
    c = tl.load(c_ptr + place * H + h[None, :], mask=begin, other=0.0)
    up = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if dh_ptr is not None:
        up = tl.load(dh_ptr + place * H + h[None, :], mask=begin, other=0.0).to(tl.float32)
    for s in range(0, longest):
        t = first + s * way
        alive = t < steps
        here = alive[:, None] & columns
        place = element(offsets_ptr, t, b, T, B)[:, None]
        before = t + way
        begins = (before < 0) | (before >= steps)
        cut = begins & False
        if reset_ptr is not None:
            cut = is_cut(reset_ptr, offsets_ptr, t, b, steps, T, B, reverse)
        place_before = element(offsets_ptr, before, b, T, B)
        if reset_ptr is not None:  # else it was the state before of the step after
            c = tl.load(c_ptr + place * H + h[None, :], mask=here, other=0.0)
        # A row whose last step comes next needs its cell there already.
        pointers, known = state_before(
            c_ptr, c0_ptr, c_start_ptr, place_before, b, begins, cut, alive | (begins == 0), H
        )
        c_before = tl.load(pointers[:, None] + h[None, :], mask=known[:, None] & columns, other=0.0)
        ahead = (begins == 0)[:, None] & columns
        at_h = place_before[:, None] * H + h[None, :]
        then_i, then_f, then_g, then_o = load_planes(gates_ptr + place_before[:, None] * (4 * H) + h[None, :], H, ahead)
        then_up = up
        if dh_ptr is not None:
            then_up = tl.load(dh_ptr + at_h, mask=ahead, other=0.0).to(tl.float32)

        di = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        df, dg, do = di, di, di
        if dgates_ptr is not None:
            di, df, dg, do = load_planes(dgates_ptr + place * (4 * H) + h[None, :], H, here)
            di, df, dg, do = di.to(tl.float32), df.to(tl.float32), dg.to(tl.float32), do.to(tl.float32)
        dc_all = dc
        if dc_ptr is not None:
            dc_all += tl.load(dc_ptr + place * H + h[None, :], mask=here, other=0.0)
        i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
        di, df, dg, do, dc_in = cell_backward(
            dh + up, dc_all, i, f, g, o, c, c_before, di, df, dg, do, inverse_tau, HARD
        )
        written = here
        if lengths_ptr is not None and offsets_ptr is None:
            written = in_batch
        kind = w_i.dtype
        di, df = tl.where(here, di, 0.0).to(kind), tl.where(here, df, 0.0).to(kind)
        dg, do = tl.where(here, dg, 0.0).to(kind), tl.where(here, do, 0.0).to(kind)
        store_gates(dx_ptr + place * (4 * H) + h[None, :], H, di, df, dg, do, written)
        dh_in = tl.dot(di, w_i, input_precision=PRECISION)
        dh_in = tl.dot(df, w_f, dh_in, input_precision=PRECISION)
        dh_in = tl.dot(dg, w_g, dh_in, input_precision=PRECISION)
        dh_in = tl.dot(do, w_o, dh_in, input_precision=PRECISION)
        if reset_ptr is not None:
            crossing = cut[:, None] & here
            if dh_start_ptr is not None:
                dh_start += tl.where(crossing, dh_in, 0.0)
                dc_start += tl.where(crossing, dc_in, 0.0)
            dh_in, dc_in = tl.where(crossing, 0.0, dh_in), tl.where(crossing, 0.0, dc_in)
        dh, dc = tl.where(here, dh_in, dh), tl.where(here, dc_in, dc)
        i, f, g, o, c, up = then_i, then_f, then_g, then_o, c_before, then_up
    tl.store(dh0_ptr + own, dh, mask=in_batch)
    tl.store(dc0_ptr + own, dc, mask=in_batch)
    if dh_start_ptr is not None:
        tl.store(dh_start_ptr + own, dh_start, mask=in_batch)
        tl.store(dc_start_ptr + own, dc_start, mask=in_batch)
    if lengths_ptr is not None and offsets_ptr is None:
        zero = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        for t in range(longest, T):
            place = element(offsets_ptr, t, b, T, B)[:, None]
            store_gates(dx_ptr + place * (4 * H) + h[None, :], H, zero, zero, zero, zero, in_batch)


class Tile(NamedTuple):
    """How a kernel runs."""

    units: int
    num_warps: int


def tile(H: int, dtype: torch.dtype) -> Tile:
    """Eight warps from 64 units on, or from 32 without tensor cores: with four, registers are spilled."""
    units = power_of_two(H, 16)
    plain = dtype == torch.float32 and rnn_precision(dtype) == "ieee"
    return Tile(units, 8 if units >= (32 if plain else 64) else 4)


def why_not(H: int, dtype: torch.dtype, reset: bool, target: Target) -> str | None:
    """Why weight_hh, or with ``reset`` what a step needs beside it, does not fit, or None."""
    units = power_of_two(H, 16)
    if dtype == torch.float32:
        most = 32 if rnn_precision(dtype) == "ieee" else 64
    else:
        most = 128 if target.shared >= 160 * 1024 and not reset else 64
    if units <= most:
        return None
    room = "one multiprocessor" + (" beside the state of segments" if reset and units == 128 else "")
    return f"weight_hh of H = {H} does not fit into {room}, H <= {most} does"


class Direction(NamedTuple):
    """One direction of the forward: what it is given and where it writes."""

    call: Recurrence
    x_gates: Tensor
    h: Tensor
    c: Tensor | None
    gates: Tensor | None


def _or_zeros(given: Tensor | None, other: Tensor | None) -> Tensor | None:
    return torch.zeros_like(other) if given is None and other is not None else given


def _launch(kernel: Any, calls: list[Recurrence], dtype: torch.dtype, sets: list[tuple[Any, ...]]) -> None:
    """One launch for one or two directions; ``sets`` are their own arguments."""
    call = calls[0]
    own, other = sets[0], (None,) * len(sets[0])
    if len(sets) > 1:  # what one direction is given and the other is not counts as zeros there
        own, other = (tuple(_or_zeros(*pair) for pair in zip(a, b, strict=True)) for a, b in (sets, sets[::-1]))
    at = tile(call.H, dtype)
    launch(
        kernel,
        (cdiv(call.rows.B, BLOCK_B), len(sets)),
        *own,
        *other,
        *call.places,
        *(1.0 / call.tau, call.rows.T, call.rows.B, call.H),
        HARD=call.hard,
        REVERSE=int(call.reverse),
        BOTH=len(sets) > 1,
        PRECISION=rnn_precision(dtype),
        BLOCK_B=BLOCK_B,
        BLOCK_H=at.units,
        num_warps=at.num_warps,
    )


def forward(directions: list[Direction]) -> list[tuple[Tensor, Tensor]]:
    """Write h, c and gates of one direction, or of a forward and a reverse one; returns h_n and c_n of each."""
    last = [
        (torch.empty_like(d.call.h0, memory_format=torch.contiguous_format), torch.empty_like(d.call.c0))
        for d in directions
    ]
    sets = []
    for d, (h_n, c_n) in zip(directions, last, strict=True):
        start = (d.call.h_start, d.call.c_start, h_n, c_n)
        sets.append((d.x_gates, d.call.weight_hh, d.h, d.c, d.gates, d.call.h0, d.call.c0, *start))
    _launch(_resident_kernel, [d.call for d in directions], directions[0].x_gates.dtype, sets)
    return last


class Given(NamedTuple):
    """One direction of the backward."""

    call: Recurrence
    grads: Grads
    gates: Tensor
    c: Tensor


def backward(directions: list[Given]) -> list[Found]:
    """Gradients of one direction, or of a forward and a reverse one."""
    found, sets = [], []
    for call, grads, gates, c in directions:
        start = call.reset is not None and (call.h_start is not None or call.c_start is not None)
        sums = (torch.empty_like(call.c0), torch.empty_like(call.c0)) if start else (None, None)
        out = (torch.empty_like(gates), torch.empty_like(call.h0), torch.empty_like(call.c0), *sums)
        found.append(Found(*out, None, None))
        sets.append((*grads, gates, c, call.weight_hh, call.c0, call.c_start, *out))
    _launch(_resident_backward_kernel, [d.call for d in directions], directions[0].gates.dtype, sets)
    return found

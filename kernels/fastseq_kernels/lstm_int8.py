"""The LSTM with int8 recurrent weights on a GPU, for inference.

h is rounded to 1/127 and multiplied with int8 matrix instructions; the sums are exact, so their order is free.
Resident: one program takes 16 rows through all steps with the weights in shared memory, 64 KiB at H = 128. Loop: the
same program reads the weights from the second-level cache in every step, which up to 1 MiB takes less time than a
launch. Steps: one launch per step, with a program for every block of units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._call import BLOCK_B, outputs, recurrence
from fastseq_kernels._cell import cell, load_c, load_gates, store_gates, store_step
from fastseq_kernels._launch import Repeated, Target, cdiv, launch, power_of_two, target
from fastseq_kernels._steps import element, is_cut, neighbours, state_before, steps_between, steps_of

_RUN_TIME = ["first", "last", "T", "B", "inverse_tau"]  # what must not compile anew
_IN_ONE = 1 << 20  # bytes of weights that one program reads in less time than a launch takes
_RESIDENT = 128  # the largest H whose weights, with rows and columns up to a power of two, fit on every target


@triton.jit
def quantized(h):
    """127 * h to the nearest integer, ties to even, in -127 .. 127; NaN counts as 0."""
    scaled = h.to(tl.float32) * 127.0
    bounded = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -127.0), 127.0), 0.0)
    return ((bounded + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2**23, where float32 has no fraction


@triton.jit
def _pre_activation(x, total, scale_ptr, n, H):
    """x + total * scale / 127 of one gate; scale_ptr holds scale / 127."""
    scale = tl.load(scale_ptr + n, mask=n < H, other=0.0)
    return x + total.to(tl.float32) * scale[None, :]


@triton.jit(do_not_specialize=_RUN_TIME)
def resident_kernel(
    x_ptr,  # [N, 4*H] pre-activations with their noise; may be gates
    weight_ptr,  # int8 [4, BLOCK_H, BLOCK_H], zeros beyond H
    scale_ptr,  # [4*H], divided by 127
    h0_ptr,  # [B, H]
    lengths_ptr,  # int64 [B] or None
    offsets_ptr,  # int64 [T] or None
    reset_ptr,  # bool [N] or None
    h_start_ptr,  # [H] or None
    c_start_ptr,  # [H] or None
    h_ptr,  # [N, H] out
    c_ptr,  # [N, H] out, or None
    gates_ptr,  # [N, 4*H] out, or None
    h_n_ptr,  # [B, H] out
    c_n_ptr,  # [B, H] in and out: c0 at first
    T,
    B,
    H,
    inverse_tau,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_H)
    in_h = (n < H)[None, :]
    steps = steps_of(lengths_ptr, b, T, B)
    most = tl.max(steps, 0)
    own, inside = b.to(tl.int64)[:, None] * H + n[None, :], (b < B)[:, None] & in_h
    h = tl.load(h0_ptr + own, mask=inside, other=0.0)
    c = tl.load(c_n_ptr + own, mask=inside, other=0.0)
    h_start, c_start = tl.zeros([BLOCK_H], h.dtype), tl.zeros([BLOCK_H], tl.float32)
    if h_start_ptr is not None:
        h_start = tl.load(h_start_ptr + n, mask=n < H, other=0.0)
    if c_start_ptr is not None:
        c_start = tl.load(c_start_ptr + n, mask=n < H, other=0.0)
    weight, plane = weight_ptr + n[None, :] * BLOCK_H + k[:, None], BLOCK_H * BLOCK_H
    w_i, w_f = tl.load(weight), tl.load(weight + plane)
    w_g, w_o = tl.load(weight + 2 * plane), tl.load(weight + 3 * plane)
    zero = tl.zeros([BLOCK_B, BLOCK_H], tl.int32)

    for s in range(most):
        t = most - 1 - s if REVERSE else s
        live = (t < steps)[:, None] & in_h
        place = element(offsets_ptr, t, b, T, B)[:, None]
        at, at_gates = place * H + n[None, :], place * (4 * H) + n[None, :]
        i, f, g, o = load_gates(x_ptr + at_gates, H, live)
        if reset_ptr is not None:
            cut = is_cut(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)[:, None]
            h, c = tl.where(cut, h_start[None, :], h), tl.where(cut, c_start[None, :], c)
        q = quantized(h)
        i = _pre_activation(i, tl.dot(q, w_i, zero, out_dtype=tl.int32), scale_ptr, n, H)
        f = _pre_activation(f, tl.dot(q, w_f, zero, out_dtype=tl.int32), scale_ptr + H, n, H)
        g = _pre_activation(g, tl.dot(q, w_g, zero, out_dtype=tl.int32), scale_ptr + 2 * H, n, H)
        o = _pre_activation(o, tl.dot(q, w_o, zero, out_dtype=tl.int32), scale_ptr + 3 * H, n, H)
        i, f, g, o, c_new, m = cell(i, f, g, o, c, inverse_tau, HARD)
        h, c = tl.where(live, m.to(h.dtype), h), tl.where(live, c_new, c)
        tl.store(h_ptr + at, h, mask=live)
        if c_ptr is not None:
            tl.store(c_ptr + at, c, mask=live)
        if gates_ptr is not None:
            tl.debug_barrier()  # gates may be x: other threads of this program have read their part of it
            store_gates(gates_ptr + at_gates, H, i, f, g, o, live)
    tl.store(h_n_ptr + own, h, mask=inside)
    tl.store(c_n_ptr + own, c, mask=inside)


@triton.jit
def _sums(
    rows,
    known,
    weight_ptr,
    n,
    H,
    rows_of_gate,
    terms,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Integer products of the rows of h that are ``known``, the others zeros, with the weights of units n."""
    i = tl.zeros([BLOCK_B, BLOCK_H], tl.int32)
    f, g, o = i, i, i
    plane = tl.cast(rows_of_gate, tl.int64) * terms
    weight = weight_ptr + n.to(tl.int64)[None, :] * terms
    for first in range(0, terms, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        q = quantized(tl.load(rows[:, None] + k[None, :], mask=known[:, None] & (k < H)[None, :], other=0.0))
        at = weight + k[:, None]
        i = tl.dot(q, tl.load(at), i, out_dtype=tl.int32)
        f = tl.dot(q, tl.load(at + plane), f, out_dtype=tl.int32)
        g = tl.dot(q, tl.load(at + 2 * plane), g, out_dtype=tl.int32)
        o = tl.dot(q, tl.load(at + 3 * plane), o, out_dtype=tl.int32)
    return i, f, g, o


@triton.jit(do_not_specialize=_RUN_TIME)
def steps_kernel(
    x_ptr,  # as above
    weight_ptr,  # int8 [4, rows_of_gate, terms], zeros beyond H, multiples of BLOCK_H and BLOCK_K
    scale_ptr,
    h0_ptr,
    lengths_ptr,
    offsets_ptr,
    reset_ptr,
    h_start_ptr,
    c_start_ptr,
    h_ptr,
    c_ptr,
    gates_ptr,
    h_n_ptr,  # [B, H] out, the rows that end
    c_n_ptr,
    first,  # steps done before
    last,
    T,
    B,
    H,
    inverse_tau,
    rows_of_gate,
    terms,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    steps = steps_of(lengths_ptr, b, T, B)
    most = tl.max(steps, 0)
    from_step, to_step = steps_between(first, last, most, T, REVERSE)
    for s in range(from_step, to_step):
        t = T - 1 - s if REVERSE else s
        alive, begins, cut, place, earlier = neighbours(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)
        rows, known = state_before(h_ptr, h0_ptr, h_start_ptr, earlier, b, begins, cut, alive, H)
        for block in range(tl.program_id(1), tl.cdiv(H, BLOCK_H), tl.num_programs(1)):
            n = block * BLOCK_H + tl.arange(0, BLOCK_H)
            live = alive[:, None] & (n < H)[None, :]
            i, f, g, o = load_gates(x_ptr + place[:, None] * (4 * H) + n[None, :], H, live)
            c = load_c(c_n_ptr, c_start_ptr, b, n, cut, live, H)
            i_sum, f_sum, g_sum, o_sum = _sums(
                *(rows, known, weight_ptr, n, H, rows_of_gate, terms, BLOCK_B, BLOCK_H, BLOCK_K)
            )
            i, f = _pre_activation(i, i_sum, scale_ptr, n, H), _pre_activation(f, f_sum, scale_ptr + H, n, H)
            g = _pre_activation(g, g_sum, scale_ptr + 2 * H, n, H)
            o = _pre_activation(o, o_sum, scale_ptr + 3 * H, n, H)
            i, f, g, o, c, m = cell(i, f, g, o, c, inverse_tau, HARD)
            ends = (t == 0) if REVERSE else (t + 1 == steps)[:, None]
            store_step(h_ptr, c_ptr, gates_ptr, h_n_ptr, c_n_ptr, place, b, n, H, live, ends, i, f, g, o, c, m)
        tl.debug_barrier()  # the next step reads h and c, which other threads wrote


class Plan(NamedTuple):
    """How the recurrence runs."""

    route: str  # resident, loop (one program per 16 rows, weights read in every step) or steps (a launch each)
    block_h: int
    block_k: int
    num_warps: int
    num_stages: int


def plan(H: int, device: Target) -> Plan:
    """By the size of the model."""
    if H <= _RESIDENT and 6 * power_of_two(H, 32) ** 2 <= device.shared:
        return Plan("resident", power_of_two(H, 32), power_of_two(H, 32), 8 if H > 64 else 4 if H > 32 else 2, 1)
    if 4 * H * H <= _IN_ONE:
        return Plan("loop", 64, 64, 8, 2)
    return Plan("steps", 16, 64, 4, 3)


def lstm_int8_forward(
    x_gates: Tensor, weight_hh: Tensor, scale: Tensor, h0: Tensor, c0: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """``reference.lstm_int8``; ``save`` 2 keeps c and gates, 1 c alone, 0 neither."""
    call = recurrence(x_gates, weight_hh, h0, c0, args[:5], args[10:13])
    out, at = outputs(call, x_gates, args[5:10], args[13]), plan(call.H, target(x_gates.device))
    weight = _padded(weight_hh, at)
    given = (out.x, weight, scale / 127, h0, *call.places, call.h_start, call.c_start, *out[1:])
    sizes, tiles = (call.rows.T, call.rows.B, call.H, 1.0 / call.tau), cdiv(call.rows.B, BLOCK_B)
    options: dict[str, Any] = {"HARD": call.hard, "REVERSE": call.reverse, "BLOCK_B": BLOCK_B, "BLOCK_H": at.block_h}
    options |= {"num_warps": at.num_warps, "num_stages": at.num_stages}
    if target(x_gates.device).capability not in (80, 90):
        options["maxnreg"] = 255  # else ptxas spills a few registers to have more programs per multiprocessor
    if at.route == "resident":
        launch(resident_kernel, (tiles, 1), *given, *sizes, **options)
        return out.results()
    across = 1 if at.route == "loop" else cdiv(call.H, at.block_h)
    step = max(call.rows.T, 1) if at.route == "loop" else 1
    run = Repeated(steps_kernel, (tiles, across), BLOCK_K=at.block_k, **options)
    for first in range(0, call.rows.T, step):
        run(*given, first, first + step, *sizes, *weight.shape[1:])
    return out.results()


def _padded(weight_hh: Tensor, at: Plan) -> Tensor:
    """Weights as [4, rows, terms] with zeros up to whole blocks, which are read without a mask and in wide words."""
    H = weight_hh.shape[1]
    rows, terms = cdiv(H, at.block_h) * at.block_h, cdiv(H, at.block_k) * at.block_k
    if rows == terms == H:
        return weight_hh.view(4, H, H)
    out = weight_hh.new_zeros(4, rows, terms)
    out[:, :H, :H] = weight_hh.view(4, H, H)
    return out

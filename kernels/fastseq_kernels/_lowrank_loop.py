"""Low-rank LSTM, factors read anew in every step: for sizes whose factors no program can hold.

A step has two parts: v = down @ h, then the cells from up @ v. Either one program takes 16 rows through all steps and
both parts (PART 0), reading the factors from the second-level cache; or, where reading them takes longer than two
launches, each part of each step is a launch with a program for every block of ranks (PART 1) or of units (PART 2).
Backward: the cells, whose dh is down.T @ dv of the step done before, then dv = up.T @ d; and dh0 at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq_kernels._cell import cell, load_c, load_gates, step_backward, store_step
from fastseq_kernels._steps import element, is_cut, neighbours, state_before, steps_between, steps_of

_RUN_TIME = ["first", "last", "T", "B", "inverse_tau"]  # what must not compile anew


@triton.jit
def _ranks(
    rows,
    known,
    down_ptr,
    v_rows,
    b,
    B,
    H,
    V,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """v = down @ h of the rows of h that are ``known``, the others zeros; down is [V, H]."""
    for block in range(tl.program_id(1), tl.cdiv(V, BLOCK_R), tl.num_programs(1)):
        k = block * BLOCK_R + tl.arange(0, BLOCK_R)
        total = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
        for first in range(0, H, BLOCK_H):
            n = first + tl.arange(0, BLOCK_H)
            h = tl.load(rows[:, None] + n[None, :], mask=known[:, None] & (n < H)[None, :], other=0.0)
            weight = down_ptr + k.to(tl.int64)[None, :] * H + n[:, None]
            weight = tl.load(weight, mask=(k < V)[None, :] & (n < H)[:, None], other=0.0)
            total = tl.dot(h, weight, total, input_precision=PRECISION)
        tl.store(v_rows[:, None] + k[None, :], total, mask=(b < B)[:, None] & (k < V)[None, :])


@triton.jit
def _widen(
    i, f, g, o, up_ptr, v_rows, live, n, H, R, DOWNS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr
):
    """The pre-activations of units n with up @ v added."""
    plane = tl.cast(H, tl.int64) * R
    for first in range(0, R, BLOCK_R):
        k = first + tl.arange(0, BLOCK_R)
        read = live[:, None] & (k < R)[None, :]
        at, inside = up_ptr + n.to(tl.int64)[None, :] * R + k[:, None], (n < H)[None, :] & (k < R)[:, None]
        v = tl.load(v_rows[:, None] + k[None, :], mask=read, other=0.0)
        i = tl.dot(v, tl.load(at, mask=inside, other=0.0), i, input_precision=PRECISION)
        if DOWNS == 4:
            v = tl.load(v_rows[:, None] + R + k[None, :], mask=read, other=0.0)
        f = tl.dot(v, tl.load(at + plane, mask=inside, other=0.0), f, input_precision=PRECISION)
        if DOWNS == 4:
            v = tl.load(v_rows[:, None] + 2 * R + k[None, :], mask=read, other=0.0)
        g = tl.dot(v, tl.load(at + 2 * plane, mask=inside, other=0.0), g, input_precision=PRECISION)
        if DOWNS == 4:
            v = tl.load(v_rows[:, None] + 3 * R + k[None, :], mask=read, other=0.0)
        o = tl.dot(v, tl.load(at + 3 * plane, mask=inside, other=0.0), o, input_precision=PRECISION)
    return i, f, g, o


@triton.jit(do_not_specialize=_RUN_TIME)
def forward_kernel(
    x_ptr,  # [N, 4*H] pre-activations with their noise; may be gates
    up_ptr,  # [4, H, R]
    down_ptr,  # [DOWNS, R, H]
    v_ptr,  # [B, DOWNS*R] scratch
    h0_ptr,  # [B, H]
    lengths_ptr,  # int64 [B] or None
    offsets_ptr,  # int64 [T] or None
    reset_ptr,  # bool [N] or None
    h_start_ptr,  # [H] or None
    c_start_ptr,  # [H] or None
    h_ptr,  # [N, H] out
    c_ptr,  # [N, H] out, or None
    gates_ptr,  # [N, 4*H] out, or None
    h_n_ptr,  # [B, H] out, the rows that end
    c_n_ptr,  # [B, H] in and out: c0 at first
    first,  # steps done before
    last,
    T,
    B,
    H,
    R,
    inverse_tau,
    PART: tl.constexpr,
    DOWNS: tl.constexpr,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    steps = steps_of(lengths_ptr, b, T, B)
    most = tl.max(steps, 0)
    from_step, to_step = steps_between(first, last, most, T, REVERSE)
    v_rows = v_ptr + b.to(tl.int64) * (DOWNS * R)
    for s in range(from_step, to_step):
        t = T - 1 - s if REVERSE else s
        alive, begins, cut, place, earlier = neighbours(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)
        if PART != 2:
            rows, known = state_before(h_ptr, h0_ptr, h_start_ptr, earlier, b, begins, cut, alive, H)
            _ranks(rows, known, down_ptr, v_rows, b, B, H, DOWNS * R, PRECISION, BLOCK_B, BLOCK_H, BLOCK_R)
        if PART == 0:
            tl.debug_barrier()  # v was written by other threads of this program
        if PART != 1:
            for block in range(tl.program_id(1), tl.cdiv(H, BLOCK_H), tl.num_programs(1)):
                n = block * BLOCK_H + tl.arange(0, BLOCK_H)
                live = alive[:, None] & (n < H)[None, :]
                i, f, g, o = load_gates(x_ptr + place[:, None] * (4 * H) + n[None, :], H, live)
                c = load_c(c_n_ptr, c_start_ptr, b, n, cut, live, H)
                i, f, g, o = _widen(i, f, g, o, up_ptr, v_rows, alive, n, H, R, DOWNS, PRECISION, BLOCK_R)
                i, f, g, o, c, m = cell(i, f, g, o, c, inverse_tau, HARD)
                ends = (t == 0) if REVERSE else (t + 1 == steps)[:, None]
                store_step(h_ptr, c_ptr, gates_ptr, h_n_ptr, c_n_ptr, place, b, n, H, live, ends, i, f, g, o, c, m)
        if PART == 0:
            tl.debug_barrier()  # the next step reads h and c, which other threads wrote, and writes v


@triton.jit
def _carried(
    dv_ptr,
    down_ptr,
    dh_n_ptr,
    place,
    taken,
    cut,
    b,
    n,
    B,
    H,
    V,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The gradient of a state: down.T @ dv of the step that took it, at ``place``; dh_n where none did; 0 if cut."""
    total = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    rows, read = dv_ptr + place * V, taken & (cut == 0)
    for first in range(0, V, BLOCK_R):
        k = first + tl.arange(0, BLOCK_R)
        dv = tl.load(rows[:, None] + k[None, :], mask=read[:, None] & (k < V)[None, :], other=0.0)
        weight = down_ptr + k.to(tl.int64)[:, None] * H + n[None, :]
        weight = tl.load(weight, mask=(k < V)[:, None] & (n < H)[None, :], other=0.0)
        total = tl.dot(dv, weight, total, input_precision=PRECISION)
    if dh_n_ptr is not None:
        ends = ((b < B) & (taken == 0))[:, None] & (n < H)[None, :]
        total += tl.load(dh_n_ptr + b.to(tl.int64)[:, None] * H + n[None, :], mask=ends, other=0.0).to(tl.float32)
    return total


@triton.jit
def _narrow(
    d_rows,
    up_ptr,
    dv_rows,
    dv_start_ptr,
    alive,
    cut,
    b,
    H,
    R,
    DOWNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dv = up.T @ d, over all gates where they share down."""
    across = tl.cdiv(R, BLOCK_R)
    for block in range(tl.program_id(1), DOWNS * across, tl.num_programs(1)):
        down, k = block // across, (block % across) * BLOCK_R + tl.arange(0, BLOCK_R)
        total = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
        for gate in range(down, down + 4 // DOWNS):
            for first in range(0, H, BLOCK_H):
                n = first + tl.arange(0, BLOCK_H)
                d = tl.load(d_rows[:, None] + gate * H + n[None, :], mask=alive[:, None] & (n < H)[None, :], other=0.0)
                weight = up_ptr + (tl.cast(gate, tl.int64) * H + n)[:, None] * R + k[None, :]
                weight = tl.load(weight, mask=(n < H)[:, None] & (k < R)[None, :], other=0.0)
                total = tl.dot(d, weight, total, input_precision=PRECISION)
        tl.store(dv_rows[:, None] + down * R + k[None, :], total, mask=alive[:, None] & (k < R)[None, :])
        if dv_start_ptr is not None:
            sums = dv_start_ptr + b.to(tl.int64)[:, None] * (DOWNS * R) + down * R + k[None, :]
            crossing = (alive & cut)[:, None] & (k < R)[None, :]
            total += tl.load(sums, mask=crossing, other=0.0)
            tl.debug_barrier()  # other threads may have read what is written here
            tl.store(sums, total, mask=crossing)


@triton.jit
def _start(
    dv_ptr,
    down_ptr,
    dh_n_ptr,
    offsets_ptr,
    reset_ptr,
    dh0_ptr,
    steps,
    b,
    T,
    B,
    H,
    R,
    DOWNS: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dh0, from dv of each row's first step."""
    first = steps - 1 if REVERSE else steps * 0
    taken = steps > 0
    cut = taken & False
    if reset_ptr is not None:
        cut = is_cut(reset_ptr, offsets_ptr, first, b, steps, T, B, REVERSE)
    place = element(offsets_ptr, first, b, T, B)
    for block in range(tl.program_id(1), tl.cdiv(H, BLOCK_H), tl.num_programs(1)):
        n = block * BLOCK_H + tl.arange(0, BLOCK_H)
        dh = _carried(
            *(dv_ptr, down_ptr, dh_n_ptr, place, taken, cut, b, n, B, H, DOWNS * R),
            *(PRECISION, BLOCK_B, BLOCK_H, BLOCK_R),
        )
        own = b.to(tl.int64)[:, None] * H + n[None, :]
        tl.store(dh0_ptr + own, dh, mask=(b < B)[:, None] & (n < H)[None, :])


@triton.jit(do_not_specialize=_RUN_TIME)
def backward_kernel(
    dh_ptr,  # [N, H] or None, as the next three
    dc_ptr,  # [N, H]
    dgates_ptr,  # [N, 4*H]
    dh_n_ptr,  # [B, H]
    gates_ptr,  # [N, 4*H]
    c_ptr,  # [N, H]
    up_ptr,  # [4, H, R]
    down_ptr,  # [DOWNS, R, H]
    c0_ptr,  # [B, H]
    lengths_ptr,  # int64 [B] or None
    offsets_ptr,  # int64 [T] or None
    reset_ptr,  # bool [N] or None
    c_start_ptr,  # [H] or None
    d_ptr,  # [N, 4*H] out, of the pre-activations
    dv_ptr,  # [N, DOWNS*R] out, of down @ h
    dh0_ptr,  # [B, H] out
    dc0_ptr,  # [B, H] in and out: dc_n at first
    dv_start_ptr,  # [B, DOWNS*R] in and out, sum of dv over the steps whose state was cut: zeros at first; or None
    dc_start_ptr,  # [B, H] in and out, likewise of dc
    first,  # steps done before
    last,
    T,
    B,
    H,
    R,
    inverse_tau,
    PART: tl.constexpr,
    DOWNS: tl.constexpr,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    steps = steps_of(lengths_ptr, b, T, B)
    most = tl.max(steps, 0)
    from_step, to_step = steps_between(first, last, most, T, not REVERSE)
    for s in range(from_step, to_step):
        t = s if REVERSE else T - 1 - s
        after = t - 1 if REVERSE else t + 1
        alive, begins, cut, place, earlier = neighbours(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)
        taken, cut_after = alive & (after >= 0) & (after < steps), cut & False
        if reset_ptr is not None:
            cut_after = is_cut(reset_ptr, offsets_ptr, after, b, steps, T, B, REVERSE)
        place_after = element(offsets_ptr, after, b, T, B)
        if PART != 2:
            c_rows, known = state_before(c_ptr, c0_ptr, c_start_ptr, earlier, b, begins, cut, alive, H)
            for block in range(tl.program_id(1), tl.cdiv(H, BLOCK_H), tl.num_programs(1)):
                n = block * BLOCK_H + tl.arange(0, BLOCK_H)
                dm = _carried(
                    *(dv_ptr, down_ptr, dh_n_ptr, place_after, taken, cut_after, b, n, B, H, DOWNS * R),
                    *(PRECISION, BLOCK_B, BLOCK_H, BLOCK_R),
                )
                step_backward(
                    *(dh_ptr, dc_ptr, dgates_ptr, gates_ptr, c_ptr, c_rows, known, d_ptr, dc0_ptr, dc_start_ptr),
                    *(place, b, n, alive, cut, dm, H, inverse_tau, HARD),
                )
        if PART == 0:
            tl.debug_barrier()  # other threads of this program wrote d
        if PART != 1:
            d_rows, dv_rows = d_ptr + place * (4 * H), dv_ptr + place * (DOWNS * R)
            _narrow(
                *(d_rows, up_ptr, dv_rows, dv_start_ptr, alive, cut, b, H, R),
                *(DOWNS, PRECISION, BLOCK_B, BLOCK_H, BLOCK_R),
            )
        if PART == 0:
            tl.debug_barrier()  # and dv, dc and the sums, for the next step
    if PART == 0:
        _start(
            *(dv_ptr, down_ptr, dh_n_ptr, offsets_ptr, reset_ptr, dh0_ptr, steps, b, T, B, H, R),
            *(DOWNS, REVERSE, PRECISION, BLOCK_B, BLOCK_H, BLOCK_R),
        )


@triton.jit(do_not_specialize=_RUN_TIME[2:])
def start_kernel(
    dv_ptr,  # as above
    down_ptr,
    dh_n_ptr,
    lengths_ptr,
    offsets_ptr,
    reset_ptr,
    dh0_ptr,
    T,
    B,
    H,
    R,
    inverse_tau,
    DOWNS: tl.constexpr,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    steps = steps_of(lengths_ptr, b, T, B)
    _start(
        *(dv_ptr, down_ptr, dh_n_ptr, offsets_ptr, reset_ptr, dh0_ptr, steps, b, T, B, H, R),
        *(DOWNS, REVERSE, PRECISION, BLOCK_B, BLOCK_H, BLOCK_R),
    )

"""Low-rank LSTM, factors resident: one program takes 16 rows through all steps, with the factors in shared memory.

At H = 512, r = 32 in 16 bits the factors take 160 KiB. A step has one product over H and four over r, and waits for no
other program. Units come in chunks of BLOCK_H, one after the other, so that the numbers of one chunk fit in registers;
h stays there, or its gradient. H and R are constants, else the addresses of all chunks would fill the registers. Which
sizes fit is said by ``lstm_lowrank.plan``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq_kernels._cell import cell, load_c, load_gates, step_backward, store_step
from fastseq_kernels._steps import neighbours, state_before, steps_of

_RUN_TIME = ["T", "B", "inverse_tau"]  # what must not compile anew


@triton.jit
def _units(chunk: tl.constexpr, BLOCK_H: tl.constexpr):
    return chunk * BLOCK_H + tl.arange(0, BLOCK_H)


@triton.jit
def _load_chunks(
    first, b, B, H, DTYPE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Rows b of [B, H] in chunks, as DTYPE; zeros where there is no such tensor."""
    found = ()
    for chunk in tl.static_range(CHUNKS):
        value = tl.zeros([BLOCK_B, BLOCK_H], DTYPE)
        if first is not None:
            n = _units(chunk, BLOCK_H)
            at, inside = b.to(tl.int64)[:, None] * H + n[None, :], (b < B)[:, None] & (n < H)[None, :]
            value = tl.load(first + at, mask=inside, other=0.0).to(DTYPE)
        found = found + (value,)
    return found


@triton.jit
def _load_factor(
    factor_ptr,
    plane,
    unit,
    rank,
    H,
    R,
    PLANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
):
    """The blocks of a factor, chunk by chunk, in each gate by gate; ``unit``, ``rank``, ``plane``: its strides."""
    found = ()
    k = tl.arange(0, BLOCK_R)
    for chunk in tl.static_range(CHUNKS):
        n = _units(chunk, BLOCK_H)
        for gate in tl.static_range(PLANES):
            if UNITS_FIRST:
                at, inside = n[:, None] * unit + k[None, :] * rank, (n < H)[:, None] & (k < R)[None, :]
            else:
                at, inside = n[None, :] * unit + k[:, None] * rank, (n < H)[None, :] & (k < R)[:, None]
            found = found + (tl.load(factor_ptr + gate * plane + at, mask=inside, other=0.0),)
    return found


@triton.jit
def _restarted(state, start_ptr, cut, H, CHUNKS: tl.constexpr, BLOCK_H: tl.constexpr):
    """The start state, or zeros, in rows that are cut."""
    found = ()
    for chunk in tl.static_range(CHUNKS):
        n = _units(chunk, BLOCK_H)
        start = tl.zeros([BLOCK_H], state[chunk].dtype)
        if start_ptr is not None:
            start = tl.load(start_ptr + n, mask=n < H, other=0.0)
        found = found + (tl.where(cut[:, None], start[None, :], state[chunk]),)
    return found


@triton.jit(do_not_specialize=_RUN_TIME)
def forward_kernel(
    x_ptr,  # [N, 4*H] pre-activations with their noise; may be gates
    up_ptr,  # [4, H, R]
    down_ptr,  # [DOWNS, R, H]
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
    T,
    B,
    H: tl.constexpr,
    R: tl.constexpr,
    inverse_tau,
    DOWNS: tl.constexpr,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    steps = steps_of(lengths_ptr, b, T, B)
    most = tl.max(steps, 0)
    narrow = h_ptr.dtype.element_ty
    h = _load_chunks(h0_ptr, b, B, H, narrow, CHUNKS, BLOCK_B, BLOCK_H)
    down = _load_factor(down_ptr, R * H, 1, H, H, R, DOWNS, CHUNKS, BLOCK_H, BLOCK_R, True)
    up = _load_factor(up_ptr, R * H, R, 1, H, R, 4, CHUNKS, BLOCK_H, BLOCK_R, False)

    for s in range(most):
        t = most - 1 - s if REVERSE else s
        alive, _, cut, place, _ = neighbours(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)
        if reset_ptr is not None:
            h = _restarted(h, h_start_ptr, cut, H, CHUNKS, BLOCK_H)
        v = ()
        for gate in tl.static_range(DOWNS):
            total = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
            for chunk in tl.static_range(CHUNKS):
                total = tl.dot(h[chunk], down[chunk * DOWNS + gate], total, input_precision=PRECISION)
            v = v + (total.to(narrow),)
        if DOWNS == 1:
            v = (v[0], v[0], v[0], v[0])
        h_next = ()
        ends = (t == 0) if REVERSE else (t + 1 == steps)[:, None]
        for chunk in tl.static_range(CHUNKS):
            n = _units(chunk, BLOCK_H)
            live = alive[:, None] & (n < H)[None, :]
            i, f, g, o = load_gates(x_ptr + place[:, None] * (4 * H) + n[None, :], H, live)
            c = load_c(c_n_ptr, c_start_ptr, b, n, cut, live, H)
            i = tl.dot(v[0], up[4 * chunk], i, input_precision=PRECISION)
            f = tl.dot(v[1], up[4 * chunk + 1], f, input_precision=PRECISION)
            g = tl.dot(v[2], up[4 * chunk + 2], g, input_precision=PRECISION)
            o = tl.dot(v[3], up[4 * chunk + 3], o, input_precision=PRECISION)
            i, f, g, o, c, m = cell(i, f, g, o, c, inverse_tau, HARD)
            store_step(h_ptr, c_ptr, gates_ptr, h_n_ptr, c_n_ptr, place, b, n, H, live, ends, i, f, g, o, c, m)
            h_next = h_next + (tl.where(live, m.to(narrow), h[chunk]),)
        h = h_next
        tl.debug_barrier()  # the next step reads c, which other threads may have written


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
    T,
    B,
    H: tl.constexpr,
    R: tl.constexpr,
    inverse_tau,
    DOWNS: tl.constexpr,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_R)
    steps = steps_of(lengths_ptr, b, T, B)
    most = tl.max(steps, 0)
    dh = _load_chunks(dh_n_ptr, b, B, H, tl.float32, CHUNKS, BLOCK_B, BLOCK_H)
    up = _load_factor(up_ptr, R * H, R, 1, H, R, 4, CHUNKS, BLOCK_H, BLOCK_R, True)
    down = _load_factor(down_ptr, R * H, 1, H, H, R, DOWNS, CHUNKS, BLOCK_H, BLOCK_R, False)
    narrow = d_ptr.dtype.element_ty

    for s in range(most):
        t = s if REVERSE else most - 1 - s
        alive, begins, cut, place, earlier = neighbours(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)
        c_rows, known = state_before(c_ptr, c0_ptr, c_start_ptr, earlier, b, begins, cut, alive, H)
        dv_i = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
        dv_f, dv_g, dv_o = dv_i, dv_i, dv_i
        for chunk in tl.static_range(CHUNKS):
            n = _units(chunk, BLOCK_H)
            di, df, dg, do = step_backward(
                *(dh_ptr, dc_ptr, dgates_ptr, gates_ptr, c_ptr, c_rows, known, d_ptr, dc0_ptr, dc_start_ptr),
                *(place, b, n, alive, cut, dh[chunk], H, inverse_tau, HARD),
            )
            di, df, dg, do = di.to(narrow), df.to(narrow), dg.to(narrow), do.to(narrow)
            dv_i = tl.dot(di, up[4 * chunk], dv_i, input_precision=PRECISION)
            if DOWNS == 1:
                dv_i = tl.dot(df, up[4 * chunk + 1], dv_i, input_precision=PRECISION)
                dv_i = tl.dot(dg, up[4 * chunk + 2], dv_i, input_precision=PRECISION)
                dv_i = tl.dot(do, up[4 * chunk + 3], dv_i, input_precision=PRECISION)
            else:
                dv_f = tl.dot(df, up[4 * chunk + 1], dv_f, input_precision=PRECISION)
                dv_g = tl.dot(dg, up[4 * chunk + 2], dv_g, input_precision=PRECISION)
                dv_o = tl.dot(do, up[4 * chunk + 3], dv_o, input_precision=PRECISION)
        dv = (dv_i,) if DOWNS == 1 else (dv_i, dv_f, dv_g, dv_o)
        for gate in tl.static_range(DOWNS):
            mask = alive[:, None] & (k < R)[None, :]
            tl.store(dv_ptr + place[:, None] * (DOWNS * R) + gate * R + k[None, :], dv[gate], mask=mask)
            if dv_start_ptr is not None:
                own = dv_start_ptr + b.to(tl.int64)[:, None] * (DOWNS * R) + gate * R + k[None, :]
                crossing = mask & cut[:, None]
                sums = dv[gate] + tl.load(own, mask=crossing, other=0.0)
                tl.debug_barrier()  # as above
                tl.store(own, sums, mask=crossing)
        dh_next = ()
        for chunk in tl.static_range(CHUNKS):
            total = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
            for gate in tl.static_range(DOWNS):
                total = tl.dot(dv[gate].to(narrow), down[chunk * DOWNS + gate], total, input_precision=PRECISION)
            total = tl.where(alive[:, None], total, dh[chunk])
            dh_next = dh_next + (tl.where((alive & cut)[:, None], 0.0, total),)
        dh = dh_next
        tl.debug_barrier()  # the next step reads dc and the sums, which other threads may have written
    for chunk in tl.static_range(CHUNKS):
        n = _units(chunk, BLOCK_H)
        own = b.to(tl.int64)[:, None] * H + n[None, :]
        tl.store(dh0_ptr + own, dh[chunk], mask=(b < B)[:, None] & (n < H)[None, :])

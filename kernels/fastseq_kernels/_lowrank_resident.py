"""Low-rank LSTM, factors resident: one program takes 16 rows through all steps, with the factors in shared memory.

At H = 512, r = 32 in 16 bits the factors take 160 KiB. A step has one product over H and four over r, and waits for no
other program. Which sizes fit is said by ``lstm_lowrank.plan``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseq_kernels._cell import cell, cell_backward, load_gates, store_gates
from fastseq_kernels._steps import element, is_cut, state_before, steps_of

_RUN_TIME = ["T", "B", "inverse_tau"]  # what must not compile anew


@triton.jit
def _planes(first, distance, mask, COUNT: tl.constexpr):
    """Four blocks of weights, ``distance`` apart, or one for all four."""
    i = tl.load(first, mask=mask, other=0.0)
    if COUNT == 1:
        return i, i, i, i
    else:
        f = tl.load(first + distance, mask=mask, other=0.0)
        g = tl.load(first + 2 * distance, mask=mask, other=0.0)
        o = tl.load(first + 3 * distance, mask=mask, other=0.0)
        return i, f, g, o


@triton.jit(do_not_specialize=_RUN_TIME)
def forward_kernel(
    x_ptr,  # [N, 4*H] pre-activations with their noise; may be gates
    up_ptr,  # [4, H, R]
    down_ptr,  # [DOWNS, R, H]
    h0_ptr,  # [B, H]
    c0_ptr,  # [B, H]
    lengths_ptr,  # int64 [B] or None
    offsets_ptr,  # int64 [T] or None
    reset_ptr,  # bool [N] or None
    h_start_ptr,  # [H] or None
    c_start_ptr,  # [H] or None
    h_ptr,  # [N, H] out
    c_ptr,  # [N, H] out, or None
    gates_ptr,  # [N, 4*H] out, or None
    h_n_ptr,  # [B, H] out
    c_n_ptr,  # [B, H] out
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
    n, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_R)
    in_h = (n < H)[None, :]
    steps = steps_of(lengths_ptr, b, T, B)
    most = tl.max(steps, 0)
    own, inside = b.to(tl.int64)[:, None] * H + n[None, :], (b < B)[:, None] & in_h
    h = tl.load(h0_ptr + own, mask=inside, other=0.0)
    c = tl.load(c0_ptr + own, mask=inside, other=0.0)
    h_start, c_start = tl.zeros([1, BLOCK_H], h.dtype), tl.zeros([1, BLOCK_H], tl.float32)
    if h_start_ptr is not None:
        h_start = tl.load(h_start_ptr + n[None, :], mask=in_h, other=0.0)
    if c_start_ptr is not None:
        c_start = tl.load(c_start_ptr + n[None, :], mask=in_h, other=0.0)
    turned = n[:, None] + k[None, :] * H
    down_i, down_f, down_g, down_o = _planes(down_ptr + turned, R * H, (n < H)[:, None] & (k < R)[None, :], DOWNS)
    turned = n[None, :] * R + k[:, None]
    up_i, up_f, up_g, up_o = _planes(up_ptr + turned, R * H, in_h & (k < R)[:, None], 4)

    for s in range(most):
        t = s
        if REVERSE:
            t = most - 1 - s
        place = element(offsets_ptr, t, b, T, B)[:, None]
        live = (t < steps)[:, None] & in_h
        i, f, g, o = load_gates(x_ptr + place * (4 * H) + n[None, :], H, live)
        if reset_ptr is not None:
            cut = is_cut(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)[:, None]
            h, c = tl.where(cut, h_start, h), tl.where(cut, c_start, c)
        v_i = tl.dot(h, down_i, input_precision=PRECISION).to(h.dtype)
        v_f, v_g, v_o = v_i, v_i, v_i
        if DOWNS == 4:
            v_f = tl.dot(h, down_f, input_precision=PRECISION).to(h.dtype)
            v_g = tl.dot(h, down_g, input_precision=PRECISION).to(h.dtype)
            v_o = tl.dot(h, down_o, input_precision=PRECISION).to(h.dtype)
        i = tl.dot(v_i, up_i, i, input_precision=PRECISION)
        f = tl.dot(v_f, up_f, f, input_precision=PRECISION)
        g = tl.dot(v_g, up_g, g, input_precision=PRECISION)
        o = tl.dot(v_o, up_o, o, input_precision=PRECISION)
        i, f, g, o, c_new, m = cell(i, f, g, o, c, inverse_tau, HARD)
        h, c = tl.where(live, m.to(h.dtype), h), tl.where(live, c_new, c)
        tl.store(h_ptr + place * H + n[None, :], h, mask=live)
        if c_ptr is not None:
            tl.store(c_ptr + place * H + n[None, :], c, mask=live)
        if gates_ptr is not None:
            tl.debug_barrier()  # gates may be x: other threads of this program have read their part of it
            store_gates(gates_ptr + place * (4 * H) + n[None, :], H, i, f, g, o, live)
    tl.store(h_n_ptr + own, h, mask=inside)
    tl.store(c_n_ptr + own, c, mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def backward_kernel(
    dh_ptr,  # [N, H] or None, as the next four
    dc_ptr,  # [N, H]
    dgates_ptr,  # [N, 4*H]
    dh_n_ptr,  # [B, H]
    dc_n_ptr,  # [B, H]
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
    dc0_ptr,  # [B, H] out
    dv_start_ptr,  # [B, DOWNS*R] out, sum of dv over the steps whose state was cut; or None, as the next
    dc_start_ptr,  # [B, H] out, what each row gives
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
    n, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_R)
    in_h, in_r = (n < H)[None, :], (k < R)[None, :]
    steps = steps_of(lengths_ptr, b, T, B)
    most = tl.max(steps, 0)
    own, inside = b.to(tl.int64)[:, None] * H + n[None, :], (b < B)[:, None] & in_h
    dh, dc = tl.zeros([BLOCK_B, BLOCK_H], tl.float32), tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if dh_n_ptr is not None:
        dh = tl.load(dh_n_ptr + own, mask=inside, other=0.0).to(tl.float32)
    if dc_n_ptr is not None:
        dc = tl.load(dc_n_ptr + own, mask=inside, other=0.0)
    dc_start = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    v_i = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
    v_f, v_g, v_o = v_i, v_i, v_i
    up_i, up_f, up_g, up_o = _planes(up_ptr + n[:, None] * R + k[None, :], R * H, (n < H)[:, None] & in_r, 4)
    down_i, down_f, down_g, down_o = _planes(
        down_ptr + n[None, :] + k[:, None] * H, R * H, in_h & (k < R)[:, None], DOWNS
    )
    narrow = up_i.dtype

    for s in range(most):
        t = most - 1 - s
        if REVERSE:
            t = s
        alive = t < steps
        live = alive[:, None] & in_h
        row = element(offsets_ptr, t, b, T, B)
        place = row[:, None]
        i, f, g, o = load_gates(gates_ptr + place * (4 * H) + n[None, :], H, live)
        c = tl.load(c_ptr + place * H + n[None, :], mask=live, other=0.0)
        cut = alive & False
        if reset_ptr is not None:
            cut = is_cut(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)
        before = t + 1 if REVERSE else t - 1
        begins = (before < 0) | (before >= steps)
        earlier = element(offsets_ptr, before, b, T, B)
        rows, read = state_before(c_ptr, c0_ptr, c_start_ptr, earlier, b, begins, cut, alive, H)
        c_in = tl.load(rows[:, None] + n[None, :], mask=read[:, None] & in_h, other=0.0)
        dh_t, dc_t = dh, dc
        if dh_ptr is not None:
            dh_t += tl.load(dh_ptr + place * H + n[None, :], mask=live, other=0.0).to(tl.float32)
        if dc_ptr is not None:
            dc_t += tl.load(dc_ptr + place * H + n[None, :], mask=live, other=0.0)
        di = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        df, dg, do = di, di, di
        if dgates_ptr is not None:
            di, df, dg, do = load_gates(dgates_ptr + place * (4 * H) + n[None, :], H, live)
        di, df, dg, do, dc_in = cell_backward(dh_t, dc_t, i, f, g, o, c, c_in, di, df, dg, do, inverse_tau, HARD)
        zero = tl.zeros([BLOCK_B, BLOCK_H], narrow)
        d_i, d_f = tl.where(live, di.to(narrow), zero), tl.where(live, df.to(narrow), zero)
        d_g, d_o = tl.where(live, dg.to(narrow), zero), tl.where(live, do.to(narrow), zero)
        store_gates(d_ptr + place * (4 * H) + n[None, :], H, d_i, d_f, d_g, d_o, live)
        dv_i = tl.dot(d_i, up_i, input_precision=PRECISION)
        dv_at, dv_mask = dv_ptr + place * (DOWNS * R) + k[None, :], alive[:, None] & in_r
        if DOWNS == 1:
            dv_i = tl.dot(d_f, up_f, dv_i, input_precision=PRECISION)
            dv_i = tl.dot(d_g, up_g, dv_i, input_precision=PRECISION)
            dv_i = tl.dot(d_o, up_o, dv_i, input_precision=PRECISION)
            dh_in = tl.dot(dv_i.to(narrow), down_i, input_precision=PRECISION)
            tl.store(dv_at, dv_i, mask=dv_mask)
        else:
            dv_f = tl.dot(d_f, up_f, input_precision=PRECISION)
            dv_g = tl.dot(d_g, up_g, input_precision=PRECISION)
            dv_o = tl.dot(d_o, up_o, input_precision=PRECISION)
            store_gates(dv_at, R, dv_i, dv_f, dv_g, dv_o, dv_mask)
            dh_in = tl.dot(dv_i.to(narrow), down_i, input_precision=PRECISION)
            dh_in = tl.dot(dv_f.to(narrow), down_f, dh_in, input_precision=PRECISION)
            dh_in = tl.dot(dv_g.to(narrow), down_g, dh_in, input_precision=PRECISION)
            dh_in = tl.dot(dv_o.to(narrow), down_o, dh_in, input_precision=PRECISION)
        dh, dc = tl.where(live, dh_in, dh), tl.where(live, dc_in, dc)
        if reset_ptr is not None:
            if dc_start_ptr is not None:
                dc_start += tl.where(cut[:, None], dc, 0.0)
                v_i += tl.where(cut[:, None], dv_i, 0.0)
                if DOWNS == 4:
                    v_f += tl.where(cut[:, None], dv_f, 0.0)
                    v_g += tl.where(cut[:, None], dv_g, 0.0)
                    v_o += tl.where(cut[:, None], dv_o, 0.0)
            dh, dc = tl.where(cut[:, None], 0.0, dh), tl.where(cut[:, None], 0.0, dc)
    tl.store(dh0_ptr + own, dh, mask=inside)
    tl.store(dc0_ptr + own, dc, mask=inside)
    if dc_start_ptr is not None:
        tl.store(dc_start_ptr + own, dc_start, mask=inside)
        v_at, v_mask = dv_start_ptr + b.to(tl.int64)[:, None] * (DOWNS * R) + k[None, :], (b < B)[:, None] & in_r
        if DOWNS == 1:
            tl.store(v_at, v_i, mask=v_mask)
        else:
            store_gates(v_at, R, v_i, v_f, v_g, v_o, v_mask)

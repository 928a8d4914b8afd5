"""One step: the state's product by cuBLAS and a pointwise kernel behind it, for cells and streaming.

For one step there is nothing to keep on chip, and cuBLAS reads weight_hh with all multiprocessors at any batch size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._cell import cell, cell_backward, load_gates, store_gates
from fastseq_kernels._launch import cdiv, launch, power_of_two
from fastseq_kernels._steps import Found, Grads, Recurrence
from fastseq_kernels._tiles import tanh
from fastseq_kernels.gemm import layer_product

_RUN_TIME = ["B"]  # the size that must not compile anew


@triton.jit(do_not_specialize=_RUN_TIME)
def _cell_kernel(
    x_gates_ptr,  # [B, 4*H] pre-activations of the input, noise added
    product_ptr,  # [B, 4*H] of the state
    c0_ptr,  # [B, H]
    h_ptr,  # [B, H] out
    h_n_ptr,  # [B, H] out, a copy, or None
    c_ptr,  # [B, H] out or None
    c_n_ptr,  # [B, H] out, a copy
    gates_ptr,  # [B, 4*H] out or None; may be x_gates
    inverse_tau,
    B,
    H,
    HARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < H
    at, own = b * (4 * H) + h, b * H + h
    x_i, x_f, x_g, x_o = load_gates(x_gates_ptr + at, H, inside)
    i, f, g, o = load_gates(product_ptr + at, H, inside)
    c = tl.load(c0_ptr + own, mask=inside, other=0.0)
    i, f, g, o, c, m = cell(x_i + i, x_f + f, x_g + g, x_o + o, c, inverse_tau, HARD)
    tl.store(h_ptr + own, m, mask=inside)
    if h_n_ptr is not None:
        tl.store(h_n_ptr + own, m, mask=inside)
    tl.store(c_n_ptr + own, c, mask=inside)
    if c_ptr is not None:
        tl.store(c_ptr + own, c, mask=inside)
    if gates_ptr is not None:
        tl.debug_barrier()  # gates may be x_gates: other threads of this program have read their part of it
        store_gates(gates_ptr + at, H, i, f, g, o, inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def _cell_backward_kernel(
    dh_ptr,  # [B, H] or None; with a projection the gradient of what it takes
    dh_n_ptr,  # [B, H] or None, added to it
    dc_ptr,  # [B, H] or None
    dc_n_ptr,  # [B, H] or None
    dgates_ptr,  # [B, 4*H] or None
    gates_ptr,  # [B, 4*H]
    c_ptr,  # [B, H]
    c0_ptr,  # [B, H]
    dx_ptr,  # [B, 4*H] out
    dc0_ptr,  # [B, H] out
    m_ptr,  # [B, H] out or None
    inverse_tau,
    B,
    H,
    HARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < H
    at, own = b * (4 * H) + h, b * H + h
    dm = tl.zeros([BLOCK_H], tl.float32)
    dc, di, df, dg, do = dm, dm, dm, dm, dm
    if dh_ptr is not None:
        dm += tl.load(dh_ptr + own, mask=inside, other=0.0).to(tl.float32)
    if dh_n_ptr is not None:
        dm += tl.load(dh_n_ptr + own, mask=inside, other=0.0).to(tl.float32)
    if dc_ptr is not None:
        dc += tl.load(dc_ptr + own, mask=inside, other=0.0)
    if dc_n_ptr is not None:
        dc += tl.load(dc_n_ptr + own, mask=inside, other=0.0)
    if dgates_ptr is not None:
        di, df, dg, do = load_gates(dgates_ptr + at, H, inside)
    i, f, g, o = load_gates(gates_ptr + at, H, inside)
    c, c0 = tl.load(c_ptr + own, mask=inside, other=0.0), tl.load(c0_ptr + own, mask=inside, other=0.0)
    if m_ptr is not None:
        tl.store(m_ptr + own, o * tanh(c), mask=inside)
    di, df, dg, do, dc = cell_backward(dm, dc, i, f, g, o, c, c0, di, df, dg, do, inverse_tau, HARD)
    store_gates(dx_ptr + at, H, di, df, dg, do, inside)
    tl.store(dc0_ptr + own, dc, mask=inside)


def fits(call: Recurrence) -> bool:
    """One plain step: every row has it, and none starts anew in it."""
    return call.rows.T == 1 and call.places == (None, None, None)


def _run(kernel: Any, call: Recurrence, *args: Any) -> None:
    block_h = power_of_two(call.H, 1, 512)
    launch(
        kernel,
        (call.rows.B, cdiv(call.H, block_h)),
        *(*args, 1.0 / call.tau, call.rows.B, call.H),
        HARD=call.hard,
        BLOCK_H=block_h,
        num_warps=4 if block_h >= 128 else 1,
    )


def forward(
    call: Recurrence, x_gates: Tensor, h: Tensor, c: Tensor | None, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Write h, and c and gates where they are kept; returns h_n and c_n. ``gates`` may be ``x_gates``."""
    product = layer_product(call.h0, call.weight_hh, None, False, True)
    projected = call.weight_hr is not None
    m = x_gates.new_empty(call.rows.B, call.H) if projected else h
    h_n, c_n = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (call.h0, call.c0))
    _run(_cell_kernel, call, x_gates, product, call.c0, m, None if projected else h_n, c, c_n, gates)
    if call.weight_hr is not None:
        h_n = layer_product(m, call.weight_hr, None, False, True)
        h.copy_(h_n)
    return h_n, c_n


def backward(call: Recurrence, grads: Grads, gates: Tensor, c: Tensor) -> Found:
    """Gradients of the pre-activations and of the states."""
    dx, dc0 = torch.empty_like(gates), torch.empty_like(call.c0)
    dh, dm, dh_n, m = None, grads.h, grads.h_n, None
    if call.weight_hr is not None:
        given = [d.reshape(call.rows.B, call.P) for d in (grads.h, grads.h_n) if d is not None]
        dh = sum(given[1:], given[0]) if given else torch.zeros_like(call.h0)
        dm, dh_n, m = layer_product(dh, call.weight_hr), None, gates.new_empty(call.rows.B, call.H)
    _run(
        *(_cell_backward_kernel, call, dm, dh_n, grads.c, grads.c_n, grads.gates),
        *(gates, c, call.c0, dx, dc0, m),
    )
    dh0 = layer_product(dx.reshape(-1, 4 * call.H), call.weight_hh)
    return Found(dx, dh0, dc0, None, None, dh, m)

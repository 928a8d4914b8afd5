"""What needs the state before every step at once: the gradient of weight_hh, and gates rebuilt from kept h."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._cell import cell, load_gates, store_gates
from fastseq_kernels._launch import cdiv, launch, power_of_two, rnn_precision
from fastseq_kernels._steps import Recurrence, element, is_cut, state_before, steps_of
from fastseq_kernels.gemm import layer_product
from fastseq_kernels.lstm_step import gate_sums

_RUN_TIME = ["T", "B", "N", "first"]  # sizes that must not compile anew


@triton.jit(do_not_specialize=_RUN_TIME)
def _states_kernel(
    h_ptr,  # [N, P]
    h0_ptr,  # [B, P]
    h_start_ptr,  # [P] or None
    out_ptr,  # [N, P] the state before each element, zeros beyond a row's end
    lengths_ptr,
    offsets_ptr,
    reset_ptr,
    T,
    B,
    P,
    REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tiles = tl.cdiv(B, BLOCK_B)
    t = tl.program_id(0) // tiles
    b = (tl.program_id(0) % tiles) * BLOCK_B + tl.arange(0, BLOCK_B)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    steps = steps_of(lengths_ptr, b, T, B)
    alive = t < steps
    before = t + 1 if REVERSE else t - 1
    begins = (before < 0) | (before >= steps)
    cut = begins & False
    if reset_ptr is not None:
        cut = is_cut(reset_ptr, offsets_ptr, t, b, steps, T, B, REVERSE)
    place, place_before = element(offsets_ptr, t, b, T, B), element(offsets_ptr, before, b, T, B)
    state, known = state_before(h_ptr, h0_ptr, h_start_ptr, place_before, b, begins, cut, alive, P)
    written = (b < B) if offsets_ptr is None else alive
    columns = (p < P)[None, :]
    found = tl.load(state[:, None] + p[None, :], mask=known[:, None] & columns, other=0.0)
    tl.store(out_ptr + place[:, None] * P + p[None, :], found, mask=written[:, None] & columns)


class Part(NamedTuple):
    """Elements from ``first`` on, and the states before them."""

    first: int
    states: Tensor  # [elements, P]


def states_before(call: Recurrence, h: Tensor) -> list[Part]:
    """The states before all elements: of plain dense data h0 and h itself, else one gathered tensor."""
    (T, B, lengths, offsets), P = call.rows, call.P
    flat = h.reshape(-1, P)
    if flat.shape[0] == 0:
        return []
    # Without reset the state before an element of a row is that of the neighbouring step; beyond a row's end any
    # number will do. Only a reversed row of its own length begins elsewhere.
    if call.reset is None and offsets is None and (lengths is None or not call.reverse):
        rest = [Part(0, flat[B:]) if call.reverse else Part(B, flat[:-B])] if T > 1 else []
        return [Part((T - 1) * B if call.reverse else 0, call.h0), *rest]
    out = torch.empty_like(flat)
    block_p = power_of_two(P, 16, 128)
    block_b = 512 // block_p if B > 1 else 1
    launch(
        _states_kernel,
        (cdiv(B, block_b) * T, cdiv(P, block_p)),
        *(flat, call.h0, call.h_start, out, *call.places, T, B, P),
        REVERSE=call.reverse,
        BLOCK_B=block_b,
        BLOCK_P=block_p,
        num_warps=4,
    )
    return [Part(0, out)]


def weight_gradient(call: Recurrence, dx_gates: Tensor, h: Tensor) -> Tensor:
    """dweight_hh [4*H, P]: the pre-activations' gradients times the states before them, over all elements."""
    flat = dx_gates.reshape(-1, 4 * call.H)
    total = None
    for part in states_before(call, h):
        d = flat[part.first : part.first + part.states.shape[0]]
        one = layer_product(d, part.states, None, True, False)
        total = one if total is None else total.add_(one)
    return torch.zeros_like(call.weight_hh) if total is None else total


@triton.jit(do_not_specialize=_RUN_TIME)
def _gates_kernel(
    x_gates_ptr,  # [N, 4*H] pre-activations, noise added
    states_ptr,  # [N, P]
    weight_ptr,  # [4*H, P]
    gates_ptr,  # [N, 4*H] out; may be x_gates
    lengths_ptr,  # [B] of dense data, or None
    first,  # number of the first element
    N,
    B,
    H,
    P,
    inverse_tau,
    HARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(H, BLOCK_H)
    n = (tl.program_id(0) // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_unit = (tl.program_id(0) % across) * BLOCK_H
    h = first_unit + tl.arange(0, BLOCK_H)
    alive = n < N
    if lengths_ptr is not None:
        t, b = (first + n) // B, (first + n) % B
        alive = alive & (t < tl.load(lengths_ptr + b, mask=alive, other=0))
    here = alive[:, None] & (h < H)[None, :]
    at = n[:, None] * (4 * H) + h[None, :]
    i, f, g, o = gate_sums(
        states_ptr + n * P, alive, weight_ptr, first_unit, H, P, PRECISION, BLOCK_N, BLOCK_H, BLOCK_K
    )
    x_i, x_f, x_g, x_o = load_gates(x_gates_ptr + at, H, here)
    i, f, g, o, _, _ = cell(x_i + i, x_f + f, x_g + g, x_o + o, 0.0, inverse_tau, HARD)
    i, f, g, o = tl.where(here, i, 0.0), tl.where(here, f, 0.0), tl.where(here, g, 0.0), tl.where(here, o, 0.0)
    tl.debug_barrier()  # gates may be x_gates: other threads of this program have read their part of it
    store_gates(gates_ptr + at, H, i, f, g, o, (n < N)[:, None] & (h < H)[None, :])


class Tile(NamedTuple):
    """How the kernel of the gates runs: elements, units and terms of the sum per tile."""

    elements: int
    units: int
    terms: int
    num_warps: int
    num_stages: int


def tile(H: int, P: int, dtype: torch.dtype) -> Tile:
    """Products without tensor cores keep all terms of a tile in registers, so these are few."""
    if dtype == torch.float32 and rnn_precision(dtype) == "ieee":
        return Tile(32, 16, 16, 4, 2)
    return Tile(64, power_of_two(H, 16, 32), power_of_two(P, 16, 32 if dtype == torch.float32 else 64), 4, 3)


def rebuild(call: Recurrence, x_gates: Tensor, h: Tensor, gates: Tensor) -> None:
    """Write the gates of all steps, from pre-activations and the h that the forward returned."""
    H, P = call.H, call.P
    x, out = x_gates.reshape(-1, 4 * H), gates.reshape(-1, 4 * H)
    at = tile(H, P, x_gates.dtype)
    for part in states_before(call, h):
        N = part.states.shape[0]
        these = slice(part.first, part.first + N)
        lengths = call.rows.lengths if call.rows.offsets is None else None
        launch(
            _gates_kernel,
            (cdiv(N, at.elements) * cdiv(H, at.units),),
            *(x[these], part.states, call.weight_hh, out[these], lengths),
            *(part.first, N, call.rows.B, H, P, 1.0 / call.tau),
            HARD=call.hard,
            PRECISION=rnn_precision(x_gates.dtype),
            BLOCK_N=at.elements,
            BLOCK_H=at.units,
            BLOCK_K=at.terms,
            num_warps=at.num_warps,
            num_stages=at.num_stages,
        )

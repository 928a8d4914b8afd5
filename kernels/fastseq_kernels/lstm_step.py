"""The LSTM step by step, for every size and layout: one launch per step, two with a projection.

A program owns BLOCK_B rows and BLOCK_N units with all four gates; it multiplies the whole state of its rows with its
rows of weight_hh and goes on to the cell. At few rows a step is the reading of weight_hh from the second-level cache,
by all multiprocessors; tiles are narrow so that there are programs for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._cell import cell, load_gates, store_gates
from fastseq_kernels._launch import Repeated, cdiv, power_of_two, rnn_precision, target
from fastseq_kernels._steps import Recurrence, element, is_cut, state_before, steps_of
from fastseq_kernels._tiles import add_product

_RUN_TIME = ["t", "T", "B"]  # sizes that must not compile anew


@triton.jit
def gate_sums(
    state,  # [BLOCK_B] pointers to rows of P
    known,  # [BLOCK_B] rows to read, the others are zeros
    weight_ptr,  # [4*H, P]
    first_unit,
    H,
    P,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The state times the rows of weight_hh of BLOCK_N units, per gate.

    The four gates of a unit are neighbours in one product, whose long side is theirs: few rows fill no instruction.
    """
    n = tl.arange(0, 4 * BLOCK_N)
    h = first_unit + n // 4
    weight = weight_ptr + ((n % 4) * H + h).to(tl.int64)[:, None] * P
    sums = tl.zeros([4 * BLOCK_N, BLOCK_B], tl.float32)
    lost = sums
    for first in range(0, P, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        w = tl.load(weight + k[None, :], mask=(h < H)[:, None] & (k < P)[None, :], other=0.0)
        s = tl.load(state[None, :] + k[:, None], mask=known[None, :] & (k < P)[:, None], other=0.0)
        sums, lost = add_product(sums, lost, w, s, PRECISION)
    i_g, f_o = tl.split(tl.reshape(tl.trans(sums), [BLOCK_B, BLOCK_N, 2, 2]))
    i, g = tl.split(i_g)
    f, o = tl.split(f_o)
    return i, f, g, o


@triton.jit
def step(
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    first_unit = tl.program_id(1) * BLOCK_N
    h = first_unit + tl.arange(0, BLOCK_N)
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
    x_i, x_f, x_g, x_o = load_gates(x_gates_ptr + at, H, here)
    c = tl.load(c_state[:, None] + h[None, :], mask=c_known[:, None] & columns, other=0.0)
    i, f, g, o = gate_sums(state, known, weight_ptr, first_unit, H, P, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K)

    i, f, g, o, c, m = cell(x_i + i, x_f + f, x_g + g, x_o + o, c, inverse_tau, HARD)

    tl.debug_barrier()  # gates may be x_gates: other threads of this program have read their part of it
    written = here
    if lengths_ptr is not None and offsets_ptr is None:  # elements beyond a row's end exist and are zeros
        written = (b < B)[:, None] & columns
        i, f, g, o = tl.where(here, i, 0.0), tl.where(here, f, 0.0), tl.where(here, g, 0.0), tl.where(here, o, 0.0)
    if gates_ptr is not None:
        store_gates(gates_ptr + at, H, i, f, g, o, written)
    tl.store(c_ptr + c_place[:, None] * H + h[None, :], tl.where(here, c, 0.0), mask=written)
    last = here & ((t == 0) if REVERSE else (t + 1 == steps)[:, None])
    own = b.to(tl.int64)[:, None] * H + h[None, :]
    tl.store(c_n_ptr + own, c, mask=last)
    if m_ptr is not None:
        tl.store(m_ptr + own, m, mask=here)
    else:
        tl.store(h_ptr + place[:, None] * P + h[None, :], tl.where(here, m, 0.0), mask=written)
        tl.store(h_n_ptr + own, m, mask=last)


@triton.jit(do_not_specialize=_RUN_TIME)
def _step_kernel(
    x_gates_ptr,
    weight_ptr,
    h_ptr,
    c_ptr,
    gates_ptr,
    m_ptr,
    h0_ptr,
    c0_ptr,
    h_start_ptr,
    c_start_ptr,
    h_n_ptr,
    c_n_ptr,
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
    KEEP_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    step(
        *(x_gates_ptr, weight_ptr, h_ptr, c_ptr, gates_ptr, m_ptr, h0_ptr, c0_ptr, h_start_ptr, c_start_ptr),
        *(h_n_ptr, c_n_ptr, lengths_ptr, offsets_ptr, reset_ptr, inverse_tau, t, T, B, H, P),
        *(HARD, REVERSE, KEEP_C, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
    )


@triton.jit
def row_sums(
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
    lost = total
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(rows[:, None] + k[None, :], mask=known[:, None] & (k < K)[None, :], other=0.0)
        weight = weight_ptr + k.to(tl.int64)[:, None] * weight_row + n.to(tl.int64)[None, :] * weight_column
        w = tl.load(weight, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total, lost = add_product(total, lost, a, w, PRECISION)
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
    out = row_sums(rows, alive, weight_ptr, p, P, H, 1, H, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K)
    here = alive[:, None] & (p < P)[None, :]
    written = here
    if lengths_ptr is not None and offsets_ptr is None:
        written = (b < B)[:, None] & (p < P)[None, :]
    place = element(offsets_ptr, t, b, T, B)
    tl.store(h_ptr + place[:, None] * P + p[None, :], tl.where(here, out, 0.0), mask=written)
    last = here & ((t == 0) if REVERSE else (t + 1 == steps)[:, None])
    tl.store(h_n_ptr + b.to(tl.int64)[:, None] * P + p[None, :], out, mask=last)


class Tile(NamedTuple):
    """How a kernel runs: rows, units and terms of the sum per tile."""

    rows: int
    units: int
    terms: int
    num_warps: int
    num_stages: int


def tile(B: int, width: int, terms: int, dtype: torch.dtype, planes: int = 1) -> Tile:
    """For B rows, ``width`` units of a model, sums of ``terms``, and that many of them at once.

    Tiles grow where there are programs enough without. About 32 KiB must be under way to hide the second-level cache.
    A matrix instruction takes 16 rows; of many rows 32 or 64 share what a program reads of the weights (64 of float32
    spill registers on sm_120), which is all that B decides, so that other batches compile two kernels more at most. A
    row's sums are the same either way.
    Products without tensor cores keep all terms of a tile in registers, so these are few.
    """
    units = power_of_two(width, 16, 16 if width <= 2048 else 32)
    if dtype == torch.float32 and rnn_precision(dtype) == "ieee":
        return Tile(16, units, 16, 4, 2)
    rows = 16 if B <= 32 else 32 if B <= 128 or dtype == torch.float32 else 64
    return Tile(rows, units, power_of_two(terms, 16, 64 if dtype == torch.float32 else 128), 4, 3 if planes == 4 else 5)


def repeated(kernel: Any, rows: int, width: int, at: Tile, device: torch.device, **constexprs: Any) -> Repeated:
    """Launches over all rows and ``width`` units."""
    if target(device).capability == 120:
        constexprs["maxnreg"] = 255  # else ptxas spills a few registers to have more programs per multiprocessor
    return Repeated(
        kernel,
        (cdiv(rows, at.rows), cdiv(width, at.units)),
        BLOCK_B=at.rows,
        BLOCK_N=at.units,
        BLOCK_K=at.terms,
        num_warps=at.num_warps,
        num_stages=at.num_stages,
        **constexprs,
    )


class Loop(NamedTuple):
    """A loop over time that one kernel makes step by step: what each launch is given beside its step."""

    kernel: Any
    tensors: tuple[Tensor | None, ...]
    call: Recurrence
    at: Tile
    constexprs: dict[str, Any]
    falling: bool  # from the last step to the first

    def launcher(self) -> Callable[[int], None]:
        """What launches step t."""
        (T, B, *_), H, P = self.call.rows, self.call.H, self.call.P
        launch = repeated(self.kernel, B, H, self.at, self.call.h0.device, **self.constexprs)
        return lambda t: launch(*self.tensors, 1.0 / self.call.tau, t, T, B, H, P)

    def step(self, n: int) -> int:
        """The n-th step of the loop."""
        return self.call.rows.T - 1 - n if self.falling else n


def forward_loop(
    call: Recurrence, x_gates: Tensor, h: Tensor, c: Tensor | None, gates: Tensor | None
) -> tuple[Loop, Tensor, Tensor]:
    """The loop, and h_n and c_n, which it writes."""
    h_n, c_n = call.h0.clone(), call.c0.clone()
    keep = c is not None
    c = call.c0.new_empty(2, call.rows.B, call.H) if c is None else c
    m = None if call.weight_hr is None else x_gates.new_empty(call.rows.B, call.H)
    first = (x_gates, call.weight_hh, h, c, gates, m)
    tensors = (*first, call.h0, call.c0, call.h_start, call.c_start, h_n, c_n, *call.places)
    constexprs = {"HARD": call.hard, "REVERSE": call.reverse, "KEEP_C": keep, "PRECISION": rnn_precision(h.dtype)}
    loop = Loop(
        _step_kernel, tensors, call, tile(call.rows.B, call.H, call.P, h.dtype, planes=4), constexprs, call.reverse
    )
    return loop, h_n, c_n


def forward(
    call: Recurrence, x_gates: Tensor, h: Tensor, c: Tensor | None, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Write h, and c and gates where they are kept; returns h_n and c_n. ``gates`` may be ``x_gates``."""
    (T, B, *_), H, P = call.rows, call.H, call.P
    loop, h_n, c_n = forward_loop(call, x_gates, h, c, gates)
    m, step, options = loop.tensors[5], loop.launcher(), {"REVERSE": call.reverse, "PRECISION": rnn_precision(h.dtype)}
    project = repeated(_project_kernel, B, P, tile(B, P, H, h.dtype), h.device, **options)
    for t in map(loop.step, range(T)):
        step(t)
        if m is not None:
            project(m, call.weight_hr, h, h_n, *call.places[:2], t, T, B, H, P)
    return h_n, c_n

"""The low-rank LSTM on a GPU: which route a call takes, and what is around the loop over time.

Weights of gate g are up[g] @ down[g], or up[g] @ down[0]; they are never multiplied together. The gradients of both
factors are products over all elements after the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq_kernels import _lowrank_loop, _lowrank_resident
from fastseq_kernels._call import BLOCK_B, fresh, outputs, recurrence
from fastseq_kernels._launch import Repeated, Target, cdiv, power_of_two, rnn_precision, target
from fastseq_kernels._steps import Grads, Recurrence
from fastseq_kernels.gemm import layer_product
from fastseq_kernels.lstm_states import states_before

_STAGED = 8192  # numbers that pass through shared memory beside the factors
_IN_ONE = 3 << 19  # bytes of factors per step that one program reads faster than two launches take


class Plan(NamedTuple):
    """How the recurrence runs."""

    route: str  # resident, loop (one program per 16 rows, factors read in every step) or steps (two launches each)
    block_h: int
    block_r: int
    num_warps: int
    num_stages: int


def plan(H: int, R: int, downs: int, dtype: torch.dtype, device: Target) -> Plan:
    """By the sizes of the model. Products without tensor cores keep their operands in registers, so tiles are small."""
    block_h, block_r = power_of_two(H, 16, 64), power_of_two(R, 16)
    size = (4 + downs) * dtype.itemsize
    in_one = size * H * R <= _IN_ONE
    wide = dtype == torch.float32
    if wide and rnn_precision(dtype) == "ieee":
        return Plan("loop" if in_one else "steps", min(block_h, 32), 16, 4, 1)
    factors, staged = size * cdiv(H, block_h) * block_h * block_r, _STAGED * dtype.itemsize
    most = 128 if downs > 1 else 384 if device.capability == 100 else 512  # beyond, the backward spills registers
    if H <= most and factors + staged <= device.shared:
        return Plan("resident", block_h, block_r, 4 if H <= 64 else 8, 1)
    # Larger tiles would have more on its way from the cache at once, as far as registers allow: to be measured.
    block_h, block_r = min(block_h, 32), min(block_r, 32)
    return Plan("loop", block_h, block_r, 8 if wide else 4, 2) if in_one else Plan("steps", block_h, block_r, 4, 2)


class _Call(NamedTuple):
    """A recurrence, its factors and how it runs."""

    base: Recurrence
    up: Tensor
    down: Tensor
    at: Plan

    @property
    def downs(self) -> int:
        return self.down.shape[0]

    @property
    def sizes(self) -> tuple[Any, ...]:
        return (self.base.rows.T, self.base.rows.B, self.base.H, self.up.shape[2], 1.0 / self.base.tau)

    def launcher(self, kernel: Any, across: int, **constexprs: Any) -> Callable[..., None]:
        """Launches over all rows; ``across``: programs that share a tile of them."""
        if self.at.route != "resident" or self.at.num_warps == 4:
            constexprs["maxnreg"] = 255  # else ptxas spills a few registers to have more programs per multiprocessor
        launch = Repeated(
            kernel,
            (cdiv(self.base.rows.B, BLOCK_B), across),
            **constexprs,
            DOWNS=self.downs,
            HARD=self.base.hard,
            REVERSE=self.base.reverse,
            PRECISION=rnn_precision(self.up.dtype),
            BLOCK_B=BLOCK_B,
            BLOCK_H=self.at.block_h,
            BLOCK_R=self.at.block_r,
            num_warps=self.at.num_warps,
            num_stages=self.at.num_stages,
        )
        return lambda *args: launch(*args, *self.sizes)

    def run(self, kernel: Any, across: int, *args: Any, **constexprs: Any) -> None:
        self.launcher(kernel, across, **constexprs)(*args)

    @property
    def chunks(self) -> int:
        return cdiv(self.base.H, self.at.block_h)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of units, and of ranks."""
        return cdiv(self.base.H, self.at.block_h), self.downs * cdiv(self.up.shape[2], self.at.block_r)


def _call(data: Tensor, up: Tensor, down: Tensor, h0: Tensor, c0: Tensor, state: Any, gate: Any) -> _Call:
    base = recurrence(data, up, h0, c0, state, gate)
    return _Call(base, up, down, plan(base.H, up.shape[2], down.shape[0], up.dtype, target(up.device)))


def lstm_lowrank_forward(
    x_gates: Tensor, up: Tensor, down: Tensor, h0: Tensor, c0: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """``reference.lstm_lowrank``; ``save`` 2 keeps c and gates, 1 c alone, 0 neither."""
    call = _call(x_gates, up, down, h0, c0, args[:5], args[10:13])
    base, out = call.base, outputs(call.base, x_gates, args[5:10], args[13])
    starts = (base.h_start, base.c_start)
    if call.at.route == "resident":
        states = (h0, *base.places, *starts)
        call.run(_lowrank_resident.forward_kernel, 1, out.x, up, down, *states, *out[1:], CHUNKS=call.chunks)
        return out.results()
    T, v = base.rows.T, x_gates.new_empty(base.rows.B, down.shape[0] * down.shape[1])
    given = (out.x, up, down, v, h0, *base.places, *starts, *out[1:])
    if call.at.route == "loop":
        call.run(_lowrank_loop.forward_kernel, 1, *given, 0, T, PART=0)
        return out.results()
    parts = [call.launcher(_lowrank_loop.forward_kernel, n, PART=part) for part, n in enumerate(call.blocks[::-1], 1)]
    for step in range(T):
        for part in parts:
            part(*given, step, step + 1)
    return out.results()


def lstm_lowrank_backward(*args: Any) -> tuple[Tensor, ...]:
    """``reference.lstm_lowrank_backward``; without ``weights`` the factors' gradients come back without elements."""
    grads, (gates, h, c, up, down, h0, c0), weights = Grads(*args[:5]), args[5:12], args[20]
    call = _call(gates, up, down, h0, c0, args[12:17], args[17:20])
    base = call.base
    start = base.reset is not None and (base.h_start is not None or base.c_start is not None)
    d = fresh(base, *gates.shape, like=gates)
    dv = fresh(base, *gates.shape[:-1], down.shape[0] * down.shape[1], like=gates)
    dh0, dc0 = torch.empty_like(h0), torch.zeros_like(c0) if grads.c_n is None else grads.c_n.clone()
    starts = tuple(c0.new_zeros(base.rows.B, n) if start else None for n in (dv.shape[-1], base.H))
    given, out = (gates, c, up, down, c0, *base.places, base.c_start), (d, dv, dh0, dc0, *starts)
    if call.at.route == "resident":
        call.run(_lowrank_resident.backward_kernel, 1, *grads[:4], *given, *out, CHUNKS=call.chunks)
    else:
        _backward_loop(call, (*grads[:4], *given, *out))
    dup, ddown = _factor_gradients(call, d, dv, h) if weights else (up.new_empty(0), down.new_empty(0))
    return (d, dup, ddown, dh0, dc0, *_start_gradients(call, *starts))


def _backward_loop(call: _Call, given: tuple[Any, ...]) -> None:
    T = call.base.rows.T
    if call.at.route == "loop":
        call.run(_lowrank_loop.backward_kernel, 1, *given, 0, T, PART=0)
        return
    parts = [call.launcher(_lowrank_loop.backward_kernel, n, PART=part) for part, n in enumerate(call.blocks, 1)]
    for step in range(T):
        for part in parts:
            part(*given, step, step + 1)
    dv, dh0 = given[14:16]
    dh_n, down, places = given[3], given[7], given[9:12]
    call.run(_lowrank_loop.start_kernel, call.blocks[0], dv, down, dh_n, *places, dh0)


def _factor_gradients(call: _Call, d: Tensor, dv: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """dup = d.T @ v with v = down @ h of the step before, and ddown = dv.T @ h, over all elements."""
    (downs, R, H), dup, ddown = call.down.shape, torch.zeros_like(call.up), torch.zeros_like(call.down)
    N = h.shape[:-1].numel()
    d, dv = d.reshape(N, 4 * H), dv.reshape(N, downs * R)
    for part in states_before(call.base, h):
        these = slice(part.first, part.first + part.states.shape[0])
        v = layer_product(part.states, call.down.reshape(downs * R, H), None, False, True)
        ddown += layer_product(dv[these], part.states, None, True, False).view_as(ddown)
        for g in range(downs):
            some = d[these, g * H : (g + 1) * H] if downs == 4 else d[these]
            one = layer_product(some, v[:, g * R : (g + 1) * R], None, True, False)
            dup[g * 4 // downs : (g + 1) * 4 // downs] += one.view(4 // downs, H, R)
    return dup, ddown


def _start_gradients(call: _Call, dv: Tensor | None, dc: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of h_start and c_start, from the sums per row."""
    base = call.base
    if base.h_start is None and base.c_start is None:
        return base.h0.new_empty(0), base.c0.new_empty(0)
    if dv is None or dc is None:  # no reset: no row ever starts anew
        return base.h0.new_zeros(base.P), base.c0.new_zeros(base.H)
    dh = (dv.sum(0)[:, None] * call.down.reshape(-1, base.H).float()).sum(0)
    return dh.to(base.h0.dtype), dc.sum(0)

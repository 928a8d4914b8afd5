"""The LSTM operators on a GPU: which route a call takes, and what is around the loop over time.

The noise depends on no state and is added to the pre-activations before the loop; the weights' gradients are products
over all steps after it. Gates that are kept take the place of the pre-activations, where that memory is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq_kernels import _checks, lstm_cell, lstm_graph, lstm_resident, lstm_states, lstm_step, lstm_step_backward
from fastseq_kernels._launch import target
from fastseq_kernels._rows import rows_of
from fastseq_kernels._steps import Found, Grads, Recurrence
from fastseq_kernels.gemm import layer_product
from fastseq_kernels.lstm_noise import add_noise
from fastseq_kernels.lstm_resident import Direction, Given


class Noise(NamedTuple):
    """Arguments of the noise, in the order of the operators."""

    seed: Tensor | None
    rows: Tensor | None
    row_offset: int
    stream: int
    probability: float


def recurrence(data: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, state: Any, gate: Any) -> Recurrence:
    """One call; ``state`` is weight_hr, lengths, batch_sizes, reset, h_start, c_start, ``gate`` tau, hard, reverse."""
    weight_hr, lengths, batch_sizes, reset, h_start, c_start = state
    rows = rows_of(data, h0.shape[0], lengths, batch_sizes)
    call = Recurrence(rows, weight_hh, h0, c0, weight_hr, reset, h_start, c_start, *gate)
    _checks.recurrence(call, data)
    return call


class Plan(NamedTuple):
    """Which way a call takes, and why."""

    route: str  # cell, resident, graph or step
    why: str


def plan(call: Recurrence, data: Tensor) -> Plan:
    """The route of one call: of one step, or by the sizes of the model, the dtype and the device; T and B
    only decide whether graphs are worth their capture."""
    if lstm_cell.fits(call):
        return Plan("cell", "one step: torch's product and a pointwise kernel")
    if call.weight_hr is not None:
        return Plan("step", "a launch per step and one for the projection, whose result all units need")
    reason = lstm_resident.why_not(call.H, data.dtype, call.reset is not None, target(data.device))
    if reason is None:
        return Plan("resident", "one kernel for all steps, which holds weight_hh")
    if lstm_graph.wanted(call):
        return Plan("graph", f"a launch per step, {lstm_graph.STEPS} steps to a CUDA graph: {reason}")
    return Plan("step", f"a launch per step: {reason}")


def noisy(call: Recurrence, x_gates: Tensor, noise: Noise, ours: bool) -> tuple[Tensor, bool]:
    """x_gates with noise, and whether that is memory that may be written; in place where x_gates is ``ours``."""
    if noise.seed is None:
        return x_gates, ours
    out = x_gates if ours else torch.empty_like(x_gates)
    add_noise(x_gates, out, call.rows, noise.seed, *noise[1:])
    return out, True


def prepared(call: Recurrence, x_gates: Tensor, noise: Noise, save: int, ours: bool) -> Direction:
    """What the loop over time reads and writes; ``ours``: x_gates may be overwritten."""
    _checks.elements(call, x_gates, "x_gates", x_gates, "4*H", 4 * call.H)
    lead = x_gates.shape[:-1]
    x, ours = noisy(call, x_gates, noise, ours)
    c = call.c0.new_empty(*lead, call.H) if save >= 1 else None
    gates = None if save < 2 else x if ours else torch.empty_like(x)
    return Direction(call, x, x.new_empty(*lead, call.P), c, gates)


def run_forward(directions: list[Direction]) -> list[tuple[Tensor, Tensor]]:
    """h_n and c_n of one direction or of a pair, which the resident kernel runs in one launch."""
    route = plan(directions[0].call, directions[0].x_gates).route
    if route == "resident":
        return lstm_resident.forward(directions)
    by = {"cell": lstm_cell.forward, "graph": lstm_graph.forward, "step": lstm_step.forward}[route]
    return [by(*d) for d in directions]


def kept(d: Direction, h_n: Tensor, c_n: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, c, gates, h_n, c_n; what is not kept has no elements."""
    c = d.call.c0.new_empty(0) if d.c is None else d.c
    return d.h, c, d.x_gates.new_empty(0) if d.gates is None else d.gates, h_n, c_n


def forward(
    call: Recurrence, x_gates: Tensor, noise: Noise, save: int, ours: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, c, gates, h_n, c_n; ``ours``: x_gates may be overwritten."""
    direction = prepared(call, x_gates, noise, save, ours)
    return kept(direction, *run_forward([direction])[0])


def rebuilt(call: Recurrence, x_gates: Tensor, h: Tensor, noise: Noise, ours: bool) -> Tensor:
    """The gates of ``forward``, rebuilt from its h."""
    _checks.elements(call, x_gates, "x_gates", x_gates, "4*H", 4 * call.H)
    _checks.elements(call, x_gates, "h", h, "P", call.P)
    x, ours = noisy(call, x_gates, noise, ours)
    gates = x if ours else torch.empty_like(x)
    lstm_states.rebuild(call, x, h, gates)
    return gates


def run_backward(directions: list[Given]) -> list[Found]:
    """Gradients of one direction or of a pair, which the resident kernel runs in one launch."""
    route = plan(directions[0].call, directions[0].gates).route
    if route == "resident":
        return lstm_resident.backward(directions)
    by = {"cell": lstm_cell.backward, "graph": lstm_graph.backward, "step": lstm_step_backward.backward}[route]
    return [by(*d) for d in directions]


def backward(call: Recurrence, grads: Grads, gates: Tensor, h: Tensor, c: Tensor, weights: bool) -> tuple[Tensor, ...]:
    """dx_gates, dweight_hh, dh0, dc0, dweight_hr, dh_start, dc_start, without elements where there is none."""
    _checks.backward(call, grads, gates, h, c)
    return gradients(call, run_backward([Given(call, grads, gates, c)])[0], h, weights)


def gradients(call: Recurrence, found: Found, h: Tensor, weights: bool) -> tuple[Tensor, ...]:
    """What ``lstm_backward`` returns, from what a route found."""
    none = h.new_empty(0)
    dweight_hh, dweight_hr = none, none.clone()
    if weights:
        dweight_hh = lstm_states.weight_gradient(call, found.dx_gates, h)
        if found.dh is not None and found.m is not None:
            dweight_hr = layer_product(found.dh.reshape(-1, call.P), found.m.reshape(-1, call.H), None, True, False)
    dh_start, dc_start = _starts(call, found)
    return found.dx_gates, dweight_hh, found.dh0, found.dc0, dweight_hr, dh_start, dc_start


def _starts(call: Recurrence, found: Found) -> tuple[Tensor, Tensor]:
    """Gradients of the start states, from their sums per row."""
    if call.h_start is None and call.c_start is None:
        return call.h0.new_empty(0), call.c0.new_empty(0)
    if found.dh_start is None or found.dc_start is None:  # no reset: no row ever starts anew
        return call.h0.new_zeros(call.P), call.c0.new_zeros(call.H)
    return found.dh_start.sum(0).to(call.h0.dtype), found.dc_start.sum(0)


def lstm_forward(x_gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """``reference.lstm``; ``save`` 2 keeps c and gates, 1 c alone, 0 neither."""
    call = recurrence(x_gates, weight_hh, h0, c0, args[:6], args[11:14])
    return forward(call, x_gates, Noise(*args[6:11]), args[14], False)


def lstm_gates(x_gates: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, *args: Any) -> Tensor:
    """``reference.lstm_gates``: one product over all steps. It may sum in another order than the forward did."""
    call = recurrence(x_gates, weight_hh, h0, c0, args[:6], args[11:14])
    return rebuilt(call, x_gates, h, Noise(*args[6:11]), False)


def lstm_backward(*args: Any) -> tuple[Tensor, ...]:
    """``reference.lstm_backward``; without ``weights`` their gradients come back without elements."""
    grads, (gates, h, c, weight_hh, h0, c0) = Grads(*args[:5]), args[5:11]
    call = recurrence(gates, weight_hh, h0, c0, args[11:17], args[17:20])
    return backward(call, grads, gates, h, c, args[20])

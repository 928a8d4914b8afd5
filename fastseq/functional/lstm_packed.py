"""``linear_packed`` and ``lstm_packed``: weights kept in few bits or as thin factors; layout and choices.

On the CPU the compiled core takes the packed bytes; their meaning is ``fastseq.reference.packed``. On a GPU the Triton
kernels of the int8 and of the low-rank recurrence take the weights as they are kept, where they fit. Gradients go
straight through roundings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import _check, reference
from fastseq.functional.lstm import Gates, Result, packed_places
from fastseq.functional.lstm_arguments import State
from fastseq.functional.lstm_int8 import lstm_int8
from fastseq.functional.lstm_lowrank import lstm_lowrank
from fastseq.ops import packed as _ops
from fastseq.ops._select import allowed, choose
from fastseq.ops.packed_autograd import Linear, Recurrence
from fastseq.reference import Gate, Matrix, Part

__all__ = ["Gate", "Matrix", "Packed", "PackedWeights", "Part", "linear_packed", "lstm_packed", "pack"]

storage_of = reference.storage_of


class Packed(NamedTuple):
    """A matrix as it is kept, and what ``pack`` made of it; None where there is no core to take it."""

    matrix: Matrix
    packed: Tensor | None
    K: int
    dense: Tensor | None = None  # the values that it stands for, where a gradient goes to what they are made of

    @property
    def rows(self) -> int:
        return sum(len(gate.rows.values) for gate in self.matrix)


class PackedWeights(NamedTuple):
    """Of one layer in one direction, on one device; sizes as in ``Weights``."""

    weight_ih: Packed  # 4 gates
    weight_hh: Packed  # 4 gates, bounded without weight_hr
    bias: Tensor | None  # float32 [4*H]
    weight_hr: Packed | None  # 1 gate, bounded
    h_start: Tensor | None  # float32
    c_start: Tensor | None


def pack(matrix: Matrix, K: int, bounded: bool = False) -> Tensor | None:
    """The bytes of a matrix [N, K] on the CPU, or None where the compiled core is not there or the matrix elsewhere."""
    here = matrix[0].rows.values
    if here.device.type != "cpu" or _ops.BACKENDS["pack_matrix"][0].why_not(here) is not None:
        return None
    return None if allowed() == "reference" else _ops.pack(matrix, K, bounded)


def stored_as(like: Part, weight: Tensor) -> Part:
    """``weight`` kept in the way of ``like``."""
    return reference.store(weight.float(), storage_of(like), like.group)


def straight_through(weight: Tensor, part: Part) -> Tensor:
    """The values of ``part``, which ``weight`` was stored as, with the gradient of ``weight`` itself."""
    wide = weight.float()
    return wide + (reference.part_values(part, weight.shape[1]).float() - wide).detach()


def linear_packed(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` as ``reference.linear_packed`` has it: x [..., K], result [..., N] of its dtype."""
    flat = x.to(torch.float32).reshape(-1, x.shape[-1]).contiguous()
    y = _linear(flat, weight, bias).to(x.dtype)
    return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])


def lstm_packed(
    x: Tensor,
    weights: Sequence[PackedWeights],
    hx: State | None = None,
    *,
    bidirectional: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
    noise_probability: float = 1.0,
    tau: float = 1.0,
    hard: bool = False,
    dropout: float = 0.0,
    return_gates: bool = False,
) -> Result:
    """``lstm`` over packed weights, computed in float32. Arguments and results are those of ``lstm``.

    Differentiable in x, hx, biases, start states and ``Packed.dense``, straight through roundings, once.

    Raises:
        ArgumentError: on a GPU, weights that there is no kernel for.
    """
    dtype, step = x.dtype, 2 if bidirectional else 1
    if lengths is not None:
        lengths = lengths.to("cpu" if x.is_cpu else lengths.device, torch.int64).contiguous()
    sizes = lengths, batch_sizes, None if reset is None else reset.contiguous()
    out, found = x.to(torch.float32).contiguous(), []
    B = x.shape[1] if batch_sizes is None else hx[0].shape[1] if hx else int(batch_sizes[0]) if len(batch_sizes) else 0
    for n in range(0, len(weights), step):
        if n and dropout:
            out = F.dropout(out, dropout)
        layer = []
        for direction, w in enumerate(weights[n : n + step]):
            w = _in_float32(w)
            h0, c0 = _start(w, B, out) if hx is None else (hx[0][n + direction], hx[1][n + direction])
            options = (*sizes, w.h_start, w.c_start, tau, hard, direction == 1)
            noise = None if seed is None else (seed, rows, 0, n // step * 2 + direction, noise_probability)
            state = h0.float().contiguous(), (c0.clone() if c0 is h0 else c0).float().contiguous()
            layer.append(_direction(out, w, *state, options, noise, 2 if return_gates else 0))
        out = layer[0][0] if step == 1 else torch.cat([v[0] for v in layer], -1)
        found += layer
    h_n, c_n = (torch.stack([v[k] for v in found]).to(dtype) for k in (3, 4))
    kept = [Gates(*(g.to(dtype) for g in (*v[2].chunk(4, -1)[:2], v[1]))) for v in found] if return_gates else []
    return Result(out.to(dtype), h_n, c_n, kept)


def _direction(
    x: Tensor,
    w: PackedWeights,
    h0: Tensor,
    c0: Tensor,
    options: tuple[Any, ...],
    noise: tuple[Any, ...] | None,
    save: int,
) -> tuple[Tensor, ...]:
    """h, c, gates, h_n, c_n of one layer in one direction. Apart are its two products where something lies between."""
    lengths, batch_sizes, reset, h_start, c_start, *gates = options
    dense = [v.dense for v in (w.weight_ih, w.weight_hh, w.weight_hr) if v is not None]
    grad = _needs_gradient(x, h0, c0, w.bias, h_start, c_start, *dense)
    if not grad and noise is None:
        return recurrence(x, w.weight_ih, w.bias, w, h0, c0, options, save)
    x_gates = _linear(x.flatten(0, -2), w.weight_ih, w.bias).unflatten(0, x.shape[:-1])
    if noise is not None:
        x_gates = x_gates + F.pad(_noise(x_gates, noise, batch_sizes, len(h0)), (0, x_gates.shape[-1] // 2))
    if not grad:
        return recurrence(x_gates, None, None, w, h0, c0, options, save)

    def run(x_gates: Tensor, h0: Tensor, c0: Tensor, options: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return recurrence(x_gates, None, None, w, h0, c0, options, 2)

    hh, hr = _dense(w.weight_hh), None if w.weight_hr is None else _dense(w.weight_hr)
    rest = (lengths, batch_sizes, reset, *gates)
    tensors = (x_gates.contiguous(), hh, h0, c0, hr, h_start, c_start)
    out: tuple[Tensor, ...] = Recurrence.apply(run, rest, *tensors)  # type: ignore[no-untyped-call]
    return out


def recurrence(
    x: Tensor,
    weight_ih: Packed | None,
    bias: Tensor | None,
    w: PackedWeights,
    h0: Tensor,
    c0: Tensor,
    options: tuple[Any, ...],
    save: int,
) -> tuple[Tensor, ...]:
    """One layer in one direction without a gradient; x is x_gates without ``weight_ih``."""
    if not x.is_cpu:
        return by_kernels(x, weight_ih, bias, w, h0, c0, options, save)
    hr = w.weight_hr
    if not _by_core(x, w.weight_hh):
        ih = None if weight_ih is None else weight_ih.matrix
        return reference.lstm_packed(x, w.weight_hh.matrix, h0, c0, ih, bias, hr and hr.matrix, *options)
    weights = (w.weight_hh.packed, h0, c0, weight_ih and weight_ih.packed, bias, hr and hr.packed)
    out: tuple[Tensor, ...] = torch.ops.fastseq.lstm_packed_forward.default(x, *weights, *options, save)
    return out


def by_kernels(
    x: Tensor,
    weight_ih: Packed | None,
    bias: Tensor | None,
    w: PackedWeights,
    h0: Tensor,
    c0: Tensor,
    options: tuple[Any, ...],
    save: int,
) -> tuple[Tensor, ...]:
    """``recurrence`` by the kernels in int8 and of low rank; the input product is that of the definition."""
    parts = [gate.rows for gate in w.weight_hh.matrix]
    downs = [gate.down for gate in w.weight_hh.matrix]
    names = ("lengths", "batch_sizes", "reset", "h_start", "c_start", "tau", "hard", "reverse")
    named: dict[str, Any] = {**dict(zip(names, options, strict=True)), "return_gates": save == 2}
    whole = all(d is None for d in downs) and all(p.values.dtype == torch.int8 and not p.group for p in parts)
    factors = all(d is not None and d.scale is None and p.scale is None for d, p in zip(downs, parts, strict=True))
    if w.weight_hr is not None or not (whole or factors):
        expected = "int8 with one scale a row, or all factors in floating point, without projection, on a GPU"
        _check.fail("lstm_packed", "weight_hh", expected, "a projection" if w.weight_hr else "another form")
    if weight_ih is not None:
        x = reference.linear_packed(x.flatten(0, -2), weight_ih.matrix, bias).unflatten(0, x.shape[:-1])
    if whole:
        scale = torch.cat([p.scale[:, 0] for p in parts if p.scale is not None])
        out = lstm_int8(x, torch.cat([p.values for p in parts]), scale, (h0, c0), **named)
    else:
        rank = max(p.values.shape[1] for p in parts)
        up = torch.stack([F.pad(p.values.float(), (0, rank - p.values.shape[1])) for p in parts])
        down = torch.stack([F.pad(d.values.float(), (0, 0, 0, rank - len(d.values))) for d in downs if d is not None])
        out = lstm_lowrank(x, up, down, (h0, c0), **named)
    none = x.new_empty(0)
    return out.h, none if out.c is None else out.c, none if out.gates is None else out.gates, out.h_n, out.c_n


def _linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x [M, K], float32 and contiguous."""

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        if _by_core(x, weight):
            y: Tensor = torch.ops.fastseq.linear_packed.default(x, weight.packed, bias, weight.rows)
            return y
        return reference.linear_packed(x, weight.matrix, bias)

    if not _needs_gradient(x, bias, weight.dense):
        return run(x, bias)
    y: Tensor = Linear.apply(run, x, _dense(weight), bias)  # type: ignore[no-untyped-call]
    return y


def _noise(x_gates: Tensor, noise: tuple[Any, ...], batch_sizes: Tensor | None, B: int) -> Tensor:
    seed, *rest = noise
    T = x_gates.shape[0] if batch_sizes is None else len(batch_sizes)
    found: Tensor = torch.ops.fastseq.lstm_noise.default(seed, T, B, x_gates.shape[-1] // 4, *rest)
    return found if batch_sizes is None else found[packed_places(batch_sizes, len(x_gates), x_gates.device)]


def _dense(weight: Packed) -> Tensor:
    """The values that a matrix stands for, [N, K]."""
    found = reference.matrix_values(weight.matrix, weight.K) if weight.dense is None else weight.dense
    return found.float().contiguous()


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)


def _by_core(x: Tensor, weight: Packed) -> bool:
    """Whether the compiled core computes; where it should and cannot, an error says why."""
    if not x.is_cpu or allowed() == "reference":
        return False
    if weight.packed is None:
        choose("lstm_packed_forward", _ops.BACKENDS["lstm_packed_forward"], x)
    return True


def _in_float32(w: PackedWeights) -> PackedWeights:
    return PackedWeights(*w[:2], *(v.float() if isinstance(v, Tensor) else v for v in w[2:]))  # type: ignore[arg-type]


def _start(w: PackedWeights, B: int, x: Tensor) -> State:
    """The start state of every row."""
    H = len(w.weight_hh.matrix[0].rows.values)
    P = H if w.weight_hr is None else w.weight_hr.rows
    h0 = x.new_zeros(B, P) if w.h_start is None else w.h_start.expand(B, P)
    return h0, x.new_zeros(B, H) if w.c_start is None else w.c_start.expand(B, H)

"""``fastseq::lstm_layer_both_*``: both directions of a layer in one call, which a GPU can run in one launch.

``lstm_layer_both_forward`` returns h, c, gates, h_n and c_n, forward before reverse in each. The backward returns dx,
the sum over both directions, and then in the same way dweight_ih, dbias, dweight_hh, dh0, dc0, dh_start and dc_start.
Lists hold one tensor per direction or, where there is none, nothing. ``stream`` is that of the forward direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastseq.ops import lstm_layer, lstm_persist
from fastseq.ops._library import fake, library, register, without_core
from fastseq.ops._transforms import apply
from fastseq.ops.lstm import NOISE

WEIGHTS = "Tensor[] weight_hh, Tensor[] h0, Tensor[] c0"
SIZES = "Tensor? lengths, Tensor? batch_sizes, Tensor? reset, Tensor[] h_start, Tensor[] c_start"
library.define(
    f"lstm_layer_both_forward(Tensor x, Tensor[] weight_ih, Tensor[] bias, {WEIGHTS}, {SIZES}, {NOISE}, float tau, "
    "bool hard, int save) -> Tensor[]"
)
library.define(
    "lstm_layer_both_backward(Tensor?[] grads, Tensor x, Tensor[] weight_ih, Tensor[] bias, Tensor[] gates, "
    f"Tensor[] h, Tensor[] c, {WEIGHTS}, {SIZES}, {NOISE}, float tau, bool hard, bool needs_x, bool needs_weight_ih, "
    "bool needs_bias, bool weights) -> Tensor[]"
)


class Both(NamedTuple):
    """Tensors of a layer that differ per direction, in the order of the operators."""

    weight_ih: Sequence[Tensor]
    bias: Sequence[Tensor]
    weight_hh: Sequence[Tensor]
    h0: Sequence[Tensor]
    c0: Sequence[Tensor]
    h_start: Sequence[Tensor]
    c_start: Sequence[Tensor]


def _one(pair: Sequence[Tensor], n: int) -> Tensor | None:
    return pair[n] if pair else None


def _per_direction(both: Both, sizes: Sequence[Any], noise: Sequence[Any], gate: Sequence[Any], n: int) -> list[Any]:
    """Arguments of ``lstm_layer_forward`` from weight_ih on, without ``save``, of direction n."""
    seed, rows, row_offset, stream, probability = noise
    own = (both.weight_ih[n], _one(both.bias, n), both.weight_hh[n], both.h0[n], both.c0[n], None)
    start = (_one(both.h_start, n), _one(both.c_start, n))
    return [*own, *sizes, *start, seed, rows, row_offset, stream + n, probability, *gate, n == 1]


def _in_turn(pairs: list[Any]) -> list[Tensor]:
    """h of both directions, then c of both, and so on."""
    return [t for values in zip(*pairs, strict=True) for t in values]


def _forward_by(run: Any, x: Tensor, *args: Any) -> list[Tensor]:
    both, sizes, noise, (*gate, save) = Both(*args[:5], *args[8:10]), args[5:8], args[10:15], args[15:]
    return _in_turn([run(x, *_per_direction(both, sizes, noise, gate, n), save) for n in (0, 1)])


def _backward_by(run: Any, grads: Sequence[Tensor | None], x: Tensor, *args: Any) -> list[Tensor]:
    (weight_ih, bias, gates, h, c), rest = args[:5], args[5:]
    both = Both(weight_ih, bias, *rest[:3], *rest[6:8])
    sizes, noise, gate, (needs_x, *needs) = rest[3:6], rest[8:13], rest[13:15], rest[15:]
    dx, found = x.new_empty(0), []
    for n in (0, 1):
        own, one_bias, *state = _per_direction(both, sizes, noise, gate, n)
        kept = (_one(gates, n), h[n], c[n])
        one, *others = run(*grads[n::2], x, own, one_bias, *kept, *state, needs_x, *needs)
        dx = one if n == 0 or not needs_x else dx + one
        found.append([v for at, v in enumerate(others) if at != 5])  # no projection
    return [dx, *_in_turn(found)]


def _reference_of(op: str) -> Any:
    return lstm_layer.BACKENDS[op][-1].run


def _forward(*args: Any) -> list[Tensor]:
    return _forward_by(_reference_of("lstm_layer_forward"), *args)


def _backward(*args: Any) -> list[Tensor]:
    return _backward_by(_reference_of("lstm_layer_backward"), *args)


@fake("lstm_layer_both_forward")
def _(*args: Any) -> list[Tensor]:
    return _forward_by(torch.ops.fastseq.lstm_layer_forward.default, *args)


@fake("lstm_layer_both_backward")
def _(*args: Any) -> list[Tensor]:
    return _backward_by(torch.ops.fastseq.lstm_layer_backward.default, *args)


_DEFINITIONS = {"lstm_layer_both_forward": _forward, "lstm_layer_both_backward": _backward}
BACKENDS = {op: without_core(op, run, "lstm_layer", lstm_persist.BACKEND[op]) for op, run in _DEFINITIONS.items()}
for _op in BACKENDS:
    register(_op, BACKENDS[_op])


class LSTMBoth(Function):
    """Autograd of both directions. ``counts`` says how many tensors of each field of ``Both`` are given."""

    @staticmethod
    def forward(x: Tensor, counts: tuple[int, ...], sizes: Any, rest: Any, save: int, *tensors: Tensor) -> Any:
        b = _fields(counts, tensors)
        args = (*b[:5], *sizes, *b[5:], *rest, save)
        return tuple(torch.ops.fastseq.lstm_layer_both_forward.default(x, *map(_listed, args)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.counts, ctx.sizes, ctx.rest, save, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.rebuilds = save < 2
        ctx.save_for_backward(x, *tensors, *output[:4], *(() if ctx.rebuilds else output[4:6]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count, needs = sum(ctx.counts), ctx.needs_input_grad
        both, kept = _fields(ctx.counts, saved[:count]), saved[count:]
        grads = tuple(None if d is None else d.contiguous() for d in grads)
        if ctx.rebuilds:  # the forward returned no gates
            grads = (*grads[:4], None, None, *grads[6:])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _again(ctx, x, both, grads)
        wanted = _fields(ctx.counts, needs[5:])
        asked = (needs[0], *(any(pair) for pair in (wanted.weight_ih, wanted.bias, wanted.weight_hh)))
        given = (both.weight_ih, both.bias, kept[4:], kept[:2], kept[2:4], both.weight_hh, both.h0, both.c0)
        state = (*ctx.sizes, both.h_start, both.c_start, *ctx.rest, *asked)
        found = torch.ops.fastseq.lstm_layer_both_backward.default(list(grads), x, *map(_listed, (*given, *state)))
        pairs = [found[n : n + 2] for n in range(1, 15, 2)]
        in_order = [d for pair, n in zip(pairs, ctx.counts, strict=True) for d in pair[:n]]
        return _kept(needs, found[0], in_order)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fields(counts: tuple[int, ...], values: Sequence[Any]) -> Both:
    """``Both`` from its tensors in a row."""
    at, found = 0, []
    for count in counts:
        found.append(tuple(values[at : at + count]))
        at += count
    return Both(*found)


def _kept(needs: tuple[bool, ...], dx: Tensor | None, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    rest = (d if n else None for d, n in zip(grads, needs[5:], strict=True))
    return dx if needs[0] else None, None, None, None, None, *rest


def _again(ctx: Any, x: Tensor, both: Both, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The backward of the two directions one after the other, which is differentiable."""
    from fastseq.ops.lstm_autograd import layer

    *noise, tau, hard = ctx.rest
    outs: list[Any] = []
    for n in (0, 1):
        own, one_bias, weight_hh, h0, c0, *options = _per_direction(both, ctx.sizes, noise, (tau, hard), n)
        outs.append(layer(x, own, one_bias, weight_hh, h0, c0, tuple(options)))
    pairs = [(v, d) for v, d in zip(_in_turn(outs), grads, strict=True) if d is not None]
    inputs = (x, *(t for pair in both for t in pair))
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found: Any = [None] * len(wanted)
    if pairs:
        values, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(values, wanted, given, create_graph=True, allow_unused=True)
    rest = iter(found)
    dx, *others = (next(rest) if need else None for need in needs)
    return _kept(ctx.needs_input_grad, dx, others)


def both_directions(
    x: Tensor, both: Both, sizes: Sequence[Any], rest: tuple[Any, ...], save: int, recompute: bool
) -> list[tuple[Tensor, ...]]:
    """h, c, gates, h_n and c_n of each direction; differentiable.

    Args:
        sizes: lengths, batch_sizes, reset. rest: seed, rows, row_offset, stream, noise_probability, tau, hard.
        save, recompute: as in ``lstm_autograd.layer``.
    """
    tensors = [t for pair in both for t in pair]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)):
        kept = 1 if recompute and save < 2 else 2
        out = apply(LSTMBoth, x, tuple(map(len, both)), tuple(sizes), rest, kept, *tensors)
    else:
        given = (*both[:5], *sizes, *both[5:], *rest, save)
        out = torch.ops.fastseq.lstm_layer_both_forward.default(x, *map(_listed, given))
    return [tuple(out[n::2]) for n in (0, 1)]

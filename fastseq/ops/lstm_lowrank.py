"""``fastseq::lstm_lowrank_*`` for torch: schemas, fakes, backends, autograd. Meaning: ``reference.lstm_lowrank``.

Arguments and results are those of ``lstm_forward`` and ``lstm_backward``, with up [4, H, r] and down [4, r, H] or
[1, r, H] for weight_hh, and no projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastseq import reference
from fastseq.ops import lstm as _lstm
from fastseq.ops import lstm_persist_lowrank
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._select import once
from fastseq.ops._transforms import apply, in_float32, one_by_one, refuse_forward_mode

OPTIONS = "Tensor? lengths, Tensor? batch_sizes, Tensor? reset, Tensor? h_start, Tensor? c_start"
_FACTORS = "Tensor up, Tensor down, Tensor h0, Tensor c0"

library.define(
    f"lstm_lowrank_forward(Tensor x_gates, {_FACTORS}, {OPTIONS}, {_lstm.NOISE}, {_lstm.GATES}, int save)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"lstm_lowrank_backward({_lstm.GRADS}, Tensor gates, Tensor h, Tensor c, {_FACTORS}, {OPTIONS}, {_lstm.GATES}, "
    "bool weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@fake("lstm_lowrank_forward")
def _(x_gates: Tensor, up: Tensor, down: Tensor, h0: Tensor, c0: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _lstm.fake_forward(x_gates, up, h0, c0, *args)


@fake("lstm_lowrank_backward")
def _(*args: Any) -> tuple[Tensor, ...]:
    gates, up, down, h0, c0 = args[5], *args[8:12]
    weights, start = args[-1], args[15] is not None or args[16] is not None
    return (
        torch.empty_like(gates),
        torch.empty_like(up) if weights else up.new_empty(0),
        torch.empty_like(down) if weights else down.new_empty(0),
        torch.empty_like(h0),
        torch.empty_like(c0),
        h0.new_empty(h0.shape[1] if start else 0),
        c0.new_empty(c0.shape[1] if start else 0),
    )


def _forward(x_gates: Tensor, up: Tensor, down: Tensor, h0: Tensor, c0: Tensor, *args: Any) -> tuple[Tensor, ...]:
    def definition(x_gates: Tensor, factors: Any, h0: Tensor, c0: Tensor, _: None, *options: Any) -> Any:
        return reference.lstm_lowrank(x_gates, *factors, h0, c0, *options)

    return _lstm.by_definition(definition, x_gates, (up, down), h0, c0, None, *args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    if args[12] is not None:
        args = (*args[:12], args[12].to(args[8].device), *args[13:])
    out: list[Any] = list(reference.lstm_lowrank_backward(args[:5], *args[5:-1]))
    if not args[-1]:
        out[1], out[2] = out[1].new_empty(0), out[2].new_empty(0)
    if args[15] is None and args[16] is None:
        out[5], out[6] = out[5].new_empty(0), out[6].new_empty(0)
    return tuple(out)


forward_reference = in_float32(_forward, 0, 4, 0, 3, 4)
backward_reference = in_float32(_backward, 5, 8, 9, 10, 11, 10, 11)

_DEFINITIONS = {"lstm_lowrank_forward": forward_reference, "lstm_lowrank_backward": backward_reference}
BACKENDS = {op: backends(op, run, "lstm_lowrank", lstm_persist_lowrank.BACKEND[op]) for op, run in _DEFINITIONS.items()}
for _op in BACKENDS:
    register(_op, BACKENDS[_op])


class LowRank(Function):
    """Autograd of ``lstm_lowrank_forward``, which keeps everything (save = 2)."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = torch.ops.fastseq.lstm_lowrank_forward.default(*args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        h, c, gates, _, _ = output
        ctx.save_for_backward(gates, h, c, *inputs[1:10])
        ctx.gate = inputs[15:18]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(d is None for d in grads):
            return (None,) * 19
        needs = ctx.needs_input_grad
        given = (*(d if d is None else d.contiguous() for d in grads), *ctx.saved_tensors, *ctx.gate)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            once("lstm_lowrank: double backward runs step by step in plain torch; no kernel for second derivatives")
            found = backward_reference(*given, True)
        else:
            found = torch.ops.fastseq.lstm_lowrank_backward.default(*given, needs[1] or needs[2])
        in_order = (*found[:5], None, None, None, *found[5:])
        return (*(d if n else None for d, n in zip(in_order, needs, strict=False)), *(None,) * 9)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(LowRank.apply)(info, in_dims, *args)


def lstm_lowrank(
    x_gates: Tensor,
    up: Tensor,
    down: Tensor,
    h0: Tensor,
    c0: Tensor,
    options: tuple[Any, ...] = _lstm.PLAIN[1:],
    save: int = 0,
) -> tuple[Tensor, ...]:
    """h, c, gates, h_n, c_n; differentiable where an input requires grad, and then all are kept, whatever ``save``."""
    tensors = (x_gates, up, down, h0, c0, *options[3:5])
    if forward_ad._current_level >= 0:
        refuse_forward_mode("lstm_lowrank", *tensors)
    out: tuple[Tensor, ...]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out = apply(LowRank, x_gates, up, down, h0, c0, *options, 2)
    else:
        out = torch.ops.fastseq.lstm_lowrank_forward.default(x_gates, up, down, h0, c0, *options, save)
    return out

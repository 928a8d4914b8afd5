"""``fastseq::lstm_mixed_*`` for torch: schemas, fakes, backends, autograd. Meaning: ``reference.lstm_mixed``.

Arguments and results are those of ``lstm_lowrank_*``, with weight_hh [D*H, H] (None where no gate is full), up [H, R],
down [R, H] and the rank of each gate, -1 for a full one, for its factors. There is no kernel for GPUs: what calls this
has another way there (``functional.lstm``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastseq import reference
from fastseq.ops import lstm as _lstm
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._select import once
from fastseq.ops._transforms import apply, in_float32, one_by_one, refuse_forward_mode
from fastseq.ops.lstm_lowrank import OPTIONS

_WEIGHTS = "Tensor? weight_hh, Tensor up, Tensor down, int rank_i, int rank_f, int rank_g, int rank_o"
_STATE = f"{_WEIGHTS}, Tensor h0, Tensor c0, {OPTIONS}"

library.define(
    f"lstm_mixed_forward(Tensor x_gates, {_STATE}, {_lstm.NOISE}, {_lstm.GATES}, int save)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"lstm_mixed_backward({_lstm.GRADS}, Tensor gates, Tensor h, Tensor c, {_STATE}, {_lstm.GATES}, bool weights)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@fake("lstm_mixed_forward")
def _(x_gates: Tensor, weight_hh: Tensor | None, up: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _lstm.fake_forward(x_gates, up, *args[5:])


@fake("lstm_mixed_backward")
def _(*args: Any) -> tuple[Tensor, ...]:
    gates, given, h0, c0 = args[5], args[8:11], args[15], args[16]
    weights, start = args[-1], args[20] is not None or args[21] is not None
    return (
        torch.empty_like(gates),
        *(torch.empty_like(w) if weights and w is not None else gates.new_empty(0) for w in given),
        torch.empty_like(h0),
        torch.empty_like(c0),
        h0.new_empty(h0.shape[1] if start else 0),
        c0.new_empty(c0.shape[1] if start else 0),
    )


def _forward(x_gates: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weights, (h0, c0), options = args[:7], args[7:9], args[9:]

    def definition(x_gates: Tensor, weights: Any, h0: Tensor, c0: Tensor, _: None, *options: Any) -> Any:
        return reference.lstm_mixed(x_gates, *weights[:3], weights[3:], h0, c0, *options)

    return _lstm.by_definition(definition, x_gates, weights, h0, c0, None, *options)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    state, ranks, rest = args[5:11], args[11:15], args[15:-1]
    out: list[Any] = list(reference.lstm_mixed_backward(args[:5], *state, ranks, *rest))
    none = out[0].new_empty(0)
    if not args[-1] or args[8] is None:
        out[1] = none
    if not args[-1]:
        out[2], out[3] = none.clone(), none.clone()
    if args[20] is None and args[21] is None:
        out[6], out[7] = none.clone(), none.clone()
    return tuple(out)


forward_reference = in_float32(_forward, 0, 9, 0, 8, 9)
backward_reference = in_float32(_backward, 5, 9, 9, 10, 15, 16, 15, 16)

BACKENDS = {
    "lstm_mixed_forward": backends("lstm_mixed_forward", forward_reference, "lstm_lowrank"),
    "lstm_mixed_backward": backends("lstm_mixed_backward", backward_reference, "lstm_lowrank"),
}
for _op in BACKENDS:
    register(_op, BACKENDS[_op])


class Mixed(Function):
    """Autograd of ``lstm_mixed_forward``, which keeps everything (save = 2)."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = torch.ops.fastseq.lstm_mixed_forward.default(*args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        h, c, gates, _, _ = output
        ctx.save_for_backward(gates, h, c, *inputs[1:4], *inputs[8:15])
        ctx.ranks, ctx.gate = inputs[4:8], inputs[20:23]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(d is None for d in grads):
            return (None,) * 24
        needs, saved = ctx.needs_input_grad, ctx.saved_tensors
        own = (*(d if d is None else d.contiguous() for d in grads), *saved[:6], *ctx.ranks, *saved[6:], *ctx.gate)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            once("lstm_mixed: double backward runs step by step in plain torch; no kernel for second derivatives")
            found = backward_reference(*own, True)
        else:
            found = torch.ops.fastseq.lstm_mixed_backward.default(*own, any(needs[1:4]))
        in_order = (*found[:4], *(None,) * 4, *found[4:6], None, None, None, *found[6:])
        return (*(d if n else None for d, n in zip(in_order, needs, strict=False)), *(None,) * 9)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(Mixed.apply)(info, in_dims, *args)


def lstm_mixed(
    x_gates: Tensor,
    weights: tuple[Tensor | None, Tensor, Tensor],
    ranks: tuple[int, int, int, int],
    h0: Tensor,
    c0: Tensor,
    options: tuple[Any, ...] = _lstm.PLAIN[1:],
    save: int = 0,
) -> tuple[Tensor, ...]:
    """h, c, gates, h_n, c_n; differentiable where an input requires grad, and then all are kept, whatever ``save``.

    Args:
        weights: weight_hh, up and down.
    """
    tensors = (x_gates, *weights, h0, c0, *options[3:5])
    if forward_ad._current_level >= 0:
        refuse_forward_mode("lstm_mixed", *tensors)
    given = (x_gates, *weights, *ranks, h0, c0, *options)
    out: tuple[Tensor, ...]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out = apply(Mixed, *given, 2)
    else:
        out = torch.ops.fastseq.lstm_mixed_forward.default(*given, save)
    return out

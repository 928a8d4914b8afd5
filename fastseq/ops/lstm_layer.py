"""``fastseq::lstm_layer_*``: the input product and the recurrence of one layer in one call, and the backward of both.

``lstm_layer_forward`` is ``lstm_forward`` of ``gemm(x, weight_ih, bias)``, in one buffer. ``lstm_layer_backward`` takes
what the forward kept (gates None: rebuild them) and returns dx, dweight_ih, dbias, dweight_hh, dh0, dc0, dweight_hr,
dh_start, dc_start, without elements where not asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import reference
from fastseq.ops import lstm as _lstm
from fastseq.ops import lstm_persist
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._transforms import in_float32

library.define(
    f"lstm_layer_forward(Tensor x, Tensor weight_ih, Tensor? bias, {_lstm.STATE}, {_lstm.NOISE}, {_lstm.GATES}, "
    "int save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"lstm_layer_backward({_lstm.GRADS}, Tensor x, Tensor weight_ih, Tensor? bias, Tensor? gates, Tensor h, Tensor c, "
    f"{_lstm.STATE}, {_lstm.NOISE}, {_lstm.GATES}, bool needs_x, bool needs_weight_ih, bool needs_bias, bool weights)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@fake("lstm_layer_forward")
def _(x: Tensor, weight_ih: Tensor, bias: Tensor | None, weight_hh: Tensor, h0: Tensor, *args: Any) -> Any:
    x_gates = x.new_empty(*x.shape[:-1], weight_ih.shape[0])
    return _lstm.fake_forward(x_gates, weight_hh, h0, *args)


@fake("lstm_layer_backward")
def _(*args: Any) -> tuple[Tensor, ...]:
    x, weight_ih, h, c, state = args[5], args[6], args[9], args[10], args[11:20]
    needs_x, needs_weight_ih, needs_bias, weights = args[-4:]
    gates = x.new_empty(*x.shape[:-1], weight_ih.shape[0])
    rest = _lstm.fake_backward(*(None,) * 5, gates, h, c, *state, 1.0, False, False, weights)
    return (
        torch.empty_like(x) if needs_x else x.new_empty(0),
        torch.empty_like(weight_ih) if needs_weight_ih else x.new_empty(0),
        weight_ih.new_empty(weight_ih.shape[0]) if needs_bias else x.new_empty(0),
        *rest[1:],
    )


def _x_gates(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    return reference.linear(x.reshape(-1, x.shape[-1]), weight_ih, bias, False, True).view(
        *x.shape[:-1], len(weight_ih)
    )


def _forward(x: Tensor, weight_ih: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = _lstm.forward_reference(_x_gates(x, weight_ih, bias), *args)
    return out


def _backward(*args: Any) -> tuple[Tensor, ...]:
    grads, (x, weight_ih, bias, gates, h, c), state, options = args[:5], args[5:11], args[11:20], args[20:28]
    needs_x, needs_weight_ih, needs_bias, weights = args[-4:]
    if gates is None:
        gates = _lstm.forward_reference(_x_gates(x, weight_ih, bias), *state, *options, 2)[2]
    d, *rest = _lstm.backward_reference(*grads, gates, h, c, *state, *options[5:], weights)
    flat = d.reshape(-1, d.shape[-1])
    dx = (flat @ weight_ih).view_as(x) if needs_x else d.new_empty(0)
    dweight_ih = flat.mT @ x.reshape(-1, x.shape[-1]) if needs_weight_ih else d.new_empty(0)
    return (dx, dweight_ih, flat.sum(0) if needs_bias else d.new_empty(0), *rest)


_DEFINITIONS = {
    "lstm_layer_forward": in_float32(_forward, 0, 5, 0, 4, 5),
    "lstm_layer_backward": in_float32(_backward, 5, 6, 6, 11, 12, 13, 11, 12, 13),
}
BACKENDS = {op: backends(op, run, "lstm_layer", lstm_persist.BACKEND[op]) for op, run in _DEFINITIONS.items()}
for _op in BACKENDS:
    register(_op, BACKENDS[_op])

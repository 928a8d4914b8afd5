"""``fastseq::lstm_int8_forward`` for torch: schema, fake, backends. Meaning: ``fastseq.reference.lstm_int8``.

Arguments and results are those of ``lstm_forward``, with int8 weight_hh [4*H, H] and scale [4*H], and no projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import reference
from fastseq.ops import lstm as _lstm
from fastseq.ops import lstm_persist
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._select import choose
from fastseq.ops._transforms import in_float32
from fastseq.ops.lstm_lowrank import OPTIONS

library.define(
    f"lstm_int8_forward(Tensor x_gates, Tensor weight_hh, Tensor scale, Tensor h0, Tensor c0, {OPTIONS}, "
    f"{_lstm.NOISE}, {_lstm.GATES}, int save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@fake("lstm_int8_forward")
def _(x_gates: Tensor, weight_hh: Tensor, scale: Tensor, h0: Tensor, c0: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _lstm.fake_forward(x_gates, weight_hh, h0, c0, *args)


def _forward(
    x_gates: Tensor, weight_hh: Tensor, scale: Tensor, h0: Tensor, c0: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    def definition(x_gates: Tensor, weights: Any, h0: Tensor, c0: Tensor, _: None, *options: Any) -> Any:
        return reference.lstm_int8(x_gates, *weights, h0, c0, *options)

    return _lstm.by_definition(definition, x_gates, (weight_hh, scale), h0, c0, None, *args)


forward_reference = in_float32(_forward, 0, 4, 0, 3, 4)
_persist = lstm_persist.BACKEND["lstm_int8_forward"]
_cpu, *_others = backends("lstm_int8_forward", forward_reference, "lstm_int8", _persist)


def _why_not_cpu(x_gates: Tensor, *args: Any) -> str | None:
    if x_gates.is_cpu and x_gates.dtype is not torch.float32:
        return f"x_gates is {x_gates.dtype}, it takes torch.float32"
    return _cpu.why_not(x_gates, *args)


BACKENDS = {"lstm_int8_forward": (_cpu._replace(why_not=_why_not_cpu), *_others)}
register("lstm_int8_forward", BACKENDS["lstm_int8_forward"])


def lstm_int8(x_gates: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The operator; in dtypes that the compiled core does not have, its definition."""
    out: tuple[Tensor, ...]
    if x_gates.is_cpu and x_gates.dtype is not torch.float32:
        out = choose("lstm_int8_forward", BACKENDS["lstm_int8_forward"], x_gates, *args).run(x_gates, *args)
    else:
        out = torch.ops.fastseq.lstm_int8_forward.default(x_gates, *args)
    return out

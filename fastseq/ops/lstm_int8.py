"""``fastseq::lstm_int8_forward`` for torch: schema, fake, backends. Meaning: ``fastseq.reference.lstm_int8``.

Arguments and results are those of ``lstm_forward``, with int8 weight_hh [4*H, H] and scale [4*H], and no projection.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastseq import reference
from fastseq.ops import lstm as _lstm
from fastseq.ops._library import fake, library, register, without_core
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
BACKENDS = {"lstm_int8_forward": without_core("lstm_int8_forward", forward_reference, "lstm_int8")}
register("lstm_int8_forward", BACKENDS["lstm_int8_forward"])

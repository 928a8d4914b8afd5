"""One layer in one call: the input product and the recurrence, in few buffers, and the backward of both.

The product's result is overwritten with noise added, and that with the gates. Backward needs one such buffer more.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastseq_kernels import lstm
from fastseq_kernels._steps import Grads
from fastseq_kernels.gemm import layer_product


def _x_gates(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """Pre-activations from the input, [T, B, 4*H] or [N, 4*H]."""
    out = layer_product(x.reshape(-1, x.shape[-1]), weight_ih, bias, False, True)
    return out.view(*x.shape[:-1], weight_ih.shape[0])


def lstm_layer_forward(x: Tensor, weight_ih: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """``lstm_forward`` of ``gemm(x, weight_ih, bias)``."""
    weight_hh, h0, c0 = args[:3]
    call = lstm.recurrence(x, weight_hh, h0, c0, args[3:9], args[14:17])
    return lstm.forward(call, _x_gates(x, weight_ih, bias), lstm.Noise(*args[9:14]), args[17], True)


def _input_gradients(
    d: Tensor, x: Tensor, weight_ih: Tensor, needs_x: bool, needs_weight_ih: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight_ih and dbias from the gradient of the pre-activations, without elements where not asked for."""
    flat, none = d.reshape(-1, d.shape[-1]), d.new_empty(0)
    dx = layer_product(flat, weight_ih).view_as(x) if needs_x else none
    dweight_ih = layer_product(flat, x.reshape(-1, x.shape[-1]), None, True, False) if needs_weight_ih else none.clone()
    return dx, dweight_ih, flat.sum(0) if needs_bias else none.clone()


def lstm_layer_backward(*args: Any) -> tuple[Tensor, ...]:
    """dx, dweight_ih, dbias and then what ``lstm_backward`` returns after dx_gates; gates None: rebuild them."""
    grads, (x, weight_ih, bias, gates, h, c, weight_hh, h0, c0) = Grads(*args[:5]), args[5:14]
    needs_x, needs_weight_ih, needs_bias, weights = args[28:]
    call = lstm.recurrence(x, weight_hh, h0, c0, args[14:20], args[25:28])
    if gates is None:
        gates = lstm.rebuilt(call, _x_gates(x, weight_ih, bias), h, lstm.Noise(*args[20:25]), True)
    d, *rest = lstm.backward(call, grads, gates, h, c, weights)
    return *_input_gradients(d, x, weight_ih, needs_x, needs_weight_ih, needs_bias), *rest

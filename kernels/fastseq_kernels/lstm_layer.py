"""One layer in one call: the input product and the recurrence, in few buffers, and the backward of both.

The product's result is overwritten with noise added, and that with the gates. Backward needs one such buffer more.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastseq_kernels import _checks, lstm, lstm_resident
from fastseq_kernels._steps import Grads, Recurrence
from fastseq_kernels.gemm import layer_product


def _x_gates(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """Pre-activations from the input, [T, B, 4*H] or [N, 4*H]."""
    width, of = weight_ih.shape[0], (x.dtype, x.device)
    _checks.tensor("weight_ih", weight_ih, "[4*H, I]", (width, x.shape[-1]), *of)
    _checks.tensor("bias", bias, "[4*H]", (width,), *of)
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


def lstm_layer_both_forward(
    x: Tensor,
    weight_ih: list[Tensor],
    bias: list[Tensor],
    weight_hh: list[Tensor],
    h0: list[Tensor],
    c0: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    h_start: list[Tensor],
    c_start: list[Tensor],
    *args: Any,
) -> list[Tensor]:
    """``lstm_layer_forward`` of both directions of one layer, without projection: the first goes forward, the second
    in reverse, with ``stream`` and ``stream + 1``. Where a program holds weight_hh, both run in one launch.

    Args:
        lists: one entry per direction, or none. args: seed, rows, row_offset, stream, noise_probability, tau, hard,
            save.

    Returns:
        h of both directions, then c of both, gates, h_n and c_n.
    """
    seed, rows, row_offset, stream, probability, tau, hard, save = args
    starts = [(_one(h_start, n), _one(c_start, n)) for n in (0, 1)]
    calls = _pair(x, weight_hh, h0, c0, (lengths, batch_sizes, reset), starts, tau, hard)
    directions = []
    for n, call in enumerate(calls):
        x_gates = _x_gates(x, weight_ih[n], _one(bias, n))
        noise = lstm.Noise(seed, rows, row_offset, stream + n, probability)
        directions.append(lstm.prepared(call, x_gates, noise, save, True))
    last = lstm.run_forward(directions)
    out = [lstm.kept(d, *states) for d, states in zip(directions, last, strict=True)]
    return [v for pair in zip(*out, strict=True) for v in pair]


def _one(pair: list[Tensor], n: int) -> Tensor | None:
    return pair[n] if pair else None


def _pair(
    x: Tensor,
    weight_hh: list[Tensor],
    h0: list[Tensor],
    c0: list[Tensor],
    shared: tuple[Tensor | None, Tensor | None, Tensor | None],
    starts: list[tuple[Tensor | None, Tensor | None]],
    tau: float,
    hard: bool,
) -> list[Recurrence]:
    """The calls of both directions, whose rows are the same tensors."""
    first = lstm.recurrence(x, weight_hh[0], h0[0], c0[0], (None, *shared, *starts[0]), (tau, hard, False))
    h_start, c_start = starts[1]
    second = first._replace(weight_hh=weight_hh[1], h0=h0[1], c0=c0[1], h_start=h_start, c_start=c_start, reverse=True)
    return [first, second]


def lstm_layer_both_backward(
    grads: list[Tensor | None],
    x: Tensor,
    weight_ih: list[Tensor],
    bias: list[Tensor],
    gates: list[Tensor],
    h: list[Tensor],
    c: list[Tensor],
    weight_hh: list[Tensor],
    h0: list[Tensor],
    c0: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    h_start: list[Tensor],
    c_start: list[Tensor],
    *args: Any,
) -> list[Tensor]:
    """``lstm_layer_backward`` of both directions of one layer.

    Args:
        grads: those of what the forward returned, or None. gates: none to have them rebuilt. args: seed, rows,
            row_offset, stream, noise_probability, tau, hard, needs_x, needs_weight_ih, needs_bias, weights.

    Returns:
        dx, the sum over both directions, then of both directions dweight_ih, dbias, dweight_hh, dh0, dc0, dh_start
        and dc_start.
    """
    seed, rows, row_offset, stream, probability, tau, hard, needs_x, *needs, weights = args
    starts = [(_one(h_start, n), _one(c_start, n)) for n in (0, 1)]
    calls = _pair(x, weight_hh, h0, c0, (lengths, batch_sizes, reset), starts, tau, hard)
    given = []
    for n, call in enumerate(calls):
        if not gates:
            noise = lstm.Noise(seed, rows, row_offset, stream + n, probability)
            own = lstm.rebuilt(call, _x_gates(x, weight_ih[n], _one(bias, n)), h[n], noise, True)
        else:
            own = gates[n]
        given.append(lstm_resident.Given(call, Grads(*grads[n::2]), own, c[n]))
        _checks.backward(call, given[n].grads, own, h[n], c[n])
    out, dx = [], None
    for n, found in enumerate(lstm.run_backward(given)):
        d, *rest = lstm.gradients(calls[n], found, h[n], weights)
        one, *product = _input_gradients(d, x, weight_ih[n], needs_x, *needs)
        dx = one if dx is None else dx.add_(one)  # without elements where it is not needed
        dweight_hh, dh0, dc0, _, dh_start, dc_start = rest
        out.append((*product, dweight_hh, dh0, dc0, dh_start, dc_start))
    assert dx is not None
    return [dx, *(v for pair in zip(*out, strict=True) for v in pair)]


def lstm_layer_forward_detail(x: Tensor, weight_ih: Tensor, bias: Tensor | None, *args: Any) -> str:
    """Which way the recurrence takes."""
    call = lstm.recurrence(x, *args[:3], args[3:9], args[14:17])
    return "{}: {}".format(*lstm.plan(call, x))


def lstm_layer_backward_detail(*args: Any) -> str:
    """Which way the recurrence takes."""
    return lstm_layer_forward_detail(*args[5:8], *args[11:])


def lstm_layer_both_forward_detail(x: Tensor, weight_ih: list[Tensor], bias: list[Tensor], *args: Any) -> str:
    """Which way the recurrence takes."""
    (weight_hh, h0, c0), sizes, (tau, hard) = args[:3], args[3:6], args[13:15]
    call = lstm.recurrence(x, weight_hh[0], h0[0], c0[0], (None, *sizes, None, None), (tau, hard, False))
    return "{}: {}".format(*lstm.plan(call, x))


def lstm_layer_both_backward_detail(*args: Any) -> str:
    """Which way the recurrence takes."""
    return lstm_layer_both_forward_detail(*args[1:4], *args[7:])

"""Definition of the LSTM whose recurrent weights are products of two thin factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastseq.reference.lstm import Outputs, lstm, lstm_backward


def lstm_lowrank(x_gates: Tensor, up: Tensor, down: Tensor, h0: Tensor, c0: Tensor, *options: Any) -> Outputs:
    """``lstm`` with ``up[g] @ down[g]`` as the recurrent weights of gate g; the factors are never multiplied together.

    Args:
        up: [4, H, r]; gates i, f, g, o. A gate of lower rank has zeros in its last columns.
        down: [4, r, H], or [1, r, H], which all gates share.
        options: those of ``lstm`` after weight_hr, in its order.

    Returns:
        As ``lstm``.
    """
    return lstm(x_gates, lambda h: lowrank_product(h, up, down), h0, c0, None, *options)


def lowrank_product(h: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """h [B, H] times the transposed weights, [B, 4*H]."""
    return ((h @ down.mT) @ up.mT).movedim(0, 1).flatten(1)


def lstm_lowrank_backward(
    grads: tuple[Tensor | None, ...],
    gates: Tensor,
    h: Tensor,
    c: Tensor,
    up: Tensor,
    down: Tensor,
    h0: Tensor,
    c0: Tensor,
    *options: Any,
) -> tuple[Any, ...]:
    """Gradients of ``lstm_lowrank`` from its outputs, itself differentiable. Arguments as in ``lstm_backward``.

    Returns:
        dx_gates, dup [4, H, r], ddown like down, dh0, dc0, dh_start [H], dc_start [H].
    """

    def transposed(d: Tensor, h_in: Tensor) -> tuple[Tensor, ...]:
        d = d.unflatten(1, (4, -1)).movedim(1, 0)  # [4, B, H]
        dv = d @ up  # [4, B, r]
        dv = dv if len(down) == 4 else dv.sum(0, keepdim=True)
        return (dv @ down).sum(0), d.mT @ (h_in @ down.mT), dv.mT @ h_in

    out = lstm_backward(grads, gates, h, c, transposed, h0, c0, None, *options)
    dx_gates, (dup, ddown), dh0, dc0, _, dh_start, dc_start = out
    return dx_gates, dup, ddown, dh0, dc0, dh_start, dc_start

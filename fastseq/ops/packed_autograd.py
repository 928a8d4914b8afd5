"""Gradients of products and recurrences over packed weights: straight through every rounding.

Forward is the packed arithmetic; backward is that of the values which the weights stand for, ``dense``, with the
activations as they were before rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Run = Callable[..., Any]


class Linear(Function):
    """``run(x, bias)`` [M, N]; x [M, K], dense [N, K]."""

    @staticmethod
    def forward(ctx: Any, run: Run, x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, dense)
        y: Tensor = run(x, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, dense = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, ddense = d @ dense if needs[1] else None, d.mT @ x if needs[2] else None
        return None, dx, ddense, d.sum(0) if needs[3] else None


class Recurrence(Function):
    """``run(x_gates, h0, c0, options)``: h, c, gates, h_n, c_n, all kept. ``options``: lengths .. reverse."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        options: tuple[Any, ...],
        x_gates: Tensor,
        dense_hh: Tensor,
        h0: Tensor,
        c0: Tensor,
        dense_hr: Tensor | None,
        h_start: Tensor | None,
        c_start: Tensor | None,
    ) -> tuple[Tensor, ...]:
        lengths, batch_sizes, reset, tau, hard, reverse = options
        given = lengths, batch_sizes, reset, h_start, c_start, tau, hard, reverse
        out: tuple[Tensor, ...] = tuple(run(x_gates, h0, c0, given))
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(*out[:3], dense_hh, h0, c0, dense_hr, h_start, c_start)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(d is None for d in grads):
            return (None,) * 9
        h, c, gates, dense_hh, h0, c0, dense_hr, h_start, c_start = ctx.saved_tensors
        lengths, batch_sizes, reset, tau, hard, reverse = ctx.options
        dh, dc, dgates, dh_n, dc_n = (d if d is None else d.contiguous() for d in grads)
        state = dense_hh, h0, c0, dense_hr, lengths, batch_sizes, reset, h_start, c_start
        found = torch.ops.fastseq.lstm_backward.default(
            dh, dc, dgates, dh_n, dc_n, gates, h, c, *state, tau, hard, reverse, True
        )
        dx, dhh, dh0, dc0, dhr, dh_start, dc_start = found
        in_order = None, None, dx, dhh, dh0, dc0, dhr, dh_start, dc_start
        return tuple(d if need else None for d, need in zip(in_order, ctx.needs_input_grad, strict=True))

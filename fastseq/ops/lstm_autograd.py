"""Autograd of the LSTM operators, over the raw ones: functional transforms, compile and export pass through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastseq.ops import lstm_layer  # noqa: F401  (gives torch the operators of a whole layer)
from fastseq.ops._select import once
from fastseq.ops._transforms import apply, one_by_one, refuse_forward_mode
from fastseq.ops.gemm import gemm
from fastseq.ops.lstm import PLAIN, Options, backward_reference


class LSTM(Function):
    """Autograd of a layer: the input product, where there is a weight_ih, and the recurrence.

    Takes the arguments of ``lstm_layer_forward``: x is [T, B, I] or packed [N, I] (the pre-activations themselves where
    weight_ih is None), bias [4*H] or None, ``save`` 2 or 1. h, c and gates are all differentiable: double backward
    passes through them.
    """

    @staticmethod
    def forward(x: Tensor, weight_ih: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...]
        if weight_ih is None:
            out = torch.ops.fastseq.lstm_forward.default(x, *rest)
        else:
            out = torch.ops.fastseq.lstm_layer_forward.default(x, weight_ih, bias, *rest)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight_ih, bias, weight_hh, h0, c0, weight_hr, *sizes, h_start, c_start, seed, rows = inputs[:14]
        ctx.set_materialize_grads(False)
        h, c, gates, _, _ = output
        rebuild = inputs[20] < 2
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            x if rebuild or (weight_ih is not None and needs[1]) else None,
            weight_ih,
            bias if rebuild else None,
            None if rebuild else gates,
            *(h, c, weight_hh, h0, c0, weight_hr, *sizes, h_start, c_start),
            *((seed, rows) if rebuild else (None, None)),
        )
        ctx.rest = inputs[14:20]

    @staticmethod
    def backward(
        ctx: Any,
        dh: Tensor | None,
        dc: Tensor | None,
        dgates: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if dh is None and dc is None and dgates is None and dh_n is None and dc_n is None:
            return (None,) * 21
        needs = ctx.needs_input_grad
        x, weight_ih, bias, gates, h, c, weight_hh, h0, c0, *state, seed, rows = ctx.saved_tensors
        row_offset, stream, noise_probability, *gate = ctx.rest
        noise = (seed, rows, row_offset, stream, noise_probability)
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        dgates = None if gates is None else dgates  # the forward returned none
        grads = [d if d is None else d.contiguous() for d in (dh, dc, dgates, dh_n, dc_n)]
        weights = needs[3] or needs[6]
        if x is not None and weight_ih is not None and not differentiable:
            given = (*grads, x, weight_ih, bias, gates, h, c, weight_hh, h0, c0, *state, *noise, *gate)
            return _kept(needs, *torch.ops.fastseq.lstm_layer_backward.default(*given, *needs[:3], weights))
        if gates is None and differentiable:
            gates = apply(LSTM, x, weight_ih, bias, weight_hh, h0, c0, *state, *noise, *gate, 2)[2]
        elif gates is None:
            gates = torch.ops.fastseq.lstm_gates.default(x, h, c, weight_hh, h0, c0, *state, *noise, *gate)
        args = (*grads, gates, h, c, weight_hh, h0, c0, *state, *gate, weights)
        d, *rest = apply(LSTMBackward, *args) if differentiable else torch.ops.fastseq.lstm_backward.default(*args)
        dx, dweight_ih, dbias = d, None, None
        if weight_ih is not None or needs[1] or needs[2]:
            dx, dweight_ih, dbias = _input_product_backward(d, x, weight_ih, needs, differentiable)
        return _kept(needs, dx, dweight_ih, dbias, *rest)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(LSTM.apply)(info, in_dims, *args)


def _kept(needs: tuple[bool, ...], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight_ih, bias, weight_hh, h0, c0, weight_hr, h_start and c_start as backward returns them."""
    in_order = (*grads[:7], None, None, None, *grads[7:])
    return (*(d if n else None for d, n in zip(in_order, needs, strict=False)), *(None,) * 9)


def _input_product_backward(
    d: Tensor, x: Tensor | None, weight_ih: Tensor | None, needs: tuple[bool, ...], differentiable: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight_ih and bias from that of the pre-activations; each one only where it is needed."""
    product = gemm if differentiable else torch.ops.fastseq.gemm.default
    flat = d if d.dim() == 2 else d.view(d.shape[0] * d.shape[1], d.shape[2])
    dx = dweight_ih = dbias = None
    if needs[0] and weight_ih is not None:
        dx = product(flat, weight_ih, None, False, False)
        dx = dx if d.dim() == 2 else dx.view(d.shape[0], d.shape[1], weight_ih.shape[1])
    if needs[1] and x is not None:
        dweight_ih = product(flat, x if x.dim() == 2 else x.view(flat.shape[0], x.shape[2]), None, True, False)
    if needs[2]:
        dbias = flat.sum(0)
    return dx, dweight_ih, dbias


class LSTMBackward(Function):
    """Autograd of ``lstm_backward``: its derivative goes through the definition, step by step."""

    @staticmethod
    def forward(
        dh: Tensor | None,
        dc: Tensor | None,
        dgates: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        gates: Tensor,
        *args: Any,
    ) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = torch.ops.fastseq.lstm_backward.default(dh, dc, dgates, dh_n, dc_n, gates, *args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:17])
        ctx.rest = inputs[17:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        once("lstm: double backward runs step by step in plain torch; no kernel for second derivatives")
        args = ctx.saved_tensors
        wanted = [n for n, need in enumerate(ctx.needs_input_grad[:17]) if need]

        def definition(*values: Tensor) -> tuple[Tensor, ...]:
            filled = list(args)
            for n, value in zip(wanted, values, strict=True):
                filled[n] = value
            out: tuple[Tensor, ...] = backward_reference(*filled, *ctx.rest)
            return out

        pulled: Any = torch.func.vjp(definition, *(args[n] for n in wanted))
        found = dict(zip(wanted, pulled[1](tuple(grads)), strict=True))
        return tuple(found.get(n) for n in range(17 + len(ctx.rest)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(LSTMBackward.apply)(info, in_dims, *args)


def lstm(
    x_gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, options: Options = PLAIN, save: int = 0
) -> tuple[Tensor, ...]:
    """h, c, gates, h_n, c_n of the recurrence; differentiable where an input requires grad.

    Without gradients c and gates come back empty unless ``save`` asks for them.
    """
    return layer(x_gates, None, None, weight_hh, h0, c0, options, save)


def layer(
    x: Tensor,
    weight_ih: Tensor | None,
    bias: Tensor | None,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    options: tuple[Any, ...] = PLAIN,
    save: int = 0,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """``lstm`` of ``x @ weight_ih.T + bias``, with x [T, B, I] or packed [N, I] (bias: the sum of both biases).

    ``recompute``: between forward and backward hold x, h and c and rebuild the gates, instead of holding the gates.
    """
    tensors = (x, weight_ih, bias, weight_hh, h0, c0, options[0], options[4], options[5])
    if forward_ad._current_level >= 0:
        refuse_forward_mode("lstm", *tensors)
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                saved = 1 if recompute and save < 2 else 2
                out: tuple[Tensor, ...] = apply(LSTM, x, weight_ih, bias, weight_hh, h0, c0, *options, saved)
                return out
    if weight_ih is None:
        out = torch.ops.fastseq.lstm_forward.default(x, weight_hh, h0, c0, *options, save)
    else:
        out = torch.ops.fastseq.lstm_layer_forward.default(x, weight_ih, bias, weight_hh, h0, c0, *options, save)
    return out

"""torch's own LSTM for a whole net: what runs sigmoid gates on a GPU, but where ours was measured to be faster.

It gives way where it lacks something: gate noise, temperatures, resets, all cell states, recomputation, transforms of
functions, graphs of torch.compile. Its backward exists in evaluation mode too here, and a second derivative goes
through our operators, since cuDNN has neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastseq.ops import lstm_costs, lstm_persist
from fastseq.ops._select import Backend
from fastseq.ops._triton import kernels, why_not_triton


class StockCall(NamedTuple):
    """A call of ``lstm``: what torch's LSTM takes, and what is asked for beyond it."""

    x: Tensor
    weights: Sequence[Any]  # of fastseq.functional.Weights
    hx: tuple[Tensor, Tensor] | None
    bidirectional: bool
    batch_sizes: Tensor | None
    dropout: float
    special: dict[str, bool]  # what torch's LSTM lacks: whether it is asked for


def _why_not(call: StockCall) -> str | None:
    missing = [name for name, asked in call.special.items() if asked]
    if missing:
        return f"torch's LSTM has no {missing[0]}"
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return "inside torch.compile or torch.func"
    device = call.x.device
    if device.type == "cuda" and not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn.enabled is False"
    if device.type not in ("cuda", "cpu"):
        return f"not used on {device.type}"
    first = call.weights[0]
    for w in call.weights:
        if (w.bias_ih is None) != (w.bias_hh is None) or (w.bias_ih is None) != (first.bias_ih is None):
            return "torch's LSTM has both biases everywhere or none"
        if w.weight_hh.shape != first.weight_hh.shape or w.weight_hh.dtype != first.weight_hh.dtype:
            return "layers differ in size or dtype"
    return None


def _slower(call: StockCall) -> str | None:
    """Where ours was seen right on this device and is faster: one layer and direction, of sizes at which both were
    measured in bfloat16; in float16 our time is taken to be the same."""
    x, weight_hh = call.x, call.weights[0].weight_hh
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or torch.version.hip:
        return None
    if len(call.weights) > 1 or call.weights[0].weight_hr is not None:  # not measured
        return None
    T, B = x.shape[:2] if call.batch_sizes is None else (len(call.batch_sizes), int(call.batch_sizes[0]))
    H = weight_hh.shape[1]
    if T < lstm_costs.LEAST_T or why_not_triton() is not None:
        return None
    found = [_triton(T, B, H, x), lstm_persist.layer_cost(B, x.shape[-1], H, x.dtype, x.device)]
    ours = min((cost.of(T) for cost in found if cost is not None), default=math.inf)
    theirs = lstm_costs.cudnn(B, H, x.dtype == torch.float16).of(T)
    if ours >= theirs:
        return None
    return f"slower than our kernels: {theirs:.0f} us for all steps by our estimate, {ours:.0f} for ours"


def _triton(T: int, B: int, H: int, x: Tensor) -> lstm_costs.Cost | None:
    """Of our kernels in triton, where they were measured and seen right."""
    doubt = kernels("_verified").doubt
    if B * H * H > lstm_costs.MOST_WORK:
        return None
    if any(doubt(module, x.device, x.dtype) is not None for module in ("lstm_layer", "lstm_graph")):
        return None
    return lstm_costs.triton(T, B, H, False)


def _can(call: StockCall) -> str | None:
    return None


# "layers" stands for our operators, layer by layer, each with backends of its own
BACKENDS = (Backend("torch", lambda call: stock(call), _why_not, _slower), Backend("layers", lambda call: None, _can))


def stock(call: StockCall, again: Callable[..., tuple[Tensor, ...]] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h_n and c_n of torch's LSTM.

    Args:
        again: the same function of x, weights and hx by our operators, for derivatives of derivatives.
    """
    state = _start(call) if call.hx is None else call.hx
    tensors = (call.x, *state, *(t for w in call.weights for t in w[:5] if t is not None))
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return _run(call, False, *tensors)
    out: tuple[Tensor, Tensor, Tensor] = Stock.apply(call, again, *tensors)  # type: ignore[no-untyped-call]
    return out


def _start(call: StockCall) -> tuple[Tensor, Tensor]:
    """The start states of all layers and directions, [L*D, B, P] and [L*D, B, H]."""
    B = call.x.shape[1] if call.batch_sizes is None else int(call.batch_sizes[0])
    h, c = [], []
    for w in call.weights:
        P, H = w.weight_hh.shape[1], w.weight_hh.shape[0] // 4
        h.append(w.weight_hh.new_zeros(B, P) if w.h_start is None else w.h_start.expand(B, P))
        c.append(w.weight_hh.new_zeros(B, H) if w.c_start is None else w.c_start.expand(B, H))
    return torch.stack(h), torch.stack(c)


def _run(
    call: StockCall, train: bool, x: Tensor, h0: Tensor, c0: Tensor, *flat: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm``; train: keep what backward needs, whatever the mode of the module."""
    first = call.weights[0]
    layers = len(call.weights) // (2 if call.bidirectional else 1)
    options = (first.bias_ih is not None, layers, call.dropout, train, call.bidirectional)
    if call.batch_sizes is None:
        out: tuple[Tensor, Tensor, Tensor] = torch._VF.lstm(x, (h0, c0), flat, *options, False)
    else:
        out = torch._VF.lstm(x, call.batch_sizes, (h0, c0), flat, *options)
    return out


class Stock(Function):
    """Autograd around torch's LSTM, whose own graph is kept inside: its backward, and where the gradient is to be
    differentiated again, that of our operators."""

    @staticmethod
    def forward(ctx: Any, call: StockCall, again: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.again = call, again
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)  # as they are, for derivatives of derivatives
        with torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(need) for t, need in zip(tensors, ctx.needs_input_grad[2:], strict=True)
            ]
            ctx.inner = _run(call, True, *leaves), leaves
        return tuple(v.detach() for v in ctx.inner[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        keep = bool(torch._C._autograd._get_current_graph_task_keep_graph())
        if torch.is_grad_enabled():
            if ctx.call.dropout:
                raise NotImplementedError("lstm: no second derivative through dropout in torch's LSTM")
            leaves, keep = ctx.saved_tensors, True
            outputs = ctx.again(*_arguments(ctx.call, leaves))
        else:
            ctx.saved_tensors  # noqa: B018  (raises where a tensor was changed in place, or backward came twice)
            outputs, leaves = ctx.inner
        pairs = [(v, d) for v, d in zip(outputs, grads, strict=True) if d is not None]
        wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
        found: Any = (None,) * len(wanted)
        if pairs:
            values, given = zip(*pairs, strict=True)
            create = torch.is_grad_enabled()
            found = torch.autograd.grad(
                values, wanted, given, retain_graph=keep, create_graph=create, allow_unused=True
            )
        if not keep:
            ctx.inner = None
        rest = iter(found)
        return None, None, *(next(rest) if need else None for need in needs)


def _arguments(call: StockCall, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Any], tuple[Tensor, Tensor]]:
    """x, weights and hx out of the tensors that ``_run`` takes."""
    x, h0, c0, *flat = tensors
    rest, weights = iter(flat), []
    for w in call.weights:
        found = [None if t is None else next(rest) for t in w[:5]]
        weights.append(type(w)(*found))
    return x, weights, (h0, c0)

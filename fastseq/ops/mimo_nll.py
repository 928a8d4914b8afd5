"""``fastseq::mimo_nll``: schema, fake, backends and autograd. Meaning and shapes: ``fastseq.reference.mimo_nll``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastseq import reference
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._transforms import apply, one_by_one, refuse_forward_mode, wide

library.define(
    "mimo_nll(Tensor logits, Tensor labels, float smoothing, int ignore) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "mimo_nll_backward(Tensor? dloss, Tensor? dnll, Tensor logits, Tensor labels, Tensor top, Tensor logsum, "
    "float smoothing, int ignore) -> Tensor"
)


@fake("mimo_nll")
def _(logits: Tensor, labels: Tensor, smoothing: float, ignore: int) -> tuple[Tensor, ...]:
    N, M, _ = logits.shape
    dtype = wide(logits.dtype)
    return logits.new_empty((), dtype=dtype), *(logits.new_empty(N, M, dtype=dtype) for _ in range(3))


@fake("mimo_nll_backward")
def _(dloss: Any, dnll: Any, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _forward(logits: Tensor, labels: Tensor, smoothing: float, ignore: int) -> tuple[Tensor, ...]:
    return reference.mimo_nll(logits.to(wide(logits.dtype)), labels, smoothing, ignore)


def _backward(dloss: Any, dnll: Any, logits: Tensor, *args: Any) -> Tensor:
    found = reference.mimo_nll_backward(dloss, dnll, logits.to(wide(logits.dtype)), *args)
    return found.to(logits.dtype)


BACKENDS = {
    "mimo_nll": backends("mimo_nll", _forward, "mimo_nll"),
    "mimo_nll_backward": backends("mimo_nll_backward", _backward, "mimo_nll"),
}
for _op in BACKENDS:
    register(_op, BACKENDS[_op])


class NLL(Function):
    """Autograd of ``mimo_nll``: loss and nll are differentiable; second derivatives go through the definition."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, smoothing: float, ignore: int) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = torch.ops.fastseq.mimo_nll.default(logits, labels, smoothing, ignore)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, labels, *ctx.rest = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(logits, labels, *output[2:])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dnll: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        logits, labels, *sums = ctx.saved_tensors
        if dloss is None and dnll is None:
            return None, None, None, None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            values = logits.to(wide(logits.dtype))
            sums = reference.softmax_sums(values)
            found = reference.mimo_nll_backward(dloss, dnll, values, labels, *sums, *ctx.rest)
            return found.to(logits.dtype), None, None, None
        dnll = None if dnll is None else dnll.contiguous()
        d = torch.ops.fastseq.mimo_nll_backward.default(dloss, dnll, logits, labels, *sums, *ctx.rest)
        return d, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(NLL.apply)(info, in_dims, *args)


def nll(logits: Tensor, labels: Tensor, smoothing: float, ignore: int) -> tuple[Tensor, Tensor]:
    """loss and nll, differentiable."""
    if forward_ad._current_level >= 0:
        refuse_forward_mode("mimo_nll", logits)
    if torch.is_grad_enabled() and logits.requires_grad:
        loss, each, *_ = apply(NLL, logits, labels, smoothing, ignore)
    else:
        loss, each, *_ = torch.ops.fastseq.mimo_nll.default(logits, labels, smoothing, ignore)
    return loss, each

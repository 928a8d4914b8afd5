"""``fastseq::mimo_*`` on rows of several examples: schemas, fakes, backends, autograd. Meaning: ``reference.mimo``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastseq import reference
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._transforms import apply, in_float32, one_by_one, refuse_forward_mode

library.define("mimo_gather(Tensor x, Tensor index, Tensor? labels) -> (Tensor, Tensor)")
library.define("mimo_gather_backward(Tensor d, Tensor index, int B) -> Tensor")
library.define("mimo_combine(Tensor parts, Tensor index, Tensor? bias) -> Tensor")
library.define("mimo_combine_backward(Tensor d, Tensor index, int B) -> Tensor")
library.define("mimo_project(Tensor x, Tensor weight, Tensor? bias, Tensor index) -> Tensor")
library.define(
    "mimo_project_backward(Tensor d, Tensor x, Tensor weight, Tensor index, bool needs_x, bool needs_weight, "
    "bool needs_bias) -> (Tensor, Tensor, Tensor)"
)


@fake("mimo_gather")
def _(x: Tensor, index: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    (A, _, S, C), (M, N) = x.shape, index.shape
    taken = x.new_empty(0, dtype=torch.int64) if labels is None else labels.new_empty(N, M, labels.shape[1])
    return x.new_empty(A, N, S, M * C), taken


@fake("mimo_gather_backward")
def _(d: Tensor, index: Tensor, B: int) -> Tensor:
    A, _, S, width = d.shape
    return d.new_empty(A, B, S, width // index.shape[0])


@fake("mimo_combine")
def _(parts: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    (A, _, S, width), (M, N) = parts.shape, index.shape
    return parts.new_empty(A, N, S, width // M)


@fake("mimo_combine_backward")
def _(d: Tensor, index: Tensor, B: int) -> Tensor:
    A, _, S, G = d.shape
    return d.new_empty(A, B, S, index.shape[0] * G)


@fake("mimo_project")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], index.shape[1], x.shape[2], weight.shape[0])


@fake("mimo_project_backward")
def _(
    d: Tensor, x: Tensor, weight: Tensor, index: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(x) if needs_x else x.new_empty(0),
        torch.empty_like(weight) if needs_weight else x.new_empty(0),
        weight.new_empty(weight.shape[0]) if needs_bias else x.new_empty(0),
    )


def _gather(x: Tensor, index: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    taken = x.new_empty(0, dtype=torch.int64) if labels is None else labels[index.long()].transpose(0, 1).contiguous()
    return reference.mimo_gather(x, index).contiguous(), taken


def _project_backward(
    d: Tensor, x: Tensor, weight: Tensor, index: Tensor, *needs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = reference.mimo_project_backward(d, x, weight, index)
    return tuple(g.contiguous() if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True))  # type: ignore[return-value]


def _one(run: Any) -> Any:
    """A definition with one result, 16-bit arguments computed in float32."""
    wide = in_float32(lambda *args: (run(*args).contiguous(),), 0)
    return lambda *args: wide(*args)[0]


BACKENDS = {
    "mimo_gather": backends("mimo_gather", _gather, "mimo"),
    "mimo_gather_backward": backends("mimo_gather_backward", _one(reference.mimo_gather_backward), "mimo"),
    "mimo_combine": backends("mimo_combine", _one(reference.mimo_combine), "mimo"),
    "mimo_combine_backward": backends("mimo_combine_backward", _one(reference.mimo_combine_backward), "mimo"),
    "mimo_project": backends("mimo_project", _one(reference.mimo_project), "mimo"),
    "mimo_project_backward": backends("mimo_project_backward", in_float32(_project_backward, 1, 2, 2), "mimo"),
}
for _op in BACKENDS:
    register(_op, BACKENDS[_op])


class Gather(Function):
    """Autograd of ``mimo_gather``, labels aside. It is linear: each derivative is it or its adjoint, to any order."""

    @staticmethod
    def forward(x: Tensor, index: Tensor) -> Tensor:
        out: Tensor = torch.ops.fastseq.mimo_gather.default(x, index, None)[0]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.B = inputs[0].shape[1]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return _call(GatherBackward, d.contiguous(), ctx.saved_tensors[0], ctx.B), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(Gather.apply)(info, in_dims, *args)


class GatherBackward(Function):
    """Autograd of ``mimo_gather_backward``."""

    @staticmethod
    def forward(d: Tensor, index: Tensor, B: int) -> Tensor:
        out: Tensor = torch.ops.fastseq.mimo_gather_backward.default(d, index, B)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return _call(Gather, d.contiguous(), ctx.saved_tensors[0]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(GatherBackward.apply)(info, in_dims, *args)


class Combine(Function):
    """Autograd of ``mimo_combine``, linear as well."""

    @staticmethod
    def forward(parts: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.fastseq.mimo_combine.default(parts, index, bias)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.B = inputs[0].shape[1]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        need_parts, _, need_bias = ctx.needs_input_grad
        dparts = _call(CombineBackward, d.contiguous(), ctx.saved_tensors[0], ctx.B) if need_parts else None
        return dparts, None, d.sum((0, 1, 2)) if need_bias else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(Combine.apply)(info, in_dims, *args)


class CombineBackward(Function):
    """Autograd of ``mimo_combine_backward``."""

    @staticmethod
    def forward(d: Tensor, index: Tensor, B: int) -> Tensor:
        out: Tensor = torch.ops.fastseq.mimo_combine_backward.default(d, index, B)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return _call(Combine, d.contiguous(), ctx.saved_tensors[0], None), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(CombineBackward.apply)(info, in_dims, *args)


class Project(Function):
    """Autograd of ``mimo_project``; second derivatives go through the definition."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
        out: Tensor = torch.ops.fastseq.mimo_project.default(x, weight, bias, index)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], inputs[3])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = reference.mimo_project_backward(d, x, weight, index)
        else:
            grads = torch.ops.fastseq.mimo_project_backward.default(d.contiguous(), x, weight, index, *needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(Project.apply)(info, in_dims, *args)


def _call(function: type[Function], *args: Any) -> Any:
    """The operator alone where nobody differentiates."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if forward_ad._current_level >= 0:
        refuse_forward_mode("mimo", *tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return apply(function, *args)
    return function.forward(*args)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """``reference.mimo_gather``, differentiable."""
    out: Tensor = _call(Gather, x, index)
    return out


def combine(parts: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    """``reference.mimo_combine``, differentiable."""
    out: Tensor = _call(Combine, parts, index, bias)
    return out


def project(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """``reference.mimo_project``, differentiable."""
    out: Tensor = _call(Project, x, weight, bias, index)
    return out

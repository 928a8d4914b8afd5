"""``fastseq::gemm``: the matrix product with one order of summation, for torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastseq import reference
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._select import Backend, allowed
from fastseq.ops._transforms import apply, one_by_one, refuse_forward_mode

library.define("gemm(Tensor a, Tensor b, Tensor? bias=None, bool transpose_a=False, bool transpose_b=False) -> Tensor")


@fake("gemm")
def _(a: Tensor, b: Tensor, bias: Tensor | None = None, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])


def _why_not_torch(a: Tensor, *args: Any) -> str | None:
    return "input is on cpu, where its order of summation varies" if a.is_cpu and allowed() != "torch" else None


# cuBLAS, whose order of summation varies with the number of rows; the Triton kernel keeps one, and is for those who ask
BACKENDS = backends("gemm", reference.linear, "gemm", Backend("torch", reference.linear, _why_not_torch))


register("gemm", BACKENDS)


class Gemm(Function):
    """Autograd of ``gemm``; every derivative is again a ``gemm``, so it differentiates to any order."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None, transpose_a: bool, transpose_b: bool) -> Tensor:
        out: Tensor = torch.ops.fastseq.gemm.default(a, b, bias, transpose_a, transpose_b)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, _, ctx.transpose_a, ctx.transpose_b = inputs
        needs = ctx.needs_input_grad
        ctx.save_for_backward(a if needs[1] else None, b if needs[0] else None)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        ta, tb = ctx.transpose_a, ctx.transpose_b
        d = d.contiguous()
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        product = gemm if differentiable else torch.ops.fastseq.gemm.default
        da = db = dbias = None
        if ctx.needs_input_grad[0]:
            da = product(b, d, None, tb, True) if ta else product(d, b, None, False, not tb)
        if ctx.needs_input_grad[1]:
            db = product(d, a, None, True, ta) if tb else product(a, d, None, not ta, False)
        if ctx.needs_input_grad[2]:
            dbias = d.sum(0)
        return da, db, dbias, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(Gemm.apply)(info, in_dims, *args)


def gemm(
    a: Tensor, b: Tensor, bias: Tensor | None = None, transpose_a: bool = False, transpose_b: bool = False
) -> Tensor:
    """``op(a) @ op(b) + bias``; definition and shapes: ``fastseq.reference.linear``. Differentiable.

    On the CPU every element of the result is summed over K in one order (csrc/core/gemm.h), whatever the number of rows
    or threads or the instruction set; on a GPU so does the Triton kernel, but not cuBLAS, which runs by default.
    """
    if forward_ad._current_level >= 0:
        refuse_forward_mode("gemm", a, b, bias)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)):
        out: Tensor = apply(Gemm, a, b, bias, transpose_a, transpose_b)
        return out
    out = torch.ops.fastseq.gemm.default(a, b, bias, transpose_a, transpose_b)
    return out

"""``fastseq::vq_residual*`` for torch. Meaning and shapes: ``fastseq.reference.vq_residual``.

``vq_residual`` returns quantized [N, D], index int64 [N, M], distance [M, N], and of all codebooks, one after the
other: counts [K_1 + ... + K_M], sums [K_1 + ... + K_M, D] and the codes themselves, copied for a backward that comes
when they have changed; without elements where not asked for. Quantized has x's dtype, the codes that of the
codebooks; distance, counts and sums are float32 where x has 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastseq import reference
from fastseq.ops import vq_cuda
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._transforms import apply, one_by_one, refuse_forward_mode, wide
from fastseq.ops.vq import GRADIENTS

library.define(
    "vq_residual(Tensor x, Tensor[] codebooks, Tensor? mask, Tensor? levels, bool sums, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "vq_residual_backward(Tensor? dquantized, Tensor? dcommitment, Tensor x, Tensor codes, int[] sizes, Tensor index, "
    "int gradient) -> Tensor"
)


@fake("vq_residual")
def _(
    x: Tensor, codebooks: list[Tensor], mask: Tensor | None, levels: Tensor | None, sums: bool, keep: bool
) -> tuple[Tensor, ...]:
    (N, D), M, K = x.shape, len(codebooks), sum(c.shape[0] for c in codebooks)
    return (
        x.new_empty(N, D),
        x.new_empty(N, M, dtype=torch.int64),
        x.new_empty(M, N, dtype=wide(x.dtype)),
        x.new_empty(K if sums else 0, dtype=wide(x.dtype)),
        x.new_empty((K, D) if sums else 0, dtype=wide(x.dtype)),
        codebooks[0].new_empty((K, D) if keep else 0),
    )


@fake("vq_residual_backward")
def _(dquantized: Tensor | None, dcommitment: Tensor | None, x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _reference(
    x: Tensor, codebooks: list[Tensor], mask: Tensor | None, levels: Tensor | None, sums: bool, keep: bool
) -> tuple[Tensor, ...]:
    rows, books = x.to(wide(x.dtype)), [c.to(wide(x.dtype)) for c in codebooks]
    quantized, index, distance, residuals = reference.vq_residual(rows, books, mask, levels)
    counts, total = rows.new_empty(0), rows.new_empty(0)
    if sums:
        each = [reference.vq_sums(residuals[m][None], index[None, :, m], len(c)) for m, c in enumerate(books)]
        counts, total = (torch.cat([pair[n][0] for pair in each]) for n in (0, 1))
    codes = torch.cat(codebooks) if keep else codebooks[0].new_empty(0)
    return quantized.to(x.dtype), index, distance, counts, total, codes


def _backward_reference(*args: Any) -> Tensor:
    *tensors, sizes, index, gradient = args
    dtype = tensors[2].dtype
    given: Any = [None if t is None else t.to(wide(dtype)) for t in tensors]
    given[3:] = given[3].split(list(sizes)), index, GRADIENTS[gradient]
    return reference.vq_residual_backward(*given).to(dtype)


BACKENDS = {
    "vq_residual": backends("vq_residual", _reference, "vq_residual", vq_cuda.BACKEND["vq_residual"]),
    "vq_residual_backward": backends("vq_residual_backward", _backward_reference, "vq_residual"),
}
for _op in BACKENDS:
    register(_op, BACKENDS[_op])


class Residual(Function):
    """Autograd of ``vq_residual`` in x. Codebooks get no gradient."""

    @staticmethod
    def forward(
        x: Tensor, mask: Tensor | None, levels: Tensor | None, sums: bool, gradient: str, *codebooks: Tensor
    ) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = torch.ops.fastseq.vq_residual.default(x, list(codebooks), mask, levels, sums, True)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.gradient = inputs[0], inputs[4]
        ctx.sizes = [c.shape[0] for c in inputs[5:]]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1], *output[3:])
        ctx.save_for_backward(x, output[1], output[5])

    @staticmethod
    def backward(
        ctx: Any, dquantized: Tensor | None, _: Any, dcommitment: Tensor | None, *__: Any
    ) -> tuple[Tensor | None, ...]:
        x, index, codes = ctx.saved_tensors
        grads: Any = [d if d is None else d.contiguous() for d in (dquantized, dcommitment)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            definition: Any = (*grads, x, codes.split(ctx.sizes), index, ctx.gradient)
            dx = reference.vq_residual_backward(*definition)
        else:
            given = (*grads, x, codes, ctx.sizes, index, GRADIENTS.index(ctx.gradient))
            dx = torch.ops.fastseq.vq_residual_backward.default(*given)
        return dx, *(None,) * (4 + len(ctx.sizes))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(Residual.apply)(info, in_dims, *args)


def vq_residual(
    x: Tensor, codebooks: list[Tensor], mask: Tensor | None, levels: Tensor | None, sums: bool, gradient: str
) -> tuple[Tensor, ...]:
    """``Residual`` where a gradient is wanted, else the operator alone: its results but for the copied codes."""
    if forward_ad._current_level >= 0:
        refuse_forward_mode("vq_residual", x, *codebooks)
    if torch.is_grad_enabled() and x.requires_grad:
        out: tuple[Tensor, ...] = apply(Residual, x, mask, levels, sums, gradient, *codebooks)
    else:
        out = torch.ops.fastseq.vq_residual.default(x, codebooks, mask, levels, sums, False)
    return out[:5]

"""``fastseq::vq_*`` for torch: schemas, fakes, backends and autograd. Meaning and shapes: ``fastseq.reference.vq``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastseq import reference
from fastseq.ops import vq_cuda
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._transforms import apply, one_by_one, refuse_forward_mode, wide

GRADIENTS = ("straight", "rotation", "codes")
SCREEN = {False: 0, True: 1, None: 2}  # never, always where it can, where it is faster
INDEX_BITS = {16: torch.int16, 32: torch.int32, 64: torch.int64}

library.define(
    "vq_nearest(Tensor x, Tensor codebook, Tensor? mask, bool dot, int best, int bits, bool distance, bool score, "
    "int screen) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "vq_quantize(Tensor x, Tensor codebook, Tensor? mask, bool dot, bool sums)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define("vq_sums(Tensor x, Tensor index, int K) -> (Tensor, Tensor)")
library.define(
    "vq_backward(Tensor? dquantized, Tensor? dcommitment, Tensor? dcodebook_error, Tensor x, Tensor codes, "
    "Tensor index, int K, int gradient, bool need_x, bool need_codebook) -> (Tensor, Tensor)"
)


@fake("vq_nearest")
def _(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    dot: bool,
    best: int,
    bits: int,
    distance: bool,
    score: bool,
    screen: int,
) -> tuple[Tensor, ...]:
    size = (x.shape[0], x.shape[1], best)
    return (
        x.new_empty(size, dtype=INDEX_BITS[bits]),
        x.new_empty(size if distance else 0, dtype=wide(x.dtype)),
        x.new_empty(size if score else 0, dtype=wide(x.dtype)),
    )


@fake("vq_quantize")
def _(x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, sums: bool) -> tuple[Tensor, ...]:
    G, N, D = x.shape
    K = codebook.shape[1]
    return (
        x.new_empty(G, N, D),
        x.new_empty(G, N, dtype=torch.int64),
        x.new_empty(G, N, dtype=wide(x.dtype)),
        x.new_empty((G, K) if sums else 0, dtype=wide(x.dtype)),
        x.new_empty((G, K, D) if sums else 0, dtype=wide(x.dtype)),
    )


@fake("vq_sums")
def _(x: Tensor, index: Tensor, K: int) -> tuple[Tensor, ...]:
    G, dtype = x.shape[0], wide(x.dtype)
    return x.new_empty(G, K, dtype=dtype), x.new_empty(G, K, x.shape[2], dtype=dtype)


@fake("vq_backward")
def _(*args: Any) -> tuple[Tensor, ...]:
    x, K, (need_x, need_codebook) = args[3], args[6], args[8:]
    G, N, D = x.shape
    return (
        x.new_empty((G, N, D) if need_x else 0),
        x.new_empty((G, K, D) if need_codebook else 0, dtype=wide(x.dtype)),
    )


def _nearest_reference(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    dot: bool,
    best: int,
    bits: int,
    distance: bool,
    score: bool,
    screen: int,
) -> tuple[Tensor, ...]:
    x, codebook = x.to(wide(x.dtype)), codebook.to(wide(x.dtype))
    index = reference.vq_nearest(x, codebook, mask, dot, best)
    codes = reference.vq_gather(codebook, index.flatten(1)).view(*index.shape, codebook.shape[2])
    apart = scores = x.new_empty(0)
    if distance:
        apart = torch.where(index >= 0, (x[:, :, None] - codes).square().sum(-1), 0.0)
    if score:
        rows = x[:, :, None].expand_as(codes).reshape(-1, 1, x.shape[2])
        scores = reference.vq_scores(rows, codes.reshape(-1, 1, x.shape[2]), dot).view(index.shape)
        counts = (index >= 0) & rows.isfinite().all(-1).view(index.shape) & ~scores.isnan()
        scores = torch.where(counts, scores, torch.inf)
    return index.to(INDEX_BITS[bits]), apart, scores.clone()


def _quantize_reference(x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, sums: bool) -> tuple[Tensor, ...]:
    rows = x.to(wide(x.dtype))
    codes, index, distance = reference.vq_quantize(rows, codebook.to(rows.dtype), mask, dot)
    none = rows.new_empty(0)
    found = reference.vq_sums(rows, index, codebook.shape[1]) if sums else (none, none.clone())
    return codes.to(x.dtype), index, distance, *found


def _sums_reference(x: Tensor, index: Tensor, K: int) -> tuple[Tensor, ...]:
    return reference.vq_sums(x.to(wide(x.dtype)), index, K)


def _backward_reference(*args: Any) -> tuple[Tensor, ...]:
    need_x, need_codebook = args[8:]
    x = args[3]
    tensors = [a.to(wide(x.dtype)) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args[:7]]
    given: Any = (*tensors, GRADIENTS[args[7]])
    dx, dcodebook = reference.vq_backward(*given)
    return dx.to(x.dtype) if need_x else x.new_empty(0), dcodebook if need_codebook else dcodebook.new_empty(0)


BACKENDS = {
    "vq_nearest": backends("vq_nearest", _nearest_reference, "vq_nearest", vq_cuda.BACKEND["vq_nearest"]),
    "vq_quantize": backends("vq_quantize", _quantize_reference, "vq_quantize", vq_cuda.BACKEND["vq_quantize"]),
    "vq_sums": backends("vq_sums", _sums_reference, "vq_sums"),
    "vq_backward": backends("vq_backward", _backward_reference, "vq_backward"),
}
for _op in BACKENDS:
    register(_op, BACKENDS[_op])


class VQ(Function):
    """Autograd of ``vq_quantize``.

    Returns the codes, their index, the squared distance twice (the gradient of the first goes to x, of the second to
    the codebook), counts and sums. ``gradient`` says where that of the codes goes, see ``reference.vq_backward``.
    """

    @staticmethod
    def forward(
        x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, sums: bool, gradient: str
    ) -> tuple[Tensor, ...]:
        codes, index, distance, *rest = torch.ops.fastseq.vq_quantize.default(x, codebook, mask, dot, sums)
        return codes, index, distance, distance.clone(), *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, codebook, ctx.gradient = inputs[0], inputs[1], inputs[5]
        codes, index, _, _, counts, sums = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(index, counts, sums)
        ctx.K = codebook.shape[1]
        ctx.save_for_backward(x, codes, index)  # not the codebook, which may change in place before backward
        # for second derivatives: only the way to it matters, not its values
        ctx.codebook = codebook if ctx.needs_input_grad[1] and not torch.compiler.is_compiling() else None

    @staticmethod
    def backward(
        ctx: Any, dcodes: Tensor | None, _: Any, dcommitment: Tensor | None, derror: Tensor | None, *__: Any
    ) -> tuple[Tensor | None, ...]:
        x, codes, index = ctx.saved_tensors
        need_x, need_codebook = ctx.needs_input_grad[:2]
        grads: Any = [d if d is None else d.contiguous() for d in (dcodes, dcommitment, derror)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            codes = codes.detach()
            if ctx.codebook is not None:
                way = reference.vq_gather(ctx.codebook, index)
                codes = codes + (way - way.detach())
            definition: Any = (*grads, x, codes, index, ctx.K, ctx.gradient)
            dx, dcodebook = reference.vq_backward(*definition)
        else:
            gradient = GRADIENTS.index(ctx.gradient)
            given = (*grads, x, codes, index, ctx.K, gradient, need_x, need_codebook)
            dx, dcodebook = torch.ops.fastseq.vq_backward.default(*given)
        return dx if need_x else None, dcodebook if need_codebook else None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(VQ.apply)(info, in_dims, *args)


def vq(x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, sums: bool, gradient: str) -> tuple[Tensor, ...]:
    """``VQ`` where a gradient is wanted, else the operator alone."""
    if forward_ad._current_level >= 0:
        refuse_forward_mode("vq_quantize", x, codebook)
    if torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad):
        out: tuple[Tensor, ...] = apply(VQ, x, codebook, mask, dot, sums, gradient)
        return out
    codes, index, distance, *rest = torch.ops.fastseq.vq_quantize.default(x, codebook, mask, dot, sums)
    return codes, index, distance, distance, *rest

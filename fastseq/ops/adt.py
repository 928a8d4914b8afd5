"""``fastseq::adt_*``: schemas, fakes, backends and autograd. Meaning: ``fastseq.reference.adt_*``, of rows [B, N].

In place of the noise stand the seed, int64 [1], and the step that it is of. eps is [1, N] or [B, N], weight [B]. mu and
rho are as wide as sums are; x and g may have 16 bits where kernels are for a GPU, and samples have the dtype of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastseq import reference
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._transforms import apply, one_by_one, refuse_forward_mode

STATE = "Tensor x, Tensor mu, Tensor rho, Tensor seed, Tensor eps"
library.define("adt_noise(Tensor like, Tensor seed, int samples, int step) -> Tensor")
library.define(f"adt_sample({STATE}, int samples, int step, float low, float high) -> Tensor")
library.define(f"adt_backward(Tensor g, {STATE}, Tensor weight, int step, float low, float high) -> Tensor")
library.define(
    f"adt_ascend(Tensor g, {STATE}, Tensor weight, Tensor? totals, int step, float rate, float low, float high) "
    "-> (Tensor, Tensor, Tensor)"
)


@fake("adt_noise")
def _(like: Tensor, seed: Tensor, samples: int, step: int) -> Tensor:
    return like.new_empty(samples, *like.shape)


@fake("adt_sample")
def _(x: Tensor, mu: Tensor, rho: Tensor, seed: Tensor, eps: Tensor, samples: int, *args: Any) -> Tensor:
    return x.new_empty(samples, *x.shape)


@fake("adt_backward")
def _(g: Tensor, x: Tensor, mu: Tensor, *args: Any) -> Tensor:
    return mu.new_empty(2, *mu.shape)


@fake("adt_ascend")
def _(
    g: Tensor, x: Tensor, mu: Tensor, rho: Tensor, seed: Tensor, eps: Tensor, weight: Tensor, totals: Any, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape), mu.new_empty(0 if totals is None else totals.shape)


def _noise(like: Tensor, seed: Tensor, samples: int, step: int) -> Tensor:
    B, N = like.shape
    return reference.adt_noise(seed, samples, B, N, step, like.dtype).to(like.device)


def _sample(
    x: Tensor, mu: Tensor, rho: Tensor, seed: Tensor, eps: Tensor, samples: int, step: int, low: float, high: float
) -> Tensor:
    return reference.adt_sample(x.to(mu.dtype), mu, rho, _noise(mu, seed, samples, step), eps, low, high).to(x.dtype)


def _values(
    g: Tensor, x: Tensor, mu: Tensor, rho: Tensor, seed: Tensor, eps: Tensor, weight: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the definitions of a gradient and of a step take first."""
    noise = _noise(mu, seed, len(g), step)
    return g.to(mu.dtype), x.to(mu.dtype), mu, rho, noise, eps, weight[:, None]


def _ascend(
    g: Tensor,
    x: Tensor,
    mu: Tensor,
    rho: Tensor,
    seed: Tensor,
    eps: Tensor,
    weight: Tensor,
    totals: Tensor | None,
    step: int,
    rate: float,
    low: float,
    high: float,
) -> tuple[Tensor, ...]:
    values = _values(g, x, mu, rho, seed, eps, weight, step)
    return reference.adt_ascend(*values, rate, low, high, totals)


def _backward(
    g: Tensor,
    x: Tensor,
    mu: Tensor,
    rho: Tensor,
    seed: Tensor,
    eps: Tensor,
    weight: Tensor,
    step: int,
    low: float,
    high: float,
) -> Tensor:
    values = _values(g, x, mu, rho, seed, eps, weight, step)
    return torch.stack(reference.adt_backward(*values, low, high))


BACKENDS = {
    "adt_noise": backends("adt_noise", _noise, "adt"),
    "adt_sample": backends("adt_sample", _sample, "adt"),
    "adt_backward": backends("adt_backward", _backward, "adt"),
    "adt_ascend": backends("adt_ascend", _ascend, "adt"),
}
for _op in BACKENDS:
    register(_op, BACKENDS[_op])


class Sample(Function):
    """Autograd of ``adt_sample`` in mu and rho; second derivatives go through the definition."""

    @staticmethod
    def forward(x: Tensor, mu: Tensor, rho: Tensor, seed: Tensor, eps: Tensor, *args: Any) -> Tensor:
        out: Tensor = torch.ops.fastseq.adt_sample.default(x, mu, rho, seed, eps, *args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, _, step, low, high = inputs
        ctx.save_for_backward(*saved)
        ctx.rest = step, low, high

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mu, *rest = ctx.saved_tensors
        given = (g.contiguous(), x, mu, *rest, mu.new_zeros(len(mu)), *ctx.rest)
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        d = _backward(*given) if again else torch.ops.fastseq.adt_backward.default(*given)
        return None, d[0], d[1], *[None] * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(Sample.apply)(info, in_dims, *args)


def sample(x: Tensor, mu: Tensor, rho: Tensor, *args: Any) -> Tensor:
    """``adt_sample``, differentiable in mu and rho."""
    if forward_ad._current_level >= 0:
        refuse_forward_mode("adt_sample", mu, rho)
    if torch.is_grad_enabled() and (mu.requires_grad or rho.requires_grad):
        out: Tensor = apply(Sample, x, mu, rho, *args)
    else:
        out = torch.ops.fastseq.adt_sample.default(x, mu, rho, *args)
    return out

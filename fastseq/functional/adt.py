"""``adt_*``: ADT's explicit distribution of perturbations (Dong et al., NeurIPS 2020), ``fastseq.reference.adt_*``.

Noise is made of counters wherever it is needed, from a seed and the numbers of a step, a sample, a row and a place in
it: it is never stored, and a row has the same in any batch where it stands at the same place. Gradients are in closed
form, so a step on the distribution needs no graph and no more of the model than the gradient of its input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastseq import _check, reference
from fastseq.ops import adt as ops
from fastseq.ops._transforms import wide
from fastseq.ops._triton import in_low_precision

Clamp = tuple[float, float]  # the least and the largest value that a perturbed input may have


def adt_noise(like: Tensor, seed: Tensor, samples: int = 1, *, step: int = 0) -> Tensor:
    """The N(0, 1) numbers of one step, [S, B, ...] of the dtype and on the device of ``like``.

    Args:
        like: [B, ...], float32 or float64; its values do not matter.
        seed: int64, one element, see ``draw_seed``. samples: S >= 1. step: in 0 .. 2**32 - 1.

    Raises:
        ArgumentError: for a wrong shape, dtype or range.
    """
    f = "adt_noise"
    if like.dtype not in (torch.float32, torch.float64):
        _check.fail(f, "like", "of float32 or float64", like.dtype)
    _check_source(f, seed, samples, step)
    out: Tensor = torch.ops.fastseq.adt_noise(_rows(f, "like", like), seed, samples, step)
    return out.view(samples, *like.shape)


def adt_sample(
    x: Tensor,
    mu: Tensor,
    rho: Tensor,
    seed: Tensor,
    eps: Tensor,
    clamp: Clamp | None = None,
    *,
    samples: int = 1,
    step: int = 0,
) -> Tensor:
    """``x + eps * tanh(mu + softplus(rho) * adt_noise)``, clamped; differentiable in mu and rho.

    Args:
        x: [B, ...], bfloat16 and float16 are perturbed in float32 and rounded once.
        mu, rho: like x, float64 where x is and else float32.
        seed, samples, step: as of ``adt_noise``.
        eps: the largest perturbation, >= 0, broadcast to x.
        clamp: the least and the largest value, or None.

    Returns:
        [S, B, ...], of the dtype of x.

    Raises:
        ArgumentError: for a wrong shape, dtype or range.
    """
    f = "adt_sample"
    _check_state(f, x, mu, rho, clamp)
    _check_source(f, seed, samples, step)
    rows = _rows(f, "x", _arithmetic(x.detach()))
    given = (rows, _rows(f, "mu", mu), _rows(f, "rho", rho), seed, _radius(f, eps, mu))
    return ops.sample(*given, samples, step, *_limits(clamp)).view(samples, *x.shape).to(x.dtype)


def adt_entropy(mu: Tensor, rho: Tensor, seed: Tensor, eps: Tensor, *, samples: int = 1, step: int = 0) -> Tensor:
    """-log density of each number of the perturbations, [S, B, ...]; its mean over samples is the entropy.

    Differentiable in mu and rho. Where eps is 0 nothing is perturbed, and the result is 0. Arguments: as of
    ``adt_sample``.

    Raises:
        ArgumentError: for a wrong shape, dtype or range.
    """
    _check_same("adt_entropy", "rho", rho, mu)
    noise, off = adt_noise(mu.detach(), seed, samples, step=step), eps == 0
    return reference.adt_entropy(mu, rho, noise, torch.where(off, 1.0, eps)).masked_fill(off, 0.0)


def adt_ascend(
    g: Tensor,
    x: Tensor,
    mu: Tensor,
    rho: Tensor,
    seed: Tensor,
    eps: Tensor,
    weight: Tensor,
    rate: float,
    clamp: Clamp | None = None,
    *,
    step: int = 0,
    totals: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """mu and rho a step further up ``(g * adt_sample).sum() + (weight * adt_entropy).sum()``, over all samples.

    The step is ``rate`` along the sign of the gradient d. With totals it is along ``t / (|t| + 1e-8)``, t = totals + d.

    Args:
        g: gradient of the perturbed inputs, [S, B, ...], of the dtype of x.
        x, mu, rho, seed, eps, clamp, step: as of the ``adt_sample`` that gave them.
        weight: of the entropy of each number of a row, [B] or []; a number with eps = 0 has none.
        rate: > 0.
        totals: [2, B, ...] of mu and rho, as the step before returned them; zeros before the first.

    Returns:
        mu, rho and t, or None without totals. No gradients.

    Raises:
        ArgumentError: for a wrong shape, dtype or range.
    """
    f = "adt_ascend"
    _check_state(f, x, mu, rho, clamp)
    _check.shape(f, "g", g, "S, B, ...", len(g), *x.shape)
    _check.dtype(f, "g", g, x.dtype)
    _check.positive(f, "rate", rate)
    if weight.shape not in ((), x.shape[:1]):
        _check.fail(f, "weight", f"[B] = {list(x.shape[:1])} or []", list(weight.shape))
    if totals is not None:
        _check.shape(f, "totals", totals, "2, B, ...", 2, *x.shape)
        _check.dtype(f, "totals", totals, mu.dtype)
    _check_source(f, seed, len(g), step)
    with torch.no_grad():
        rows = [_rows(f, name, v) for name, v in (("x", _arithmetic(x)), ("mu", mu), ("rho", rho))]
        weights = weight.to(mu.dtype).expand(len(x)).contiguous()
        up, sums = (None if v is None else v.reshape(len(v), *rows[0].shape) for v in (_arithmetic(g), totals))
        given = (up, *rows, seed, _radius(f, eps, mu), weights, sums)
        found = torch.ops.fastseq.adt_ascend(*given, step, rate, *_limits(clamp))
    higher = [v.view(x.shape) for v in found[:2]]
    return higher[0], higher[1], None if totals is None else found[2].view(totals.shape)


def _rows(function: str, name: str, value: Tensor) -> Tensor:
    """[B, N]"""
    if value.dim() < 1:
        _check.fail(function, name, "[B, ...]", list(value.shape))
    return (value.flatten(1) if value.dim() > 1 else value[:, None]).contiguous()


def _radius(function: str, eps: Tensor, mu: Tensor) -> Tensor:
    """eps of mu's dtype, [B, N], or [1, N] where all rows have the same."""
    try:
        wide_eps = eps.detach().to(mu.dtype).expand(mu.shape)
    except RuntimeError:
        _check.fail(function, "eps", f"broadcast to x, {list(mu.shape)}", list(eps.shape))
    return _rows(function, "eps", wide_eps[:1] if wide_eps.stride(0) == 0 and len(mu) else wide_eps)


def _arithmetic(x: Tensor) -> Tensor:
    """What operators take: on the CPU float32 in place of 16 bits."""
    return x.float() if x.dtype.itemsize == 2 and not in_low_precision(x.device) else x


def _limits(clamp: Clamp | None) -> Clamp:
    return clamp or (-math.inf, math.inf)


def _check_same(function: str, name: str, value: Tensor, mu: Tensor) -> None:
    _check.shape(function, name, value, "B, ...", *mu.shape)
    _check.dtype(function, name, value, mu.dtype)


def _check_state(function: str, x: Tensor, mu: Tensor, rho: Tensor, clamp: Clamp | None) -> None:
    if not x.is_floating_point():
        _check.fail(function, "x", "of floating point", x.dtype)
    _check.shape(function, "mu", mu, "B, ...", *x.shape)
    _check.dtype(function, "mu", mu, wide(x.dtype))
    _check_same(function, "rho", rho, mu)
    if clamp is not None and not clamp[0] <= clamp[1]:
        _check.fail(function, "clamp", "(low, high) with low <= high, or None", clamp)


def _check_source(function: str, seed: Tensor, samples: int, step: int) -> None:
    if seed.dtype != torch.int64 or seed.numel() != 1:
        _check.fail(function, "seed", "int64, one element", f"{seed.dtype} {list(seed.shape)}")
    _check.count(function, "samples", samples)
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**32:
        _check.fail(function, "step", "an integer in 0 .. 2**32 - 1", repr(step))

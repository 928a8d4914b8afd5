"""``vq_residual``: checks, dtypes and layout around the operator of the residual quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _check
from fastseq.ops import vq_residual as _ops
from fastseq.ops._triton import in_low_precision
from fastseq.ops.vq import GRADIENTS

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Residual(NamedTuple):
    """What ``vq_residual`` returns."""

    quantized: Tensor  # [N, D], the sum of the codes in the order of the levels
    index: Tensor  # type: ignore[assignment]  # int64 [N, M], -1 where a level is not used
    commitment: Tensor  # [M, N], squared distance of what is left and its code; gradient to x; 0 where not used
    counts: list[Tensor] | None  # M of [K_m], rows per code
    sums: list[Tensor] | None  # M of [K_m, D], sum of what was left of the rows of each code


def vq_residual(
    x: Tensor,
    codebooks: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    levels: Tensor | None = None,
    gradient: str = "straight",
    sums: bool = False,
) -> Residual:
    """All levels of a residual quantizer; definition: ``reference.vq_residual``.

    Args:
        x: [N, D], float32, float64, bfloat16 or float16 (computed in float32).
        codebooks: M of [K_m, D], at least one; no gradient goes to them.
        mask: bool [N], the rows that count. levels: integers [N], how many levels each row uses; None means M.
        gradient: what each level passes to x, "straight" or "rotation" (see ``vq_quantize``); the levels add up.
        sums: also counts and sums per code, for moving averages.

    Returns:
        ``Residual``.

    Raises:
        ArgumentError: naming the argument.
    """
    f = "vq_residual"
    _check.one_of(f, "gradient", gradient, GRADIENTS[:2])
    if x.dim() != 2 or x.shape[1] < 1:
        _check.fail(f, "x", "[N, D] with D >= 1", list(x.shape))
    if not len(codebooks):
        _check.fail(f, "codebooks", "at least one", "none")
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    taken = x.dtype if in_low_precision(x.device) else computed
    for name, t in [("x", x), *((f"codebooks[{m}]", c) for m, c in enumerate(codebooks))]:
        if t.dtype not in _DTYPES:
            _check.fail(f, name, "float32, float64, bfloat16 or float16", t.dtype)
        _check.device(f, name, t, x.device)
    for m, c in enumerate(codebooks):
        if c.dim() != 2 or c.shape[0] < 1 or c.shape[1] != x.shape[1]:
            _check.fail(f, f"codebooks[{m}]", f"[K, D] = [K, {x.shape[1]}] with K >= 1", list(c.shape))
    for name, given in (("mask", mask), ("levels", levels)):
        if given is not None:
            _check.shape(f, name, given, "N", x.shape[0])
            _check.device(f, name, given, x.device)
    if mask is not None:
        _check.dtype(f, "mask", mask, torch.bool)
    if levels is not None and (levels.is_floating_point() or levels.is_complex() or levels.dtype == torch.bool):
        _check.fail(f, "levels", "integers", levels.dtype)
    quantized, index, commitment, counts, total = _ops.vq_residual(
        x.to(taken).contiguous(),
        [c.detach().to(computed).contiguous() for c in codebooks],
        None if mask is None else mask.contiguous(),
        None if levels is None else levels.to(torch.int64).contiguous(),
        sums,
        gradient,
    )
    sizes = [c.shape[0] for c in codebooks]
    return Residual(
        quantized.to(x.dtype),
        index,
        commitment,
        list(counts.split(sizes)) if sums else None,
        list(total.split(sizes)) if sums else None,
    )

"""The backend "cuda" of the quantizers' operators: few rows in one launch (``vq_lookup``), or many rows past a screen
on tensor cores (``vq_screen``).
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from fastseq.ops import vq_lookup, vq_screen
from fastseq.ops._cuda import cuda_backend
from fastseq.ops._triton import kernels
from fastseq.ops.vq_lookup import Call, Shape


def _of_nearest(
    x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, best: int, bits: int, distance: bool, score: bool,
    screen: int,
) -> Call:  # fmt: skip
    return Call(x, [codebook], mask, None, dot, bits, distance, score, False, best=best, screen=screen)


def _of_quantize(x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, sums: bool) -> Call:
    return Call(x, [codebook], mask, None, dot, sums=sums)


def _of_residual(
    x: Tensor, codebooks: list[Tensor], mask: Tensor | None, levels: Tensor | None, sums: bool, keep: bool
) -> Call:
    return Call(x, codebooks, mask, levels, keep=keep, sums=sums)


@functools.lru_cache(maxsize=1024)
def way(shape: Shape) -> ModuleType:
    """A screen where it is asked for, or where it can and few rows in one launch cannot or are not better."""
    if shape.screen == 1:
        return vq_screen
    if vq_screen.why_not(shape) is not None:
        return vq_lookup
    few = vq_lookup.why_not(shape) is None and vq_lookup.doubt(shape) is None
    return vq_lookup if few else vq_screen


def _lacking(shape: Shape) -> str | None:
    """What neither way has."""
    for name, dtype in zip(("x", *["codes"] * len(shape.sizes)), shape.dtypes, strict=True):
        if dtype not in vq_lookup.DTYPES:
            return f"only float32, bfloat16 and float16, {name} are {str(dtype).removeprefix('torch.')}"
    if len(set(shape.dtypes[1:])) > 1:
        return "codebooks of several dtypes"
    if shape.best > 1:
        return "only the nearest code, best = 1"
    return None if min(shape.size[:2]) else "no rows"


@functools.lru_cache(maxsize=1024)
def why_not(shape: Shape) -> str | None:
    found: str | None = _lacking(shape) or way(shape).why_not(shape)
    return found


@functools.lru_cache(maxsize=1024)
def doubt(shape: Shape) -> str | None:
    found: str | None = way(shape).doubt(shape)
    return found


def _module(call: Call) -> str:
    return "vq_screen" if way(call.shape) is vq_screen else "vq_lookup"


def _detail(call: Call) -> str:
    found: str = way(call.shape).detail(call.shape)
    return found


def _sums(call: Call, index: Tensor) -> tuple[Tensor, ...]:
    """Counts and sums by code, of one level."""
    if call.sums:
        found: tuple[Tensor, ...] = kernels("vq_sums").vq_sums(call.data, index, call.codebooks[0].shape[1])
        return found
    none = torch.empty(0, dtype=torch.float32, device=index.device)
    return none, none.clone()


def _nearest(call: Call) -> tuple[Tensor, ...]:
    found = way(call.shape).run(call)
    return found.index, *(v.view(found.index.shape) if v.numel() else v for v in (found.distance, found.score))


def _quantize(call: Call) -> tuple[Tensor, ...]:
    found = way(call.shape).run(call)
    index = found.index[..., 0]
    return found.quantized, index, found.distance[:, 0], *_sums(call, index)


def _residual(call: Call) -> tuple[Tensor, ...]:
    index, distance, none, quantized = vq_lookup.run(call)
    codes = torch.cat(list(call.codebooks)) if call.keep else call.codebooks[0].new_empty(0)
    return quantized, index[0], distance[0], none, torch.empty_like(none), codes


BACKEND = {
    op: cuda_backend(_module, call_of, run, lambda c: why_not(c.shape), _detail, lambda c: doubt(c.shape))
    for op, call_of, run in (
        ("vq_nearest", _of_nearest, _nearest),
        ("vq_quantize", _of_quantize, _quantize),
        ("vq_residual", _of_residual, _residual),
    )
}

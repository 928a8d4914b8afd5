"""Calls of the operators of vector quantization."""

from __future__ import annotations

from typing import Any

import torch

from tests.kernels._call import BF16, DTYPES, FP16, FP32, call, new


def nearest(
    N: int = 1000,
    K: int = 1024,
    D: int = 64,
    G: int = 1,
    x: torch.dtype = FP32,
    codes: torch.dtype = FP32,
    best: int = 1,
    bits: int = 64,
    screen: int = 1,
    more: bool = False,
) -> tuple[Any, ...]:
    """``more``: with a mask, products instead of distances, and distance and score asked for."""
    mask = new(G, N, dtype=torch.bool) if more else None
    few = min(best, K)
    return (new(G, N, D, dtype=x), new(G, K, D, dtype=codes), mask, more, few, bits, more, more, screen)


def quantize(
    N: int = 5000,
    K: int = 1024,
    D: int = 64,
    G: int = 1,
    x: torch.dtype = FP32,
    codes: torch.dtype = FP32,
    sums: bool = True,
    more: bool = False,
) -> tuple[Any, ...]:
    mask = new(G, N, dtype=torch.bool) if more else None
    return (new(G, N, D, dtype=x), new(G, K, D, dtype=codes), mask, more, sums)


PAIRS = {
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "fp16": (FP16, FP16),
    "mixed": (BF16, FP32),
    "mixed16": (FP16, FP32),
}
for _name, (_x, _codes) in PAIRS.items():
    for _D in (8, 64, 256):
        call("vq_nearest", "vq_nearest", f"{_name} D {_D}", nearest, x=_x, codes=_codes, D=_D)
    call("vq_quantize", "vq_quantize", _name, quantize, x=_x, codes=_codes)
call("vq_nearest", "vq_nearest", "fp32 odd", nearest, D=37)
call("vq_nearest", "vq_nearest", "fp32 unscreened", nearest, screen=0)
call("vq_nearest", "vq_nearest", "fp32 more", nearest, more=True, G=2, bits=16)
call("vq_nearest", "vq_nearest", "bf16 more", nearest, more=True, x=BF16, codes=BF16, bits=32)
call("vq_nearest", "vq_nearest", "fp32 best", nearest, best=4)
call("vq_nearest", "vq_nearest", "bf16 best", nearest, best=4, x=BF16, codes=BF16, more=True)
call("vq_quantize", "vq_quantize", "fp32 small", quantize, D=8)
call("vq_quantize", "vq_quantize", "fp32 more", quantize, more=True, G=2)


def sums(N: int = 1000, K: int = 1024, D: int = 64, G: int = 2, dtype: torch.dtype = FP32) -> tuple[Any, ...]:
    return (new(G, N, D, dtype=dtype), new(G, N, dtype=torch.int64), K)


def vq_backward(
    N: int = 1000,
    K: int = 1024,
    D: int = 64,
    G: int = 2,
    dtype: torch.dtype = FP32,
    gradient: int = 0,
    given: str = "quantized commitment error",
    codebook: bool = True,
) -> tuple[Any, ...]:
    row, one = new(G, N, D, dtype=dtype), new(G, N)
    grads = (
        row if "quantized" in given else None,
        one if "commitment" in given else None,
        new(G, N) if "error" in given else None,
    )
    codes = new(G, N, D, dtype=dtype)
    return (*grads, new(G, N, D, dtype=dtype), codes, new(G, N, dtype=torch.int64), K, gradient, True, codebook)


for _name, _dtype in DTYPES.items():
    call("vq_sums", "vq_sums", _name, sums, dtype=_dtype)
    for _gradient, _way in enumerate(("straight", "rotation", "codes")):
        call("vq_backward", "vq_backward", f"{_name} {_way}", vq_backward, dtype=_dtype, gradient=_gradient)
call("vq_sums", "vq_sums", "fp32 wide", sums, D=1000)
call("vq_backward", "vq_backward", "fp32 wide", vq_backward, D=1000, gradient=1)
call("vq_backward", "vq_backward", "fp32 commitment", vq_backward, given="commitment", codebook=False)
call("vq_backward", "vq_backward", "fp32 error", vq_backward, given="error")


def pack(N: int = 100, bits: int = 10, count: int = 7) -> tuple[Any, ...]:
    return (new(N, count, dtype=torch.int64), bits)


def unpack(N: int = 100, bits: int = 10, count: int = 7) -> tuple[Any, ...]:
    return (new(N, (bits * count + 7) // 8, dtype=torch.uint8), bits, count)


for _bits in (1, 10, 63):
    call("vq_codes", "vq_pack", f"{_bits}", pack, bits=_bits)
    call("vq_codes", "vq_unpack", f"{_bits}", unpack, bits=_bits)


def residual(
    N: int = 1000,
    K: int = 256,
    D: int = 64,
    dtype: torch.dtype = FP32,
    codes: torch.dtype | None = None,
    more: bool = False,
) -> tuple[Any, ...]:
    books = [new(K, D, dtype=codes or dtype) for _ in range(3)]
    mask, levels = (new(N, dtype=torch.bool), new(N, dtype=torch.int64)) if more else (None, None)
    return (new(N, D, dtype=dtype), books, mask, levels, more, more)


def residual_backward(
    N: int = 1000, K: int = 256, D: int = 64, dtype: torch.dtype = FP32, gradient: int = 0
) -> tuple[Any, ...]:
    grads = (new(N, D, dtype=dtype), new(3, N))
    return (*grads, new(N, D, dtype=dtype), new(3 * K, D, dtype=dtype), [K] * 3, new(N, 3, dtype=torch.int64), gradient)


for _name, _dtype in DTYPES.items():
    call("vq_residual", "vq_residual", _name, residual, dtype=_dtype)
    for _gradient, _way in enumerate(("straight", "rotation")):
        given = dict(dtype=_dtype, gradient=_gradient)
        call("vq_residual", "vq_residual_backward", f"{_name} {_way}", residual_backward, **given)
call("vq_residual", "vq_residual", "fp32 more", residual, more=True)
call("vq_residual", "vq_residual", "mixed", residual, dtype=BF16, codes=FP32)
call("vq_residual", "vq_residual", "fp32 small", residual, D=8, more=True)
call("vq_residual", "vq_residual", "fp32 wide", residual, D=1000)
call("vq_residual", "vq_residual", "fp32 large", residual, N=65536, K=1024, D=256)
call("vq_residual", "vq_residual", "bf16 large", residual, N=65536, K=1024, D=256, dtype=BF16, more=True)

"""Calls of the operators of ADT."""

from __future__ import annotations

from typing import Any

import torch

from tests.kernels._call import BF16, FP32, call, new

LIMITS = (0.0, 1.0)


def state(B: int, N: int, dtype: torch.dtype, own: bool) -> tuple[Any, ...]:
    return (new(B, N, dtype=dtype), new(B, N), new(B, N), new(1, dtype=torch.int64), new(B if own else 1, N))


def noise(B: int = 64, N: int = 8192) -> tuple[Any, ...]:
    return (new(B, N), new(1, dtype=torch.int64), 5, 3)


def sample(B: int = 64, N: int = 8192, dtype: torch.dtype = FP32, own: bool = True) -> tuple[Any, ...]:
    return (*state(B, N, dtype, own), 5, 3, *LIMITS)


def backward(B: int = 64, N: int = 8192, dtype: torch.dtype = FP32, own: bool = True) -> tuple[Any, ...]:
    return (new(5, B, N, dtype=dtype), *state(B, N, dtype, own), new(B), 3, *LIMITS)


def ascend(
    B: int = 64, N: int = 8192, dtype: torch.dtype = FP32, own: bool = True, totals: bool = False
) -> tuple[Any, ...]:
    given = new(2, B, N) if totals else None
    return (new(5, B, N, dtype=dtype), *state(B, N, dtype, own), new(B), given, 3, 0.3, *LIMITS)


call("adt", "adt_noise", "fp32", noise)
for _name, _dtype in {"fp32": FP32, "bf16": BF16}.items():
    call("adt", "adt_sample", _name, sample, dtype=_dtype)
    call("adt", "adt_backward", _name, backward, dtype=_dtype)
    call("adt", "adt_ascend", _name, ascend, dtype=_dtype)
call("adt", "adt_sample", "fp32 odd", sample, N=37, own=False)
call("adt", "adt_ascend", "fp32 totals", ascend, N=37, own=False, totals=True)

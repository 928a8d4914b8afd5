"""Calls of the operators of MIMO and of ensembles."""

from __future__ import annotations

from typing import Any

import torch

from tests.kernels._call import BF16, FP32, call, new

INT = torch.int32
M = 3


def gather(
    T: int = 20, B: int = 32, N: int = 128, C: int = 64, dtype: torch.dtype = FP32, labels: bool = True
) -> tuple[Any, ...]:
    given = new(B, 1, dtype=torch.int64) if labels else None
    return (new(2, B, T, C, dtype=dtype), new(M, N, dtype=INT), given)


def gather_backward(T: int = 20, B: int = 32, N: int = 128, C: int = 64, dtype: torch.dtype = FP32) -> tuple[Any, ...]:
    return (new(2, N, T, M * C, dtype=dtype), new(M, N, dtype=INT), B)


def combine(
    T: int = 20, B: int = 32, N: int = 128, G: int = 256, dtype: torch.dtype = FP32, bias: bool = True
) -> tuple[Any, ...]:
    given = new(G, dtype=dtype) if bias else None
    return (new(2, B, T, M * G, dtype=dtype), new(M, N, dtype=INT), given)


def combine_backward(
    T: int = 20, B: int = 32, N: int = 128, G: int = 256, dtype: torch.dtype = FP32
) -> tuple[Any, ...]:
    return (new(2, N, T, G, dtype=dtype), new(M, N, dtype=INT), B)


def project(T: int = 20, B: int = 32, N: int = 128, dtype: torch.dtype = FP32) -> tuple[Any, ...]:
    layer = new(256, M * 64, dtype=dtype), new(256, dtype=dtype)
    return (new(2, B, T, 64, dtype=dtype), *layer, new(M, N, dtype=INT))


def project_backward(T: int = 20, B: int = 32, N: int = 128, dtype: torch.dtype = FP32) -> tuple[Any, ...]:
    x, weight = new(2, B, T, 64, dtype=dtype), new(256, M * 64, dtype=dtype)
    return (new(2, N, T, 256, dtype=dtype), x, weight, new(M, N, dtype=INT), True, True, True)


for _name, _dtype in {"fp32": FP32, "bf16": BF16}.items():
    call("mimo", "mimo_gather", _name, gather, dtype=_dtype)
    call("mimo", "mimo_gather_backward", _name, gather_backward, dtype=_dtype)
    call("mimo", "mimo_combine", _name, combine, dtype=_dtype)
    call("mimo", "mimo_combine_backward", _name, combine_backward, dtype=_dtype)
    call("mimo", "mimo_project", _name, project, dtype=_dtype)
    call("mimo", "mimo_project_backward", _name, project_backward, dtype=_dtype)
call("mimo", "mimo_gather", "int64 tokens", gather, C=1, dtype=torch.int64, labels=False)
call("mimo", "mimo_combine", "fp32 odd", combine, G=37, bias=False)


def nll(
    N: int = 1000, K: int = 10, dtype: torch.dtype = FP32, smoothing: float = 0.1, slots: int = M
) -> tuple[Any, ...]:
    return (new(N, slots, K, dtype=dtype), new(N, slots, dtype=torch.int64), smoothing, -100)


def nll_backward(
    N: int = 1000, K: int = 10, dtype: torch.dtype = FP32, smoothing: float = 0.1, loss: bool = True
) -> tuple[Any, ...]:
    dloss, dnll = (new() if loss else None), (None if loss else new(N, M))
    logits, labels = new(N, M, K, dtype=dtype), new(N, M, dtype=torch.int64)
    return (dloss, dnll, logits, labels, new(N, M), new(N, M), smoothing, -100)


for _name, _dtype in {"fp32": FP32, "bf16": BF16}.items():
    call("mimo_nll", "mimo_nll", _name, nll, dtype=_dtype)
    call("mimo_nll", "mimo_nll", f"{_name} many", nll, N=100000, K=10000, dtype=_dtype, smoothing=0.0)
    call("mimo_nll", "mimo_nll_backward", _name, nll_backward, dtype=_dtype)
    call("mimo_nll", "mimo_nll_backward", f"{_name} many", nll_backward, K=10000, dtype=_dtype, loss=False)


def stats(
    B: int = 1000, K: int = 10, dtype: torch.dtype = FP32, bins: int = 15, labels: bool = True, keep: bool = True
) -> tuple[Any, ...]:
    given = new(B, dtype=torch.int64) if labels else None
    return (new(B, 4, K, dtype=dtype), given, bins, -100, keep)


for _name, _dtype in {"fp32": FP32, "bf16": BF16}.items():
    call("ensemble_stats", "ensemble_stats", _name, stats, dtype=_dtype)
    call("ensemble_stats", "ensemble_stats", f"{_name} many", stats, K=10000, dtype=_dtype, keep=False)
call("ensemble_stats", "ensemble_stats", "fp32 unlabelled", stats, K=1000, labels=False)

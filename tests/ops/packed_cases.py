"""Matrices in every form that can be packed, through the numpy door, and their products by numpy in 64-bit integers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastseq import reference
from fastseq.reference import Gate, Matrix, Part

BITS = {"int8": 8, "int4": 4}
NONE = np.zeros(0, np.float32)


class Form(NamedTuple):
    """How a gate is kept: ``rank`` 0 is whole."""

    storage: str
    group: int = 0
    rank: int = 0


FORMS: dict[str, list[Form]] = {
    "float32": [Form("float32")],
    "bfloat16": [Form("bfloat16")],
    "int8": [Form("int8")],
    "int4": [Form("int4")],
    "int8_groups": [Form("int8", 8)],
    "int8_wide_groups": [Form("int8", 64)],
    "int4_groups": [Form("int4", 32)],
    "factors": [Form("float32", 0, 3)],
    "int8_factors": [Form("int8", 0, 5)],
    "int4_factors": [Form("int4", 8, 19)],
    "mixed": [Form("int4"), Form("int4", 16), Form("bfloat16"), Form("int8")],
    "mixed_factors": [Form("int8", 0, 17), Form("int8", 0, 2), Form("int4", 8), Form("float32")],
}
INTEGER = [name for name, forms in FORMS.items() if all(f.storage in BITS for f in forms)]


def part(weight: Tensor, storage: str, group: int = 0) -> Part:
    if storage not in BITS:
        return Part(weight.to(getattr(torch, storage)))
    group = group if group < weight.shape[1] else 0
    integers, scale = reference.integer_rows(weight, BITS[storage], group or None)
    return Part(reference.nibbles(integers) if storage == "int4" else integers, scale, group)


def matrix(N: int, K: int, form: str, gates: int = 1, seed: int = 0) -> Matrix:
    """Random weights of [N, K]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    forms, found = FORMS[form], []
    for g in range(gates):
        f = forms[g % len(forms)]
        if f.rank:
            # the lower factors of all gates are kept in one way
            found.append(Gate(part(normal(N // gates, f.rank), f.storage), part(normal(f.rank, K), f.storage, f.group)))
        else:
            found.append(Gate(part(normal(N // gates, K), f.storage, f.group)))
    return found


def array(value: Tensor | None) -> np.ndarray:
    """As the numpy door takes it."""
    if value is None:
        return NONE
    value = value.contiguous()
    return value.view(torch.int16).numpy().view(np.uint16) if value.dtype == torch.bfloat16 else value.numpy()


def pack_arguments(m: Matrix, K: int, bounded: bool) -> list[Any]:
    downs = [Part(torch.zeros(0)) if g.down is None else g.down for g in m]
    found: list[Any] = []
    for parts in ([g.rows for g in m], downs):
        found += [[array(p.values) for p in parts], [array(p.scale) for p in parts], [p.group for p in parts]]
    return [*found, K, bounded]


def pack(core: Any, m: Matrix, K: int, bounded: bool = False) -> np.ndarray:
    return core.pack_matrix(*pack_arguments(m, K, bounded))


def part_product(core: Any, x: np.ndarray, p: Part, bounded: bool = False) -> np.ndarray:
    """Of integers by numpy; of floats by the core, whose sums are judged elsewhere."""
    K = x.shape[1]
    if p.scale is None:
        return core.linear_packed(x, pack(core, [Gate(p)], K))
    values = reference.from_nibbles(p.values, K) if p.values.dtype == torch.uint8 else p.values
    w, scale = values.numpy().astype(np.int64), p.scale.numpy()
    one = np.float32(127)
    with np.errstate(all="ignore"):
        if bounded:
            q, times, scale = np.nan_to_num(x * one, nan=0, posinf=127, neginf=-127), None, scale / one
        else:
            most = np.abs(x).max(1, keepdims=True)
            finite = np.isfinite(most)
            used = finite & (most >= np.float32(2.0**-118))
            q = np.where(used, x, 0) * (one / np.where(used, most, 1))
            times = np.where(used, most / one, np.where(finite, np.float32(0), np.float32(np.nan)))
        q = np.clip(np.rint(q), -127, 127).astype(np.int64)
        y, group = np.zeros((len(x), len(w)), np.float32), p.group or K
        for n, k in enumerate(range(0, K, group)):
            y = y + (q[:, k : k + group] @ w[:, k : k + group].T).astype(np.float32) * scale[:, n]
        return y if times is None else y * times


def product(core: Any, x: np.ndarray, m: Matrix, bias: Any = None, bounded: bool = False) -> np.ndarray:
    """``reference.linear_packed``."""
    found = []
    for rows, down in m:
        inner = x if down is None else part_product(core, x, down, bounded)
        found.append(part_product(core, inner, rows, bounded and down is None))
    y = np.concatenate(found, 1)
    return y if bias is None else y + bias

"""Matrices of deployed models in numpy: what each form stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
GATES = "ifgo"


def stands(tensors: Mapping[str, Array], name: str) -> bool:
    """Whether there is a matrix of this name, in any form."""
    return any(key == name or key.startswith(f"{name}.") for key in tensors)


def floats(values: Array) -> Array:
    """As float32; uint16 holds bfloat16."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(values, np.float32)


def form(tensors: Mapping[str, Array], name: str) -> str:
    """ "float32", "float16", "bfloat16", "int8", "int8 in groups", "int4", "low rank" or "gate by gate"."""
    if name not in tensors:
        return "low rank" if stands(tensors, f"{name}.up") else "gate by gate"
    scale = tensors.get(f"{name}.scale")
    if scale is None:
        return "bfloat16" if tensors[name].dtype == np.uint16 else str(tensors[name].dtype)
    if tensors[name].dtype == np.uint8:
        return "int4"
    return "int8" if scale.shape[1] == 1 else "int8 in groups"


def dense(tensors: Mapping[str, Array], name: str, K: int, group: int | None) -> Array:
    """The values of a matrix with K columns, float32 [N, K]; a product of factors is formed in float64."""
    if name in tensors:
        weight, scale = tensors[name], tensors.get(f"{name}.scale")
        if scale is None:
            return floats(weight)
        if weight.dtype == np.uint8:
            weight = np.stack((weight & 15, weight >> 4), -1).reshape(len(weight), -1)[:, :K].astype(np.int8) - 8
        return np.asarray(weight.astype(np.float32) * np.repeat(floats(scale), group or max(K, 1), 1)[:, :K])
    if stands(tensors, f"{name}.up"):
        down = dense(tensors, f"{name}.down", K, group)
        up = dense(tensors, f"{name}.up", len(down), group)
        return np.asarray(up.astype(np.float64) @ down.astype(np.float64), np.float32)
    return np.concatenate([dense(tensors, f"{name}.{gate}", K, group) for gate in GATES])

"""The matrices of a deployed model, as ``reference.linear_packed`` takes them.

The form of matrix ``name`` follows from what stands under it:

- ``name`` float32, float16 or bfloat16 [N, K]
- ``name`` int8 [N, K] and ``name.scale`` [N, G], one for each group of neighbouring columns
- ``name`` uint8 [N, ceil(K / 2)] and ``name.scale``: 4 bits, see ``reference.nibbles``
- ``name.up`` [N, r] and ``name.down`` [r, K], each in one of these forms: their product
- ``name.i``, ``name.f``, ``name.g``, ``name.o`` [H, K], each in one of these forms: the rows of one gate
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastseq.reference.packed import Gate, Matrix, Part, linear_packed

GATES = "ifgo"


def matrix_of(tensors: Mapping[str, Tensor], name: str, group: int | None = None) -> Matrix:
    """Matrix ``name``; group: columns that share a scale, None: all."""
    if f"{name}.i" in tensors or f"{name}.i.up" in tensors:
        return [_gate(tensors, f"{name}.{gate}", group) for gate in GATES]
    return [_gate(tensors, name, group)]


def _gate(tensors: Mapping[str, Tensor], name: str, group: int | None) -> Gate:
    if f"{name}.up" in tensors:
        return Gate(_part(tensors, f"{name}.up", group), _part(tensors, f"{name}.down", group))
    return Gate(_part(tensors, name, group))


def _part(tensors: Mapping[str, Tensor], name: str, group: int | None) -> Part:
    if name not in tensors:
        raise ValueError(f"run_model: there is no tensor {name}")
    values, scale = tensors[name], tensors.get(f"{name}.scale")
    if scale is None:
        return Part(values)
    K = values.shape[1] * (2 if values.dtype == torch.uint8 else 1)
    group = group if group is not None and group < K else 0
    if scale.shape != (len(values), -(-K // (group or K)) if K else 1):
        raise ValueError(f"run_model: scales of {name}, {list(values.shape)} by {group or K}, are {list(scale.shape)}")
    return Part(values, scale.float(), group)


def matrix_product(x: Tensor, matrix: Matrix, bounded: bool = False) -> Tensor:
    """``linear_packed`` of x [T, B, K], step by step: so the bits of float products do not depend on T."""
    if not len(x):
        none = linear_packed(x.flatten(0, 1), matrix)
        return none.view(*x.shape[:2], none.shape[1])
    return torch.stack([linear_packed(step, matrix, bounded=bounded) for step in x])

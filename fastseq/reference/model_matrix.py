"""Definition of a product with the matrices of a deployed model: dense, integers with scales, factored, gate by gate.

The form of matrix ``name`` follows from what stands under it:

- ``name`` float32, float16 or bfloat16 [N, K]
- ``name`` int8 [N, K] and ``name.scale`` [N, G], one for each group of neighbouring columns
- ``name`` uint8 [N, ceil(K / 2)] and ``name.scale``: 4 bits, value + 8; even columns in the low half of a byte
- ``name.up`` [N, r] and ``name.down`` [r, K], each in any form: their product
- ``name.i``, ``name.f``, ``name.g``, ``name.o`` [H, K], each in any form: the rows of one gate
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastseq.reference.compression import integer_values
from fastseq.reference.lstm_int8 import int8_product, quantized

GATES = "ifgo"
_LEAST = 2.0**-120  # a row of smaller numbers counts as zeros


def matrix_product(
    x: Tensor, tensors: Mapping[str, Tensor], name: str, group: int | None = None, unit: bool = False
) -> Tensor:
    """x [T, B, K] times the transposed matrix [N, K].

    Float products are formed step by step, so that their bits do not depend on T. Integer products are exact, and x is
    rounded to integers in float32 whatever its dtype is.

    Args:
        group: columns that share a scale; None: all.
        unit: entries of x lie in -1 .. 1 and are rounded to 1/127, not to 1/127 of their row's largest.

    Returns:
        [T, B, N] in the dtype of x.
    """
    if name in tensors:
        weight, scale = tensors[name], tensors.get(f"{name}.scale")
        if scale is None:
            steps = [step @ weight.to(x.dtype).mT for step in x]
            return torch.stack(steps) if steps else x.new_zeros(*x.shape[:-1], len(weight))
        integers = _integers(weight, x.shape[-1])
        found = _integer_product(x.flatten(0, -2), integers, scale, group, unit)
        return found.to(x.dtype).view(*x.shape[:-1], len(weight))
    if _stands(tensors, f"{name}.up"):
        thin = matrix_product(x, tensors, f"{name}.down", group, unit)
        return matrix_product(thin, tensors, f"{name}.up", group)
    if _stands(tensors, f"{name}.i"):
        return torch.cat([matrix_product(x, tensors, f"{name}.{gate}", group, unit) for gate in GATES], -1)
    raise ValueError(f"run_model: there is no tensor {name}")


def matrix_rows(
    index: Tensor, tensors: Mapping[str, Tensor], name: str, K: int, dtype: torch.dtype, group: int | None = None
) -> Tensor:
    """Rows ``index`` [T, B] of matrix ``name`` with K columns: [T, B, K] of ``dtype``."""
    if name in tensors:
        weight, scale = tensors[name], tensors.get(f"{name}.scale")
        if scale is None:
            return weight[index].to(dtype)
        return integer_values(_integers(weight, K), scale.float(), group)[index].to(dtype)
    if _stands(tensors, f"{name}.up"):
        rank = rows(tensors, f"{name}.down")
        thin = matrix_rows(index, tensors, f"{name}.up", rank, dtype, group)
        return thin @ matrix_values(tensors, f"{name}.down", K, dtype, group)
    raise ValueError(f"run_model: there is no tensor {name}")


def matrix_values(
    tensors: Mapping[str, Tensor], name: str, K: int, dtype: torch.dtype, group: int | None = None
) -> Tensor:
    """What matrix ``name`` with K columns stands for, dense [N, K]."""
    if _stands(tensors, f"{name}.i"):
        return torch.cat([matrix_values(tensors, f"{name}.{gate}", K, dtype, group) for gate in GATES])
    everything = torch.arange(rows(tensors, name))[:, None]
    return matrix_rows(everything, tensors, name, K, dtype, group)[:, 0]


def rows(tensors: Mapping[str, Tensor], name: str) -> int:
    """N of a matrix."""
    if name in tensors:
        return len(tensors[name])
    if _stands(tensors, f"{name}.up"):
        return rows(tensors, f"{name}.up")
    return sum(rows(tensors, f"{name}.{gate}") for gate in GATES) if _stands(tensors, f"{name}.i") else 0


def unpack_int4(packed: Tensor, K: int) -> Tensor:
    """uint8 [N, ceil(K / 2)] to the integers -7 .. 7, int8 [N, K]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :K].to(torch.int8) - 8


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x [R, K] as integers of 8 bits and the largest magnitude in it, [R, 1]; in float32.

    Where that magnitude is below 2**-120 or not finite the integers mean nothing.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(len(x), 1)
    return (x * (127 / largest)).round().clamp(-127, 127).nan_to_num(0).to(torch.int8), largest


def _integers(weight: Tensor, K: int) -> Tensor:
    return unpack_int4(weight, K) if weight.dtype == torch.uint8 else weight


def _integer_product(x: Tensor, integers: Tensor, scale: Tensor, group: int | None, unit: bool) -> Tensor:
    """x [R, K] times integers [N, K], scale [N, G]: [R, N], float32."""
    scale = scale.float()
    group = max(x.shape[-1], 1) if group is None else group
    if scale.dim() != 2 or scale.shape[1] != max(1, -(-x.shape[-1] // group)):
        raise ValueError(f"run_model: scales of [{len(integers)}, {x.shape[-1]}] by {group} are {list(scale.shape)}")
    q, largest = (quantized(x), None) if unit else quantized_rows(x)
    scale = scale / 127 if unit else scale
    total = torch.zeros(len(x), len(integers))
    for g, (a, b) in enumerate(zip(q.split(group, 1), integers.split(group, 1), strict=True)):
        total = total + int8_product(a, b.mT).to(torch.float32) * scale[:, g]
    if largest is None:
        return total
    total = total * (largest / 127)
    total = torch.where(largest < _LEAST, 0.0, total)
    return torch.where(largest.isfinite(), total, torch.nan)


def _stands(tensors: Mapping[str, Tensor], name: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for key in tensors)

"""What the options of ``compress`` make of the matrix of one gate, and the bytes that it then takes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import reference

GATES = "ifgo"  # as torch orders them
BITS = {"int8": 8, "int4": 4}
SCALE_BYTES = 4  # of a scale


class Form(NamedTuple):
    """The options of ``compress``, checked."""

    weights: str | None
    ranks: dict[str, int | float]
    step: float | None
    clip: float | None
    gates: str
    group: int | None


def apply(part: Tensor, gate: str, form: Form) -> tuple[str, int]:
    """Change ``part`` [N, K] in place to what it stands for when compressed; computed in float32 at the least.

    Returns:
        How, in words, empty where it stays; and its bytes then.
    """
    wide = part.float() if part.element_size() < 4 else part.clone()
    if form.step is not None:
        if not gate or gate not in form.gates:
            return "", part.numel() * part.element_size()
        how, size, values = _round(wide, form, form.step)
    elif gate in form.ranks:
        how, size, values = _factor(wide, form, form.ranks[gate], part.element_size())
    else:
        how, size, values = _store(wide, form, part.element_size())
    part.copy_(values)
    return how, size


def _round(part: Tensor, form: Form, step: float) -> tuple[str, int, Tensor]:
    """As many bits as the values need that there can be."""
    most = form.clip if form.clip is not None else float(part.abs().max()) if part.numel() else 0.0
    bits = max(1, math.ceil(math.log2(2 * round(most / step) + 1)))
    clipped = "" if form.clip is None else f", clipped at {form.clip:g}"
    how = f"rounded to {step:g}{clipped}"
    return how, math.ceil(part.numel() * bits / 8), reference.rounded(part, step, form.clip)


def _factor(part: Tensor, form: Form, wanted: int | float, itemsize: int) -> tuple[str, int, Tensor]:
    N, K = part.shape
    rank = reference.rank_of_energy(part, wanted) if isinstance(wanted, float) else wanted
    if rank * (N + K) >= N * K:
        return _store(part, form, itemsize)
    how, sizes, factors = zip(*(_store(v, form, itemsize) for v in reference.low_rank(part, rank)), strict=True)
    return ", ".join(filter(None, (f"rank {rank}", how[0]))), sum(sizes), factors[0] @ factors[1]


def _store(part: Tensor, form: Form, itemsize: int) -> tuple[str, int, Tensor]:
    if form.weights is None:
        return "", part.numel() * itemsize, part
    if form.weights == "bfloat16":
        return form.weights, 2 * part.numel(), part.to(torch.bfloat16).to(part.dtype)
    bits = BITS[form.weights]
    integers, scale = reference.integer_rows(part, bits, form.group)
    scale = scale.float().to(part.dtype)  # as it is kept
    by = "" if form.group is None else f" by {form.group}"
    size = math.ceil(part.numel() * bits / 8) + SCALE_BYTES * scale.numel()
    return f"{form.weights}{by}", size, reference.integer_values(integers, scale, form.group)

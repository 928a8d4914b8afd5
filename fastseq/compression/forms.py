"""What the options of ``compress`` make of the matrix of one gate, and the bytes that it then takes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import reference
from fastseq.reference import Gate, Part

GATES = "ifgo"  # as torch orders them
STORAGES = ("int4", "int8", "bfloat16")  # from few bits to many
FLOATS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}  # else float32


class Form(NamedTuple):
    """The options of ``compress`` for one matrix of a layer, checked."""

    weights: dict[str, str]  # of gates, and "" of projections
    ranks: dict[str, int | float]
    step: float | None
    clip: float | None
    gates: str
    group: int | None
    factored: frozenset[str]  # gates that have, or get, factors


class Kept(NamedTuple):
    """A matrix of one gate in its form; ``masters``: what was stored, the upper factor before the lower."""

    how: str  # empty where it stays
    size: int
    values: Tensor  # that it stands for
    gate: Gate | None  # None where it is only rounded
    masters: list[Tensor]


def keep(given: Gate, gate: str, form: Form, moment: Tensor | None = None) -> Kept:
    """A matrix [N, K] compressed, computed in float32 at the least."""
    part = given.rows.values
    wide, own = _wide(part), FLOATS.get(part.dtype, "float32")
    if form.step is not None:
        if not gate or gate not in form.gates:
            return Kept("", part.numel() * part.element_size(), part, None, [])
        return _round(wide, form, form.step)
    down = None if given.down is None else _wide(given.down.values)
    if gate in form.ranks:
        found = _factor(wide if down is None else wide @ down, form, gate, own, moment)
        if found is not None and (down is None or len(found.masters[1]) < len(down)):
            return found
    if down is not None:
        return _factors(wide, down, form, gate, own)
    stored, how, size = _store(wide, form.weights.get(gate, own), own, form.group)
    values = reference.part_values(stored, part.shape[1]) if how else part
    return Kept(how, size, values, Gate(stored), [wide.float()])


def _wide(part: Tensor) -> Tensor:
    return part.float() if part.element_size() < 4 else part.clone()


def _round(part: Tensor, form: Form, step: float) -> Kept:
    """As many bits as the values need that there can be."""
    most = form.clip if form.clip is not None else float(part.abs().max()) if part.numel() else 0.0
    bits = max(1, math.ceil(math.log2(2 * round(most / step) + 1)))
    clipped = "" if form.clip is None else f", clipped at {form.clip:g}"
    how = f"rounded to {step:g}{clipped}"
    return Kept(how, math.ceil(part.numel() * bits / 8), reference.rounded(part, step, form.clip), None, [])


def _factor(part: Tensor, form: Form, gate: str, own: str, moment: Tensor | None) -> Kept | None:
    """None where factors would not be smaller."""
    (N, K), wanted = part.shape, form.ranks[gate]
    rank = reference.rank_of_energy(part, wanted, moment) if isinstance(wanted, float) else wanted
    if rank * (N + K) >= N * K:
        return None
    found = _factors(*reference.low_rank(part, rank, moment), form, gate, own)
    return found._replace(how=", ".join(filter(None, (f"rank {rank}", found.how))))


def _factors(up: Tensor, down: Tensor, form: Form, gate: str, own: str) -> Kept:
    """``how`` tells the storage alone."""
    upper, how, size = _store(up, form.weights.get(gate, own), own, form.group)
    lower, lower_how, lower_size = _store(down, _lower_storage(form, own), own, form.group)
    values = reference.part_values(upper, up.shape[1]) @ reference.part_values(lower, down.shape[1])
    return Kept(how or lower_how, size + lower_size, values, Gate(upper, lower), [up.float(), down.float()])


def _lower_storage(form: Form, own: str) -> str:
    """The lower factors of all gates lie in one array: the most bits that any of them asks for."""
    found = [form.weights.get(gate, own) for gate in form.factored]
    return max(found, key=lambda s: STORAGES.index(s) if s in STORAGES else len(STORAGES))


def _store(part: Tensor, storage: str, own: str, group: int | None) -> tuple[Part, str, int]:
    """The stored array, how in words, empty where it is kept in its ``own`` dtype, and its bytes."""
    stored = reference.store(part, storage, group or 0)
    size = math.ceil(stored.values.numel() * stored.values.element_size())
    size += 0 if stored.scale is None else 4 * stored.scale.numel()
    by = f" by {stored.group}" if stored.group else ""
    return stored, "" if storage == own else f"{storage}{by}", size

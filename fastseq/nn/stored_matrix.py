"""A matrix of weights as it is kept: integers with scales, few bits, thin factors. Its buffers are its state_dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import functional
from fastseq.functional import Gate, Matrix, Packed, Part

_KINDS = ("values", "scale", "down", "down_scale")


class StoredMatrix(nn.Module):
    """A matrix [N, K] of one gate or of four; see ``fastseq.reference.packed`` for the forms.

    Buffers are named by gate, as ``i_values``, ``i_scale``, ``i_down``, ``i_down_scale`` (of one gate: without the
    letter), and keep their dtypes when a module is moved. ``packed`` is what the compiled core takes: made anew from
    them where the module is moved to the CPU, copied, unpickled or loaded; after other changes call ``pack``.

    Args:
        bounded: for inputs within -1 .. 1.
        masters: the weights that were stored, [N, K] or factor by factor, upper before lower: parameters to train, from
            which the buffers are made anew with every step in training, and when that ends.
    """

    packed: Tensor | None

    def __init__(self, matrix: Matrix, K: int, bounded: bool = False, masters: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.K, self.bounded = K, bounded
        self._groups: list[tuple[int, int]] = []
        self._names = [f"{gate}_" for gate in "ifgo"] if len(matrix) == 4 else [""]
        for name, gate in zip(self._names, matrix, strict=True):
            down: Any = Part(None) if gate.down is None else gate.down  # type: ignore[arg-type]
            self._groups.append((gate.rows.group, down.group))
            for kind, value in zip(_KINDS, (*gate.rows[:2], *down[:2]), strict=True):
                self.register_buffer(name + kind, value)
        self.register_buffer("packed", None, persistent=False)
        self.masters = None if masters is None else nn.ParameterList(masters)
        self.pack()

    def matrix(self) -> Matrix:
        """By gate, as ``fastseq.reference`` takes it."""
        found = []
        for name, (group, down_group) in zip(self._names, self._groups, strict=True):
            values, scale, down, down_scale = (self._buffers[name + kind] for kind in _KINDS)
            lower = None if down is None else Part(down, down_scale, down_group)
            found.append(Gate(Part(values, scale, group), lower))  # type: ignore[arg-type]
        return found

    def of_call(self) -> Packed:
        """For one call of the functions; in training from the masters as they are now."""
        if self.masters is None or not self.training:
            return Packed(self.matrix(), self.packed, self.K)
        self.restore()
        return Packed(self.matrix(), self.packed, self.K, self._straight_through())

    def _straight_through(self) -> Tensor:
        """The values that the matrix stands for, as a function of the masters whose roundings have the slope 1."""
        found: list[Tensor] = []
        masters = iter(self.masters or ())
        for rows, down in self.matrix():
            upper = functional.straight_through(next(masters), rows)
            found.append(upper if down is None else upper @ functional.straight_through(next(masters), down))
        return torch.cat(found)

    @torch.no_grad()
    def restore(self) -> None:
        """Make the other buffers from the masters."""
        masters = iter(self.masters or ())
        for name, gate in zip(self._names, self.matrix(), strict=True):
            for kinds, part in ((_KINDS[:2], gate.rows), (_KINDS[2:], gate.down)):
                if part is not None:
                    again = functional.stored_as(part, next(masters))
                    for kind, value in zip(kinds, again[:2], strict=True):
                        self._buffers[name + kind] = value
        self.pack()

    def pack(self) -> None:
        """Make ``packed`` from the other buffers."""
        self.packed = functional.pack(self.matrix(), self.K, self.bounded)

    def train(self, mode: bool = True) -> StoredMatrix:
        if self.training and not mode and self.masters is not None:
            self.restore()
        super().train(mode)
        return self

    def _kept(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self._buffers.items() if value is not None and name != "packed")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredMatrix:
        before = dict(self._kept())
        self.packed = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != value.dtype:  # what a scale or an integer is made of stays
                self._buffers[name] = value.to(moved.device)
        self.pack()
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        if self.training and self.masters is not None:
            self.restore()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        errors = args[-1]
        for name, value in self._kept():
            given = state.get(prefix + name)
            if given is not None and given.dtype != value.dtype:
                errors.append(f"{prefix}{name} must be {value.dtype}, got {given.dtype}: another form of the matrix")
        super()._load_from_state_dict(state, prefix, *args)
        self.pack()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {**self._buffers, "packed": None}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.pack()

    def extra_repr(self) -> str:
        found = []
        for name, gate in zip(self._names, self.matrix(), strict=True):
            text = _form(gate.rows)
            if gate.down is not None:
                text = f"rank {len(gate.down.values)}, {text}"
            found.append(f"{name.removesuffix('_')}: {text}" if name else text)
        if len({text.split(": ")[-1] for text in found}) == 1:
            found = [found[0].split(": ")[-1]]
        N = sum(len(gate.rows.values) for gate in self.matrix())
        return f"[{N}, {self.K}], {'; '.join(found)}"


def _form(part: Part) -> str:
    name = functional.storage_of(part)
    return f"{name} by {part.group}" if part.group else name

"""What the tensors of an ONNX graph mean while it is read: constants, sequences whose axes are known, and the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Size = int | str  # a number of elements, or the name of one that is not known


class UnsupportedError(Exception):
    """Why a node cannot be converted."""


class Axis:
    """One axis of a sequence: ``role`` is "T", "B", "C", or "" while nothing has told it; C is sorted by ``place``."""

    def __init__(self, size: Size, role: str = "", place: int = 0) -> None:
        self.size, self.role, self.place = size, role, place

    def bind(self, role: str) -> Axis:
        if self.role not in ("", role):
            raise UnsupportedError(f"its {_WORDS[role]} is the axis of {_WORDS[self.role]} elsewhere")
        self.role = role
        return self


_WORDS = {"T": "steps", "B": "batch", "C": "channels"}
Group = tuple[Axis, ...]  # axes that a reshape made one, the outer first


@dataclass(frozen=True, eq=False)
class Made:
    """A layer, and the layers that it takes; none for what a model is given."""

    type: str
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Array] = field(default_factory=dict)
    sources: tuple[Made, ...] = ()


@dataclass(frozen=True, eq=False)
class Steps:
    """What a layer gives, in the layout that the graph has at this place; ``pad`` zeros stand before and after."""

    made: Made
    axes: tuple[Group, ...]
    pad: tuple[int, int] = (0, 0)

    def shape(self) -> Array:
        """The sizes as a vector that may hold names."""
        out = np.empty(len(self.axes), object)
        out[:] = [product([axis.size for axis in group]) for group in self.axes]
        return out

    def channels_at(self, index: int) -> int:
        """The axis ``index``, counted from the left, which must hold all channels."""
        index %= len(self.axes)
        for axis in self.axes[index]:
            axis.bind("C")
        found = [axis for axis in self.axes[index] if axis.size != 1]
        if any(axis.role == "C" and axis.size != 1 for n, g in enumerate(self.axes) if n != index for axis in g):
            raise UnsupportedError("the directions or channels before it are spread over several axes")
        if [axis.place for axis in found] != sorted(axis.place for axis in found):
            raise UnsupportedError("the directions before it do not come first in its channels")
        return index

    def single(self, index: int, role: str) -> Axis:
        """The axis ``index`` as one of steps or of rows."""
        found = [axis for axis in self.axes[index] if axis.size != 1] or list(self.axes[index][:1]) or [Axis(1)]
        if len(found) > 1:
            raise UnsupportedError(f"several axes are its {_WORDS[role]}")
        return found[0].bind(role)

    def unpadded(self) -> Steps:
        if self.pad != (0, 0):
            raise UnsupportedError("its input has zeros added, which only a Conv takes")
        return self

    def with_made(self, made: Made) -> Steps:
        return replace(self, made=made)


@dataclass(frozen=True, eq=False)
class Constant:
    """An array; of dtype object where it holds names of sizes. ``scale`` has its rank where ``integers`` are known."""

    array: Array
    integers: Array | None = None
    scale: Array | None = None


@dataclass(frozen=True)
class Fill:
    """A tensor of one value, of a shape that is not tracked."""

    value: float


@dataclass(frozen=True)
class State:
    """A final state of an LSTM, or an input that is its initial state, in any layout."""

    name: str
    given: bool


@dataclass(frozen=True, eq=False)
class Rounded:
    """One of the outputs of DynamicQuantizeLinear: "values", "scale" or "zero"; the scale times ``factor``."""

    steps: Steps
    part: str
    factor: Array | None = None


@dataclass(frozen=True, eq=False)
class IntegerProduct:
    """Of rounded steps with integers [K, N], before it is scaled; ``scaled``: by the scale of the steps already."""

    steps: Steps
    integers: Array
    scaled: bool = False


Value = Constant | Fill | Steps | State | Rounded | IntegerProduct | None  # None: what comes from an unsupported node


def product(sizes: Sequence[Size]) -> Size:
    """Of sizes, by name where one has a name."""
    known = math.prod(size for size in sizes if isinstance(size, int))
    names = [size for size in sizes if isinstance(size, str)]
    if not names or not known:
        return known
    return "*".join(names if known == 1 else [*names, str(known)])

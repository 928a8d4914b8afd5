"""Nodes of ONNX that only move or rename the axes of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from fastseq.convert.onnx_constants import axes_of
from fastseq.convert.onnx_graph import Node
from fastseq.convert.onnx_values import Axis, Constant, Group, Size, Steps, UnsupportedError, Value, product


def moved(node: Node, steps: Steps, inputs: Sequence[Value]) -> Steps:
    """The same sequence after a node of ``MOVES``; inputs: those after the first."""
    given = inputs[0] if inputs else None
    if not isinstance(given, Constant | None):
        raise UnsupportedError("its axes or sizes are computed from values")
    axes = MOVES[node.op](node, steps.axes, given)
    if steps.pad != (0, 0) and node.op != "Transpose":
        steps.unpadded()
    return replace(steps, axes=axes)


def _transpose(node: Node, axes: tuple[Group, ...], given: Constant | None) -> tuple[Group, ...]:
    return tuple(axes[n] for n in node.get("perm", range(len(axes))[::-1]))


def _squeeze(node: Node, axes: tuple[Group, ...], given: Constant | None) -> tuple[Group, ...]:
    where = axes_of(node, None if given is None else given.array)
    ones = [n for n, group in enumerate(axes) if product([axis.size for axis in group]) == 1]
    where = tuple(ones) if where is None else tuple(n % len(axes) for n in where)
    for n in where:
        if n not in ones:  # only an axis of one element can be left out, so its size is told here
            if len(axes[n]) > 1 or not isinstance(axes[n][0].size, str):
                raise UnsupportedError(f"axis {n} is not of size 1")
            axes[n][0].size = 1
    return tuple(group for n, group in enumerate(axes) if n not in where)


def _unsqueeze(node: Node, axes: tuple[Group, ...], given: Constant | None) -> tuple[Group, ...]:
    where = axes_of(node, None if given is None else given.array) or ()
    found: list[Group | None] = [None] * (len(axes) + len(where))
    for n in where:
        found[n] = (Axis(1),)
    rest = iter(axes)
    return tuple(next(rest) if group is None else group for group in found)


def _reshape(node: Node, axes: tuple[Group, ...], given: Constant | None) -> tuple[Group, ...]:
    target = node.attributes.get("shape") if given is None else given.array.reshape(-1).tolist()
    if target is None:
        raise UnsupportedError("its shape is not known")
    if not node.get("allowzero", 0):
        copied = [product([axis.size for axis in group]) for group in axes]
        target = [copied[n] if size == 0 else size for n, size in enumerate(target)]
    atoms = [axis for group in axes for axis in group if axis.size != 1]
    split = target.index(-1) if -1 in target else len(target)
    left = _taken(target[:split], iter(atoms))
    rest = atoms[sum(len([a for a in group if a.size != 1]) for group in left) :]
    right = [group[::-1] for group in _taken(target[split + 1 :][::-1], iter(rest[::-1]))][::-1]
    middle = rest[: len(rest) - sum(len([a for a in group if a.size != 1]) for group in right)]
    if -1 not in target and middle:
        raise UnsupportedError("its shape does not hold all elements")
    return (*left, *([tuple(middle) or (Axis(1),)] if -1 in target else []), *right)


def _taken(sizes: Sequence[Size], atoms: Iterator[Axis]) -> list[Group]:
    """Groups of the next axes whose products are ``sizes``."""
    groups: list[Group] = []
    for size in sizes:
        group: list[Axis] = []
        while size != 1 and (not group or product([axis.size for axis in group]) != size):
            axis = next(atoms, None)
            if axis is None:
                raise UnsupportedError("it splits an axis")
            group.append(axis)
        groups.append(tuple(group) or (Axis(1),))
    return groups


def _same(node: Node, axes: tuple[Group, ...], given: Constant | None) -> tuple[Group, ...]:
    return axes


MOVES: dict[str, Callable[[Node, tuple[Group, ...], Constant | None], tuple[Group, ...]]] = {
    "Dropout": _same,
    "Identity": _same,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}

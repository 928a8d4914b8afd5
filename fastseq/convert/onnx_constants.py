"""Nodes of ONNX whose inputs are constants: weights on their way to a layer, and vectors of sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastseq.convert.onnx_graph import Node
from fastseq.convert.onnx_values import Array, Constant, Fill, UnsupportedError, Value

_MOST = 1 << 16  # elements of a constant tensor of one value that is made; of larger ones only the value is kept


def fold(node: Node, inputs: Sequence[Constant | Fill | None]) -> list[Value]:
    """The outputs of a node whose inputs are constants; None stands for an input that is left out."""
    if node.op not in FOLDS:
        raise UnsupportedError("")
    fills = {value.value for value in inputs[:1] if isinstance(value, Fill)}
    if node.op == "Concat":
        fills |= {value.value for value in inputs if isinstance(value, Fill)}
    if fills and node.op in _KEEP_FILL and all(isinstance(v, Fill) for v in inputs[: None if _many(node) else 1]):
        if len(fills) > 1:
            raise UnsupportedError("it joins tensors of different values")
        return [Fill(fills.pop())]
    arrays = [value.array if isinstance(value, Constant) else None for value in inputs]
    if any(isinstance(value, Fill) for value in inputs):
        raise UnsupportedError("it takes a tensor of a size that is known only at run time")
    if node.op == "Transpose" and isinstance(inputs[0], Constant) and inputs[0].scale is not None:
        perm = node.get("perm", range(inputs[0].array.ndim)[::-1])
        parts: Any = (inputs[0].array, inputs[0].integers, inputs[0].scale)
        return [Constant(*(part.transpose(perm) for part in parts))]
    if node.op == "Identity":
        return [inputs[0]]
    out = FOLDS[node.op](node, *arrays)
    return [out if isinstance(out, (Constant, Fill)) else Constant(out)]


def _many(node: Node) -> bool:
    return node.op == "Concat"


def axes_of(node: Node, value: Array | None) -> tuple[int, ...] | None:
    """Axes from the attribute of older opsets or the input of newer ones."""
    if "axes" in node.attributes:
        return tuple(node.attributes["axes"])
    return None if value is None else tuple(int(v) for v in value.reshape(-1))


def _sizes(function: Callable[[Any, Any], Any], sign: str) -> Callable[..., Array]:
    """Arithmetic on numbers and on names of sizes."""

    def one(a: Any, b: Any) -> Any:
        named = isinstance(a, str) or isinstance(b, str)
        return f"({a}{sign}{b})" if named else function(a, b)

    def run(node: Node, a: Array, b: Array) -> Array:
        if a.dtype == object or b.dtype == object:
            return np.asarray(np.frompyfunc(one, 2, 1)(a, b), object)
        return np.asarray(function(a, b), np.result_type(a, b))

    return run


def _divided(a: Any, b: Any) -> Any:
    whole = all(isinstance(v, int) or np.issubdtype(np.asarray(v).dtype, np.integer) for v in (a, b))
    return a // b if whole else a / b


def _slice(node: Node, data: Array, *bounds: Array | None) -> Array:
    if "starts" in node.attributes:
        starts, ends = (np.asarray(node.attributes[key]) for key in ("starts", "ends"))
        axes, steps = node.attributes.get("axes"), None
    else:
        starts, ends, axes, steps = (*bounds, None, None)[:4]  # type: ignore[assignment]
    where = range(len(starts)) if axes is None else [int(axis) for axis in axes]
    index = [slice(None)] * data.ndim
    for n, axis in enumerate(where):
        index[axis] = slice(int(starts[n]), int(ends[n]), 1 if steps is None else int(steps[n]))
    return data[tuple(index)]


def _unsqueeze(node: Node, data: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(data, axes_of(node, axes) or ())


def _squeeze(node: Node, data: Array, axes: Array | None = None) -> Array:
    return np.squeeze(data, axes_of(node, axes))


def _constant_of_shape(node: Node, shape: Array) -> Constant | Fill:
    value = node.get("value", np.zeros(1, np.float32)).reshape(-1)[0]
    sizes = shape.reshape(-1).tolist()
    if all(isinstance(size, int) for size in sizes) and np.prod(sizes, dtype=float) <= _MOST:
        return Constant(np.full(sizes, value))
    return Fill(float(value))


def _expand(node: Node, data: Array, shape: Array) -> Array:
    """Axes whose size has a name stay 1."""
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, [1 if isinstance(s, str) else s for s in shape]))


def _reshape(node: Node, data: Array, shape: Array) -> Array:
    sizes = [data.shape[n] if s == 0 and not node.get("allowzero", 0) else s for n, s in enumerate(shape.tolist())]
    if any(isinstance(size, str) for size in sizes):
        raise UnsupportedError("it gives a constant a size that is known only at run time")
    return data.reshape(sizes)


def _cast(node: Node, data: Array) -> Array:
    return data if data.dtype == object else data.astype(node.dtype("to"))


def _constant(node: Node) -> Array:
    for name, value in node.attributes.items():
        if name.startswith("value"):
            kind = {
                "value_float": np.float32,
                "value_floats": np.float32,
                "value_int": np.int64,
                "value_ints": np.int64,
            }
            return np.asarray(value, kind.get(name))
    raise UnsupportedError("it has no value")


def dequantized(node: Node, integers: Array, scale: Array, zero: Array | None = None) -> Constant:
    """The values, and the integers with their scale beside them."""
    if scale.ndim == 1 and scale.size > 1:
        shape = [1] * integers.ndim
        shape[node.get("axis", 1)] = -1
        scale, zero = scale.reshape(shape), None if zero is None else zero.reshape(shape)
    elif scale.size > 1:
        raise UnsupportedError("its scales are those of blocks")
    wide = integers.astype(np.int32) - (0 if zero is None else zero.astype(np.int32).reshape(scale.shape))
    scale = scale.astype(np.float32).reshape(scale.shape if scale.size > 1 else [1] * integers.ndim)
    return Constant((wide.astype(np.float32) * scale).astype(np.float32), wide, scale)


FOLDS: dict[str, Callable[..., Any]] = {
    "Add": _sizes(lambda a, b: a + b, "+"),
    "Cast": _cast,
    "Concat": lambda node, *parts: np.concatenate(parts, node.get("axis", 0)),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DequantizeLinear": dequantized,
    "Div": _sizes(_divided, "/"),
    "Equal": lambda node, a, b: np.equal(a, b).astype(bool),
    "Expand": _expand,
    "Gather": lambda node, data, index: np.take(data, index.astype(np.int64), node.get("axis", 0)),
    "Identity": lambda node, data: data,
    "Mul": _sizes(lambda a, b: a * b, "*"),
    "Reshape": _reshape,
    "Shape": lambda node, data: np.array(data.shape, np.int64)[node.get("start", 0) : node.get("end", None)],
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _sizes(lambda a, b: a - b, "-"),
    "Transpose": lambda node, data: data.transpose(node.get("perm", None)),
    "Unsqueeze": _unsqueeze,
    "Where": lambda node, c, a, b: np.where(c, a, b),
}
_KEEP_FILL = {"Cast", "Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}

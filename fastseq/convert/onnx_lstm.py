"""LSTM nodes of ONNX, and DynamicQuantizeLSTM of ONNX Runtime, as layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastseq.convert.onnx_graph import Node
from fastseq.convert.onnx_matrices import floating, integers
from fastseq.convert.onnx_values import Array, Axis, Constant, Fill, Made, State, Steps, UnsupportedError, Value

ORDER = (0, 2, 3, 1)  # the places of i, f, g, o in ONNX's i, o, f, c
SUFFIX = {"forward": ("_l0",), "reverse": ("_l0_reverse",), "bidirectional": ("_l0", "_l0_reverse")}


def lstm(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    """A layer of one LSTM node, and its final states."""
    quantized = node.op.endswith("DynamicQuantizeLSTM")
    x, W, R, bias, lengths, h0, c0, peephole, *scales = [*inputs, *[None] * 12][:12]
    if not isinstance(x, Steps) or not isinstance(W, Constant) or not isinstance(R, Constant):
        raise UnsupportedError("its input is no sequence, or its weights are no constants")
    H, direction = int(node.attributes["hidden_size"]), str(node.get("direction", "forward"))
    _check_attributes(node, H, direction, peephole, lengths)
    suffixes = SUFFIX[direction]
    tensors: dict[str, Array] = {}
    for name, weight, n in (("weight_ih", W, 0), ("weight_hh", R, 2)):
        values = weight
        if quantized:
            values = _unscaled(weight, scales[n], scales[n + 1])
        for d, suffix in enumerate(suffixes):
            tensors |= _matrix(f"{name}{suffix}", values, d, dequantize)
    if isinstance(bias, Constant):
        for suffix, both in zip(suffixes, bias.array.astype(np.float32), strict=True):
            total = gates(both[: 4 * H]) + gates(both[4 * H :])
            tensors |= {f"bias{suffix}": total} if total.any() else {}
    for name, value in (("h_start", h0), ("c_start", c0)):
        tensors |= _start(name, value, suffixes, node.get("layout", 0))
    fields = {"input_size": W.array.shape[1 if quantized else 2], "hidden_size": H, "num_layers": 1}
    fields |= {"bidirectional": len(suffixes) == 2, "proj_size": 0, "tau": 1.0, "hard": False}
    fields |= {"reverse": True} if direction == "reverse" else {}
    made = Made("lstm", fields, tensors, (x.unpadded().made,))
    return [
        Steps(made, _axes(x, len(suffixes), H, node.get("layout", 0))),
        *(State(f, False) for f in node.outputs[1:]),
    ]


def gates(rows: Array) -> Array:
    """Rows i, o, f, c as i, f, g, o."""
    return np.ascontiguousarray(rows.reshape(4, -1, *rows.shape[1:])[list(ORDER)].reshape(rows.shape))


def _axes(x: Steps, D: int, H: int, layout: int) -> Any:
    """Of the output [T, D, B, H], or [B, T, D, H]; binds those of the input."""
    if len(x.axes) != 3:
        raise UnsupportedError(f"its input has {len(x.axes)} axes, not 3")
    first, second = (x.single(n, role) for n, role in enumerate("BT" if layout else "TB"))
    x.channels_at(2)
    d, h = Axis(D, "C", 0), Axis(H, "C", 1)
    return ((first,), (second,), (d,), (h,)) if layout else ((first,), (d,), (second,), (h,))


def _check_attributes(node: Node, H: int, direction: str, peephole: Value, lengths: Value) -> None:
    usual = ["sigmoid", "tanh", "tanh"]
    functions = [str(name).lower() for name in node.get("activations", [])]
    if functions and functions != usual * (len(functions) // 3):
        raise UnsupportedError(f"its activations are {node.attributes['activations']}, not Sigmoid, Tanh, Tanh")
    if direction not in SUFFIX:
        raise UnsupportedError(f"its direction is {direction!r}")
    if node.get("clip", None) or node.get("input_forget", 0):
        raise UnsupportedError("it has clip or input_forget")
    if peephole is not None and not (isinstance(peephole, Constant) and not peephole.array.any()):
        raise UnsupportedError("it has peepholes")
    if lengths is not None and not (isinstance(lengths, State) and lengths.given):
        raise UnsupportedError("its sequence_lens are no input of the model")


def _unscaled(weight: Constant, scale: Value, zero: Value) -> Constant:
    """Integers [D, K, 4 * H], scales and zero points [D] or [D, 4 * H], as a constant [D, 4 * H, K]."""
    if not isinstance(scale, Constant) or not isinstance(zero, Constant | None):
        raise UnsupportedError("its scales or zero points are no constants")
    D = len(weight.array)
    scales = scale.array.astype(np.float32).reshape(D, -1, 1)
    zeros = 0 if zero is None else zero.array.astype(np.int32).reshape(D, -1, 1)
    values = weight.array.astype(np.int32).transpose(0, 2, 1) - zeros
    return Constant(values, values, scales)


def _matrix(name: str, weight: Constant, d: int, dequantize: bool) -> dict[str, Array]:
    """The tensors of direction d of a constant [D, 4 * H, K]."""
    if weight.integers is None or weight.scale is None:
        return {name: gates(floating(weight.array[d]))}
    scale = weight.scale[d if len(weight.scale) > 1 else 0]
    scale = gates(scale) if len(scale) > 1 else scale
    return integers(name, gates(weight.integers[d]), scale, dequantize)


def _start(name: str, value: Value, suffixes: Sequence[str], layout: int) -> dict[str, Array]:
    """The state before the first step, where it is a constant that all rows share."""
    if value is None or (isinstance(value, Fill) and value.value == 0) or (isinstance(value, State) and value.given):
        return {}
    if not isinstance(value, Constant) or value.array.dtype == object or value.array.ndim != 3:
        raise UnsupportedError(f"its {name.replace('start', '0')} is neither a constant nor an input of the model")
    array = value.array.astype(np.float32).transpose(1, 0, 2) if layout else value.array.astype(np.float32)
    if (array != array[:, :1]).any():
        raise UnsupportedError(f"its {name.replace('start', '0')} differs between rows")
    starts = zip(suffixes, array, strict=True)
    return {f"{name}{suffix}": np.ascontiguousarray(start[0]) for suffix, start in starts if start.any()}

"""``from_onnx``: an ONNX file as the layers and tensors of a deployed model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastseq import _check
from fastseq.convert.onnx_axes import MOVES, moved
from fastseq.convert.onnx_constants import FOLDS, fold
from fastseq.convert.onnx_graph import Graph, Node, load
from fastseq.convert.onnx_layers import HANDLERS
from fastseq.convert.onnx_lstm import lstm
from fastseq.convert.onnx_values import (
    Axis,
    Constant,
    Fill,
    Made,
    Rounded,
    State,
    Steps,
    UnsupportedError,
    Value,
)
from fastseq.convert.stacking import named, stacked

_LSTM = ("LSTM", "com.microsoft.DynamicQuantizeLSTM")
_STATE = {"Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze", "Cast"}


class ConversionError(_check.ArgumentError):
    """A model that has no equal among deployed ones."""


def from_onnx(
    path: str | Path, *, input: str | None = None, output: str | None = None, dequantize: bool = False
) -> dict[str, Any]:
    """The layers and tensors that compute what an ONNX file computes.

    Taken are LSTM, DynamicQuantizeLSTM and the integer products of ONNX Runtime's dynamic quantization, lookups,
    MatMul, Gemm, Conv over time, activations, sums, joins, and the nodes that only move axes or compute sizes. Integer
    weights stay integers; x is then rounded row by row and symmetrically, where ONNX Runtime rounds whole tensors with
    a zero point, so the results are near and not equal. LSTM layers of one shape that follow one another become one
    layer. Initial states that are inputs of the file, and its final states, are the state of a run.

    Args:
        path: the file.
        input: the tensor in it that the model is given; default: its first input. What comes before is left out.
        output: the tensor that the model gives; default: the first output. Others must be final states then.
        dequantize: take the float32 values of integer weights.

    Returns:
        "layers" and "tensors" (arrays); "batch_first": whether the file's input has the batch before the steps (a
        deployed model has the steps first); "axes": the order of the file's output, such as "BTC".

    Raises:
        ConversionError: names every node that has no equal.
        ImportError: without the package onnx.
    """
    graph = load(path, input is not None)
    given = input if input is not None else next(iter(graph.inputs), "")
    results = graph.outputs if output is None else [output]
    for name in [given, *results]:
        if name not in graph.shapes and not any(name in node.outputs for node in graph.nodes):
            _check.fail("from_onnx", "input" if name == given else "output", "a tensor of the file", repr(name))
    if not graph.shapes.get(given):
        _check.fail("from_onnx", "input", "a tensor whose rank is known", repr(given))
    axes = [Axis(size) for size in graph.shapes[given]]
    values: dict[str, Value] = {name: Constant(array) for name, array in graph.constants.items()}
    values |= {name: State(name, True) for name in graph.inputs}
    values[given] = Steps(Made("input"), tuple((axis,) for axis in axes))
    _walk(graph, graph.needed(results, given), values, given, dequantize, str(path))
    found = values.get(results[0])
    if not isinstance(found, Steps) or found.made.type in ("input", "lookup"):
        raise ConversionError(f"from_onnx: {results[0]} of {path} is not what a layer gives")
    others = [name for name in results[1:] if not isinstance(values.get(name), State)]
    if others:
        raise ConversionError(f"from_onnx: {path} has several outputs, {', '.join(results)}: choose one with output=")
    layers, tensors = named(stacked(found.made))
    batch_first = _batch_first(axes)
    letters = ["".join(dict.fromkeys(axis.role for axis in group if axis.size != 1)) for group in found.axes]
    return {"layers": layers, "tensors": tensors, "batch_first": batch_first, "axes": "".join(letters)}


def _batch_first(axes: Sequence[Axis]) -> bool:
    """Of the input. What nothing told apart is the steps, then the batch, as far as one of them is missing."""
    for role in "TB":
        free = [axis for axis in axes if axis.role == ""]
        if free and not any(axis.role == role for axis in axes):
            free[0].role = role
    return next((axis.role for axis in axes if axis.role in ("T", "B")), "T") == "B"


def _walk(
    graph: Graph, nodes: Sequence[Node], values: dict[str, Value], given: str, dequantize: bool, path: str
) -> None:
    """Give every output of ``nodes`` its meaning."""
    problems = []
    for node in nodes:
        inputs = [values.get(name) if name else None for name in node.inputs]
        lost = any(name and values.get(name) is None for name in node.inputs)
        outputs: Sequence[Value] = [None] * len(node.outputs)
        try:
            if node.op not in KNOWN:
                raise UnsupportedError("")
            outputs = outputs if lost else _meaning(node, inputs, dequantize)
        except UnsupportedError as error:
            problems.append(f"{node.name} ({node.op})" + (f": {error}" if str(error) else ""))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            problems.append(f"{node.name} ({node.op}): its inputs do not fit ({error})")
        values.update({n: v for n, v in zip(node.outputs, outputs, strict=False) if n and n != given})
    if problems:
        count = "1 node" if len(problems) == 1 else f"{len(problems)} nodes"
        raise ConversionError(
            f"from_onnx: {count} of {path} cannot be converted:\n" + "\n".join(f"  {p}" for p in problems)
        )


def _meaning(node: Node, inputs: Sequence[Value], dequantize: bool) -> Sequence[Value]:
    """The outputs of a node, None of whose inputs is unknown."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    if node.op in _LSTM:
        return lstm(node, inputs, dequantize)
    if all(isinstance(value, (Constant, Fill)) or value is None for value in inputs):
        return fold(node, [value for value in inputs if value is None or isinstance(value, (Constant, Fill))])
    first = inputs[0]
    if node.op == "Shape" and isinstance(first, Steps):
        return [Constant(first.unpadded().shape()[node.get("start", 0) : node.get("end", None)])]
    if node.op == "Shape":
        raise UnsupportedError("the size of a state is not known")
    if any(isinstance(value, State) for value in inputs) and node.op in _STATE:
        return [next(value for value in inputs if isinstance(value, State))]
    if isinstance(first, Steps) and node.op == "Cast":
        return [_cast(node, first)]
    if isinstance(first, Steps) and node.op in MOVES:
        return [moved(node, first, inputs[1:] if node.op != "Dropout" else [])]
    if isinstance(first, Rounded) and first.part == "values" and node.op in MOVES:
        return [Rounded(moved(node, first.steps, inputs[1:]), "values")]
    if node.op == "Cast" and first is not None and not isinstance(first, Rounded):
        return [first]  # of an integer product
    if node.op not in HANDLERS:
        raise UnsupportedError("it changes a sequence")
    return HANDLERS[node.op](node, inputs, dequantize)


def _cast(node: Node, steps: Steps) -> Steps:
    """Between floats, or between integers; what is given and what was looked up may be integers."""
    kind = np.dtype(node.dtype("to"))
    if steps.made.type in ("input", "lookup") and kind in (np.int32, np.int64):
        return steps
    if kind not in (np.float32, np.float64) or steps.made.type == "lookup":
        raise UnsupportedError(f"it casts a sequence to {kind}")
    return steps


KNOWN = {*_LSTM, *FOLDS, *MOVES, *HANDLERS, "Shape", "Cast"}

"""An ONNX file as plain nodes and arrays. The only reader of ``onnx``, which it imports when it is called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastseq import _check
from fastseq.convert.onnx_values import Array


def onnx_module(function: str) -> Any:
    """The package onnx."""
    try:
        import onnx
        import onnx.numpy_helper
        import onnx.shape_inference
    except ImportError:
        raise ImportError(f"{function} needs onnx: pip install fastseq-kernels[convert]") from None
    return onnx


@dataclass(frozen=True, eq=False)
class Node:
    """One node; ``op`` has its domain before it where that is not ONNX's own."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    opset: int

    def get(self, name: str, default: Any) -> Any:
        return self.attributes.get(name, default)

    def dtype(self, name: str) -> Any:
        """numpy's type for an attribute that holds one of ONNX."""
        import onnx

        return onnx.helper.tensor_dtype_to_np_dtype(self.attributes[name])


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in the order of their computation. ``shapes``: of the inputs and all other tensors where they are known;
    a size is a number or a name."""

    nodes: list[Node]
    constants: dict[str, Array]
    inputs: list[str]
    outputs: list[str]
    shapes: dict[str, list[int | str]]

    def needed(self, names: Iterable[str], given: str) -> list[Node]:
        """The nodes behind ``names``, without those before ``given``."""
        wanted = set(names)
        found = []
        for node in reversed(self.nodes):
            if wanted & (set(node.outputs) - {given, ""}):
                found.append(node)
                wanted |= set(node.inputs)
        return found[::-1]


def load(path: str | Path, inferred: bool) -> Graph:
    """Read a file. inferred: shapes of tensors inside too."""
    onnx = onnx_module("from_onnx")
    if not Path(path).is_file():
        _check.fail("from_onnx", "path", "an ONNX file", path)
    model = onnx.load(str(path))
    if inferred:
        model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    constants = {value.name: _array(onnx, value) for value in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    shapes = {value.name: _shape(value) for value in [*graph.input, *graph.value_info, *graph.output]}
    nodes = [_node(onnx, node, opset) for node in graph.node]
    return Graph(nodes, constants, inputs, [value.name for value in graph.output], shapes)


def _node(onnx: Any, node: Any, opset: int) -> Node:
    attributes = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = _array(onnx, value)
        elif isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, list) and value and isinstance(value[0], bytes):
            value = [v.decode() for v in value]
        attributes[attribute.name] = value
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
    name = node.name or f"the node of {next(iter(node.output), '')}"
    return Node(domain + node.op_type, name, list(node.input), list(node.output), attributes, opset)


def _array(onnx: Any, value: Any) -> Array:
    array: Array = onnx.numpy_helper.to_array(value)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _shape(value: Any) -> list[int | str]:
    """Unknown sizes get a name of their own."""
    tensor = value.type.tensor_type
    dims = tensor.shape.dim if tensor.HasField("shape") else []
    return [d.dim_value if d.HasField("dim_value") else f"{value.name}[{n}]" for n, d in enumerate(dims)]

"""ONNX files for the tests of conversion, and ONNX Runtime on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def run(path: Path, *feeds: Any) -> list[np.ndarray]:
    """All outputs for these inputs."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (np.asarray(feed) for feed in feeds), strict=True)))


def exported(module: nn.Module, x: Tensor, path: Path, opset: int = 17, dynamic: bool = True) -> Path:
    """As torch's tracing exporter writes a module, two axes open."""
    axes = {"x": {0: "first", 1: "second"}} if dynamic else None
    module.eval()
    torch.onnx.export(module, (x,), str(path), opset_version=opset, dynamo=False, input_names=["x"], dynamic_axes=axes)
    return path


def written(path: Path, nodes: list[Any], shape: list[Any], constants: dict[str, Any], opset: int = 17) -> Path:
    """A file of these nodes, from "x" (float) to "y"."""
    helper = onnx.helper
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    arrays = [onnx.numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "graph", [x], [y], arrays)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return path


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """``node("Add", "x bias", "y")``; "-" is an input that is left out."""
    domain, _, kind = op.rpartition(".")
    names = ["" if name == "-" else name for name in inputs.split()]
    called = f"/{outputs.split()[0]}"
    return onnx.helper.make_node(kind, names, outputs.split(), name=called, domain=domain, **attributes)


def onnx_constants(path: Path, op: str) -> dict[str, np.ndarray]:
    """W, R and B of the first node of this kind."""
    graph = onnx.load(str(path)).graph
    names = next(made.input for made in graph.node if made.op_type == op)[1:4]
    arrays = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    return {letter: arrays[name] for letter, name in zip("WRB", names, strict=True)}

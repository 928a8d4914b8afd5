"""One LSTM layer as an ONNX model, and its two runtimes as providers of inference."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

OPSET = 17


def model(layer: torch.nn.LSTM, T: int, B: int, state: bool) -> bytes:
    """Serialised model: x [T, B, I] (with ``state`` also h0, c0 [1, B, H]) to y [T, B, H], h_n, c_n [1, B, H]."""
    from onnx import TensorProto, checker, helper, numpy_helper

    H = layer.hidden_size

    def reordered(value: Tensor) -> np.ndarray:
        """ONNX orders the gates i, o, f, c; torch i, f, g, o."""
        i, f, g, o = value.detach().chunk(4, 0)
        return torch.cat((i, o, f, g))[None].numpy()

    bias = np.concatenate((reordered(layer.bias_ih_l0), reordered(layer.bias_hh_l0)), axis=1)
    constants = {"W": reordered(layer.weight_ih_l0), "R": reordered(layer.weight_hh_l0), "bias": bias}
    initializers = [numpy_helper.from_array(np.ascontiguousarray(v), name) for name, v in constants.items()]
    initializers.append(numpy_helper.from_array(np.array([1], np.int64), "direction"))
    states = ["h0", "c0"] if state else []
    inputs = ["x", "W", "R", "bias", *(["", *states] if state else [])]
    nodes = [
        helper.make_node("LSTM", inputs, ["y_directions", "h_n", "c_n"], hidden_size=H),
        helper.make_node("Squeeze", ["y_directions", "direction"], ["y"]),
    ]

    def value(name: str, *shape: int):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        "lstm",
        [value("x", T, B, layer.input_size), *(value(name, 1, B, H) for name in states)],
        [value("y", T, B, H), value("h_n", 1, B, H), value("c_n", 1, B, H)],
        initializers,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    checker.check_model(made)
    return made.SerializeToString()


def quantized(data: bytes) -> bytes:
    """The model with its LSTMs as DynamicQuantizeLSTM, a scale for each row of the weights.

    By ``onnxruntime.quantization.quantize_dynamic``, which gives one scale a matrix if it is not told otherwise.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        before, after = (Path(folder) / name for name in ("float32.onnx", "int8.onnx"))
        before.write_bytes(data)
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)  # its advice to run its pre-processing, which has nothing to do here
        try:
            quantize_dynamic(before, after, per_channel=True, weight_type=QuantType.QInt8)
        finally:
            logging.disable(level)
        made = after.read_bytes()
    if b"DynamicQuantizeLSTM" not in made:
        raise RuntimeError("onnxruntime.quantization.quantize_dynamic left the LSTM as it was")
    return made


Outputs = list[np.ndarray]  # y, h_n, c_n
NAMES = ["y", "h_n", "c_n"]


def onnxruntime_options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return options


def onnxruntime_session(data: bytes, threads: int) -> Callable[[dict[str, np.ndarray]], Outputs]:
    """A function of the inputs by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, onnxruntime_options(threads), providers=["CPUExecutionProvider"])
    return lambda feed: session.run(NAMES, feed)


def openvino_session(data: bytes, threads: int) -> Callable[[dict[str, np.ndarray]], Outputs]:
    """A function of the inputs by OpenVINO, whose next call overwrites the results of the last.

    float32 is asked for by name: on some processors its default is bfloat16.
    """
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(openvino.Core().read_model(data), "CPU", settings)
    request = compiled.create_infer_request()
    ports = [compiled.output(name) for name in NAMES]

    def call(feed: dict[str, np.ndarray]) -> Outputs:
        results = request.infer(feed, share_inputs=True, share_outputs=True)
        return [results[port] for port in ports]

    return call


def onnxruntime_call(data: bytes, feed: dict[str, np.ndarray], threads: int) -> Callable[[], Outputs]:
    session = onnxruntime_session(data, threads)
    return lambda: session(feed)


def openvino_call(data: bytes, feed: dict[str, np.ndarray], threads: int) -> Callable[[], Outputs]:
    session = openvino_session(data, threads)
    return lambda: session(feed)

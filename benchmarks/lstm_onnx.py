"""One LSTM layer as an ONNX model, and its two runtimes as providers of inference."""

from __future__ import annotations

from collections.abc import Callable

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


def onnxruntime_call(data: bytes, feed: dict[str, np.ndarray], threads: int) -> Callable[[], list[np.ndarray]]:
    """A call of ONNX Runtime: y, h_n, c_n."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(["y", "h_n", "c_n"], feed)


def openvino_call(data: bytes, feed: dict[str, np.ndarray], threads: int) -> Callable[[], list[np.ndarray]]:
    """A call of OpenVINO: y, h_n, c_n. float32 is asked for by name: on some processors its default is bfloat16."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(openvino.Core().read_model(data), "CPU", settings)
    request = compiled.create_infer_request()
    ports = [compiled.output(name) for name in ("y", "h_n", "c_n")]

    def call() -> list[np.ndarray]:
        results = request.infer(feed, share_inputs=True, share_outputs=True)
        return [results[port] for port in ports]

    return call

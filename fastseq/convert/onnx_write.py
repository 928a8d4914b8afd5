"""``to_onnx``: a deployed model as an ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastseq.convert.matrices import Array, dense, floats, form
from fastseq.convert.onnx_graph import onnx_module
from fastseq.convert.onnx_read import ConversionError

OPSET, IR_VERSION = 17, 8
_PLACES = (0, 3, 1, 2)  # of ONNX's gates i, o, f, c in i, f, g, o
Layer = Mapping[str, Any]
Named = Mapping[str, Array]


class Given(NamedTuple):
    """A tensor [T, B, size] of the graph; its axis T has a name."""

    name: str
    size: int | str
    steps: str


class Graph:
    """A graph in the making, and what had to be said on the way."""

    def __init__(self, onnx: Any, notes: list[str]) -> None:
        self.onnx, self.notes = onnx, notes
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {}

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node that is called as its output; "com.microsoft.X" is of that domain."""
        domain, _, kind = op.rpartition(".")
        made = self.onnx.helper.make_node(kind, list(inputs), [output], name=output, domain=domain, **attributes)
        self.nodes.append(made)
        return output

    def constant(self, name: str, value: Any, dtype: Any = None) -> str:
        self.constants[name] = np.ascontiguousarray(value, dtype)
        return name

    def values(self, layer: Layer, own: Named, name: str, K: int) -> Array:
        """A matrix as float32, with a note where it was stored otherwise."""
        how = form(own, name)
        if how != "float32":
            self.notes.append(f"{layer['name']}.{name}: {how} written as float32")
        return dense(own, name, K, layer.get("group"))


def to_onnx(layers: Sequence[Layer], tensors: Mapping[str, Any], path: str | Path) -> list[str]:
    """Write a deployed model as an ONNX file: x [T, B, C] (or int64 [T, B]) to y, both with T and B left open.

    A dense lstm becomes LSTM, one whose matrices are all int8 by rows ONNX Runtime's DynamicQuantizeLSTM, which rounds
    a whole tensor at a time, with a zero point; an int8 linear becomes DynamicQuantizeLinear with MatMulInteger. Other
    forms are written as the float32 values that they stand for, and tau becomes part of the weights. A run starts from
    h_start and c_start, or from zeros.

    Args:
        layers, tensors: the model. path: of the file.

    Returns:
        What is stored in another form than the model's, one sentence each.

    Raises:
        ConversionError: names every layer that ONNX cannot express.
        ImportError: without the package onnx.
    """
    onnx = onnx_module("to_onnx")
    refused = [f"  {layer['name']} ({layer['type']}): {why}" for layer in layers if (why := _why_not(layer))]
    if refused:
        count = "1 layer" if len(refused) == 1 else f"{len(refused)} layers"
        raise ConversionError(f"to_onnx: {count} cannot be written:\n" + "\n".join(refused))
    graph = Graph(onnx, [])
    integers = bool(layers) and layers[0]["type"] == "embedding"
    first = layers[0] if layers else {}
    channels = first.get("input_size", first.get("in", "C"))
    found = {"input": Given("x", channels, "T")}
    graph.node("Shape", ["x"], "batch", start=1, end=2)
    before = "input"
    for layer in layers:
        name = str(layer["name"])
        own = {k.removeprefix(f"{name}."): _given(k, v) for k, v in tensors.items() if k.startswith(f"{name}.")}
        sources = layer.get("from", [before])
        sources = [sources] if isinstance(sources, str) else sources
        found[name] = WRITERS[layer["type"]](graph, layer, own, [found[source] for source in sources])
        before = name
    graph.node("Identity", [found[before].name], "y")
    _save(graph, found[before], integers, channels, path)
    return graph.notes


def _given(name: str, value: Any) -> Array:
    """Biases, states and scales that are kept as bfloat16 are widened; matrices by those who write them."""
    array = np.asarray(value)
    matrix = ".weight" in name and not name.endswith(".scale")
    return floats(array) if array.dtype == np.uint16 and not matrix else array


def _save(graph: Graph, last: Given, integers: bool, channels: int | str, path: str | Path) -> None:
    helper, kinds = graph.onnx.helper, graph.onnx.TensorProto
    shape: list[int | str] = ["T", "B"] if integers else ["T", "B", channels]
    x = helper.make_tensor_value_info("x", kinds.INT64 if integers else kinds.FLOAT, shape)
    y = helper.make_tensor_value_info("y", kinds.FLOAT, [last.steps, "B", last.size])
    constants = [graph.onnx.numpy_helper.from_array(value, name) for name, value in graph.constants.items()]
    made = helper.make_graph(graph.nodes, "model", [x], [y], constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fastseq")
    graph.onnx.checker.check_model(model)
    graph.onnx.save(model, str(path))


def _why_not(layer: Layer) -> str:
    if layer["type"] not in WRITERS:
        return "ONNX has no such operator"
    if layer["type"] != "lstm":
        return ""
    if layer.get("proj_size", 0):
        return "the LSTM of ONNX has no projection"
    if layer.get("hard", False):
        return "hard gates; the LSTM of ONNX has one activation for i, f and o together"
    return ""


def _embedding(graph: Graph, layer: Layer, own: Named, sources: Sequence[Given]) -> Given:
    name, D = str(layer["name"]), layer["dim"]
    table = f"{name}.weight"
    if form(own, "weight") == "int8":
        V = len(own["weight"])
        parts = [
            graph.constant(f"{table}_quantized", own["weight"], np.int8),
            graph.constant(f"{table}_scale", own["weight.scale"][:, 0], np.float32),
            graph.constant(f"{table}_zero_point", np.zeros(V), np.int8),
        ]
        graph.node("DequantizeLinear", parts, table, axis=0)
    else:
        graph.constant(table, graph.values(layer, own, "weight", D))
    return Given(graph.node("Gather", [table, sources[0].name], name), D, sources[0].steps)


def _linear(graph: Graph, layer: Layer, own: Named, sources: Sequence[Given]) -> Given:
    name, x, N = str(layer["name"]), sources[0], layer["out"]
    last = f"{name}.product" if "bias" in own else name
    if form(own, "weight") == "int8":
        _integer_linear(graph, name, own, x.name, last)
    else:
        weight = graph.constant(f"{name}.weight", graph.values(layer, own, "weight", layer["in"]).T)
        graph.node("MatMul", [x.name, weight], last)
    if "bias" in own:
        graph.node("Add", [last, graph.constant(f"{name}.bias", own["bias"], np.float32)], name)
    return Given(name, N, x.steps)


def _integer_linear(graph: Graph, name: str, own: Named, x: str, output: str) -> None:
    parts = [f"{name}.x_{part}" for part in ("quantized", "scale", "zero_point")]
    made = graph.onnx.helper.make_node("DynamicQuantizeLinear", [x], parts, name=f"{name}.quantize")
    graph.nodes.append(made)
    weight = graph.constant(f"{name}.weight_quantized", own["weight"].T, np.int8)
    zero = graph.constant(f"{name}.weight_zero_point", np.zeros(len(own["weight"])), np.int8)
    scale = graph.constant(f"{name}.weight_scale", own["weight.scale"][:, 0], np.float32)
    total = graph.node("MatMulInteger", [parts[0], weight, parts[2], zero], f"{name}.integers")
    total = graph.node("Cast", [total], f"{name}.floats", to=graph.onnx.TensorProto.FLOAT)
    scales = graph.node("Mul", [parts[1], scale], f"{name}.scales")
    graph.node("Mul", [total, scales], output)


def _conv1d(graph: Graph, layer: Layer, own: Named, sources: Sequence[Given]) -> Given:
    name, x, k, C = str(layer["name"]), sources[0], layer["kernel"], layer["in"]
    weight = graph.values(layer, own, "weight", k * C).reshape(-1, k, C).transpose(0, 2, 1)
    inputs = [graph.node("Transpose", [x.name], f"{name}.x", perm=[1, 2, 0])]
    inputs.append(graph.constant(f"{name}.weight", weight))
    if "bias" in own:
        inputs.append(graph.constant(f"{name}.bias", own["bias"], np.float32))
    pads, stride, dilation = [layer.get("left", 0), layer.get("right", 0)], layer.get("stride", 1), layer["dilation"]
    y = graph.node("Conv", inputs, f"{name}.y", kernel_shape=[k], pads=pads, strides=[stride], dilations=[dilation])
    return Given(graph.node("Transpose", [y], name, perm=[2, 0, 1]), layer["out"], f"{name}.T")


def _lstm(graph: Graph, layer: Layer, own: Named, sources: Sequence[Given]) -> Given:
    name, x = str(layer["name"]), sources[0].name
    H, D = layer["hidden_size"], 1 + layer.get("bidirectional", False)
    reverse = layer.get("reverse", False)
    direction = "bidirectional" if D == 2 else "reverse" if reverse else "forward"
    for n in range(layer.get("num_layers", 1)):
        suffixes = [f"_l{n}_reverse"] if reverse else [f"_l{n}", f"_l{n}_reverse"][:D]
        here = f"{name}_l{n}"
        K = D * H if n else layer["input_size"]
        weights = [f"{key}{suffix}" for key in ("weight_ih", "weight_hh") for suffix in suffixes]
        quantized = all(form(own, key) == "int8" for key in weights)
        make = _integer_weights if quantized else _float_weights
        W, R, *scales = make(graph, layer, own, here, suffixes, K)
        states = [_start(graph, own, here, key, suffixes, H) for key in ("h_start", "c_start")]
        inputs = [x, W, R, _biases(graph, layer, own, here, suffixes), "", *states, "", *scales]
        while not inputs[-1]:
            inputs.pop()
        op = "com.microsoft.DynamicQuantizeLSTM" if quantized else "LSTM"
        y = graph.node(op, inputs, f"{here}.y", hidden_size=H, direction=direction)
        x = name if n + 1 == layer.get("num_layers", 1) else here
        if D == 2:
            graph.node("Transpose", [y], f"{here}.z", perm=[0, 2, 1, 3])
            graph.node("Reshape", [f"{here}.z", graph.constant(f"{here}.shape", [0, 0, -1], np.int64)], x)
        else:
            graph.node("Squeeze", [y, graph.constant(f"{here}.axis", [1], np.int64)], x)
    return Given(x, D * H, sources[0].steps)


def _gates(rows: Array, tau: float = 1.0) -> Array:
    """Rows i, f, g, o as i, o, f, c, those of i and f divided by tau."""
    i, f, g, o = np.split(rows.astype(np.float32) if tau != 1 else rows, 4)
    return np.concatenate((i / np.float32(tau), o, f / np.float32(tau), g) if tau != 1 else (i, o, f, g))


def _float_weights(
    graph: Graph, layer: Layer, own: Named, here: str, suffixes: Sequence[str], K: int
) -> tuple[str, ...]:
    """W [D, 4 * H, K] and R [D, 4 * H, H]."""
    tau, names = layer.get("tau", 1.0), []
    for letter, key, columns in (("W", "weight_ih", K), ("R", "weight_hh", layer["hidden_size"])):
        parts = [_gates(graph.values(layer, own, f"{key}{suffix}", columns), tau) for suffix in suffixes]
        names.append(graph.constant(f"{here}.{letter}", np.stack(parts)))
    return tuple(names)


def _integer_weights(
    graph: Graph, layer: Layer, own: Named, here: str, suffixes: Sequence[str], K: int
) -> tuple[str, ...]:
    """W [D, K, 4 * H] and R [D, H, 4 * H], then for each a scale and a zero point [D, 4 * H]."""
    names, more = [], []
    for letter, key in (("W", "weight_ih"), ("R", "weight_hh")):
        weight = np.stack([_gates(own[f"{key}{suffix}"]).T for suffix in suffixes])
        scale = np.stack([_gates(own[f"{key}{suffix}.scale"], layer.get("tau", 1.0))[:, 0] for suffix in suffixes])
        names.append(graph.constant(f"{here}.{letter}", weight, np.int8))
        more.append(graph.constant(f"{here}.{letter}_scale", scale, np.float32))
        more.append(graph.constant(f"{here}.{letter}_zero_point", np.zeros(scale.shape), np.int8))
    return (*names, *more)


def _biases(graph: Graph, layer: Layer, own: Named, here: str, suffixes: Sequence[str]) -> str:
    """[D, 8 * H]: of the input part, then zeros; "" where there are none."""
    if not any(f"bias{suffix}" in own for suffix in suffixes):
        return ""
    zeros = np.zeros(4 * layer["hidden_size"], np.float32)
    biases = [_gates(own.get(f"bias{suffix}", zeros), layer.get("tau", 1.0)) for suffix in suffixes]
    return graph.constant(f"{here}.B", np.stack([np.concatenate((bias, zeros)) for bias in biases]), np.float32)


def _start(graph: Graph, own: Named, here: str, key: str, suffixes: Sequence[str], H: int) -> str:
    """[D, B, H], the same for all rows; "" for zeros."""
    if not any(f"{key}{suffix}" in own for suffix in suffixes):
        return ""
    start = np.stack([own.get(f"{key}{suffix}", np.zeros(H))[None] for suffix in suffixes])
    ends = [graph.constant(f"{here}.{n}", [size], np.int64) for n, size in (("D", len(start)), ("H", H))]
    shape = graph.node("Concat", [ends[0], "batch", ends[1]], f"{here}.{key}_shape", axis=0)
    return graph.node("Expand", [graph.constant(f"{here}.{key}_row", start, np.float32), shape], f"{here}.{key}")


def _activation(op: str, **attributes: int) -> Callable[[Graph, Layer, Named, Sequence[Given]], Given]:
    def write(graph: Graph, layer: Layer, own: Named, sources: Sequence[Given]) -> Given:
        return sources[0]._replace(name=graph.node(op, [sources[0].name], str(layer["name"]), **attributes))

    return write


def _ensemble(graph: Graph, layer: Layer, own: Named, sources: Sequence[Given]) -> Given:
    """Pairs are counted as the places [M, M] where the classes of two members are equal, each with itself too."""
    name, x, M = str(layer["name"]), sources[0], layer["members"]
    shape = graph.constant(f"{name}.shape", [0, 0, M, -1], np.int64)
    logits = graph.node("Reshape", [x.name, shape], f"{name}.logits")
    shares = graph.node("Softmax", [logits], f"{name}.shares", axis=3)
    parts = [graph.node("ReduceMean", [shares], f"{name}.probability", axes=[2], keepdims=0)]
    rows = graph.node("ArgMax", [logits], f"{name}.classes", axis=3)  # [T, B, M, 1]
    columns = graph.node("Transpose", [rows], f"{name}.others", perm=[0, 1, 3, 2])
    equal = graph.node("Equal", [rows, columns], f"{name}.equal")
    pairs = graph.node("Cast", [equal], f"{name}.pairs", to=graph.onnx.TensorProto.FLOAT)
    alike = graph.node("ReduceMean", [pairs], f"{name}.alike", axes=[2, 3], keepdims=1)
    flat = graph.constant(f"{name}.flat", [0, 0, 1], np.int64)
    alike = graph.node("Reshape", [alike, flat], f"{name}.alike_steps")
    differ = graph.node("Sub", [graph.constant(f"{name}.one", 1, np.float32), alike], f"{name}.differ")
    factor = graph.constant(f"{name}.factor", M / max(1, M - 1), np.float32)
    parts.append(graph.node("Mul", [differ, factor], f"{name}.disagreement"))
    size = x.size // M + 1 if isinstance(x.size, int) else name
    return Given(graph.node("Concat", parts, name, axis=2), size, x.steps)


def _add(graph: Graph, layer: Layer, own: Named, sources: Sequence[Given]) -> Given:
    name, total = str(layer["name"]), sources[0].name
    for n, source in enumerate(sources[1:], 2):
        total = graph.node("Add", [total, source.name], name if n == len(sources) else f"{name}.{n}")
    return sources[0]._replace(name=total)


def _concat(graph: Graph, layer: Layer, own: Named, sources: Sequence[Given]) -> Given:
    name = graph.node("Concat", [source.name for source in sources], str(layer["name"]), axis=2)
    sizes = [source.size for source in sources]
    return Given(name, sum(s for s in sizes if isinstance(s, int)) if "C" not in sizes else name, sources[0].steps)


WRITERS: dict[str, Callable[[Graph, Layer, Named, Sequence[Given]], Given]] = {
    "embedding": _embedding,
    "linear": _linear,
    "conv1d": _conv1d,
    "relu": _activation("Relu"),
    "tanh": _activation("Tanh"),
    "sigmoid": _activation("Sigmoid"),
    "softmax": _activation("Softmax", axis=-1),
    "lstm": _lstm,
    "ensemble": _ensemble,
    "add": _add,
    "concat": _concat,
}

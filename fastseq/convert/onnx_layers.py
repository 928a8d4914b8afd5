"""Nodes of ONNX that are layers, or parts of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fastseq.convert.onnx_graph import Node
from fastseq.convert.onnx_matrices import integers, matrix
from fastseq.convert.onnx_values import (
    Array,
    Axis,
    Constant,
    Group,
    IntegerProduct,
    Made,
    Rounded,
    Steps,
    UnsupportedError,
    Value,
    product,
)

Handler = Callable[[Node, Sequence[Value], bool], list[Value]]  # the last argument: dequantize


def activation(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    x = _steps(inputs[0]).unpadded()
    if node.op == "Softmax":
        axis = node.get("axis", 1 if node.opset < 13 else -1) % len(x.axes)
        if axis != len(x.axes) - 1 or x.channels_at(axis) != axis:
            raise UnsupportedError("it is not over the channels, or they are not the last axis")
    return [x.with_made(Made(node.op.lower(), {}, {}, (x.made,)))]


def matmul(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    x, weight = _steps(inputs[0]), _constant(inputs[1])
    return [_linear(x, _transposed(weight), None, dequantize)]


def gemm(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    x, weight = _steps(inputs[0]), _constant(inputs[1])
    bias = _constant(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else None
    if node.get("transA", 0) or node.get("alpha", 1.0) != 1 or node.get("beta", 1.0) != 1:
        raise UnsupportedError("it has transA, or alpha or beta other than 1")
    return [_linear(x, weight if node.get("transB", 0) else _transposed(weight), bias, dequantize)]


def _linear(x: Steps, weight: Constant, bias: Constant | None, dequantize: bool) -> Steps:
    """x times the transpose of weight [N, K]."""
    return _linear_of(x, matrix("weight", weight, dequantize), bias)


def _linear_of(x: Steps, tensors: dict[str, Array], bias: Constant | None) -> Steps:
    x.channels_at(-1)
    N, K = tensors["weight"].shape
    if bias is not None:
        tensors |= {"bias": _bias(bias.array, N)}
    made = Made("linear", {"in": K, "out": N}, tensors, (x.unpadded().made,))
    return Steps(made, (*x.axes[:-1], (Axis(N, "C"),)))


def _bias(array: Array, N: int) -> Array:
    if array.size not in (1, N):
        raise UnsupportedError(f"its bias has {array.size} elements, not {N}")
    return np.ascontiguousarray(np.broadcast_to(array.astype(np.float32).reshape(-1), N))


def conv(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    """[B, C, T]; without neighbours it is a linear layer."""
    x, weight = _steps(inputs[0]), _constant(inputs[1])
    if weight.array.ndim != 3 or len(x.axes) != 3:
        raise UnsupportedError("it has more than one axis besides batch and channels")
    if node.get("group", 1) != 1 or node.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UnsupportedError("it has group or auto_pad")
    N, C, k = weight.array.shape
    x.single(0, "B")
    x.channels_at(1)
    time = x.single(2, "T")
    stride, dilation = int(node.get("strides", [1])[0]), int(node.get("dilations", [1])[0])
    left, right = (a + b for a, b in zip(x.pad, node.get("pads", [0, 0]), strict=True))
    flat = _mapped(weight, lambda part: _flat(part, weight.array.shape))
    tensors = matrix("weight", flat, dequantize)
    if len(inputs) > 2 and inputs[2] is not None:
        tensors["bias"] = _bias(_constant(inputs[2]).array, N)
    fields = {"in": C, "out": N}
    if (k, stride, left, right) == (1, 1, 0, 0):
        made = Made("linear", fields, tensors, (x.made,))
    else:
        fields |= {"kernel": k, "stride": stride, "dilation": dilation, "left": left, "right": right}
        made = Made("conv1d", fields, tensors, (x.made,))
    if stride != 1 or left + right != dilation * (k - 1):
        time = Axis(f"steps of {node.outputs[0]}", "T")
    return [Steps(made, (x.axes[0], (Axis(N, "C"),), (time,)))]


def _flat(part: Array, shape: tuple[int, ...]) -> Array:
    """[N, C, k] as [N, k * C]; scales of size 1 there stay so."""
    if part.shape[1:] == (1, 1):
        return np.asarray(part[:, :, 0])
    return np.asarray(np.broadcast_to(part, shape).transpose(0, 2, 1).reshape(shape[0], shape[1] * shape[2]))


def pad(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    """Zeros before and after the steps, for a Conv to take."""
    x = _steps(inputs[0])
    amounts = node.attributes.get("pads")
    amounts = [int(v) for v in (_constant(inputs[1]).array if amounts is None else np.asarray(amounts))]
    value = node.get("value", 0.0)
    if len(inputs) > 2 and inputs[2] is not None:
        value = float(_constant(inputs[2]).array.reshape(-1)[0])
    where = [n % len(x.axes) for n, amount in enumerate(amounts) if amount]
    if node.get("mode", "constant") != "constant" or value or min(amounts) < 0 or len(inputs) > 3:
        raise UnsupportedError("it adds something else than zeros")
    if not where:
        return [x]
    if len(set(where)) > 1:
        raise UnsupportedError("it adds zeros to several axes")
    x.single(where[0], "T")
    n = where[0]
    return [replace(x, pad=(x.pad[0] + amounts[n], x.pad[1] + amounts[n + len(x.axes)]))]


def add(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    """A bias, or a sum of layers."""
    a, b = inputs[:2]
    if isinstance(a, Constant) and isinstance(b, Steps):
        a, b = b, a
    x = _steps(a)
    if isinstance(b, Steps):
        _same_axes(x, b)
        return [x.with_made(Made("add", {}, {}, (x.unpadded().made, b.unpadded().made)))]
    bias = _constant(b)
    if x.made.type not in ("linear", "conv1d"):
        raise UnsupportedError(f"it adds a constant to what is {x.made.type}, not linear or conv1d")
    if bias.array.ndim > len(x.axes) or bias.array.dtype == object:
        raise UnsupportedError("its constant has more axes than the sequence")
    sizes = [1] * (len(x.axes) - bias.array.ndim) + list(bias.array.shape)
    where = [n for n, size in enumerate(sizes) if size != 1]
    if len(where) > 1 or (where and x.channels_at(where[0]) != where[0]):
        raise UnsupportedError("its constant is not one number for each channel")
    total = _bias(bias.array, x.made.fields["out"])
    total = x.made.tensors["bias"] + total if "bias" in x.made.tensors else total
    return [x.with_made(replace(x.made, tensors=x.made.tensors | {"bias": total}))]


def concat(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    """Along the channels; the two directions of an LSTM become one layer."""
    parts = [_steps(value) for value in inputs]
    axis = parts[0].channels_at(node.get("axis", 0))
    for part in parts:
        part.channels_at(axis)
        _same_axes(parts[0], part, axis)
    mades = [part.unpadded().made for part in parts]
    both = _both_directions(mades)
    sizes = [product([channel.size for channel in part.axes[axis]]) for part in parts]
    size = sum(n for n in sizes if isinstance(n, int)) if all(isinstance(n, int) for n in sizes) else node.outputs[0]
    group: Group = (Axis(size, "C"),)
    axes = (*parts[0].axes[:axis], group, *parts[0].axes[axis + 1 :])
    return [Steps(Made("concat", {}, {}, tuple(mades)) if both is None else both, axes)]


def _both_directions(mades: Sequence[Made]) -> Made | None:
    """Two LSTMs of one input, the second in reverse, as one; None where they are something else."""
    if len(mades) != 2 or any(made.type != "lstm" for made in mades) or mades[0].sources != mades[1].sources:
        return None
    fields = [{k: v for k, v in made.fields.items() if k not in ("reverse", "bidirectional")} for made in mades]
    directions = [made.fields.get("reverse", made.fields["bidirectional"] or None) for made in mades]
    if fields[0] != fields[1] or directions != [None, True] or mades[1].fields["bidirectional"]:
        return None
    made = mades[0]
    return replace(made, fields=made.fields | {"bidirectional": True}, tensors=made.tensors | mades[1].tensors)


def _same_axes(a: Steps, b: Steps, but: int | None = None) -> None:
    """The steps and rows of both are the same, in one layout."""

    def known(steps: Steps) -> list[object]:
        sizes: list[object] = []
        for n, group in enumerate(steps.axes):
            mine = [axis for axis in group if axis.size != 1]
            if n != but:
                sizes.append([axis.size if axis.role == "C" else axis for axis in mine])
        return sizes

    if len(a.axes) != len(b.axes) or known(a) != known(b):
        raise UnsupportedError("its inputs differ in their axes")


def gather(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    """Rows of a constant: an embedding, or what DequantizeLinear makes one."""
    if not isinstance(inputs[0], Constant):
        raise UnsupportedError("it picks from a sequence")
    table, index = inputs[0], _steps(inputs[1])
    if node.get("axis", 0) != 0 or table.array.ndim != 2 or index.made.sources:
        raise UnsupportedError("it is no lookup of the model's input in the rows of a matrix")
    V, D = table.array.shape
    axes = (*index.axes, (Axis(D, "C"),))
    if np.issubdtype(table.array.dtype, np.integer):
        return [Steps(Made("lookup", {}, {"weight": table.array}, (index.made,)), axes)]
    tensors = _table(table, dequantize)
    return [Steps(Made("embedding", {"size": V, "dim": D}, tensors, (index.made,)), axes)]


def dequantize_lookup(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    """What was looked up among integers; a second one of the same gives an equal layer."""
    x, scale = _steps(inputs[0]), _constant(inputs[1])
    zero = _constant(inputs[2]).array if len(inputs) > 2 and inputs[2] is not None else np.zeros(1, np.int32)
    if x.made.type != "lookup" or scale.array.size > 1:
        raise UnsupportedError("it is not of rows that were looked up in integers of one scale")
    values = x.made.tensors["weight"].astype(np.int32) - zero.astype(np.int32).reshape(-1)
    scales = scale.array.astype(np.float32).reshape(1, 1)
    tensors = _table(Constant(values * scales, values, scales), dequantize)
    V, D = values.shape
    return [x.with_made(Made("embedding", {"size": V, "dim": D}, tensors, x.made.sources))]


def _table(table: Constant, dequantize: bool) -> dict[str, Array]:
    """A lookup has no arithmetic, so integers of more than 8 bits become exactly the numbers that they stand for."""
    try:
        return matrix("weight", table, dequantize)
    except UnsupportedError:
        return matrix("weight", table, True)


def dynamic_quantize(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    x = _steps(inputs[0]).unpadded()
    return [Rounded(x, part) for part in ("values", "scale", "zero")]


def matmul_integer(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    x, weight, x_zero, zero = [*inputs, None, None][:4]
    if not isinstance(x, Rounded) or not isinstance(x_zero, Rounded) or x.part != "values" or x_zero.part != "zero":
        raise UnsupportedError("its first input does not come from DynamicQuantizeLinear")
    return [IntegerProduct(x.steps, _centred(_constant(weight), zero))]


def _centred(weight: Constant, zero: Value) -> Array:
    """Integers [K, N] less their zero points, one or one for each column."""
    zeros = np.zeros(1, np.int32) if zero is None else _constant(zero).array.astype(np.int32).reshape(-1)
    return np.asarray(weight.array.astype(np.int32) - zeros)


def multiply(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    """Scales of an integer product, in either order."""
    order: tuple[type, ...] = (IntegerProduct, Rounded, Constant)
    if any(type(value) not in order for value in inputs):
        raise UnsupportedError("it multiplies a sequence")
    a, b = sorted(inputs, key=lambda value: order.index(type(value)))
    if isinstance(a, Rounded) and isinstance(b, Constant) and a.part == "scale" and a.factor is None:
        return [replace(a, factor=b.array)]
    if not isinstance(a, IntegerProduct):
        raise UnsupportedError("it is not the scale of an integer product")
    if isinstance(b, Rounded) and b.part == "scale" and b.steps.made is a.steps.made and not a.scaled:
        return [replace(a, scaled=True)] if b.factor is None else [_scaled(a, b.factor, None, dequantize)]
    if isinstance(b, Constant) and a.scaled:
        return [_scaled(a, b.array, None, dequantize)]
    raise UnsupportedError("it is not the scale of an integer product")


def _scaled(x: IntegerProduct, scale: Array, bias: Constant | None, dequantize: bool) -> Steps:
    return _linear_of(x.steps, integers("weight", x.integers.T, scale.reshape(-1, 1), dequantize), bias)


def matmul_integer_to_float(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    """com.microsoft.MatMulIntegerToFloat: A, B, scales, zero points, bias."""
    x, weight, x_scale, scale, _, zero, bias = [*inputs, *[None] * 7][:7]
    if not isinstance(x, Rounded) or not isinstance(x_scale, Rounded):
        raise UnsupportedError("its first input does not come from DynamicQuantizeLinear")
    found = IntegerProduct(x.steps, _centred(_constant(weight), zero), True)
    return [_scaled(found, _constant(scale).array, None if bias is None else _constant(bias), dequantize)]


def dynamic_quantize_matmul(node: Node, inputs: Sequence[Value], dequantize: bool) -> list[Value]:
    """com.microsoft.DynamicQuantizeMatMul: A, B, scale, zero point, bias."""
    x, weight, scale, zero, bias = [*inputs, *[None] * 5][:5]
    found = IntegerProduct(_steps(x), _centred(_constant(weight), zero), True)
    return [_scaled(found, _constant(scale).array, None if bias is None else _constant(bias), dequantize)]


def _transposed(weight: Constant) -> Constant:
    return _mapped(weight, lambda part: part.T)


def _mapped(weight: Constant, function: Callable[[Array], Array]) -> Constant:
    """The array, its integers and their scale, each put through ``function``."""
    if weight.integers is None or weight.scale is None:
        return Constant(function(weight.array))
    return Constant(function(weight.array), function(weight.integers), function(weight.scale))


def _steps(value: Value) -> Steps:
    if not isinstance(value, Steps):
        raise UnsupportedError("its input is no sequence")
    return value


def _constant(value: Value) -> Constant:
    if not isinstance(value, Constant):
        raise UnsupportedError("its weights are no constants")
    return value


HANDLERS: dict[str, Handler] = {
    "Add": add,
    "Concat": concat,
    "Conv": conv,
    "DequantizeLinear": dequantize_lookup,
    "DynamicQuantizeLinear": dynamic_quantize,
    "Gather": gather,
    "Gemm": gemm,
    "MatMul": matmul,
    "MatMulInteger": matmul_integer,
    "Mul": multiply,
    "Pad": pad,
    "Relu": activation,
    "Sigmoid": activation,
    "Softmax": activation,
    "Tanh": activation,
    "com.microsoft.DynamicQuantizeMatMul": dynamic_quantize_matmul,
    "com.microsoft.MatMulIntegerToFloat": matmul_integer_to_float,
}

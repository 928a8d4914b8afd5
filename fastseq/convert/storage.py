"""``stored``: the matrices of a model in fewer bits. ``fastseq.reference.store`` is the definition."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import _check
from fastseq.convert.matrices import Array, floats

WEIGHTS = ("int8", "int4", "bfloat16")
_TYPES = ("embedding", "linear", "conv1d", "lstm")
_MATRIX = re.compile(r"weight(_(ih|hh|hr)_l\d+(_reverse)?)?(\.[ifgo])?(\.(up|down))?")


def stored(model: Mapping[str, Any], weights: str, group: int | None = None) -> dict[str, Any]:
    """A model whose matrices are kept in fewer bits; factors and gates each on their own.

    Matrices of integers stay as they are, and so do biases, initial states, codebooks and decoders.

    Args:
        model: "layers" and "tensors", as ``from_onnx`` gives them; anything else in it is passed on.
        weights: "int8" or "int4" with a scale for each row, or each ``group`` neighbours in it; or "bfloat16".
        group: a multiple of 8. A layer that has integers already keeps its own.

    Raises:
        ArgumentError: naming the argument, or the matrix that is not finite.
    """
    _check.one_of("stored", "weights", weights, WEIGHTS)
    if group is not None and (weights == "bfloat16" or group < 8 or group % 8):
        _check.fail("stored", "group", "None, or a multiple of 8 with weights 'int8' or 'int4'", group)
    layers, tensors = [], dict(model["tensors"])
    for layer in model["layers"]:
        layers.append(_store_layer(layer, tensors, weights, group) if layer["type"] in _TYPES else dict(layer))
    return {**model, "layers": layers, "tensors": tensors}


def _store_layer(
    layer: Mapping[str, Any], tensors: dict[str, Array], weights: str, group: int | None
) -> dict[str, Any]:
    """The new description; changes ``tensors``."""
    start = f"{layer['name']}."
    names = [n for n in tensors if n.startswith(start) and _MATRIX.fullmatch(n.removeprefix(start))]
    mine = [n for n in names if f"{n}.scale" not in tensors]
    own = layer.get("group") if len(mine) < len(names) else group
    bits = 4 if weights == "int4" else 8
    for name in mine:
        values = floats(np.asarray(tensors[name]))
        if not np.isfinite(values).all():
            _check.fail("stored", name, "finite", "a matrix with NaN or infinity")
        if weights == "bfloat16":
            tensors[name] = bfloat16(values)
        else:
            integers, tensors[f"{name}.scale"] = integer_rows(values, bits, own or 0)
            tensors[name] = nibbles(integers) if bits == 4 else integers
    new = {key: value for key, value in layer.items() if key != "group"}
    return new if own is None else new | {"group": own}


def integer_rows(weight: Array, bits: int, group: int) -> tuple[Array, Array]:
    """int8 [N, K] and float32 scales [N, groups]; group: neighbours that share a scale, 0: all."""
    N, K = weight.shape
    group = group if 0 < group < K else max(K, 1)
    most = np.float32(2 ** (bits - 1) - 1)
    padded = np.pad(weight, ((0, 0), (0, -K % group))).reshape(N, -1, group)
    scale = np.abs(padded).max(-1, initial=0) / most
    found = np.rint(padded / np.where(scale > 0, scale, np.float32(1))[..., None]).clip(-most, most)
    return np.ascontiguousarray(found.astype(np.int8).reshape(N, -1)[:, :K]), scale


def nibbles(integers: Array) -> Array:
    """Integers of 4 bits [N, K] as uint8 [N, (K + 1) // 2], even columns in the low halves."""
    shifted = np.pad((integers + 8).astype(np.uint8), ((0, 0), (0, integers.shape[1] % 2)), constant_values=8)
    return np.ascontiguousarray(shifted[:, ::2] | shifted[:, 1::2] << 4)


def bfloat16(values: Array) -> Array:
    """Finite float32 to the bits of the nearest bfloat16, ties to even, as uint16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

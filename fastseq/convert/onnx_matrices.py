"""The matrices of layers as ONNX stores them: arrays, or integers with scales and zero points."""

from __future__ import annotations

import numpy as np

from fastseq.convert.onnx_values import Array, Constant, UnsupportedError


def floating(array: Array) -> Array:
    """float16 as it is, anything else as float32."""
    return np.ascontiguousarray(array, None if array.dtype == np.float16 else np.float32)


def matrix(name: str, weight: Constant, dequantize: bool) -> dict[str, Array]:
    """The tensors of a matrix [N, K]."""
    if weight.array.dtype == object or weight.array.ndim != 2:
        raise UnsupportedError(f"its {name} is not a matrix")
    if weight.integers is None or weight.scale is None:
        return {name: floating(weight.array)}
    return integers(name, weight.integers, weight.scale, dequantize)


def integers(name: str, values: Array, scale: Array, dequantize: bool) -> dict[str, Array]:
    """The tensors of a matrix of integers [N, K], zero points subtracted, with scales that broadcast to it.

    Scales of columns have no place in a matrix of integers.
    """
    if scale.ndim > 1 and scale.shape[1] > 1:
        if not dequantize:
            raise UnsupportedError("its integers have scales along the summed axis; dequantize=True takes their values")
    elif not dequantize and values.size and not -127 <= values.min() <= values.max() <= 127:
        raise UnsupportedError(
            f"its integers less their zero point are {values.min()}..{values.max()}, beyond -127..127; "
            "dequantize=True takes their values"
        )
    if dequantize:
        return {name: np.ascontiguousarray(values.astype(np.float32) * scale.astype(np.float32), np.float32)}
    rows = np.broadcast_to(scale.astype(np.float32), (len(values), 1))
    return {name: np.ascontiguousarray(values, np.int8), f"{name}.scale": np.ascontiguousarray(rows)}

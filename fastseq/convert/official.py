"""What the readers of the papers' own checkpoints give, and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastseq.convert.matrices import Array
from fastseq.convert.onnx_read import ConversionError


class Official(NamedTuple):
    """A checkpoint of a paper's code, in our names and layouts."""

    state: dict[str, Array]  # a state_dict
    module: str  # what loads it, in words
    model: dict[str, Any] | None  # "layers" and "tensors" of a deployed model
    why_not: str  # why there is no ``model``; empty where there is one
    notes: list[str]  # what the file does not tell, one sentence each


def needed(function: str, tensors: Mapping[str, Array], name: str, symbols: str, *sizes: int | None) -> Array:
    """The tensor ``name`` of these sizes; None stands for any.

    Raises:
        ConversionError: it is not there, or has other sizes.
    """
    value = tensors.get(name)
    if value is None:
        some = ", ".join([*tensors][:6]) + (", ..." if len(tensors) > 6 else "")
        raise ConversionError(f"{function}: the file has no {name} (there is {some or 'nothing'})")
    right = value.ndim == len(sizes) and all(s in (None, v) for s, v in zip(sizes, value.shape, strict=True))
    if not right:
        shown = ", ".join("any" if s is None else str(s) for s in sizes)
        raise ConversionError(f"{function}: {name} must be [{symbols}] = [{shown}], got {list(value.shape)}")
    return value

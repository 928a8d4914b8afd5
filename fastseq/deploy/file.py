"""Writing models, and telling what is in a file. Whether a file is right is judged by the compiled loader alone."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import _check
from fastseq._core import Model, ModelError

FORMAT = "fastseq 1"
Array = np.ndarray[Any, Any]
# numpy's name -> that of the file
_TYPES = {"float32": "float32", "float16": "float16", "uint16": "bfloat16", "int8": "int8", "uint8": "uint8"}
_READ = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a model as one safetensors file: tensors, and in its metadata the description of the layers.

    What was written is read back before it replaces an older file.

    Args:
        model: anything with ``export_state()``, or what that returns: {"layers": [descriptions], "tensors": {name:
            array}}. Arrays are float32, float16, int8, uint8 (two numbers of 4 bits each) or uint16, which holds
            bfloat16.
        path: of the file.

    Raises:
        ArgumentError: without ``export_state``, or with arrays of other types.
        ModelError: what the loader would say of the file.
    """
    state = model.export_state() if hasattr(model, "export_state") else model
    if not isinstance(state, Mapping) or not {"layers", "tensors"} <= set(state):
        expected = "a module with export_state(), or a dict of layers and tensors"
        _check.fail("save", "model", expected, type(model).__name__)
    data = _serialized(list(state["layers"]), state["tensors"])
    Model.parse(data)
    folder = os.path.dirname(os.path.abspath(path))
    handle, name = tempfile.mkstemp(dir=folder, prefix=".fastseq-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model's file holds: its "model" as it was written, "tensors", "bytes", "input", "output", "state_size".

    Raises:
        FileError, ModelError: as ``Model.load``.
    """
    found: dict[str, Any] = json.loads(Model.load(os.fspath(path)).description)
    return found


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``save`` was given, {"layers": [descriptions], "tensors": {name: array}}; bfloat16 comes as uint16.

    Raises:
        OSError: the file cannot be read.
        ModelError: what the loader says of it.
    """
    model, data = opened(path)
    layers: list[dict[str, Any]] = json.loads(model.description)["model"]["layers"]
    return {"layers": layers, "tensors": arrays(data)}


def opened(path: str | os.PathLike[str]) -> tuple[Model, bytes]:
    """The model in a file, and the file's bytes: the very ones that the loader has seen."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        return Model.parse(data), data
    except ModelError as error:
        raise ModelError(f"{os.fspath(path)}: {error}") from None


def arrays(data: bytes) -> dict[str, Array]:
    """The tensors in the bytes of a file that the loader took."""
    size = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            first, last = (8 + size + offset for offset in entry["data_offsets"])
            values = np.frombuffer(memoryview(data)[first:last], _READ[entry["dtype"]])
            found[name] = values.reshape(entry["shape"]).copy()  # aligned, which a file is not
    return found


def source_of(tensors: Mapping[str, Array]) -> str:
    """The hash of tensors, whatever order they have in a file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return f"sha256:{digest.hexdigest()}"


def _serialized(layers: list[dict[str, Any]], tensors: Mapping[str, Any]) -> bytes:
    import safetensors

    specs, kept = {}, {}
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        if str(array.dtype) not in _TYPES:
            _check.fail("save", f"tensors[{name!r}]", f"one of {', '.join(_TYPES)}", array.dtype)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        kept[name] = array  # alive until it is written
        specs[name] = safetensors.TensorSpec(
            dtype=_TYPES[str(array.dtype)],
            shape=list(tensors[name].shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
    model = {"layers": layers, "source": source_of(kept)}
    return bytes(safetensors.serialize(specs, {"format": FORMAT, "model": json.dumps(model)}))

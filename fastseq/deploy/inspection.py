"""What a model's file holds, as data and as text: how every matrix is kept, what that takes, and what checks say."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastseq._core import Model
from fastseq.deploy.file import FORMAT, Array, arrays, opened, source_of

GATES = "ifgo"
MOST_STATE = 2**24  # numbers; a file of few bytes may claim a state that no machine has room for
Layer = Mapping[str, Any]
Entry = dict[str, Any]


def contents(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in the file of a deployed model.

    Returns:
        "file", "format", "source", "input" and "output" ({"index", "size"}), "state_size", "looks_ahead" (why the model
        cannot run piece by piece, or ""); "layers", each with "name", "type", "fields" and its "tensors". Of each of
        these "name", "shape" [N, K] of what it stands for, "kept" in words, "rank" of factors or None, "parameters"
        (numbers in the file, scales not counted), "bytes" (scales counted) and "float32_bytes" (of [N, K]). The same
        three sums of layers and of the model; "file_bytes". "checks": "name", "passed" and in words what was "found".

    Raises:
        OSError: the file cannot be read.
        ModelError: what the loader says of it.
    """
    model, data = opened(path)
    told, tensors = json.loads(model.description), arrays(data)
    rest, layers = dict(tensors), []
    for layer in told["model"]["layers"]:
        fields = {key: value for key, value in layer.items() if key not in ("name", "type")}
        entries = _entries(layer, rest)
        layers.append({"name": layer["name"], "type": layer["type"], "fields": fields, "tensors": entries})
        layers[-1] |= _sums(entries)
    source = told["model"].get("source", "")
    return {
        "file": os.fspath(path),
        "format": FORMAT,
        "source": source,
        **{key: told[key] for key in ("input", "output", "state_size")},
        "looks_ahead": model.looks_ahead,
        "layers": layers,
        **_sums(layers),
        "file_bytes": len(data),
        "checks": [
            _check("loads", True, "the loader takes it"),
            _check_source(source, tensors),
            _check("tensors", not rest, f"no layer reads {', '.join(rest)}" if rest else "layers read them all"),
            _check_run(model),
        ],
    }


def other_contents(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The metadata and tensors of any safetensors file; None where it is none."""
    import safetensors

    try:
        with safetensors.safe_open(os.fspath(path), "numpy") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            metadata = dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return None
    tensors = {name: {"dtype": part.get_dtype(), "shape": list(part.get_shape())} for name, part in slices.items()}
    return {"file": os.fspath(path), "metadata": metadata, "tensors": tensors}


def _entries(layer: Layer, rest: dict[str, Array]) -> list[Entry]:
    """Of the tensors of a layer, which leave ``rest``."""
    found: list[Entry] = []
    for name, (N, K) in _matrices(layer).items():
        full = f"{layer['name']}.{name}"
        if full in rest or f"{full}.up" in rest:
            found.append(_matrix(layer, name, N, K, rest))
        else:
            found += [_matrix(layer, f"{name}.{gate}", N // 4, K, rest) for gate in GATES]
    for name in _vectors(layer):
        array = rest.pop(f"{layer['name']}.{name}", None)
        if array is not None:
            sizes = {"parameters": array.size, "bytes": array.nbytes, "float32_bytes": 4 * array.size}
            found.append({"name": name, "shape": list(array.shape), "kept": _type(array), "rank": None, **sizes})
    return found


def _matrices(layer: Layer) -> dict[str, tuple[int, int]]:
    """The sizes [N, K] of the matrices that the loader reads."""
    if layer["type"] == "embedding":
        return {"weight": (layer["size"], layer["dim"])}
    if layer["type"] in ("linear", "conv1d"):
        return {"weight": (layer["out"], layer["in"] * layer.get("kernel", 1))}
    if layer["type"] != "lstm":
        return {}
    H, P, found = layer["hidden_size"], layer.get("proj_size", 0), {}
    for suffix, K in _suffixes(layer):
        found[f"weight_ih{suffix}"] = (4 * H, K)
        found[f"weight_hh{suffix}"] = (4 * H, P or H)
        if P:
            found[f"weight_hr{suffix}"] = (P, H)
    return found


def _vectors(layer: Layer) -> list[str]:
    """What else the loader reads, where it is there."""
    if layer["type"] == "lstm":
        return [f"{name}{suffix}" for suffix, _ in _suffixes(layer) for name in ("bias", "h_start", "c_start")]
    others = {"residual_vq": ["codebooks"], "crf": ["start", "transitions", "end"]}
    return others.get(layer["type"], ["bias"] if layer["type"] in ("linear", "conv1d") else [])


def _suffixes(layer: Layer) -> list[tuple[str, int]]:
    """Of every layer and direction of an lstm, with the width of its input."""
    ends = ("_reverse",) if layer.get("reverse") else ("", "_reverse")[: 1 + layer.get("bidirectional", False)]
    width = len(ends) * (layer.get("proj_size", 0) or layer["hidden_size"])
    return [
        (f"_l{n}{end}", width if n else layer["input_size"]) for n in range(layer.get("num_layers", 1)) for end in ends
    ]


def _matrix(layer: Layer, name: str, N: int, K: int, rest: dict[str, Array]) -> Entry:
    full, group = f"{layer['name']}.{name}", layer.get("group", 0)
    rank = None
    if full in rest:
        kept, numbers, size = _part(full, N, K, group, rest)
    else:
        rank = len(rest[f"{full}.down"])
        up, down = _part(f"{full}.up", N, rank, group, rest), _part(f"{full}.down", rank, K, group, rest)
        kept = f"rank {rank}, {up[0]}" + ("" if up[0] == down[0] else f" and {down[0]}")
        numbers, size = up[1] + down[1], up[2] + down[2]
    sizes = {"parameters": numbers, "bytes": size, "float32_bytes": 4 * N * K}
    return {"name": name, "shape": [N, K], "kept": kept, "rank": rank, **sizes}


def _part(name: str, N: int, K: int, group: int, rest: dict[str, Array]) -> tuple[str, int, int]:
    """How an array [N, K] is kept, how many numbers that are, and the bytes."""
    values = rest.pop(name)
    if values.dtype not in (np.int8, np.uint8):
        return _type(values), N * K, values.nbytes
    by = f" by {group}" if 0 < group < K else ""
    kind = "int8" if values.dtype == np.int8 else "int4"
    return kind + by, N * K, values.nbytes + rest.pop(f"{name}.scale").nbytes


def _type(values: Array) -> str:
    return "bfloat16" if values.dtype == np.uint16 else values.dtype.name


def _sums(entries: Sequence[Entry]) -> Entry:
    return {key: sum(entry[key] for entry in entries) for key in ("parameters", "bytes", "float32_bytes")}


def _check(name: str, passed: bool, found: str) -> Entry:
    return {"name": name, "passed": passed, "found": found}


def _check_source(source: Any, tensors: Mapping[str, Array]) -> Entry:
    if not source:
        return _check("hash", True, "the file tells none")
    passed = source == source_of(tensors)
    return _check("hash", passed, "that of its tensors" if passed else "another than that of its tensors")


def _check_run(model: Model) -> Entry:
    """One step of zeros."""
    if model.state_size > MOST_STATE:
        return _check("runs", False, f"not tried, its state has {model.state_size:,} numbers")
    shape = (1, 1) if model.input_is_index else (1, 1, model.input_size)
    y, _ = model.run(np.zeros(shape, np.int32 if model.input_is_index else np.float32))
    finite = bool(np.isfinite(y).all())
    return _check("runs", finite, f"a step of zeros gives {'' if finite else 'what are not '}finite numbers")

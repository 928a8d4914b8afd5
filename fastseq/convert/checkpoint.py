"""``from_checkpoint``: tensors with torch's names as the layers and tensors of a deployed model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastseq import _check
from fastseq.convert.matrices import Array
from fastseq.convert.onnx_read import ConversionError
from fastseq.convert.onnx_values import Made
from fastseq.convert.stacking import chained

ACTIVATIONS = ("relu", "tanh", "sigmoid", "softmax")
_RECURRENT = re.compile(r"(weight_ih|weight_hh|weight_hr|bias_ih|bias_hh)(_l\d+)?(_reverse)?")
Parts = Mapping[str, Array]


def from_checkpoint(
    source: Any,
    *,
    prefix: str = "",
    order: Sequence[str] | None = None,
    fields: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The layers and tensors of a model whose parameters have the names that torch gives them.

    Taken are LSTM and LSTMCell (``weight_ih_l0`` or ``weight_ih``, and so on), Linear, Embedding, and Conv1d. What a
    checkpoint does not tell stands in ``order`` and ``fields``: activations, strides, gates.

    Args:
        source: names to tensors or arrays, or a file: .safetensors, else one of torch.save, which is read with
            weights_only=True and so runs no code. Of nested ones the dictionary "state_dict",
            "model_state_dict" or "model" is taken.
        prefix: of the names to take; it is removed.
        order: the modules one after the other, such as ["embedding", "lstm", "relu", "head"]; "relu", "tanh",
            "sigmoid" and "softmax" are activations. None: all modules, as they come in the checkpoint.
        fields: of layers by their modules' names: {"conv": {"left": 2, "right": 0}, "head": {"type": "linear"}}.

    Returns:
        "layers", called as the modules are, and "tensors".

    Raises:
        ConversionError: names every tensor that is in no layer, and layers that do not fit one another.
    """
    tensors = tensors_of("from_checkpoint", source)
    modules: dict[str, dict[str, Array]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            name, _, parameter = key.removeprefix(prefix).rpartition(".")
            modules.setdefault(name, {})[parameter] = value
    fields = fields or {}
    wanted = list(modules) if order is None else list(order)
    unknown = [n for n in [*wanted, *fields] if n not in modules and not (n in wanted and n in ACTIVATIONS)]
    if unknown:
        _check.fail("from_checkpoint", "order and fields", f"names among {', '.join(modules)}", ", ".join(unknown))
    parts, problems = _layers(wanted, modules, fields)
    if problems:
        raise ConversionError("from_checkpoint: what these tensors are is not known:\n" + "\n".join(problems))
    _check_sizes(parts, order is None)
    layers, found = chained(_distinct(parts))
    return {"layers": layers, "tensors": found}


def _distinct(parts: Sequence[tuple[str, Made]]) -> list[tuple[str, Made]]:
    """Names that are in use already get a number."""
    found: dict[str, Made] = {}
    for name, made in parts:
        base, n = name or made.type, 0
        name = base
        while name in found:
            n += 1
            name = f"{base}_{n}"
        found[name] = made
    return list(found.items())


def tensors_of(function: str, source: Any, state: str | None = None) -> dict[str, Array]:
    """The arrays by name of a mapping or a file; of nested mappings the one called ``state``, or a usual one.

    Raises:
        ArgumentError: ``source`` is neither, or it has no mapping called ``state``.
    """
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            _check.fail(function, "source", "a mapping of tensors or a file", repr(str(source)))
        source = _read(Path(source))
    if state is not None:
        inside = [str(k) for k, v in source.items() if isinstance(v, Mapping)] if isinstance(source, Mapping) else []
        if state not in inside:
            expected = f"one of {', '.join(inside)}" if inside else "None, since nothing is nested"
            _check.fail(function, "state", expected, repr(state))
        source = source[state]
    while isinstance(source, Mapping):
        inner = next(
            (source[k] for k in ("state_dict", "model_state_dict", "model") if isinstance(source.get(k), Mapping)), None
        )
        if inner is None:
            return {str(k): _array(v) for k, v in source.items() if hasattr(v, "shape")}
        source = inner
    _check.fail(function, "source", "a mapping of tensors or a file", type(source).__name__)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        import safetensors

        with safetensors.safe_open(str(path), "numpy") as file:
            names = file.offset_keys() if hasattr(file, "offset_keys") else file.keys()
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            return {n: _bfloat16(path, n) if kind == "BF16" else file.get_tensor(n) for n, kind in kinds.items()}
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _bfloat16(path: Path, name: str) -> Array:
    """numpy has no such numbers; as float32 they are the same."""
    import json

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
        first, last = entry["data_offsets"]
        file.seek(8 + size + first)
        bits = np.frombuffer(file.read(last - first), "<u2").astype(np.uint32) << 16
    return np.asarray(bits.view(np.float32).reshape(entry["shape"]))


def _array(value: Any) -> Array:
    """float16 as it is, other floats as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() and value.element_size() != 2 else value).contiguous()
        value = value.float().numpy() if str(value.dtype) == "torch.bfloat16" else value.numpy()
    array = np.asarray(value)
    return array if array.dtype == np.float16 or array.dtype.kind not in "fV" else array.astype(np.float32)


def _layers(
    wanted: Sequence[str], modules: Mapping[str, Parts], fields: Mapping[str, Mapping[str, Any]]
) -> tuple[list[tuple[str, Made]], list[str]]:
    """The layers in their order, and a line for every tensor that is none's."""
    found: list[tuple[str, Made]] = []
    problems: list[str] = []
    for n, name in enumerate(wanted):
        if name not in modules:
            found.append((name, Made(name)))
            continue
        parts, more = modules[name], dict(fields.get(name, {}))
        kind = more.pop("type", None) or ("conv1d" if more.keys() & {"left", "right", "stride", "dilation"} else None)
        kind = kind or _kind_of(name, parts, [modules[m] for m in wanted[n + 1 :] if m in modules], n)
        why = "" if kind in MAKERS else kind
        try:
            made = MAKERS[kind](parts, more) if not why else None
        except KeyError as error:
            made, why = None, f"it has no {error}"
        if made is None:
            shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in parts.items())
            problems.append(f"  {name or '(no name)'} ({shapes}): {why}")
        else:
            made.fields.update(more)
            found.append((name, made))
    return found, problems


def _kind_of(name: str, parts: Parts, later: Sequence[Parts], place: int) -> str:
    """The type of a layer, or why it is not known."""
    if all(_RECURRENT.fullmatch(key) for key in parts):
        return "lstm" if any(key.startswith("weight_hh") for key in parts) else "it is not known"
    weight = parts.get("weight")
    if weight is None or not set(parts) <= {"weight", "bias"} or weight.ndim not in (2, 3):
        return "it is no LSTM, Linear, Embedding or Conv1d"
    if weight.ndim == 3:
        if weight.shape[2] == 1:
            return "conv1d"
        return "a Conv1d has left and right zeros, stride and dilation: tell them in fields"
    if "bias" in parts or place:
        return "linear"
    if "emb" in name.rsplit(".", 1)[-1].lower():
        return "embedding"
    N, K = weight.shape
    follows = next((size for p in later if (size := _input_size(p)) is not None), None)
    if N == K or follows not in (N, K):
        return "it may be a Linear or an Embedding: tell its type in fields"
    return "embedding" if follows == K else "linear"


def _input_size(parts: Parts) -> int | None:
    for key in ("weight_ih_l0", "weight_ih", "weight"):
        if key in parts and parts[key].ndim > 1:
            return int(parts[key].shape[1])
    return None


def _lstm(parts: Parts, fields: Mapping[str, Any]) -> Made:
    """Biases summed in float32; those of a cell are the first layer's."""
    own = {k if "_l" in k else f"{k}_l0": v for k, v in parts.items()}
    suffixes = sorted({key[len("weight_ih") :] for key in own if key.startswith("weight_ih_l")})
    tensors: dict[str, Array] = {k: v for k, v in own.items() if k.startswith("weight")}
    for suffix in suffixes:
        both = [own[k].astype(np.float32) for k in (f"bias_ih{suffix}", f"bias_hh{suffix}") if k in own]
        if both:
            tensors[f"bias{suffix}"] = both[0] + both[1] if len(both) == 2 else both[0]
    H = len(own["weight_ih_l0"]) // 4
    projected = own.get("weight_hr_l0")
    made = {"input_size": int(own["weight_ih_l0"].shape[1]), "hidden_size": H}
    made |= {"num_layers": len([s for s in suffixes if not s.endswith("_reverse")])}
    made |= {"bidirectional": "_l0_reverse" in suffixes, "proj_size": 0 if projected is None else len(projected)}
    return Made("lstm", {**made, "tau": 1.0, "hard": False}, tensors)


def _linear(parts: Parts, fields: Mapping[str, Any]) -> Made:
    weight = parts["weight"]
    return Made("linear", {"in": int(weight.shape[1]), "out": len(weight)}, _biased(parts, weight))


def _embedding(parts: Parts, fields: Mapping[str, Any]) -> Made:
    weight = parts["weight"]
    return Made("embedding", {"size": len(weight), "dim": int(weight.shape[1])}, {"weight": weight})


def _conv1d(parts: Parts, fields: Mapping[str, Any]) -> Made:
    """[N, C, k] to [N, k * C]; without neighbours it is a linear layer."""
    weight = parts["weight"]
    N, C, k = weight.shape
    flat = np.ascontiguousarray(weight.transpose(0, 2, 1).reshape(N, k * C))
    made: dict[str, Any] = {"in": C, "out": N}
    if k == 1 and not fields:
        return Made("linear", made, _biased(parts, flat))
    made |= {"kernel": k, "stride": 1, "dilation": 1, "left": 0, "right": 0}
    return Made("conv1d", made, _biased(parts, flat))


def _biased(parts: Parts, weight: Array) -> dict[str, Array]:
    return {"weight": weight} | ({"bias": parts["bias"].astype(np.float32)} if "bias" in parts else {})


def _check_sizes(parts: Sequence[tuple[str, Made]], guessed: bool) -> None:
    """Each layer takes what the one before it gives."""
    before, size = "", None
    for name, made in parts:
        f = made.fields
        takes = f.get("input_size", f.get("in"))
        if made.type == "embedding" and before:
            raise ConversionError(f"from_checkpoint: {name} is an embedding after {before}: tell the order")
        if takes is not None and size is not None and takes != size:
            hint = ": tell the order of the modules" if guessed else ""
            raise ConversionError(f"from_checkpoint: {name} takes {takes} channels, {before} gives {size}{hint}")
        if made.type == "lstm":
            size = (f["proj_size"] or f["hidden_size"]) * (1 + f["bidirectional"])
        elif made.type not in ACTIVATIONS:
            size = f.get("out", f.get("dim"))
        before = name


MAKERS = {"lstm": _lstm, "linear": _linear, "embedding": _embedding, "conv1d": _conv1d}

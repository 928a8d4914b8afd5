"""``export_state(model)``: a trained model as plain descriptions of its layers and numpy arrays, for deployment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastseq import _check
from fastseq.calibration import Temperature
from fastseq.nn import MIMO, MIMOConv1d, MIMOEmbedding, MIMOHead, MIMOLinear, ResidualVQ, VectorQuantize
from fastseq.nn._exporting import array, plain_lstm_state
from fastseq.nn._exporting_vq import normalized, vq_state
from fastseq.nn.batch_norm import MaskedBatchNorm

_SILENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.AlphaDropout)  # at inference they do nothing
_PLAIN: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
ACTIVATIONS = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "softmax": nn.Softmax(-1)}


def export_state(model: nn.Module, order: Sequence[str] | None = None) -> dict[str, Any]:
    """``{"layers": [...], "tensors": {...}}`` of an ``nn.Sequential``, of one layer, or of the modules named.

    Layers are dicts that json takes, each with its "type" and "name"; the name of a tensor begins with that of its
    layer. They are computed one after another on [T, B, C], time first, whatever a module's own layout is. Tensors are
    numpy arrays as they are kept: compressed ones stay so, bfloat16 comes as the uint16 of its bits.

    Args:
        model: ``nn.Embedding``, ``Linear``, ``Conv1d``, ``LSTM``, ours, compressed ones, ``VectorQuantize`` and
            ``ResidualVQ``, ``MaskedBatchNorm`` before a ``Linear``, ``ReLU``, ``Tanh``, ``Sigmoid``, ``Softmax`` over
            the features, the layers of MIMO but ``MIMOConv2d``, or an ``nn.Sequential`` of these and of dropout,
            however deep; with ``order`` any module that has these inside. A ``MIMO`` is taken as its backbone.
        order: names of modules inside ``model``, one after the other as its forward calls them, such as ["embedding",
            "lstm", "relu", "head"]; "relu", "tanh", "sigmoid" and "softmax" are activations where no module is so
            called.

    Returns:
        A quantizer that comes last gives its indices, another one its codes, projected out. Layers of MIMO become plain
        ones with the weights of all slots summed, folded or not; ``MIMOHead`` gives K mean probabilities of its slots
        and then their disagreement (``deploy.split_ensemble``), and comes last,
        or right before a ``calibration.Temperature``.

    Raises:
        ArgumentError: naming the layer that has no place in a deployed model, or the option that it has none for.
    """
    found: dict[str, Any] = {"layers": [], "tensors": {}}
    model = model.backbone if isinstance(model, MIMO) else model
    parts = _walk("", model) if order is None else [part for name in order for part in _named(model, name)]
    parts = _with_norms(_with_temperature(parts))
    names: dict[str, int] = {}
    for n, (name, layer) in enumerate(parts):
        names[name] = names.get(name, 0) + 1
        own = name if names[name] == 1 else f"{name}_{names[name]}"
        state = _layer(own, layer, last=n + 1 == len(parts))
        found["layers"] += state["layers"]
        found["tensors"] |= state["tensors"]
    return found


def _named(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    if name in dict(model.named_modules()):
        return _walk(name, model.get_submodule(name))
    if name not in ACTIVATIONS:
        inside = ", ".join(n for n, _ in model.named_modules() if n)
        _check.fail("export_state", "order", f"names among {inside}, or {', '.join(ACTIVATIONS)}", repr(name))
    return [(name, ACTIVATIONS[name])]


def _walk(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(module, MIMO):
        return _walk(name, module.backbone)
    if type(module) is nn.Sequential:
        return [v for n, child in module.named_children() for v in _walk(f"{name}.{n}".strip("."), child)]
    return [] if isinstance(module, _SILENT) else [(name or type(module).__name__.lower(), module)]


def _with_temperature(parts: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """A temperature behind heads becomes part of their weights."""
    last = parts[-1][1] if len(parts) > 1 else None
    if not isinstance(last, Temperature) or not isinstance(parts[-2][1], MIMOHead):
        return parts
    head = copy.deepcopy(parts[-2][1])
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.div_(last.temperature)
    return [*parts[:-2], (parts[-2][0], head)]


def _with_norms(parts: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """A batch norm of vectors before a linear layer becomes part of its weights."""
    found: list[tuple[str, nn.Module]] = []
    for name, layer in parts:
        before = found[-1][1] if found else None
        if isinstance(before, MaskedBatchNorm) and type(layer) is nn.Linear:
            found[-1] = (name, normalized(before, layer))
        else:
            found.append((name, layer))
    return found


def _layer(name: str, module: nn.Module, last: bool) -> dict[str, Any]:
    if isinstance(module, (VectorQuantize, ResidualVQ)):
        return vq_state(module, name, last)
    if isinstance(module, (MIMOLinear, MIMOConv1d, MIMOEmbedding)):
        module = module.to_plain()
    if isinstance(module, MIMOHead):
        return _head(name, module, last)
    own: Callable[[str], dict[str, Any]] | None = getattr(module, "export_state", None)
    if own is not None:
        return own(name)
    kind = type(module)
    if kind in _PLAIN:
        return _state(name, _PLAIN[kind])
    if isinstance(module, nn.Softmax) and module.dim in (-1, 2):
        return _state(name, "softmax")
    if kind is nn.LSTM and isinstance(module, nn.LSTM):
        return plain_lstm_state(module, name)
    if kind is nn.Linear and isinstance(module, nn.Linear):
        sizes = {"in": module.in_features, "out": module.out_features}
        return _state(name, "linear", sizes, weight=module.weight, bias=module.bias)
    if kind is nn.Embedding and isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            _check.fail("export_state", f"{name}.max_norm", "None", module.max_norm)
        return _state(
            name, "embedding", {"size": module.num_embeddings, "dim": module.embedding_dim}, weight=module.weight
        )
    if kind is nn.Conv1d and isinstance(module, nn.Conv1d):
        return _convolution(name, module)
    inside = " (with order=[...] those inside it can be)" if any(True for _ in module.children()) else ""
    _check.fail("export_state", name, f"a layer that a deployed model can have{inside}", kind.__name__)


def _head(name: str, module: MIMOHead, last: bool) -> dict[str, Any]:
    if not last:
        _check.fail("export_state", name, "the last layer, since it gives probabilities", "one that others follow")
    sizes = {"in": module.in_features, "out": module.out_features}
    found = _state(name, "linear", sizes, weight=module.weight, bias=module.bias)
    found["layers"].append({"type": "ensemble", "name": f"{name}.ensemble", "members": module.M})
    return found


def _convolution(name: str, module: nn.Conv1d) -> dict[str, Any]:
    if module.groups != 1 or module.padding_mode != "zeros":
        got = f"groups={module.groups}, padding_mode={module.padding_mode!r}"
        _check.fail("export_state", name, "a Conv1d of one group with zeros around", got)
    kernel, dilation = module.kernel_size[0], module.dilation[0]
    around = dilation * (kernel - 1)
    pad = {"valid": (0, 0), "same": (around // 2, around - around // 2)}
    left, right = pad[module.padding] if isinstance(module.padding, str) else (module.padding[0],) * 2
    sizes = {"in": module.in_channels, "out": module.out_channels, "kernel": kernel, "stride": module.stride[0]}
    weight = module.weight.movedim(2, 1).flatten(1)  # columns: tap by tap
    sizes |= {"dilation": dilation, "left": left, "right": right}
    return _state(name, "conv1d", sizes, weight=weight, bias=module.bias)


def _state(name: str, kind: str, fields: dict[str, Any] | None = None, **tensors: Any) -> dict[str, Any]:
    found = {f"{name}.{key}": array(v.float() if key == "bias" else v) for key, v in tensors.items() if v is not None}
    return {"layers": [{"type": kind, "name": name, **(fields or {})}], "tensors": found}

"""Layers and tensors of deployed models for tests, with random weights in every form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastseq import reference

Model = tuple[list[dict[str, Any]], dict[str, Tensor]]
FORMS = ("dense", "float16", "bfloat16", "int8", "int8 by 4", "int4", "int4 by 8", "low rank", "gates", "low rank int8")


def group(form: str) -> dict[str, int]:
    """The field "group" of a layer whose matrices have this form."""
    return {"group": int(form.split()[-1])} if " by " in form else {}


def stored(name: str, weight: Tensor, form: str) -> dict[str, Tensor]:
    """The tensors of a matrix in one of ``FORMS``; "gates" has another form for each quarter of the rows."""
    if form in ("dense", "float16", "bfloat16"):
        return {name: weight.to(getattr(torch, form, torch.float32))}
    if form.startswith("int"):
        integers, scale = reference.integer_rows(weight, int(form[3]), group(form).get("group"))
        return {name: packed(integers) if form[3] == "4" else integers, f"{name}.scale": scale}
    if form == "gates" and len(weight) % 4:
        return stored(name, weight, "int8")
    if form == "gates":
        kinds = zip("ifgo", weight.chunk(4), ("dense", "int8", "low rank", "int4"), strict=True)
        return {k: v for gate, part, kind in kinds for k, v in stored(f"{name}.{gate}", part, kind).items()}
    factors = reference.low_rank(weight, max(1, min(weight.shape) // 2))
    kind = "int8" if form.endswith("int8") else "dense"
    return {
        k: v for n, f in zip(("up", "down"), factors, strict=True) for k, v in stored(f"{name}.{n}", f, kind).items()
    }


def packed(integers: Tensor) -> Tensor:
    """int8 [N, K] to uint8 [N, ceil(K / 2)]."""
    even = nn.functional.pad(integers, (0, integers.shape[1] % 2)) + 8
    return even[:, ::2].to(torch.uint8) | even[:, 1::2].to(torch.uint8) << 4


def lstm(module: nn.LSTM, form: str = "dense", name: str = "lstm", **fields: Any) -> Model:
    """The layer of a ``torch.nn.LSTM``."""
    layer = {
        "type": "lstm",
        "name": name,
        "input_size": module.input_size,
        "hidden_size": module.hidden_size,
        "num_layers": module.num_layers,
        "bidirectional": module.bidirectional,
        "proj_size": module.proj_size,
        **group(form),
        **fields,
    }
    tensors: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        if key.startswith("weight"):
            tensors.update(stored(f"{name}.{key}", value, form))
        elif key.startswith("bias_ih"):
            tensors[f"{name}.{key.replace('bias_ih', 'bias')}"] = value + module.state_dict()[key.replace("ih", "hh")]
    return [layer], tensors


def linear(N: int, K: int, form: str = "dense", name: str = "linear", bias: bool = True) -> Model:
    tensors = stored(f"{name}.weight", torch.randn(N, K) / K**0.5, form)
    tensors |= {f"{name}.bias": torch.randn(N)} if bias else {}
    return [{"type": "linear", "name": name, "in": K, "out": N, **group(form)}], tensors


def conv1d(N: int, C: int, kernel: int, form: str = "dense", name: str = "conv1d", **fields: int) -> Model:
    """fields: stride, dilation, left, right."""
    sizes = {"stride": 1, "dilation": 1, "left": 0, "right": 0} | fields
    tensors = stored(f"{name}.weight", torch.randn(N, kernel * C) / (kernel * C) ** 0.5, form)
    tensors[f"{name}.bias"] = torch.randn(N)
    return [{"type": "conv1d", "name": name, "in": C, "out": N, "kernel": kernel, **sizes, **group(form)}], tensors


def embedding(V: int, D: int, form: str = "dense", name: str = "embedding") -> Model:
    layer = {"type": "embedding", "name": name, "size": V, "dim": D, **group(form)}
    return [layer], stored(f"{name}.weight", torch.randn(V, D), form)


def ensemble(M: int, C: int, K: int, form: str = "dense") -> Model:
    """M members of K classes on C channels: a linear layer, and what they say together."""
    return chain(linear(M * K, C, form), ([{"type": "ensemble", "name": "ensemble", "members": M}], {}))


def chain(*models: Model) -> Model:
    """One after the other."""
    return [layer for layers, _ in models for layer in layers], {k: v for _, ts in models for k, v in ts.items()}

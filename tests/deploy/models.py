"""Small models with known answers: modules of torch, and the same as layers and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Any]


def array(value: Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().numpy())


def lstm(module: nn.LSTM, name: str = "lstm") -> State:
    """A float32 LSTM of torch."""
    tensors = {}
    ends = [f"_l{n}{end}" for n in range(module.num_layers) for end in ("", "_reverse")[: 1 + module.bidirectional]]
    for end in ends:
        for kind in ("weight_ih", "weight_hh", *(("weight_hr",) if module.proj_size else ())):
            tensors[f"{name}.{kind}{end}"] = array(getattr(module, kind + end))
        if module.bias:
            tensors[f"{name}.bias{end}"] = array(getattr(module, "bias_ih" + end) + getattr(module, "bias_hh" + end))
    layer = {
        "type": "lstm",
        "name": name,
        "input_size": module.input_size,
        "hidden_size": module.hidden_size,
        "num_layers": module.num_layers,
        "bidirectional": module.bidirectional,
        "proj_size": module.proj_size,
    }
    return {"layers": [layer], "tensors": tensors}


def linear(module: nn.Linear, name: str = "linear") -> State:
    layer = {"type": "linear", "name": name, "in": module.in_features, "out": module.out_features}
    return {"layers": [layer], "tensors": {f"{name}.weight": array(module.weight), f"{name}.bias": array(module.bias)}}


def conv1d(module: nn.Conv1d, name: str = "conv", left: int = 0, right: int = 0) -> State:
    weight = array(module.weight.transpose(1, 2).flatten(1))
    layer = {
        "type": "conv1d",
        "name": name,
        "in": module.in_channels,
        "out": module.out_channels,
        "kernel": module.kernel_size[0],
        "stride": module.stride[0],
        "dilation": module.dilation[0],
        "left": left,
        "right": right,
    }
    return {"layers": [layer], "tensors": {f"{name}.weight": weight, f"{name}.bias": array(module.bias)}}


def embedding(module: nn.Embedding, name: str = "embedding") -> State:
    layer = {"type": "embedding", "name": name, "size": module.num_embeddings, "dim": module.embedding_dim}
    return {"layers": [layer], "tensors": {f"{name}.weight": array(module.weight)}}


def plain(kind: str, **fields: Any) -> State:
    return {"layers": [{"type": kind, "name": kind, **fields}], "tensors": {}}


def chain(*parts: State) -> State:
    return {
        "layers": [layer for part in parts for layer in part["layers"]],
        "tensors": {name: value for part in parts for name, value in part["tensors"].items()},
    }


def quantized(state: State, bits: int = 8, group: int | None = None) -> State:
    """The weights of every LSTM and linear layer as integers."""
    from fastseq.reference.compression import integer_rows

    tensors = dict(state["tensors"])
    for name, value in state["tensors"].items():
        if "weight" not in name or name.startswith("embedding"):
            continue
        q, scale = integer_rows(torch.from_numpy(value), bits, group)
        tensors[name] = nibbles(array(q)) if bits == 4 else array(q)
        tensors[f"{name}.scale"] = array(scale)
    layers = [{**layer, "group": group} if group else layer for layer in state["layers"]]
    return {"layers": layers, "tensors": tensors}


def nibbles(q: np.ndarray) -> np.ndarray:
    """int8 [N, K] of 4 bits as uint8 [N, (K + 1) // 2]."""
    shifted = np.pad((q.astype(np.int16) + 8).astype(np.uint8), ((0, 0), (0, q.shape[1] % 2)), constant_values=8)
    return np.ascontiguousarray(shifted[:, 0::2] | shifted[:, 1::2] << 4)


def tagger() -> tuple[State, nn.ModuleList]:
    """Embedding, two LSTM layers, a causal convolution of stride 2, relu, linear; and its modules."""
    torch.manual_seed(3)
    modules = nn.ModuleList([nn.Embedding(30, 20), nn.LSTM(20, 33, 2), nn.Conv1d(33, 12, 3, 2), nn.Linear(12, 7)])
    e, rnn, conv, head = modules
    return chain(embedding(e), lstm(rnn), conv1d(conv, left=2), plain("relu"), linear(head)), modules  # type: ignore


def tagged(modules: nn.ModuleList, x: np.ndarray) -> np.ndarray:
    """What torch makes of x [T, B]."""
    e, rnn, conv, head = modules
    with torch.no_grad():
        h = rnn(e(torch.from_numpy(x).long()))[0]
        made = conv(nn.functional.pad(h.permute(1, 2, 0), (2, 0))).relu()
        return np.asarray(head(made.permute(2, 0, 1)).numpy())

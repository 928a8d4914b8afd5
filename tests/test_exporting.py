"""``export_state``: descriptions that json takes and arrays that hold the model; computed again from these alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq
from fastseq import reference
from fastseq.reference import Gate, Part
from tests.tolerance import assert_same_bits

I, H, T, B = 24, 10, 6, 3  # noqa: E741
LSTMS: dict[str, Any] = {
    "stock": lambda: nn.LSTM(I, H, num_layers=2, bidirectional=True),
    "ours": lambda: fastseq.nn.LSTM(I, H, proj_size=4, gates="sharpened", bias=False),
    "start": lambda: fastseq.nn.LSTM(I, H, gates="binary", hard_eval=True, learnable_state=True),
}
WAYS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "group": 8},
    "bfloat16": {"weights": "bfloat16"},
    "mixed": {"weights": {"i": "int4", "g": "int8"}, "rank": {"f": 2, "o": 1}, "group": 16},
    "rank": {"rank": 2, "gates": "ifgo", "weights": "int8"},
}


PLAIN: dict[str, Any] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softmax": lambda v: v.softmax(-1),
}


def tensor(value: np.ndarray) -> Tensor:
    if value.dtype == np.uint16:
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


class Arrays:
    """The tensors of one layer."""

    def __init__(self, tensors: dict[str, np.ndarray], layer: dict[str, Any]) -> None:
        self.layer, self.used = layer, set()
        self.tensors = {k.removeprefix(layer["name"] + "."): v for k, v in tensors.items()}

    def get(self, name: str) -> Any:
        if name not in self.tensors:
            return None
        self.used.add(name)
        return tensor(self.tensors[name])

    def part(self, name: str) -> Part:
        scale, values = self.get(f"{name}.scale"), self.get(name)
        group = self.layer.get("group", 0) if scale is not None and scale.shape[1] > 1 else 0
        return Part(values, scale, group)

    def gate(self, name: str) -> Gate:
        if f"{name}.up" in self.tensors:
            return Gate(self.part(f"{name}.up"), self.part(f"{name}.down"))
        return Gate(self.part(name))

    def matrix(self, name: str) -> list[Gate] | None:
        if name in self.tensors or f"{name}.up" in self.tensors:
            return [self.gate(name)]
        return (
            [self.gate(f"{name}.{g}") for g in "ifgo"]
            if f"{name}.i" in self.tensors or f"{name}.i.up" in self.tensors
            else None
        )


def run(state: dict[str, Any], x: Tensor) -> Tensor:
    """The model from its description, by the definitions."""
    used = 0
    for layer in json.loads(json.dumps(state["layers"])):
        mine = Arrays({k: v for k, v in state["tensors"].items() if k.startswith(layer["name"] + ".")}, layer)
        if layer["type"] == "embedding":
            x = F.embedding(x, mine.get("weight"))
        elif layer["type"] == "linear":
            x = F.linear(x, mine.get("weight"), mine.get("bias"))
        elif layer["type"] == "conv1d":
            weight = mine.get("weight").unflatten(1, (layer["kernel"], layer["in"])).movedim(1, 2)
            padded = F.pad(x.movedim(0, 2), (layer["left"], layer["right"]))
            x = F.conv1d(padded, weight, mine.get("bias"), layer["stride"], 0, layer["dilation"]).movedim(2, 0)
        elif layer["type"] == "lstm":
            for n in range(layer["num_layers"]):
                outs = []
                for reverse in (False, True)[: 1 + layer["bidirectional"]]:
                    s = f"_l{n}_reverse" if reverse else f"_l{n}"
                    hh, hr = mine.matrix(f"weight_hh{s}"), mine.matrix(f"weight_hr{s}")
                    start = mine.get(f"h_start{s}"), mine.get(f"c_start{s}")
                    widths = layer["proj_size"] or layer["hidden_size"], layer["hidden_size"]
                    h0, c0 = (torch.zeros(w) if v is None else v for v, w in zip(start, widths, strict=True))
                    options = (mine.matrix(f"weight_ih{s}"), mine.get(f"bias{s}"), hr, None, None, None, None, None)
                    first = h0.expand(x.shape[1], -1), c0.expand(x.shape[1], -1)
                    outs.append(reference.lstm_packed(x, hh, *first, *options, layer["tau"], layer["hard"], reverse)[0])
                x = torch.cat(outs, -1)
        else:
            x = PLAIN[layer["type"]](x)
        assert mine.used == set(mine.tensors), "tensors that no field of the layer names"
        used += len(mine.used)
    assert used == len(state["tensors"])
    return x


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 0.02 and (got - expected).abs().median() < 1e-5


@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("kind", LSTMS)
@torch.no_grad()
def test_lstms(kind: str, way: str | None) -> None:
    model = LSTMS[kind]().eval()
    for name, value in model.named_parameters():
        if "start" in name:
            nn.init.normal_(value, std=0.3)
    if way is not None:
        model = fastseq.compress(model, **WAYS[way]).model
    state = fastseq.export_state(model)
    assert state["layers"][0]["type"] == "lstm"
    assert all(isinstance(v, np.ndarray) for v in state["tensors"].values())
    x = torch.randn(T, B, I)
    assert_near(run(state, x), model(x)[0])
    if hasattr(model, "export_state"):
        own = model.export_state("enc")
        assert own["layers"][0] == state["layers"][0] | {"name": "enc"}
        assert {k.split(".", 1)[1] for k in own["tensors"]} == {k.split(".", 1)[1] for k in state["tensors"]}


class First(nn.Module):
    """The output of an LSTM without its state; what it holds is exported."""

    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x)[0]
        return out

    def export_state(self, name: str) -> dict[str, Any]:
        return fastseq.export_state(nn.Sequential(self.lstm)) if name == "" else self.lstm.export_state(name)  # type: ignore[operator]


@torch.no_grad()
def test_a_model() -> None:
    lstm = fastseq.compress(fastseq.nn.LSTM(I, H), "int8").model
    model = nn.Sequential(
        nn.Embedding(9, I), nn.Dropout(0.5), First(lstm), nn.Sequential(nn.Linear(H, 7), nn.ReLU()), nn.Softmax(-1)
    ).eval()
    state = fastseq.export_state(model)
    assert [(v["type"], v["name"]) for v in state["layers"]] == [
        ("embedding", "0"),
        ("lstm", "2"),
        ("linear", "3.0"),
        ("relu", "3.1"),
        ("softmax", "4"),
    ]
    tokens = torch.randint(0, 9, (T, B))
    assert_near(run(state, tokens), model(tokens))
    assert state["tensors"]["2.weight_hh_l0"].dtype == np.int8
    assert state["tensors"]["2.weight_hh_l0.scale"].shape == (4 * H, 1)


@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@torch.no_grad()
def test_convolutions(padding: Any) -> None:
    conv = nn.Conv1d(I, 5, 3, dilation=2, padding=padding)
    x = torch.randn(9, B, I)
    expected = conv(x.movedim(0, 2)).movedim(2, 0)
    assert (run(fastseq.export_state(conv), x) - expected).abs().max() < 1e-5
    strided = nn.Sequential(nn.Conv1d(I, 5, 4, stride=2, padding=1, bias=False), nn.Tanh(), nn.Sigmoid())
    expected = strided(x.movedim(0, 2)).movedim(2, 0)
    assert (run(fastseq.export_state(strided), x) - expected).abs().max() < 1e-5


def test_arrays_are_as_they_are_kept() -> None:
    tensors = fastseq.export_state(nn.Linear(3, 2).half())["tensors"]
    assert {k: v.dtype for k, v in tensors.items()} == {"linear.weight": np.float16, "linear.bias": np.float32}
    assert fastseq.export_state(nn.Linear(3, 2).double())["tensors"]["linear.weight"].dtype == np.float32
    linear = nn.Linear(3, 2).bfloat16()
    bits = fastseq.export_state(linear)["tensors"]["linear.weight"]
    assert bits.dtype == np.uint16
    assert_same_bits("weight", tensor(bits).float(), linear.weight.float())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2)), "1 must be a layer that a deployed model can have, got GRU"),
        (nn.LSTMCell(2, 2), "lstmcell must be a layer that a deployed model can have, got LSTMCell"),
        (nn.Softmax(1), "softmax must be a layer that a deployed model can have, got Softmax"),
        (nn.Conv1d(4, 4, 3, groups=2), "conv1d must be a Conv1d of one group with zeros around, got groups=2"),
        (nn.Embedding(3, 2, max_norm=1.0), "embedding.max_norm must be None, got 1.0"),
    ],
)
def test_what_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError) as error:
        fastseq.export_state(model)
    assert f"export_state: {message}" in str(error.value)


def test_groups_of_a_layer_are_alike() -> None:
    small: Any = fastseq.compress(nn.LSTM(I, H), "int8", group=8).model
    small.weight_hh_l0 = fastseq.compress(nn.LSTM(I, H), "int8").model.weight_hh_l0
    with pytest.raises(ValueError, match=r"group must be the same for all matrices of a layer, got \[8, 10\]"):
        fastseq.export_state(small)

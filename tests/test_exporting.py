"""``export_state``: descriptions that json takes and arrays that hold the model; computed again from these alone."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import deploy, reference
from tests.tolerance import assert_same_bits

I, H, T, B = 24, 10, 6, 3  # noqa: E741
LSTMS: dict[str, Any] = {
    "stock": lambda: nn.LSTM(I, H, num_layers=2, bidirectional=True),
    "ours": lambda: fastseq.nn.LSTM(I, H, proj_size=4, gates="sharpened", bias=False),
    "start": lambda: fastseq.nn.LSTM(I, H, gates="binary", hard_eval=True, learnable_state=True),
    "rank": lambda: fastseq.nn.LSTM(I, H, 2, rank=3),
    "some ranks": lambda: fastseq.nn.LSTM(I, H, rank={"f": 2, "o": 4}),
}
WAYS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "group": 8},
    "bfloat16": {"weights": "bfloat16"},
    "mixed": {"weights": {"i": "int4", "g": "int8"}, "rank": {"f": 2, "o": 1}, "group": 16},
    "rank": {"rank": 2, "gates": "ifgo", "weights": "int8"},
    "matrices": {"weights": {"weight_ih": "bfloat16", "weight_hh": {"i": "int8", "o": "int4"}}, "group": 8},
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


def run(state: dict[str, Any], x: Tensor) -> Tensor:
    """The model from its description: by the definition, and by the runtime from a file, which agree."""
    layers = json.loads(json.dumps(state["layers"]))
    y = reference.run_model(layers, state["tensors"], x)[0]
    with tempfile.TemporaryDirectory() as folder:
        deploy.save({"layers": layers, "tensors": state["tensors"]}, f"{folder}/model")
        model = deploy.Model.load(f"{folder}/model")
        found = torch.from_numpy(model.run((x if x.is_floating_point() else x.int()).numpy())[0])
    if y.is_floating_point():
        assert_near(found, y)
    else:
        assert torch.equal(found, y)
    return y


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


class Tagger(nn.Module):
    """With a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.lstm = nn.Linear(H, 4), nn.LSTM(I, H, batch_first=True)
        self.embedding, self.other = nn.Embedding(9, I), nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(self.embedding(tokens))[0].relu())
        return out.softmax(-1)


@torch.no_grad()
def test_modules_in_order() -> None:
    model, tokens = Tagger().eval(), torch.randint(0, 9, (T, B))
    order = ["embedding", "lstm", "relu", "head", "softmax"]
    state = fastseq.export_state(model, order)
    assert [v["name"] for v in state["layers"]] == order
    assert_near(run(state, tokens), model(tokens.mT).movedim(0, 1))
    small = fastseq.compress(model, "int8").model
    assert_near(run(fastseq.export_state(small, order), tokens), small(tokens.mT).movedim(0, 1))
    twice = fastseq.export_state(model, ["other", "relu", "other", "relu"])
    assert [v["name"] for v in twice["layers"]] == ["other", "relu", "other_2", "relu_2"]
    with pytest.raises(ValueError, match=r"order must be names among head, .*, softmax, got 'decoder'"):
        fastseq.export_state(model, ["decoder"])
    with pytest.raises(ValueError, match=r"must be a layer that .* \(with order=\[...\] those .*\), got Tagger"):
        fastseq.export_state(model)


QUANTIZERS: dict[str, Any] = {
    "plain": lambda: fastseq.nn.VectorQuantize(I, 16),
    "cosine": lambda: fastseq.nn.VectorQuantize(I, 16, use_cosine_sim=True),
    "projected": lambda: fastseq.nn.VectorQuantize(I, 16, codebook_dim=5),
    "input": lambda: fastseq.nn.VectorQuantize(I, 16, codebook_dim=5, batch_norm="input"),
    "codes": lambda: fastseq.nn.VectorQuantize(I, 16, codebook_dim=5, batch_norm="codes"),
    "normalized": lambda: fastseq.nn.VectorQuantize(I, 16, batch_norm="input"),
    "residual": lambda: fastseq.nn.ResidualVQ(dim=I, num_quantizers=3, codebook_size=16, codebook_dim=6),
    "shared": lambda: fastseq.nn.ResidualVQ(dim=I, num_quantizers=2, codebook_size=16, shared_codebook=True),
}


@pytest.mark.parametrize("kind", QUANTIZERS)
@torch.no_grad()
def test_quantizers(kind: str) -> None:
    """The last gives indices, another one codes."""
    vq = QUANTIZERS[kind]()
    for _ in range(3):
        vq(torch.randn(20, 4, I) + 0.5)
    vq.eval()
    x = torch.randn(T, B, I)
    quantized, index = vq(x)[:2]
    state = fastseq.export_state(nn.Sequential(vq, nn.Linear(I, 3)))
    weight, bias = (tensor(state["tensors"][f"1.{key}"]) for key in ("weight", "bias"))
    assert_near(run(state, x), nn.functional.linear(quantized, weight, bias))
    assert torch.equal(run(fastseq.export_state(vq), x), index.int())


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
        (fastseq.nn.VectorQuantize(4, 8, heads=2), "vectorquantize.heads must be as by default"),
        (
            fastseq.nn.ResidualVQ(dim=4, codebook_size=(4, 8)),
            "codebook_size must be the same on all levels, got [4, 8]",
        ),
    ],
)
def test_what_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError) as error:
        fastseq.export_state(model)
    assert "export_state: " in str(error.value) and message in str(error.value)


def test_groups_of_a_layer_are_alike() -> None:
    small: Any = fastseq.compress(nn.LSTM(I, H), "int8", group=8).model
    small.weight_hh_l0 = fastseq.compress(nn.LSTM(I, H), "int8").model.weight_hh_l0
    with pytest.raises(ValueError, match=r"group must be the same for all matrices of a layer, got \[8, 10\]"):
        fastseq.export_state(small)

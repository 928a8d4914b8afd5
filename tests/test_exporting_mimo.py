"""MIMO models deployed: plain first layers with the weights of all slots summed, and what their heads say together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import deploy
from fastseq.calibration import Temperature
from fastseq.nn import MIMO, MIMOLSTM, MIMOConv1d, MIMOConv2d, MIMOEmbedding, MIMOHead, MIMOLinear
from fastseq.reference import ensemble_stats, run_model
from tests.test_exporting import assert_near, tensor
from tests.tolerance import assert_same_bits, assert_within_budget

C, H, K, M, T, B = 5, 16, 4, 3, 7, 3
LSTMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first, two layers": {"batch_first": True, "num_layers": 2},
    "both directions, projected": {"bidirectional": True, "proj_size": 6},
    "sharpened": {"gates": "sharpened"},
    "binary": {"gates": "binary", "hard_eval": True},
    "factors": {"rank": 4},
    "start": {"learnable_state": True},
}
WAYS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "group": 8},
    "bfloat16": {"weights": "bfloat16"},
    "rank": {"rank": 3, "weights": "int8", "gates": "ifgo"},
}


class Net(nn.Module):
    """With a forward of its own: [T, B, C] to logits [T, B, M, K], whatever the layout of its LSTM."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm = MIMOLSTM(C, H, M=M, **options)
        width = (self.lstm.proj_size or H) * (1 + self.lstm.bidirectional)
        self.head = MIMOHead(width, K, M)
        for name, value in self.named_parameters():
            if "start" in name:
                nn.init.normal_(value, std=0.3)
        nn.init.normal_(self.head.weight)  # members that disagree

    def forward(self, x: Tensor) -> Tensor:
        first = self.lstm.batch_first
        h = self.lstm(x.transpose(0, 1) if first else x)[0]
        logits: Tensor = self.head(h)
        return logits.transpose(0, 1) if first else logits


def deployed(state: dict[str, Any], folder: Path) -> deploy.Model:
    deploy.save(state, folder / "m")
    return deploy.Model.load(str(folder / "m"))


def said(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [T, B, K] and disagreement [T, B] from logits [T, B, M, K]."""
    found = ensemble_stats(logits.flatten(0, 1))
    return found[0].unflatten(0, logits.shape[:2]), found[4].unflatten(0, logits.shape[:2])


def check(model: nn.Module, state: dict[str, Any], x: Tensor, folder: Path) -> None:
    """The deployed model says what torch's ensemble mode says."""
    y, _ = deployed(state, folder).run(x.numpy())
    found = [torch.from_numpy(np.ascontiguousarray(part)) for part in deploy.split_ensemble(y)]

    def plain(model_dtype: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return said(model.to(model_dtype.dtype)(x))

    assert_within_budget("probability disagreement", found, plain, [torch.zeros(1), x])
    model.float()


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", LSTMS)
@torch.no_grad()
def test_lstms(kind: str, folded: bool, tmp_path: Path) -> None:
    model = Net(**LSTMS[kind]).eval()
    if folded:
        fastseq.nn.fold(model)
    state = fastseq.export_state(model, ["lstm", "head"])
    told = [(layer["type"], layer["name"]) for layer in state["layers"]]
    assert told == [("lstm", "lstm"), ("linear", "head"), ("ensemble", "head.ensemble")]
    assert (state["layers"][0]["input_size"], state["layers"][2]["members"]) == (C, M)
    x = torch.randn(T, B, C) * 2
    assert 0 < float(said(model(x))[1].mean()) < 1
    check(model, state, x, tmp_path)


@torch.no_grad()
def test_layers_one_after_another(tmp_path: Path) -> None:
    """Of an ``nn.Sequential``, whether it trains or not: what is deployed is the ensemble mode."""
    model = nn.Sequential(MIMOLinear(C, H, M), nn.Dropout(0.5), nn.ReLU(), MIMOHead(H, K, M, bias=False))
    for own in (model.train(), fastseq.nn.fold(model.eval())):
        state = fastseq.export_state(own)
        assert [layer["name"] for layer in state["layers"]] == ["0", "2", "3", "3.ensemble"]
        assert state["tensors"]["0.weight"].shape == (H, C)
    check(model, state, torch.randn(T, B, C), tmp_path)


@torch.no_grad()
def test_words(tmp_path: Path) -> None:
    model = nn.Sequential(MIMOEmbedding(11, H, M), MIMOHead(H, K, M)).eval()
    state = fastseq.export_state(model)
    x = torch.randint(0, 11, (T, B), dtype=torch.int32)
    check(model, state, x, tmp_path)
    table = model[0].weight.unflatten(1, (M, H)).double().sum(1).float()
    assert_within_budget("weight", torch.from_numpy(state["tensors"]["0.weight"]), lambda t: t, [table])


@torch.no_grad()
def test_convolutions(tmp_path: Path) -> None:
    conv, head = MIMOConv1d(C, H, 3, stride=2, padding=1, M=M).eval(), MIMOHead(H, K, M)
    state = fastseq.export_state(nn.ModuleDict({"conv": conv, "head": head}), ["conv", "head"])
    x = torch.randn(T, B, C)
    y = torch.from_numpy(deployed(state, tmp_path).run(x.numpy())[0])

    def plain(dtype: Tensor, x: Tensor) -> Tensor:
        made = conv.to(dtype.dtype)(x.movedim(0, 2)).movedim(2, 0)
        return said(head.to(dtype.dtype)(made))[0]

    assert_within_budget("probability", y[..., :K].contiguous(), plain, [torch.zeros(1), x])
    with pytest.raises(ValueError, match="export_state: mimoconv2d must be a layer that a deployed .*, got MIMOConv2d"):
        fastseq.export_state(MIMOConv2d(C, H, 3, M=M))


def test_sums_are_rounded_once() -> None:
    """Weights of bfloat16 are summed in float32."""
    layer = MIMOLinear(C, H, M, dtype=torch.bfloat16)
    found = tensor(fastseq.export_state(layer)["tensors"]["mimolinear.weight"])
    assert_same_bits("weight", found.float(), layer.weight.float().unflatten(1, (M, C)).sum(1).bfloat16().float())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["plain", "batch first, two layers", "binary"])
@torch.no_grad()
def test_compressed(kind: str, way: str, tmp_path: Path) -> None:
    """As of other LSTMs: the same form in the file, and what the compressed torch model says."""
    model = fastseq.nn.fold(Net(**LSTMS[kind]).eval())
    x = torch.randn(T, B, C)
    small = fastseq.compress(model, **WAYS[way]).model
    assert type(small.lstm) is fastseq.nn.CompressedLSTM and type(model.lstm) is MIMOLSTM and model.lstm.is_folded
    by_hand = fastseq.compress(model.lstm.to_plain(), **WAYS[way]).model.export_state("lstm")
    state = fastseq.export_state(small, ["lstm", "head"])
    for name, value in by_hand["tensors"].items():
        assert_same_bits(
            name, torch.from_numpy(state["tensors"][name].view(np.uint8)), torch.from_numpy(value.view(np.uint8))
        )
    y, _ = deployed(state, tmp_path).run(x.numpy())
    expected = said(small(x))
    assert_near(torch.from_numpy(y[..., :K]), expected[0])
    assert_near(torch.from_numpy(y), run_model(state["layers"], state["tensors"], x)[0])
    assert (np.abs(y[..., K] - expected[1].numpy()) > 1e-6).mean() < 0.05  # a tie may fall either way


@torch.no_grad()
def test_compressed_and_reported() -> None:
    x = torch.randn(T, B, C)
    model = fastseq.nn.fold(nn.ModuleList([MIMOLSTM(C, H, M=M)]).eval())[0]
    small, report = fastseq.compress(model, rank=3, nearest="outputs", inputs=x, metric=lambda m: float(m(x)[0].sum()))
    assert small(x)[0].shape == (T, B, H)
    assert report.metric is not None
    assert_same_bits("before", torch.tensor(report.metric[0]), model(x)[0].sum())
    assert {row.name for row in report.matrices} == {"weight_ih_l0", "weight_hh_l0"}
    model.unfold()
    with pytest.raises(ValueError, match=r"compress: model must be folded \(with fastseq.nn.fold\), got a MIMOLSTM"):
        fastseq.compress(model, "int8")
    with pytest.raises(ValueError, match=r"compress: model.0 must be folded"):
        fastseq.compress(nn.Sequential(model), "int8")


class Tagger(nn.Module):
    """A network of one example, which knows of no slots."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(C, H), nn.Linear(H, K)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0].relu())
        return logits


@torch.no_grad()
def test_the_wrapper(tmp_path: Path) -> None:
    """By the order of its backbone, or by names inside it."""
    plain = nn.Sequential(nn.Linear(C, H), nn.ReLU(), nn.Linear(H, K))
    model = MIMO(plain, M).eval()
    state = fastseq.export_state(model)
    assert [layer["name"] for layer in state["layers"]] == ["0", "1", "2", "2.ensemble"]
    x = torch.randn(T, B, C)
    check(model, state, x, tmp_path)
    inside = fastseq.export_state(nn.Sequential(nn.Dropout(0.5), model))
    assert [layer["name"] for layer in inside["layers"]] == ["1.0", "1.1", "1.2", "1.2.ensemble"]
    tagger = MIMO(Tagger(), M, "lstm", "head").eval()
    check(tagger, fastseq.export_state(tagger, ["lstm", "relu", "head"]), x, tmp_path)


@torch.no_grad()
def test_a_temperature(tmp_path: Path) -> None:
    """Members are as sure as it says, and disagree as before."""
    model = nn.Sequential(MIMOLinear(C, H, M), MIMOHead(H, K, M), Temperature(0.3)).eval()
    head = model[1].weight.clone()
    x = torch.randn(T, B, C)
    state = fastseq.export_state(model)
    assert [layer["name"] for layer in state["layers"]] == ["0", "1", "1.ensemble"]
    check(model, state, x, tmp_path)
    assert_same_bits("weight", model[1].weight, head)
    colder = fastseq.export_state(
        nn.Sequential(MIMO(Tagger(), M, "lstm", "head"), Temperature(2.0)),
        ["0.backbone.lstm", "relu", "0.backbone.head", "1"],
    )
    assert [layer["type"] for layer in colder["layers"]] == ["lstm", "relu", "linear", "ensemble"]
    with pytest.raises(ValueError, match="export_state: 1 must be a layer that a deployed model can have, got Temp"):
        fastseq.export_state(nn.Sequential(nn.Linear(2, 2), Temperature(2.0)))


@pytest.mark.parametrize("way", ["int8", "int4", "bfloat16"])
def test_a_trained_wrapper_compressed(way: str, tmp_path: Path) -> None:
    """The whole way: train, fold, compress, export, and run without torch."""
    model = MIMO(Tagger(), M, "lstm", "head")
    index, optimizer = fastseq.nn.MIMOIndex(B, M, R=2), torch.optim.Adam(model.parameters(), 0.02)
    x = torch.randn(T, B, C)
    labels = (x.cumsum(0) > 0).long() @ torch.tensor([1, 1, 1, 0, 0])
    for _ in range(20):
        rows = index.draw()
        optimizer.zero_grad()
        model.loss(model(x, rows), labels, rows).backward()
        optimizer.step()
    small = fastseq.compress(model.eval().fold(), **WAYS[way]).model
    deployable = deployed(fastseq.export_state(small, ["lstm", "relu", "head"]), tmp_path)
    with torch.no_grad():
        probability, disagreement = said(small(x))
    got = deploy.split_ensemble(deployable.run(x.numpy())[0])
    assert_near(torch.from_numpy(got.probability), probability)
    assert (np.abs(got.disagreement - disagreement.numpy()) > 1e-6).mean() < 0.05  # a tie may fall either way
    assert float(probability.amax(-1).mean()) > 1.5 / K  # it has learned something
    with pytest.raises(
        ValueError, match="MIMO: mode must be 'ensemble', since .* no weights of each slot, got 'train'"
    ):
        small(x, index.draw())
    with pytest.raises(ValueError, match="MIMO: mode must be 'ensemble', .*, got 'multiplex'"):
        small(x[:, :, None].expand(-1, -1, M, -1), mode="multiplex")


def test_a_head_comes_last() -> None:
    model = nn.Sequential(MIMOLinear(C, H, M), MIMOHead(H, K, M), nn.Softmax(-1))
    with pytest.raises(ValueError, match="export_state: 1 must be the last layer, since it gives probabilities"):
        fastseq.export_state(model)

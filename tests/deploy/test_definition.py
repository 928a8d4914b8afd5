"""The runtime computes what ``reference.run_model`` says, layer by layer, in every form of a matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastseq import deploy
from fastseq.reference import run_model
from tests import model_cases as cases
from tests.tolerance import assert_same_bits, assert_within_budget

FORMS = [form for form in cases.FORMS if form != "int8 by 4"]  # the packed core takes groups of 8, 16, ...
LSTMS: dict[str, Any] = {
    "two layers": lambda form: cases.lstm(nn.LSTM(16, 20, 2), form),
    "both directions": lambda form: cases.lstm(nn.LSTM(16, 9, 2, bidirectional=True, bias=False), form),
    "reverse": lambda form: backwards(cases.lstm(nn.LSTM(16, 20), form)),
    "projection": lambda form: cases.lstm(nn.LSTM(16, 20, 2, proj_size=12), form),
    "hard": lambda form: cases.lstm(nn.LSTM(16, 20), form, hard=True, tau=0.7),
}
OTHERS: dict[str, Any] = {
    "linear": lambda form: cases.linear(7, 16, form),
    "conv1d": lambda form: cases.conv1d(5, 16, 3, form, stride=2, dilation=2, left=3, right=1),
    "embedding": lambda form: cases.embedding(11, 16, form),
}


def backwards(model: cases.Model) -> cases.Model:
    (layer,), tensors = model
    return [{**layer, "reverse": True}], {k.replace("_l0", "_l0_reverse"): v for k, v in tensors.items()}


def loaded(model: cases.Model, folder: Path) -> deploy.Model:
    def array(value: Tensor) -> np.ndarray:
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(np.uint16)
        return value.numpy()

    layers, tensors = model
    deploy.save({"layers": layers, "tensors": {k: array(v) for k, v in tensors.items()}}, folder / "m")
    return deploy.Model.load(str(folder / "m"))


def check(model: cases.Model, x: Tensor, folder: Path, atol: float) -> None:
    """Whole and by lengths."""
    layers, tensors = model
    found = loaded(model, folder)
    T, B = x.shape[:2]
    for lengths in (None, torch.tensor([T, T // 2, 1])[:B]):
        expected = run_model(layers, tensors, x, lengths)[0]
        got = torch.from_numpy(found.run(x.numpy(), None if lengths is None else lengths.numpy())[0])
        if expected.is_floating_point():
            torch.testing.assert_close(got, expected, rtol=0, atol=atol)
        else:
            assert torch.equal(got, expected)


def tolerance(form: str) -> float:
    """An activation on the edge between two integers may become either; a weight that it meets is below 1/2 here."""
    return 4e-3 if form == "gates" or "int" in form else 2e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LSTMS)
def test_lstms(name: str, form: str, tmp_path: Path) -> None:
    if name == "projection" and form.startswith(("low rank", "gates")):
        pytest.skip("a projection is whole")
    check(LSTMS[name](form), torch.randn(7, 3, 16), tmp_path, tolerance(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str, form: str, tmp_path: Path) -> None:
    if name == "embedding" and form == "gates":
        pytest.skip("rows of words have no gates")
    x = torch.randint(0, 11, (7, 3), dtype=torch.int32) if name == "embedding" else torch.randn(13, 3, 16)
    check(OTHERS[name](form), x, tmp_path, 5 * tolerance(form))


@pytest.mark.parametrize("output", ["codes", "vectors"])
@pytest.mark.parametrize(("metric", "levels"), [("euclidean", 1), ("euclidean", 3), ("cosine", 1)])
def test_quantizers(metric: str, levels: int, output: str, tmp_path: Path) -> None:
    codebooks = torch.randn(levels, 9, 16)
    codebooks = nn.functional.normalize(codebooks, dim=-1) if metric == "cosine" else codebooks
    sizes = {"dim": 16, "size": 9, "levels": levels, "metric": metric, "output": output}
    model = [{"type": "residual_vq", "name": "vq", **sizes}], {"vq.codebooks": codebooks}
    check(model, torch.randn(7, 3, 16), tmp_path, 1e-6)


def test_labels(tmp_path: Path) -> None:
    """Of small integers, so that many paths have the same score, and with scores that are not numbers."""
    tensors = {"crf.transitions": (4, 4), "crf.start": (4,), "crf.end": (4,)}
    model = (
        [{"type": "crf", "name": "crf", "labels": 4}],
        {name: torch.randint(-2, 3, size).float() for name, size in tensors.items()},
    )
    x = torch.randint(-1, 2, (9, 3, 4)).float()
    check(model, x, tmp_path, 0)
    x[4, 1, 2] = torch.nan
    check(model, x, tmp_path, 0)


def voters(M: int, K: int) -> cases.Model:
    """The input as it is, as the logits of an ensemble."""
    layers, tensors = cases.ensemble(M, M * K, K)
    return layers, tensors | {"linear.weight": torch.eye(M * K), "linear.bias": torch.zeros(M * K)}


@pytest.mark.parametrize(("M", "K"), [(1, 1), (1, 5), (2, 1), (3, 7), (4, 2), (7, 33)])
def test_ensembles(M: int, K: int, tmp_path: Path) -> None:
    layers, tensors = voters(M, K)
    model = loaded((layers, tensors), tmp_path)
    assert (model.input_size, model.output_size) == (M * K, K + 1)
    x = torch.randn(6, 3, M * K) * 4
    for lengths in (None, torch.tensor([6, 0, 4])):
        y = torch.from_numpy(model.run(x.numpy(), None if lengths is None else lengths.numpy())[0])
        assert_within_budget("y", y, lambda x, n=lengths: run_model(layers, tensors, x, n)[0], [x])
        if lengths is not None:
            assert not y[:, 1].any() and not y[4:, 2].any() and bool(y[:4, 2].any())
    assert model.run(x[:0].numpy())[0].shape == (0, 3, K + 1)
    assert model.run(x[:, :0].numpy())[0].shape == (6, 0, K + 1)


def test_disagreement(tmp_path: Path) -> None:
    """Of equal logits the first counts, and every pair once: the very numbers of the definition."""
    layers, tensors = voters(4, 3)
    model = loaded((layers, tensors), tmp_path)
    x = torch.randint(-1, 2, (50, 3, 12)).float()
    probability, disagreement = deploy.split_ensemble(model.run(x.numpy())[0])
    expected = run_model(layers, tensors, x)[0]
    assert_same_bits("disagreement", disagreement, expected[..., 3])
    votes = nn.functional.one_hot(x.unflatten(2, (4, 3)).argmax(3), 3).sum(2)
    alike = (votes * (votes - 1)).sum(2) / 12
    assert_within_budget("disagreement", torch.from_numpy(disagreement), lambda a: 1 - a, [alike])
    assert set(votes.amax(2).flatten().tolist()) == {2, 3, 4}  # all ways in which four can differ
    assert probability.shape == (50, 3, 3) and probability.base is disagreement.base is not None


def test_an_ensemble_of_no_numbers(tmp_path: Path) -> None:
    """Among the logits of a member a NaN is the largest, as for torch, and infinity is a place like others."""
    layers: list[dict[str, Any]] = [
        *({"type": "linear", "name": f"first{n}", "in": 1, "out": 1, "from": ["input"]} for n in range(4)),
        *({"type": "linear", "name": f"then{n}", "in": 1, "out": 1, "from": [f"first{n}"]} for n in range(4)),
        {"type": "concat", "name": "all", "from": [f"then{n}" for n in range(4)]},
        {"type": "ensemble", "name": "ensemble", "members": 2},
    ]
    x, nan, inf = torch.full((1, 1, 1), 3e38), float("nan"), float("inf")
    for row, differ in (([1, nan, 0, 2], 0), ([nan, 1, 0, 2], 1), ([nan, nan, 1, 0], 0), ([0, inf, 1, 0], 1)):
        tensors = {}
        for n, value in enumerate(row):  # weights are finite: 2 * 3e38 is infinite, and 0 times that is NaN
            finite = -10 < value < 10
            tensors[f"first{n}.weight"] = torch.full((1, 1), 0.0 if finite else 2.0)
            tensors[f"first{n}.bias"] = torch.full((1,), float(value) if finite else 0.0)
            tensors[f"then{n}.weight"] = torch.full((1, 1), 0.0 if value != value else 1.0)
        y = torch.from_numpy(loaded((layers, tensors), tmp_path).run(x.numpy())[0])
        expected = run_model(layers, tensors, x)[0]
        assert y[0, 0, 2] == expected[0, 0, 2] == differ
        assert y.isnan().tolist() == expected.isnan().tolist() == [[[True, True, False]]]

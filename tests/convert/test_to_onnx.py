"""Deployed models as ONNX files: what ONNX Runtime makes of them, and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastseq import export_state
from fastseq.compression import compress
from fastseq.convert import ConversionError, from_onnx, to_onnx
from fastseq.reference import matrix_of, matrix_values, run_model
from tests import model_cases as cases
from tests.convert import runtime
from tests.tolerance import assert_same_bits, assert_within_budget

MODELS: dict[str, Any] = {
    "embedding": lambda: cases.chain(cases.embedding(9, 4), cases.linear(3, 4, bias=False)),
    "convolutions": lambda: cases.chain(
        cases.conv1d(5, 4, 3, left=4, dilation=2),
        ([{"type": "relu", "name": "relu"}], {}),
        cases.conv1d(2, 5, 2, stride=2, right=1, name="b"),
    ),
    "one": lambda: cases.lstm(nn.LSTM(4, 5)),
    "no bias": lambda: cases.lstm(nn.LSTM(4, 5, bias=False)),
    "both": lambda: cases.chain(cases.lstm(nn.LSTM(4, 5, 2, bidirectional=True)), cases.linear(3, 10)),
    "start": lambda: started(cases.lstm(nn.LSTM(4, 5, 2, bidirectional=True))),
    "temperature": lambda: cases.lstm(nn.LSTM(4, 5, 2), tau=0.7),
    "joins": lambda: joins(),
    "softmax": lambda: cases.chain(cases.linear(3, 4), ([{"type": "softmax", "name": "softmax"}], {})),
}


def started(model: cases.Model) -> cases.Model:
    more = {
        "lstm.h_start_l0": torch.rand(5),
        "lstm.c_start_l0_reverse": torch.randn(5),
        "lstm.c_start_l1": torch.randn(5),
    }
    return model[0], model[1] | more


def joins() -> cases.Model:
    layers, tensors = cases.chain(cases.linear(4, 4, name="a"), cases.lstm(nn.LSTM(4, 4), name="b"))
    layers += [
        {"type": "tanh", "name": "t"},
        {"type": "add", "name": "sum", "from": ["a", "t", "input"]},
        {"type": "sigmoid", "name": "s"},
        {"type": "concat", "name": "c", "from": ["s", "b"]},
    ]
    return layers, tensors


def arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_floats(name: str, tmp_path: Path) -> None:
    layers, tensors = MODELS[name]()
    path = tmp_path / "m.onnx"
    assert to_onnx(layers, arrays(tensors), path) == []
    x = torch.randint(0, 9, (6, 3)) if name == "embedding" else torch.randn(6, 3, 4)
    got = torch.from_numpy(runtime.run(path, x)[0])
    assert_within_budget("y", got, lambda t, x: run_model(layers, t, x)[0], [tensors, x])
    model = from_onnx(path)
    assert not model["batch_first"] and model["axes"] == "TBC"
    if name in ("temperature", "joins"):
        return
    assert [layer["type"] for layer in model["layers"]] == [layer["type"] for layer in layers]
    assert sorted(str(v.tobytes()) for v in model["tensors"].values()) == sorted(
        str(v.contiguous().numpy().tobytes()) for v in tensors.values()
    )


@pytest.mark.parametrize(("M", "K"), [(1, 3), (2, 1), (3, 5)])
def test_ensembles(M: int, K: int, tmp_path: Path) -> None:
    """Logits that are equal too: of these the first counts."""
    layers, tensors = cases.chain(cases.ensemble(M, 4, K))
    tensors["linear.weight"] = torch.randint(-1, 2, (M * K, 4)).float()
    tensors["linear.bias"] = torch.zeros(M * K)
    path = tmp_path / "m.onnx"
    assert to_onnx(layers, arrays(tensors), path) == []
    x = torch.randint(-1, 2, (6, 3, 4)).float()
    got = torch.from_numpy(runtime.run(path, x)[0])
    parts = got[..., :-1], got[..., -1]

    def definition(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        y = run_model(layers, tensors, x)[0]
        return y[..., :-1], y[..., -1]

    assert_within_budget("probability disagreement", parts, definition, [tensors, x])
    assert runtime.run(path, x[:1, :2])[0].shape == (1, 2, K + 1)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_names_come_back(bidirectional: bool, tmp_path: Path) -> None:
    layers, tensors = cases.chain(
        cases.embedding(9, 4, "int8"), cases.lstm(nn.LSTM(4, 5, 2, bidirectional=bidirectional), "int8"),
        cases.linear(3, 5 * (1 + bidirectional), "int8"),
    )  # fmt: skip
    assert to_onnx(layers, arrays(tensors), tmp_path / "m") == []
    model = from_onnx(tmp_path / "m")
    assert model["layers"] == [
        {"tau": 1.0, "hard": False, **layer} if layer["type"] == "lstm" else layer for layer in layers
    ]
    assert model["tensors"].keys() == tensors.keys()
    for key, value in tensors.items():
        assert_same_bits(key, model["tensors"][key], value)


def test_integers_are_those_of_onnx_runtime(tmp_path: Path) -> None:
    """One layer, one step: 8 bits of whole tensors with a zero point, so each side is off by its own roundings.

    The pre-activations of float32 inputs are sums of K products, each wrong by at most half a step of x times a weight:
    m / 254 by rows, (max - min) / 510 over all rows in ONNX Runtime. So both lie within that sum of the exact product
    with the same integer weights, and no number is chosen here.
    """
    layers, tensors = cases.linear(7, 40, "int8", bias=False)
    to_onnx(layers, arrays(tensors), tmp_path / "m")
    x = torch.randn(5, 3, 40)
    weight = tensors["linear.weight"].float() * tensors["linear.weight.scale"]
    exact, most = x @ weight.mT, weight.abs().sum(1)
    ours = run_model(layers, tensors, x)[0]
    theirs = torch.from_numpy(runtime.run(tmp_path / "m", x)[0])
    step = x.abs().amax(-1, keepdim=True) / 254
    assert ((ours - exact).abs() <= 1.001 * step * most).all()
    assert ((theirs - exact).abs() <= 1.01 * (x.max() - x.min()) / 510 * most).all()
    layers, tensors = cases.lstm(nn.LSTM(40, 8), "int8")
    to_onnx(layers, arrays(tensors), tmp_path / "m")
    theirs = torch.from_numpy(runtime.run(tmp_path / "m", x[:1])[0])
    # the derivative of h by a pre-activation is at most 1/4 for each of i, g, o here (c starts at 0), f has none
    most = (tensors["lstm.weight_ih_l0"].float() * tensors["lstm.weight_ih_l0.scale"]).abs().sum(1).max()
    steps = x[:1].abs().max() / 254 + (x[:1].max() - x[:1].min()) / 510
    assert (theirs - run_model(layers, tensors, x[:1])[0]).abs().max() <= (0.25 + 1 + 0.25) * 1.01 * steps * most


@pytest.mark.parametrize("form", [form for form in cases.FORMS if form not in ("dense", "int8")])
def test_other_forms_are_written_as_values(form: str, tmp_path: Path) -> None:
    layers, tensors = cases.chain(cases.lstm(nn.LSTM(8, 8), form), cases.linear(4, 8, form))
    known = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in tensors.items()}
    notes = to_onnx(layers, arrays(known), tmp_path / "m")
    told = {"gates": "gate by gate", "low rank int8": "low rank", "int8 by 4": "int8 in groups"}.get(form, form)
    if form != "bfloat16":
        assert f"lstm.weight_ih_l0: {told.removesuffix(' by 8')} written as float32" in notes
    model = from_onnx(tmp_path / "m")
    group = cases.group(form).get("group")
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0", "linear.weight"):
        got = torch.from_numpy(model["tensors"][name])
        values = matrix_values(matrix_of(tensors, name, group), 8)
        torch.testing.assert_close(got, values.float(), rtol=1e-6, atol=1e-6)


def test_bfloat16_becomes_onnx_by_its_values(tmp_path: Path) -> None:
    """``export_state`` and files give bfloat16 as the uint16 of its bits."""
    small = export_state(compress(nn.LSTM(4, 8), "bfloat16").model)
    assert {str(v.dtype) for k, v in small["tensors"].items() if "weight" in k} == {"uint16"}
    notes = to_onnx(small["layers"], small["tensors"], tmp_path / "m.onnx")
    assert [note.split(": ")[1] for note in notes] == ["bfloat16 written as float32"] * 2
    back = from_onnx(tmp_path / "m.onnx")
    for name, value in small["tensors"].items():
        wide = (value.astype(np.uint32) << 16).view(np.float32) if value.dtype == np.uint16 else value
        np.testing.assert_array_equal(back["tensors"][f"lstm.{name.rpartition('.')[2]}"], wide)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    layers = [
        *cases.lstm(nn.LSTM(4, 5, proj_size=2), name="projected")[0],
        *cases.lstm(nn.LSTM(2, 5), name="binary", hard=True)[0],
        {"type": "crf", "name": "crf", "labels": 5},
    ]
    with pytest.raises(ConversionError) as error:
        to_onnx(layers, {}, tmp_path / "m")
    assert str(error.value).splitlines() == [
        "to_onnx: 3 layers cannot be written:",
        "  projected (lstm): the LSTM of ONNX has no projection",
        "  binary (lstm): hard gates; the LSTM of ONNX has one activation for i, f and o together",
        "  crf (crf): ONNX has no such operator",
    ]


def test_sizes_are_open(tmp_path: Path) -> None:
    layers, tensors = started(cases.lstm(nn.LSTM(4, 5, 2, bidirectional=True)))
    to_onnx(layers, arrays(tensors), tmp_path / "m")
    for T, B in ((1, 1), (3, 2)):
        assert runtime.run(tmp_path / "m", np.zeros((T, B, 4), np.float32))[0].shape == (T, B, 10)

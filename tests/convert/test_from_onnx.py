"""ONNX files of torch and of ONNX Runtime's quantizer as deployed models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastseq.convert import ConversionError, from_onnx
from fastseq.reference import run_model
from tests.convert import runtime
from tests.convert.runtime import node
from tests.tolerance import assert_same_bits, assert_within_budget


class Tagger(nn.Module):
    """Lookup, LSTM, activation, linear layer, either layout."""

    def __init__(self, batch_first: bool, directions: int, head: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 8, 2, batch_first=batch_first, bidirectional=directions == 2)
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(8 * directions, 3)) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(self.embedding(x))[0])
        return y


def kinds(model: dict[str, Any]) -> list[str]:
    return [layer["type"] for layer in model["layers"]]


def tensors(model: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in model["tensors"].items()}


def check(path: Path, model: dict[str, Any], x: Tensor) -> None:
    """The model gives what ONNX Runtime gives, in the accuracy of float32; x as the file takes it."""
    flat = x.mT if x.dtype == torch.int64 else x.transpose(0, 1)
    order = [model["axes"].index(axis) for axis in "TBC"]
    got = torch.from_numpy(runtime.run(path, x)[0]).permute(order).contiguous()
    named, given = tensors(model), flat if model["batch_first"] else x

    def definition(named: dict[str, Tensor], given: Tensor) -> Tensor:
        return run_model(model["layers"], named, given)[0]

    assert_within_budget("y", got, definition, [named, given])


@pytest.mark.parametrize("opset", [9, 12, 14, 17])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_tagger_of_torch(tmp_path: Path, directions: int, batch_first: bool, opset: int) -> None:
    path = runtime.exported(Tagger(batch_first, directions), torch.zeros(5, 4, dtype=torch.long), tmp_path / "m", opset)
    model = from_onnx(path)
    assert kinds(model) == ["embedding", "lstm", "tanh", "linear"]
    assert model["layers"][1]["num_layers"] == 2 and model["batch_first"] == batch_first
    assert model["axes"] == ("BTC" if batch_first else "TBC")
    check(path, model, torch.randint(0, 11, (7, 3)))


def test_arrays_are_those_of_the_module(tmp_path: Path) -> None:
    module = Tagger(False, 2)
    model = from_onnx(runtime.exported(module, torch.zeros(5, 4, dtype=torch.long), tmp_path / "m"))
    state = module.lstm.state_dict()
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        for name in ("weight_ih", "weight_hh"):
            assert_same_bits(name, model["tensors"][f"lstm.{name}{suffix}"], state[f"{name}{suffix}"])
        bias = state[f"bias_ih{suffix}"] + state[f"bias_hh{suffix}"]
        assert_same_bits("bias", model["tensors"][f"lstm.bias{suffix}"], bias)
    assert_same_bits("table", model["tensors"]["embedding.weight"], module.embedding.weight)


class Convolutions(nn.Module):
    """Causal by zeros added before, then strided; a residual sum; a join."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 4, 3, dilation=2), nn.Conv1d(8, 5, 2, stride=2, padding=1)
        self.lstm = nn.LSTM(5, 5)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T]
        y = self.first(nn.functional.pad(x, (4, 0))).relu() + x
        y = self.second(torch.cat((y, x), 1)).permute(2, 0, 1)
        return self.lstm(y)[0].softmax(-1)


def test_convolutions(tmp_path: Path) -> None:
    path, x = tmp_path / "m", torch.randn(3, 4, 10)
    torch.onnx.export(
        Convolutions().eval(),
        (x,),
        str(path),
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "B", 2: "T"}},
        opset_version=17,
    )
    model = from_onnx(path)
    assert kinds(model) == ["conv1d", "relu", "add", "concat", "conv1d", "lstm", "softmax"]
    first, second = (layer for layer in model["layers"] if layer["type"] == "conv1d")
    assert (first["left"], first["right"], first["dilation"]) == (4, 0, 2)
    assert (second["left"], second["right"], second["stride"]) == (1, 1, 2)
    got = torch.from_numpy(runtime.run(path, torch.cat((x, x), 2))[0])
    given = torch.cat((x, x), 2).permute(2, 0, 1)
    assert_within_budget("y", got, lambda t, x: run_model(model["layers"], t, x)[0], [tensors(model), given])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
def test_dynamic_quantization(tmp_path: Path, directions: int, per_channel: bool) -> None:
    """The integers are those of the file; each row is rounded on its own, so results are near those of ONNX Runtime."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    module = Tagger(True, directions, nn.Linear(8 * directions, 3))
    path = runtime.exported(module, torch.zeros(5, 4, dtype=torch.long), tmp_path / "f")
    quantization.quantize_dynamic(
        str(path), str(tmp_path / "q"), weight_type=quantization.QuantType.QInt8, per_channel=per_channel
    )
    model = from_onnx(tmp_path / "q")
    assert kinds(model) == ["embedding", "lstm", "linear"]
    assert {str(v.dtype) for k, v in model["tensors"].items() if "weight_" in k and "scale" not in k} == {"int8"}
    floats, exact = from_onnx(tmp_path / "q", dequantize=True), from_onnx(path)
    for name, value in exact["tensors"].items():
        step = np.abs(value).max() / 127
        assert np.abs(floats["tensors"][name] - value).max() <= (1.01 if name.startswith("emb") else 0.51) * step, name
        if f"{name}.scale" in model["tensors"]:
            values = model["tensors"][name].astype(np.float32) * model["tensors"][f"{name}.scale"]
            np.testing.assert_array_equal(values, floats["tensors"][name])
    x = torch.randint(0, 11, (6, 9))
    theirs = runtime.run(tmp_path / "q", x)[0].transpose(1, 0, 2)
    found = [run_model(m["layers"], tensors(m), x.mT)[0].numpy() for m in (model, floats)]
    assert np.abs(found[0] - found[1]).max() <= np.abs(theirs - found[1]).max() + 0.01


def test_a_reverse_layer_and_two_that_are_one(tmp_path: Path) -> None:
    module = nn.LSTM(4, 5, bidirectional=True)
    path = runtime.exported(module, torch.randn(3, 2, 4), tmp_path / "m")
    weights = {k: v for k, v in runtime.onnx_constants(path, "LSTM").items()}
    constants: dict[str, Any] = {"one": np.array([1])}
    for d, letter in enumerate("fr"):
        constants |= {f"{name}{letter}": value[d : d + 1] for name, value in weights.items()}
    nodes = [
        node("LSTM", "x Wf Rf Bf", "a", hidden_size=5),
        node("LSTM", "x Wr Rr Br", "b", hidden_size=5, direction="reverse"),
        node("Squeeze", "a one", "c"),
        node("Squeeze", "b one", "d"),
        node("Concat", "c d", "y", axis=2),
    ]
    x = torch.randn(6, 2, 4)
    whole = from_onnx(runtime.written(tmp_path / "both", nodes, ["T", "B", 4], constants))
    assert kinds(whole) == ["lstm"] and whole["layers"][0]["bidirectional"]
    check(tmp_path / "both", whole, x)
    nodes[-1] = node("Identity", "d", "y")
    alone = from_onnx(runtime.written(tmp_path / "reverse", nodes, ["T", "B", 4], constants))
    assert alone["layers"][0]["reverse"]
    check(tmp_path / "reverse", alone, x)


def test_a_start_that_is_constant(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {k: rng.normal(size=(1, 12, n)).astype("f") for k, n in (("W", 2), ("R", 3))}
    constants |= {"h0": np.repeat(rng.normal(size=(1, 1, 3)), 2, 1).astype("f"), "c0": np.ones((1, 2, 3), "f")}
    nodes = [node("LSTM", "x W R - - h0 c0", "z", hidden_size=3), node("Squeeze", "z one", "y")]
    path = runtime.written(tmp_path / "m", nodes, ["T", 2, 2], constants | {"one": np.array([1])})
    model = from_onnx(path)
    assert {"lstm.h_start_l0", "lstm.c_start_l0"} <= set(model["tensors"])
    check(path, model, torch.randn(4, 2, 2))
    constants["h0"][0, 1] += 1
    path = runtime.written(tmp_path / "m", nodes, ["T", 2, 2], constants | {"one": np.array([1])})
    with pytest.raises(ConversionError, match="its h_0 differs between rows"):
        from_onnx(path)


def test_state_and_lengths_that_are_inputs(tmp_path: Path) -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, 2)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            y, (h, c) = self.lstm(x, (h, c))
            return y, h, c

    x, h, c = torch.randn(5, 2, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    path, names = tmp_path / "m", {"input_names": ["x", "h", "c"], "output_names": ["y", "hn", "cn"]}
    torch.onnx.export(Stateful().eval(), (x, h, c), str(path), dynamo=False, opset_version=17, **names)
    model = from_onnx(path)
    assert kinds(model) == ["lstm"] and model["layers"][0]["num_layers"] == 2
    y, state = run_model(model["layers"], tensors(model), x, state={"lstm.h": h, "lstm.c": c})
    for got, expected in zip((y, state["lstm.h"], state["lstm.c"]), runtime.run(path, x, h, c), strict=True):
        torch.testing.assert_close(got, torch.from_numpy(expected))


@pytest.mark.parametrize("merged", [False, True])
def test_linear_forms(tmp_path: Path, merged: bool) -> None:
    """Gemm over merged steps and rows, and integers by DequantizeLinear."""
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {"w": rng.integers(-127, 128, (3, 4)).astype(np.int8), "s": np.array(0.01, "f")}
    constants |= {"b": rng.normal(size=3).astype("f"), "flat": np.array([-1, 4]), "back": np.array([6, -1, 3])}
    nodes = [node("DequantizeLinear", "w s", "v")]
    if merged:
        nodes += [node("Reshape", "x flat", "f"), node("Gemm", "f v b", "g", transB=1), node("Reshape", "g back", "y")]
    else:
        nodes += [node("Transpose", "v", "t", perm=[1, 0]), node("MatMul", "x t", "p"), node("Add", "b p", "y")]
    path = runtime.written(tmp_path / "m", nodes, [6, 2, 4], constants)
    model = from_onnx(path)
    assert_same_bits("weight", model["tensors"]["linear.weight"], constants["w"])
    check(path, from_onnx(path, dequantize=True), torch.randn(6, 2, 4))


def test_all_that_is_unsupported_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (self.lstm(x.abs())[0].exp() * 2)[-1]

    path = runtime.exported(Odd(), torch.randn(5, 2, 3), tmp_path / "m")
    with pytest.raises(ConversionError, match=r"2 nodes of .* cannot be converted:\n  /Abs \(Abs\)\n  /Exp \(Exp\)$"):
        from_onnx(path)


@pytest.mark.parametrize(
    ("attributes", "inputs", "why"),
    [
        ({"activations": ["Relu", "Tanh", "Tanh"]}, "x W R", "its activations are .'Relu'"),
        ({"clip": 3.0}, "x W R", "it has clip or input_forget"),
        ({}, "x W R - - - - P", "it has peepholes"),
        ({}, "x W R - n", "its sequence_lens are no input"),
        ({}, "x W x", "its input is no sequence, or its weights are no constants"),
    ],
)
def test_lstm_that_is_not_ours(tmp_path: Path, attributes: dict[str, Any], inputs: str, why: str) -> None:
    constants = {"W": np.ones((1, 8, 3), "f"), "R": np.ones((1, 8, 2), "f"), "P": np.ones((1, 6), "f")}
    nodes = [node("LSTM", inputs, "z", hidden_size=2, **attributes), node("Squeeze", "z one", "y")]
    constants |= {"n": np.array([1, 1], np.int32), "one": np.array([1])}
    path = runtime.written(tmp_path / "m", nodes, ["T", "B", 3], constants)
    with pytest.raises(ConversionError, match=rf"1 node of .*\n  /z \(LSTM\): {why}"):
        from_onnx(path)


def test_integers_of_more_than_eight_bits(tmp_path: Path) -> None:
    """With a zero point off the middle they have no place in a product, and are exact in a lookup."""
    w = np.array([[0, 255], [7, 8]], np.uint8)
    constants = {"w": w, "s": np.array(0.5, "f"), "z": np.array(9, np.uint8)}
    nodes = [node("DequantizeLinear", "w s z", "v"), node("MatMul", "x v", "y")]
    path = runtime.written(tmp_path / "m", nodes, ["T", "B", 2], constants)
    with pytest.raises(ConversionError, match=r"-9..246, beyond -127..127; dequantize=True"):
        from_onnx(path)
    model = from_onnx(path, dequantize=True)
    np.testing.assert_array_equal(model["tensors"]["linear.weight"], (w.T.astype("f") - 9) / 2)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="from_onnx: path must be an ONNX file"):
        from_onnx(tmp_path / "none")
    constants = {"w": np.ones((2, 2), "f")}
    nodes = [node("MatMul", "x w", "h"), node("Relu", "h", "y")]
    path = runtime.written(tmp_path / "m", nodes, ["T", "B", 2], constants)
    with pytest.raises(ValueError, match="from_onnx: output must be a tensor of the file, got 'z'"):
        from_onnx(path, output="z")
    assert kinds(from_onnx(path, output="h")) == ["linear"]
    assert kinds(from_onnx(path, input="h")) == ["relu"]
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"from_onnx needs onnx: pip install fastseq-kernels\[convert\]"):
        from_onnx(path)

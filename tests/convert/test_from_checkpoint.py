"""Checkpoints with torch's names as deployed models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastseq.convert import ConversionError, from_checkpoint
from fastseq.reference import run_model


def modules() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "words": nn.Embedding(9, 4),
            "below": nn.LSTM(4, 6, 2, bidirectional=True),
            "above": nn.LSTM(12, 6, proj_size=3),
            "cell": nn.LSTMCell(3, 5),
            "head": nn.Linear(5, 2),
        }
    )


def expected(model: nn.ModuleDict, x: Tensor) -> Tensor:
    y = model["above"](model["below"](model["words"](x))[0])[0]
    state, outs = None, []
    for step in y:
        state = model["cell"](step, state)
        outs.append(state[0])
    out: Tensor = model["head"](torch.stack(outs)).tanh()
    return out


def given(result: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    return result["layers"], {name: torch.as_tensor(value) for name, value in result["tensors"].items()}


ORDER = ["words", "below", "above", "cell", "head", "tanh"]


@pytest.mark.parametrize("kind", ["mapping", "pt", "safetensors", "nested"])
def test_all_at_once(kind: str, tmp_path: Path) -> None:
    model, x = modules(), torch.randint(0, 9, (7, 3))
    source: Any = model.state_dict()
    if kind == "pt":
        torch.save({"epoch": 3, "model_state_dict": source}, tmp_path / "m.pt")
        source = tmp_path / "m.pt"
    elif kind == "safetensors":
        save_file(source, str(tmp_path / "m.safetensors"))
        source = str(tmp_path / "m.safetensors")
    elif kind == "nested":
        source = {"state_dict": {f"net.{k}": v for k, v in source.items()} | {"loss.weight": torch.ones(3)}}
    layers, tensors = given(from_checkpoint(source, order=ORDER, prefix="net." if kind == "nested" else ""))
    assert [layer["name"] for layer in layers] == ORDER
    with torch.no_grad():
        torch.testing.assert_close(run_model(layers, tensors, x)[0], expected(model, x))


def test_order_of_the_file() -> None:
    result = from_checkpoint(modules().state_dict())
    assert [layer["type"] for layer in result["layers"]] == ["embedding", "lstm", "lstm", "lstm", "linear"]
    shuffled = dict(sorted(modules().state_dict().items()))
    with pytest.raises(ConversionError, match="below takes 4 channels, above gives 3: tell the order of the modules"):
        from_checkpoint(shuffled)


def test_one_module() -> None:
    layers, tensors = given(from_checkpoint(nn.LSTM(3, 4, bias=False).state_dict(), fields={"": {"tau": 0.5}}))
    assert (
        layers[0]["name"] == "lstm"
        and layers[0]["tau"] == 0.5
        and set(tensors)
        == {
            "lstm.weight_ih_l0",
            "lstm.weight_hh_l0",
        }
    )


def test_convolutions_need_their_fields() -> None:
    model = nn.Sequential(nn.Conv1d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv1d(5, 2, 1))
    with pytest.raises(ConversionError, match=r"  0 \(weight \[5, 4, 3\], bias \[5\]\): a Conv1d has left and right"):
        from_checkpoint(model.state_dict())
    fields = {"0": {"left": 1, "right": 1}}
    layers, tensors = given(from_checkpoint(model.state_dict(), order=["0", "relu", "2"], fields=fields))
    assert [layer["type"] for layer in layers] == ["conv1d", "relu", "linear"]
    x = torch.randn(6, 2, 4)
    with torch.no_grad():
        expected = model(x.permute(1, 2, 0)).permute(2, 0, 1)
    torch.testing.assert_close(run_model(layers, tensors, x)[0], expected)


def test_lookups_and_products() -> None:
    def kinds(*modules: nn.Module, **options: Any) -> list[str]:
        return [layer["type"] for layer in from_checkpoint(nn.Sequential(*modules).state_dict(), **options)["layers"]]

    assert kinds(nn.Embedding(9, 4), nn.LSTM(4, 3)) == ["embedding", "lstm"]
    assert kinds(nn.Linear(9, 4, bias=False), nn.LSTM(4, 3)) == ["linear", "lstm"]
    with pytest.raises(ConversionError, match="it may be a Linear or an Embedding: tell its type in fields"):
        kinds(nn.Embedding(4, 4), nn.LSTM(4, 3))
    assert kinds(nn.Embedding(4, 4), nn.LSTM(4, 3), fields={"0": {"type": "embedding"}}) == ["embedding", "lstm"]


@pytest.mark.parametrize("kind", ["mapping", "pt", "safetensors"])
def test_half_precision(kind: str, tmp_path: Path) -> None:
    """bfloat16 has no type in numpy and becomes float32 without error; float16 stays."""
    state = nn.LSTM(3, 4).bfloat16().state_dict() | {"weight_hh_l0": torch.randn(16, 4).half()}
    if kind == "pt":
        torch.save(state, tmp_path / "m.pt")
    else:
        save_file(state, str(tmp_path / "m.safetensors"))
    source: Any = state if kind == "mapping" else tmp_path / f"m.{kind}"
    tensors = from_checkpoint(source)["tensors"]
    np.testing.assert_array_equal(tensors["lstm.weight_ih_l0"], state["weight_ih_l0"].float().numpy())
    np.testing.assert_array_equal(tensors["lstm.weight_hh_l0"], state["weight_hh_l0"].numpy())
    bias = state["bias_ih_l0"].float() + state["bias_hh_l0"].float()
    np.testing.assert_array_equal(tensors["lstm.bias_l0"], bias.numpy())


class Surprise:
    def __reduce__(self) -> Any:
        return (print, ("this ran",))


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": Surprise()}, tmp_path / "m.pt")
    with pytest.raises(Exception, match="weights_only"):
        from_checkpoint(tmp_path / "m.pt")
    assert "this ran" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="source must be a mapping of tensors or a file, got 'none.pt'"):
        from_checkpoint("none.pt")
    with pytest.raises(ValueError, match="order and fields must be names among words, .*, got tail"):
        from_checkpoint(modules().state_dict(), order=["words", "tail"])
    with pytest.raises(ConversionError, match=r"  norm \(weight \[4\], bias \[4\]\): it is no LSTM, Linear"):
        from_checkpoint(nn.ModuleDict({"norm": nn.LayerNorm(4)}).state_dict())
    with pytest.raises(ConversionError, match="words is an embedding after below"):
        from_checkpoint(modules().state_dict(), order=["below", "words"], fields={"words": {"type": "embedding"}})

"""Files: what is written, and what a hostile one meets: an error with its reason, never a crash."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastseq import deploy
from tests.deploy import models


def small() -> models.State:
    torch.manual_seed(1)
    return models.chain(models.lstm(nn.LSTM(3, 5)), models.linear(nn.Linear(5, 2)))


def written(tmp_path: Path, state: models.State) -> bytes:
    deploy.save(state, tmp_path / "m")
    return (tmp_path / "m").read_bytes()


def rebuilt(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(whole: bytes) -> tuple[dict[str, Any], bytes]:
    (n,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + n]), whole[8 + n :]


def test_written_and_described(tmp_path: Path) -> None:
    state = small()
    state["tensors"]["lstm.weight_hh_l0"] = state["tensors"]["lstm.weight_hh_l0"].astype(np.float16)
    deploy.save(state, tmp_path / "m")
    found = deploy.description(tmp_path / "m")
    assert found["model"]["layers"] == state["layers"]
    assert found["model"]["source"].startswith("sha256:")
    assert found["tensors"]["lstm.weight_hh_l0"] == {"dtype": "float16", "shape": [20, 5]}
    assert found["bytes"] == sum(v.nbytes for v in state["tensors"].values())
    assert found["input"] == {"index": False, "size": 3} and found["output"]["size"] == 2
    from safetensors.numpy import load_file

    for name, value in load_file(tmp_path / "m").items():
        np.testing.assert_array_equal(value, state["tensors"][name])


def test_an_older_file_stays_where_writing_fails(tmp_path: Path) -> None:
    before = written(tmp_path, small())
    broken = small()
    del broken["tensors"]["linear.weight"]
    with pytest.raises(deploy.ModelError, match=r"tensor 'linear.weight' is missing"):
        deploy.save(broken, tmp_path / "m")
    with pytest.raises(ValueError, match=r"save: tensors\['linear.weight'\] must be one of float32.*, got float64"):
        deploy.save({**small(), "tensors": {"linear.weight": np.zeros((2, 5))}}, tmp_path / "m")
    with pytest.raises(ValueError, match=r"save: model must be a module with export_state\(\)"):
        deploy.save(3, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


Change = Callable[[dict[str, Any], dict[str, Any]], Any]  # of the header, and of the model in it


def _layer(number: int, **fields: Any) -> Change:
    return lambda header, model: model["layers"][number].update(fields)


def _tensor(name: str, **fields: Any) -> Change:
    return lambda header, model: header[name].update(fields)


WRONG: dict[str, tuple[Change, str]] = {
    "format": (lambda h, m: h["__metadata__"].update(format="fastseq 9"), "its format is 'fastseq 9', this version"),
    "no format": (lambda h, m: h["__metadata__"].pop("format"), "its metadata name no format"),
    "no metadata": (lambda h, m: h.pop("__metadata__"), "its metadata name no format"),
    "number as metadata": (lambda h, m: h["__metadata__"].update(a=1), "metadata 'a' must be a string"),
    "no layers": (lambda h, m: m.update(layers=[]), "layers must be a list of 1 .. 1000 objects"),
    "unknown type": (_layer(0, type="gru"), "layer 'lstm': type must be one of embedding, .*, got 'gru'"),
    "same name": (_layer(1, name="lstm"), "layer 'lstm' stands there twice"),
    "later layer": (_layer(0, **{"from": ["linear"]}), 'from names "linear", which is no earlier layer'),
    "wide input": (_layer(1, **{"in": 6}), r"it takes \[T, B, 6\] floats, got \[T, B, 5\] floats|tensor"),
    "large": (_layer(0, hidden_size=2**62), "hidden_size must be an integer of 1 .. 65536, got 4611686018427387904"),
    "text as size": (_layer(0, hidden_size="5"), "hidden_size must be an integer"),
    "negative": (_layer(0, hidden_size=-5), "hidden_size must be an integer of 1 .. 65536, got -5"),
    "many layers": (_layer(0, num_layers=2), "tensor 'lstm.weight_ih_l1' is missing"),
    "tau": (_layer(0, tau=0), "layer 'lstm': tau must be greater than 0"),
    "flag": (_layer(0, hard=1), "hard must be true or false, got 1"),
    "other shape": (_tensor("linear.weight", shape=[5, 2]), r"'linear.weight' must be \[2, 5\], got float32 \[5, 2\]"),
    "too short": (_tensor("linear.weight", shape=[3, 5]), r"float32 \[3, 5\] takes 60 bytes, the file gives it 40"),
    "huge": (_tensor("linear.weight", shape=[2**62, 2**62]), "its shape is too large"),
    "negative shape": (_tensor("linear.weight", shape=[-2, -5]), "sizes must be integers of at least 0"),
    "dims": (_tensor("linear.weight", shape=[1] * 5), "shape must be a list of at most 4 sizes"),
    "dtype": (_tensor("linear.weight", dtype="F64"), "dtype must be F32, F16, BF16, I8 or U8, got F64"),
    "beyond": (_tensor("linear.weight", data_offsets=[0, 2**60]), "its data lie at 0 .. 1152921504606846976, the file"),
    "backwards": (_tensor("linear.weight", data_offsets=[40, 0]), "its data lie at 40 .. 0"),
    "no offsets": (_tensor("linear.weight", data_offsets=[]), "data_offsets must be two integers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    header, data = parts(written(tmp_path, small()))
    model = json.loads(header["__metadata__"]["model"])
    change(header, model)
    if "__metadata__" in header:
        header["__metadata__"]["model"] = json.dumps(model)
    with pytest.raises(deploy.ModelError, match=message):
        deploy.Model.parse(rebuilt(header, data))


def test_overlaps_and_holes(tmp_path: Path) -> None:
    header, data = parts(written(tmp_path, small()))
    first, second = sorted((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])[:2]
    header[second]["data_offsets"] = [v - 4 for v in header[second]["data_offsets"]]
    with pytest.raises(deploy.ModelError, match=f"'{second}': its data overlap those of another tensor"):
        deploy.Model.parse(rebuilt(header, data))
    header, data = parts(written(tmp_path, small()))
    with pytest.raises(deploy.ModelError, match=r"bytes \d+ .. \d+ of the data belong to no tensor"):
        deploy.Model.parse(rebuilt(header, data + bytes(8)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({}, "layer 'ensemble': members is missing"),
        ({"members": 0}, "layer 'ensemble': members must be an integer of 1 .. 65536, got 0"),
        ({"members": 2.5}, "layer 'ensemble': members must be an integer of 1 .. 65536, got 2.5"),
        ({"members": 4}, "layer 'ensemble': its input of 6 channels must hold as many for each of 4 members"),
        ({"members": 12}, "layer 'ensemble': its input of 6 channels must hold as many for each of 12 members"),
        ({"members": 2, "from": ["input"]}, "layer 'ensemble': it takes .* floats, got integers"),
        ({"members": 2, "from": ["linear", "linear"]}, "layer 'ensemble': it takes one input, got 2"),
    ],
)
def test_ensembles(tmp_path: Path, layer: dict[str, Any], message: str) -> None:
    parts = models.embedding(nn.Embedding(5, 3)), models.linear(nn.Linear(3, 6)), models.plain("ensemble", **layer)
    with pytest.raises(deploy.ModelError, match=message):
        deploy.save(models.chain(*parts), tmp_path / "m")
    alone = models.plain("ensemble", members=2)
    with pytest.raises(deploy.ModelError, match="layer 'ensemble' cannot be the first to read the input"):
        deploy.save(alone, tmp_path / "m")


def test_the_parts_of_an_ensemble() -> None:
    y = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    found = deploy.split_ensemble(y[:, 0])
    np.testing.assert_array_equal(found.probability, [[0, 1], [6, 7]])
    np.testing.assert_array_equal(found.disagreement, [2, 8])
    assert deploy.split_ensemble(y[0, 0]).disagreement == 2
    for wrong, got in (
        (y[..., :1], r"float32 \[2, 2, 1\]"),
        (y.astype(np.int32), r"int32 \[2, 2, 3\]"),
        ([1.0], "list"),
    ):
        with pytest.raises(
            ValueError, match=rf"split_ensemble: y must be an array of floats \[..., K \+ 1\].*, got {got}"
        ):
            deploy.split_ensemble(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float) -> None:
    state = small()
    state["tensors"]["lstm.weight_hh_l0"][3, 2] = value
    with pytest.raises(deploy.ModelError, match="'lstm.weight_hh_l0' holds .*, which is not a finite number"):
        deploy.save(state, tmp_path / "m")


def test_integers_and_scales(tmp_path: Path) -> None:
    state = models.quantized(small())
    deploy.save(state, tmp_path / "m")
    name = "lstm.weight_hh_l0"
    for key, value, message in (
        (name, np.full((20, 5), -128, np.int8), "must hold integers of -127 .. 127, got -128"),
        (f"{name}.scale", np.full((20, 1), np.nan, np.float32), "is not a finite number"),
        (f"{name}.scale", np.full((20, 1), -1, np.float32), "a scale is at least 0"),
        (f"{name}.scale", np.ones((20, 2), np.float32), r"must be \[20, 1\], got float32 \[20, 2\]"),
    ):
        with pytest.raises(deploy.ModelError, match=message):
            deploy.save({**state, "tensors": {**state["tensors"], key: value}}, tmp_path / "n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100000, "JSON is nested deeper than 16"),
        ("{", "expected"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": 01}', "expected"),
        ('{"a": "\\ud800"}', "expected the second half of a character"),
        ('{"a": "\x01"}', "no control character"),
        ('{"a": 1e999}', "expected a number"),
        ("[1, 2] 3", "expected nothing more"),
        ("nul", "expected a value"),
        ("[]", "expected an object, got a list"),
    ],
)
def test_json(text: str, message: str) -> None:
    data = text.encode()
    with pytest.raises(deploy.ModelError, match=message):
        deploy.Model.parse(struct.pack("<Q", len(data)) + data)


def test_cut_off_anywhere(tmp_path: Path) -> None:
    whole = written(tmp_path, small())
    for end in [*range(0, 64), *range(64, len(whole), 37)]:
        with pytest.raises(deploy.ModelError):
            deploy.Model.parse(whole[:end])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_flipped_bytes(data: st.DataObject) -> None:
    """Another model, or an error: and a model that loads also runs."""
    whole = bytearray(_whole())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        model = deploy.Model.parse(bytes(whole))
    except deploy.ModelError as error:
        assert str(error)
        return
    if not model.input_is_index:
        model.run(np.ones((3, 2, model.input_size), np.float32))


_kept: list[bytes] = []


def _whole() -> bytes:
    if not _kept:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            _kept.append(written(Path(folder), models.quantized(small())))
    return _kept[0]


def test_no_code_is_run(tmp_path: Path) -> None:
    """A pickle is only bytes."""
    import pickle

    (tmp_path / "m").write_bytes(pickle.dumps(print))
    code = f"from fastseq import deploy; deploy.Model.load({str(tmp_path / 'm')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "not a safetensors file" in done.stderr and done.stdout == ""

"""``fastseq inspect``: what it tells of every form of a matrix, and what it says of files that are wrong."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from fastseq import cli, deploy
from fastseq.deploy import inspection
from tests import model_cases as cases
from tests.deploy import models
from tests.deploy.test_file import parts, rebuilt, small

ROOT = Path(__file__).parents[1]
NO_TORCH = "import sys; sys.modules['torch'] = sys.modules['rich'] = None; "


def numpy_state(model: cases.Model) -> models.State:
    """As ``save`` takes it."""
    layers, tensors = model
    bits = {k: v.view(torch.int16).numpy().view(np.uint16) for k, v in tensors.items() if v.dtype == torch.bfloat16}
    return {"layers": layers, "tensors": {k: bits[k] if k in bits else v.detach().numpy() for k, v in tensors.items()}}


def inspected(path: Path, capsys: pytest.CaptureFixture[str], status: int = 0) -> dict[str, Any]:
    assert cli.main(["inspect", "--json", str(path)]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


KEPT = {
    "dense": {"float32"},
    "float16": {"float16"},
    "bfloat16": {"bfloat16"},
    "int8": {"int8"},
    "int8 by 8": {"int8 by 8", "int8"},  # the input of 8 columns is one group
    "int4": {"int4"},
    "low rank": {"rank 4, float32", "rank 12, float32"},
    "low rank int8": {"rank 4, int8", "rank 12, int8"},
    "gates": {"float32", "int8", "rank 4, float32", "rank 12, float32", "int4"},
}


@pytest.mark.parametrize("form", KEPT)
def test_every_form_is_told(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = numpy_state(cases.chain(cases.lstm(nn.LSTM(8, 24, 2), form), cases.linear(5, 24, "dense")))
    deploy.save(state, tmp_path / "m")
    found = inspected(tmp_path / "m", capsys)
    lstm, linear = found["layers"]
    matrices = [entry for entry in lstm["tensors"] if entry["name"].startswith("weight")]
    assert {entry["kept"] for entry in matrices} == KEPT[form]
    assert len(matrices) == (16 if form == "gates" else 4)
    assert {entry["rank"] for entry in matrices} == {int(r) if r else None for r in ranks(KEPT[form])}
    assert sum(e["bytes"] for layer in (lstm, linear) for e in layer["tensors"]) == found["bytes"]
    assert found["bytes"] == sum(v.nbytes for v in state["tensors"].values())
    assert found["float32_bytes"] == 4 * (96 * (8 + 24 + 24 + 24 + 2) + 5 * 24 + 5)
    numbers = [v.size * (2 if v.dtype == np.uint8 else 1) for k, v in state["tensors"].items() if "scale" not in k]
    assert found["parameters"] == sum(numbers)
    assert found["file_bytes"] == (tmp_path / "m").stat().st_size
    assert all(check["passed"] for check in found["checks"])


def ranks(kept: set[str]) -> list[str]:
    return [(re.search(r"rank (\d+)", text) or ["", ""])[1] for text in kept]


def test_an_odd_number_of_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deploy.save(numpy_state(cases.linear(4, 5, "int4")), tmp_path / "m")
    weight, bias = inspected(tmp_path / "m", capsys)["layers"][0]["tensors"]
    assert (weight["shape"], weight["parameters"], weight["bytes"]) == ([4, 5], 20, 4 * 3 + 4 * 4)
    assert (bias["name"], bias["kept"], bias["shape"]) == ("bias", "float32", [4])


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = nn.LSTM(4, 8, bidirectional=True, proj_size=2)
    state = numpy_state(
        cases.chain(
            cases.embedding(1000, 6, "int8"),
            cases.conv1d(4, 6, 3, left=1, right=1, stride=2),
            cases.lstm(both, tau=0.5),
            cases.lstm(nn.LSTM(4, 4), name="binary", hard=True),
            ([{"type": "add", "name": "sum", "from": ["lstm", "binary"]}], {}),
            ([{"type": "crf", "name": "crf", "labels": 4}], {f"crf.{k}": torch.zeros(4) for k in ("start", "end")}),
            ([], {"crf.transitions": torch.zeros(4, 4)}),
        )
    )
    deploy.save(state, tmp_path / "m")
    assert cli.main(["inspect", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'm'}: fastseq 1, {(tmp_path / 'm').stat().st_size:,} bytes\nsource: sha256:")
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    for row in (
        ["input: int32 [T, B]; output: int32 [T, B]"],
        ["embedding", "embedding", "1000 to 6", "6,000", "10,000", "24,000"],
        ["conv1d", "conv1d, kernel 3, stride 2, left 1, right 1", "6 to 4", "76", "304", "304"],
        ["lstm", "lstm, sigmoid gates, tau 0.5, both directions, projected to 2", "4 to 4", "480", "1,920", "1,920"],
        ["binary", "lstm, hard gates", "4 to 4", "144", "576", "576"],
        ["sum", "add, from lstm, binary", "0", "0", "0"],
        ["transitions", "float32", "4 x 4", "16", "64", "64"],
        ["ok", "hash: that of its tensors"],
    ):
        assert row in rows, row
    assert "whole sequences only: layer 'conv1d': it needs steps that come after; state:" in out
    lines = out.split("\n\n")[1].splitlines()  # numbers stand at the right, all rows end at the same column
    assert len({len(line) for line in lines}) == 1


def test_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deploy.save(numpy_state(cases.ensemble(3, 4, 2)), tmp_path / "m")
    assert cli.main(["inspect", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert "output: float32 [T, B, 3]" in out and re.search(r"^ensemble +ensemble, 3 members +0", out, re.M)


def test_without_torch_and_rich(tmp_path: Path) -> None:
    deploy.save(models.quantized(small()), tmp_path / "m")
    code = f"{NO_TORCH} from fastseq import cli; sys.exit(cli.main(['inspect', {str(tmp_path / 'm')!r}]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=300)
    assert (run.returncode, run.stderr) == (0, "")
    assert "weight_hh_l0" in run.stdout and "runs: a step of zeros gives finite numbers" in run.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def changed(tmp_path: Path, **layer: Any) -> Path:
    """A file whose first layer has other fields."""
    header, data = parts(written(tmp_path))
    model = json.loads(header["__metadata__"]["model"])
    model["layers"][0].update(layer)
    header["__metadata__"]["model"] = json.dumps(model)
    (tmp_path / "m").write_bytes(rebuilt(header, data))
    return tmp_path / "m"


def written(tmp_path: Path) -> bytes:
    deploy.save(small(), tmp_path / "m")
    return (tmp_path / "m").read_bytes()


def test_hostile_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, whole = tmp_path / "m", written(tmp_path)
    header, data = parts(whole)
    version = {**header, "__metadata__": {**header["__metadata__"], "format": "fastseq 9"}}
    wrong = {
        whole[:-1]: r"its data lie at|takes \d+ bytes|belong to no tensor",
        whole[:5]: "not a safetensors file: it has 5 bytes",
        b"": "not a safetensors file: it has 0 bytes",
        b"\x80\x04N." * 9: "not a safetensors file, or cut off",
        struct.pack("<Q", 100000) + b"[" * 100000: "JSON is nested deeper than 16",
        rebuilt(version, data): "its format is 'fastseq 9', this version reads 'fastseq 1'",
        changed(tmp_path, hidden_size=2**40).read_bytes(): "hidden_size must be an integer of 1 .. 65536",
        changed(tmp_path, name="\x1b[31m\nfine").read_bytes(): r"tensor '\\x1b\[31m\\nfine.weight_ih_l0' is missing",
    }
    for content, message in wrong.items():
        path.write_bytes(content)
        assert cli.main(["inspect", str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and re.fullmatch(rf"fastseq inspect: {re.escape(str(path))}: .*({message}).*\n", err), err


def test_names_of_a_file_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = small()
    name = "\x1b]0;x\x07\r\n"
    state["layers"][1]["name"] = name
    state["tensors"] = {k.replace("linear", name): v for k, v in state["tensors"].items()} | {
        "\x1b[2J": np.zeros(1, "f4")
    }
    deploy.save(state, tmp_path / "m")
    assert cli.main(["inspect", str(tmp_path / "m")]) == 1
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\r" not in out and r"\x1b]0;x\x07\r\n" in out
    assert "FAILED  tensors: no layer reads \\x1b[2J\n" in out
    assert err == f"fastseq inspect: {tmp_path / 'm'}: checks failed: tensors\n"


def test_checks_that_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = bytearray(written(tmp_path))
    whole[-1] ^= 1
    (tmp_path / "m").write_bytes(bytes(whole))
    checks = {check["name"]: check for check in inspected(tmp_path / "m", capsys, 1)["checks"]}
    assert [name for name, check in checks.items() if not check["passed"]] == ["hash"]
    assert checks["hash"]["found"] == "another than that of its tensors"
    state = models.chain(models.linear(nn.Linear(2, 2), "a"), models.linear(nn.Linear(2, 2), "b"))
    state["tensors"] |= {f"{n}.{k}": np.full(s, 1e38, "f4") for n in "ab" for k, s in (("weight", (2, 2)), ("bias", 2))}
    deploy.save(state, tmp_path / "m")
    checks = {check["name"]: check for check in inspected(tmp_path / "m", capsys, 1)["checks"]}
    assert [name for name, check in checks.items() if not check["passed"]] == ["runs"]


def test_a_state_that_no_machine_has_room_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = nn.Conv1d(3, 2, 2)
    state = models.conv1d(module, left=5)
    state["layers"][0]["dilation"] = 65536
    state["layers"][0] |= {"in": 1024}
    state["tensors"]["conv.weight"] = np.zeros((2, 2048), np.float32)
    deploy.save(state, tmp_path / "m")
    run = inspected(tmp_path / "m", capsys, 1)["checks"][-1]
    assert (run["passed"], run["found"]) == (False, "not tried, its state has 67,108,865 numbers")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_other_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str], metadata: dict[str, str] | None) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"b": np.zeros((2, 3)), "a\x1b": np.zeros(4, np.int64)}, path, metadata)
    assert cli.main(["inspect", str(path)]) == 1
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()[2:]] == [["a\\x1b", "I64", "4"], ["b", "F64", "2", "x", "3"]]
    assert err == f"fastseq inspect: {path}: not a fastseq model, but a safetensors file of other tensors\n"
    assert inspected(path, capsys, 1)["tensors"]["b"] == {"dtype": "F64", "shape": [2, 3]}


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, why in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        assert cli.main(["inspect", str(path)]) == 1
        assert capsys.readouterr().err == f"fastseq inspect: {path}: {why}\n"


def test_a_state_comes_back(tmp_path: Path) -> None:
    for form in ("dense", "bfloat16", "float16", "gates"):
        state = numpy_state(cases.chain(cases.lstm(nn.LSTM(3, 8), form), cases.linear(3, 8, form)))
        deploy.save(state, tmp_path / "m")
        back = deploy.read_state(tmp_path / "m")
        assert back["layers"] == state["layers"] and back["tensors"].keys() == state["tensors"].keys()
        for name, value in state["tensors"].items():
            assert back["tensors"][name].dtype == value.dtype
            np.testing.assert_array_equal(back["tensors"][name], value)


def test_every_type_of_the_loader_is_known(tmp_path: Path) -> None:
    """So that no tensor that a layer reads is told to be read by none."""
    with pytest.raises(deploy.ModelError) as error:
        deploy.save({"layers": [{"type": "?", "name": "a"}], "tensors": {}}, tmp_path / "m")
    types = re.search(r"one of (.*), got", str(error.value))
    assert types
    plain = {"relu", "tanh", "sigmoid", "softmax", "ensemble", "add", "concat"}
    full: dict[str, Any] = {"size": 1, "dim": 1, "in": 1, "out": 1, "input_size": 1, "hidden_size": 1}
    for kind in types[1].split(", "):
        layer = {"type": kind, "name": "a", **full}
        assert bool(inspection._matrices(layer) or inspection._vectors(layer)) == (kind not in plain), kind

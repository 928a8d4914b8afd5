"""``fastseq convert``: every source and target, matrices in fewer bits, and what happens where it cannot be done."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastseq import cli, conversion, convert, deploy, reference
from fastseq.reference import run_model
from tests import model_cases as cases
from tests.convert.test_from_checkpoint import Surprise
from tests.test_cli_inspect import NO_TORCH, environment, numpy_state
from tests.tolerance import assert_same_bits, assert_within_budget


def tagger() -> nn.ModuleDict:
    torch.manual_seed(4)
    return nn.ModuleDict({"words": nn.Embedding(11, 6), "lstm": nn.LSTM(6, 20, 2), "head": nn.Linear(20, 3)})


def tags(modules: nn.ModuleDict, x: Tensor) -> Tensor:
    y: Tensor = modules["head"](modules["lstm"](modules["words"](x))[0].relu())
    return y


ORDER = ["--order", "words,lstm,relu,head"]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> str:
    """What was printed; of a failure what stands on stderr after the program's name."""
    assert cli.main(["convert", *map(str, arguments)]) == status
    out, err = capsys.readouterr()
    if not status:
        assert err == ""
        return out
    assert out == "" and err.startswith("fastseq convert: ")
    return err.removeprefix("fastseq convert: ").removesuffix("\n")


@pytest.mark.parametrize("kind", ["pt", "pth", "safetensors"])
def test_from_a_checkpoint(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules, x = tagger(), torch.randint(0, 11, (7, 3))
    source, target = tmp_path / f"c.{kind}", tmp_path / "m.safetensors"
    state = {f"net.{key}": value for key, value in modules.state_dict().items()}
    save_file(state, str(source)) if kind == "safetensors" else torch.save({"state_dict": state}, source)
    out = run(capsys, source, target, *ORDER, "--prefix", "net.")
    assert cli.main(["inspect", str(target)]) == 0
    assert capsys.readouterr().out == out  # the same is told
    y, _ = deploy.Model.load(str(target)).run(x.numpy())

    def plain(zero: Tensor) -> Tensor:
        return tags(modules.to(zero.dtype), x).detach()

    assert_within_budget("y", torch.from_numpy(y), plain, (torch.zeros(1),))


def test_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv1d(4, 5, 3, padding=1), nn.LSTM(5, 5), nn.Linear(5, 5, bias=False))
    torch.save(model.state_dict(), tmp_path / "c.pt")
    message = run(capsys, tmp_path / "c.pt", tmp_path / "m.fastseq", status=1)
    assert message.splitlines()[1].startswith("  0 (weight [5, 4, 3], bias [5]): a Conv1d has left and right zeros")
    fields = ["0.left=1", "0.right=1", "1.hard=true", "1.tau=0.5", "2.type=linear"]
    run(capsys, tmp_path / "c.pt", tmp_path / "m.fastseq", *(part for field in fields for part in ("--field", field)))
    conv, lstm, linear = deploy.description(tmp_path / "m.fastseq")["model"]["layers"]
    assert (conv["left"], conv["right"], lstm["hard"], lstm["tau"], linear["type"]) == (1, 1, True, 0.5, "linear")
    with pytest.raises(SystemExit):
        cli.main(["convert", "a.pt", "b.fastseq", "--field", "left"])
    assert "must be MODULE.NAME=VALUE, got 'left'" in capsys.readouterr().err


def test_from_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.convert import runtime
    from tests.convert.test_from_onnx import Tagger

    x = torch.randint(0, 11, (7, 3))
    path = runtime.exported(Tagger(True, 1), x, tmp_path / "m.onnx")
    out = run(capsys, path, tmp_path / "m.safetensors")
    note = "note: the ONNX file takes the batch before the steps; what was made of it takes the steps first\n"
    assert out.startswith(f"{note}{tmp_path / 'm.safetensors'}: fastseq 1, ")
    state, known = deploy.read_state(tmp_path / "m.safetensors"), convert.from_onnx(path)
    assert state["layers"] == known["layers"]
    for name, value in known["tensors"].items():
        np.testing.assert_array_equal(state["tensors"][name], value)
    theirs = torch.from_numpy(runtime.run(path, x)[0]).transpose(0, 1).contiguous()
    named = {name: torch.from_numpy(value) for name, value in state["tensors"].items()}
    y, _ = deploy.Model.load(str(tmp_path / "m.safetensors")).run(x.mT.contiguous().numpy())
    for got in (theirs, torch.from_numpy(y)):
        assert_within_budget("y", got, lambda t: run_model(state["layers"], t, x.mT)[0], [named])
    # a tensor inside; the output is then the LSTM's
    inside = next(n.output[0] for n in reversed(runtime.onnx.load(str(path)).graph.node) if n.op_type == "Tanh")
    run(capsys, path, tmp_path / "part.fastseq", "--output", inside)
    kinds = [layer["type"] for layer in deploy.read_state(tmp_path / "part.fastseq")["layers"]]
    assert kinds == ["embedding", "lstm", "tanh"]


def test_to_onnx_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.convert import runtime

    modules, x = tagger(), torch.randint(0, 11, (7, 3))
    torch.save(modules.state_dict(), tmp_path / "c.pt")
    run(capsys, tmp_path / "c.pt", tmp_path / "m.safetensors", *ORDER)
    deployed = run(capsys, tmp_path / "m.safetensors", tmp_path / "a.onnx")
    assert deployed == f"{tmp_path / 'a.onnx'}: ONNX, {(tmp_path / 'a.onnx').stat().st_size:,} bytes\n"
    run(capsys, tmp_path / "c.pt", tmp_path / "b.onnx", *ORDER)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    y = torch.from_numpy(runtime.run(tmp_path / "a.onnx", x)[0])
    assert_within_budget("y", y, lambda z: tags(modules.to(z.dtype), x).detach(), (torch.zeros(1),))
    run(capsys, tmp_path / "a.onnx", tmp_path / "back.safetensors")
    first, back = (deploy.Model.load(str(tmp_path / name)) for name in ("m.safetensors", "back.safetensors"))
    np.testing.assert_array_equal(first.run(x.numpy())[0], back.run(x.numpy())[0])
    run(capsys, tmp_path / "m.safetensors", tmp_path / "q.onnx", "--weights", "int8")
    operators = {node.op_type for node in runtime.onnx.load(str(tmp_path / "q.onnx")).graph.node}
    assert {"DynamicQuantizeLSTM", "MatMulInteger"} <= operators
    for name, options, kept in (("i", [], "int8"), ("f", ["--dequantize"], "float32")):
        run(capsys, tmp_path / "q.onnx", tmp_path / f"{name}.fastseq", *options)
        layers = deploy.contents(tmp_path / f"{name}.fastseq")["layers"]
        assert {e["kept"] for layer in layers for e in layer["tensors"] if "weight" in e["name"]} == {kept}
    notes = run(capsys, tmp_path / "m.safetensors", tmp_path / "w.onnx", "--weights", "bfloat16").splitlines()
    assert notes[0] == "note: words.weight: bfloat16 written as float32" and len(notes) == 7


@pytest.mark.parametrize("columns", [1, 7, 16, 21])
@pytest.mark.parametrize(("weights", "group"), [("int8", None), ("int4", None), ("int8", 8), ("int4", 16)])
def test_integers_are_those_of_the_definition(weights: str, group: int | None, columns: int) -> None:
    weight = torch.randn(6, columns) * torch.logspace(-42, 3, 6)[:, None]
    weight[4] = 0
    layers, tensors = [{"type": "linear", "name": "a", "in": columns, "out": 6}], {"a.weight": weight.numpy()}
    got = convert.stored({"layers": layers, "tensors": tensors}, weights, group)
    part = reference.store(weight, weights, group or 0)
    assert got["layers"] == ([{**layers[0], "group": group}] if group else layers)
    assert_same_bits("values", got["tensors"]["a.weight"], part.values)
    assert_same_bits("scale", got["tensors"]["a.weight.scale"], part.scale)
    assert tensors["a.weight"].dtype == np.float32 and "group" not in layers[0]  # what was given stays


def test_bfloat16_is_that_of_torch() -> None:
    weight = torch.randn(50, 40) * torch.logspace(-44, 30, 50)[:, None]
    weight[0] = torch.arange(40) * 2.0**-8 + 1  # ties
    model = {"layers": [{"type": "linear", "name": "a"}], "tensors": {"a.weight": weight.numpy()}}
    got = convert.stored(model, "bfloat16")["tensors"]["a.weight"]
    np.testing.assert_array_equal(got.view(np.int16), weight.bfloat16().view(torch.int16).numpy())


def test_compressed_models_run_and_are_near(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More bits are nearer, and the fewest are nearer than nothing; the loader runs what was written."""
    modules, x = tagger(), np.random.default_rng(0).integers(0, 11, (9, 5)).astype(np.int32)
    torch.save(modules.state_dict(), tmp_path / "c.pt")
    run(capsys, tmp_path / "c.pt", tmp_path / "m.safetensors", *ORDER)
    exact, _ = deploy.Model.load(str(tmp_path / "m.safetensors")).run(x)
    errors, sizes = [np.abs(exact).max()], [deploy.description(tmp_path / "m.safetensors")["bytes"]]
    for options in (["int4"], ["int4", "--group", "8"], ["int8"], ["bfloat16"]):
        target = tmp_path / f"{'-'.join(options)}.fastseq"
        run(capsys, tmp_path / "m.safetensors", target, "--weights", *options)
        y, _ = deploy.Model.load(str(target)).run(x)
        errors.append(np.abs(y - exact).max())
        sizes.append(deploy.description(target)["bytes"])
    assert all(more > less for more, less in itertools.pairwise(errors)) and max(sizes) == sizes[0]
    kept = {e["name"]: e["kept"] for layer in deploy.contents(tmp_path / "int4---group-8.fastseq")["layers"]
            for e in layer["tensors"]}  # fmt: skip
    assert kept["weight_hh_l1"] == "int4 by 8" and kept["weight_ih_l0"] == "int4" and kept["bias_l0"] == "float32"
    assert deploy.contents(tmp_path / "int4.fastseq")["layers"][0]["tensors"][0]["kept"] == "int4"  # the embedding


@pytest.mark.parametrize("form", ["bfloat16", "float16", "low rank", "gates", "int8 by 8", "low rank int8"])
def test_other_forms_are_stored_part_by_part(form: str) -> None:
    """Integers stay; floats become what the definition makes of them, by the group that the layer has."""
    layers, tensors = cases.chain(cases.lstm(nn.LSTM(16, 32), form), cases.linear(3, 32, form))
    got = convert.stored(numpy_state((layers, tensors)), "int8", 16)
    groups = [layer.get("group") for layer in got["layers"]]
    assert groups == [8, 8] if " by 8" in form else [None, None] if form in ("gates", "low rank int8") else [16, 16]
    deploy.Model.parse(deploy.file._serialized(got["layers"], got["tensors"]))
    for name, value in tensors.items():
        if name.endswith(".scale") or f"{name}.scale" in tensors or "weight" not in name:
            assert_same_bits(name, got["tensors"][name], value)
            continue
        group = groups[0 if name.startswith("lstm") else 1]
        part = reference.store(value.float(), "int8", group or 0)
        assert_same_bits(name, got["tensors"][name], part.values)
        assert_same_bits(name, got["tensors"][f"{name}.scale"], part.scale)


def test_what_is_not_supported_is_listed_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.convert import runtime
    from tests.convert.runtime import node

    nodes = [node("Abs", "x", "a"), node("Exp", "x", "\x1b"), node("Add", "a \x1b", "y")]
    path = runtime.written(tmp_path / "m.onnx", nodes, ["T", "B", 4], {})
    lines = run(capsys, path, tmp_path / "m.fastseq", status=1).splitlines()
    assert lines == [f"from_onnx: 2 nodes of {path} cannot be converted:", "  /a (Abs)", "  /\\x1b (Exp)"]
    torch.save(nn.ModuleDict({"norm": nn.LayerNorm(4)}).state_dict(), tmp_path / "c.pt")
    lines = run(capsys, tmp_path / "c.pt", tmp_path / "m.fastseq", status=1).splitlines()
    assert lines[1] == "  norm (weight [4], bias [4]): it is no LSTM, Linear, Embedding or Conv1d"
    deploy.save(numpy_state(cases.lstm(nn.LSTM(4, 5, proj_size=2))), tmp_path / "p.safetensors")
    lines = run(capsys, tmp_path / "p.safetensors", tmp_path / "p.onnx", status=1).splitlines()
    assert lines[1] == "  lstm (lstm): the LSTM of ONNX has no projection"
    assert {p.suffix for p in tmp_path.iterdir()} == {".onnx", ".pt", ".safetensors"}  # nothing was written


def test_no_code_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "c.pt"
    torch.save({"weight": Surprise()}, source)
    message = run(capsys, source, tmp_path / "m.fastseq", status=1)
    assert message.startswith(f"{source}: broken, or it holds more than tensors and is not read")
    for name in ("c.pt", "c.safetensors", "c.fastseq", "c.onnx"):
        (tmp_path / name).write_bytes(b"\x1b[2J nothing of the kind" * 9)
        message = run(capsys, tmp_path / name, tmp_path / "m.safetensors", status=1)
        assert message.isprintable() and str(tmp_path / name) in message
    assert not (tmp_path / "m.safetensors").exists()


def test_options_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deploy.save(numpy_state(cases.linear(3, 4)), tmp_path / "m.safetensors")
    torch.save({}, tmp_path / "c.pt")
    (tmp_path / "m.onnx").touch()
    multiple = "stored: group must be None, or a multiple of 8 with weights 'int8' or 'int4', got 7"
    for source, options, message in (
        ("m.safetensors", "--order a", "{} is a deployed model: for a checkpoint only: --order"),
        ("m.onnx", "--prefix a --field a.b=1", "{} is an ONNX file: for a checkpoint only: --prefix, --field"),
        ("c.pt", "--input x --dequantize", "{} is a checkpoint: for an ONNX file only: --input, --dequantize"),
        ("m.safetensors", "--group 8", "--group needs --weights int8 or int4"),
        ("m.safetensors", "--group 8 --weights bfloat16", "--group needs --weights int8 or int4"),
        ("m.safetensors", "--group 7 --weights int8", multiple),
        ("none", "", "{}: there is no such file"),
    ):
        found = run(capsys, tmp_path / source, tmp_path / "t.fastseq", *options.split(), status=1)
        assert found == message.format(tmp_path / source)


def test_an_older_file_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    deploy.save(numpy_state(cases.linear(3, 4)), source)
    target.write_text("older")
    assert run(capsys, source, target, status=1) == f"{target} is there already; --force replaces it"
    layers, tensors = numpy_state(cases.lstm(nn.LSTM(4, 5))).values()
    convert.to_onnx(layers, tensors, tmp_path / "c.onnx")
    (tmp_path / "c.onnx").write_bytes((tmp_path / "c.onnx").read_bytes()[:-20])
    run(capsys, tmp_path / "c.onnx", target, "--force", status=1)
    assert target.read_text() == "older" and len(list(tmp_path.iterdir())) == 3
    run(capsys, source, target, "--force")
    assert deploy.description(target) == deploy.description(source)
    before = source.read_bytes()
    run(capsys, source, source, "--force", "--weights", "int8")
    assert source.read_bytes() != before
    for path, message in (
        (tmp_path / "m.pt", "TARGET must end in .safetensors, .fastseq, .onnx, got {}"),
        (tmp_path / "none" / "m.onnx", "{}: there is no such folder"),
    ):
        assert run(capsys, source, path, status=1) == message.format(path)
    folder = tmp_path / "f.onnx"
    folder.mkdir()
    assert run(capsys, source, folder, "--force", status=1) == f"{folder} is there already"
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors", "c.onnx", "f.onnx"}


def test_a_file_that_comes_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "m.fastseq"
    with (
        pytest.raises(conversion.ConversionFailed, match="is there already"),
        conversion._whole_file(target, False) as p,
    ):
        p.write_text("new")
        target.write_text("other")
    assert target.read_text() == "other" and os.listdir(tmp_path) == ["m.fastseq"]


def test_without_torch(tmp_path: Path) -> None:
    """safetensors and ONNX need none; a file of torch.save says so."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    modules = tagger()
    save_file(modules.state_dict(), str(tmp_path / "c.safetensors"))
    torch.save(modules.state_dict(), tmp_path / "c.pt")
    steps = [("c.safetensors", "a.onnx", ORDER), ("a.onnx", "b.fastseq", []), ("c.pt", "d.fastseq", [])]
    calls = [["convert", str(tmp_path / a), str(tmp_path / b), "--weights", "int8", *more] for a, b, more in steps]
    code = f"{NO_TORCH} from fastseq import cli; print([cli.main(call) for call in {calls!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.stdout.splitlines()[-1] == "[0, 0, 1]"
    assert done.stderr == "fastseq convert: files of torch.save need torch: pip install fastseq-kernels[torch]\n"

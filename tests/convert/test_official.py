"""Checkpoints of the papers' own code, in files made in their layouts, and what that code computes from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq
from fastseq import cli, deploy
from fastseq.convert import ConversionError, from_adaptdl, from_g2_lstm, from_torch_uncertainty
from fastseq.recipes import LEGW
from fastseq.reference import run_model
from tests.tolerance import assert_same_bits, assert_within_budget

V, E, H, K = 11, 6, 8, 5  # words, their size, units, classes
State = dict[str, Tensor]


def converted(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> str:
    """Notes and what was told of the target; of a failure its message."""
    assert cli.main(["convert", *map(str, arguments)]) == status
    out, err = capsys.readouterr()
    return out if not status else err.removeprefix("fastseq convert: ").rstrip("\n")


def g2_lstm(layers: int = 1) -> State:
    """A language model as g2-lstm's model.py has it: embedding, LSTMs of their own sizes, a decoder that is tied."""
    torch.manual_seed(2)
    state, sizes = {"encoder.weight": torch.randn(V, E)}, [(E, H), (H, H + 1), (H + 1, E)]
    for n, (size, units) in enumerate(sizes):
        for layer in range(layers):
            cell = f"rnns.{n}.cell_{layer}."
            state[f"{cell}weight_ih"] = torch.randn(units if layer else size, 4 * units) / 2
            state[f"{cell}weight_hh"] = torch.randn(units, 4 * units) / 2
            state[f"{cell}bias"] = torch.randn(4 * units)
    return state | {"decoder.weight": state["encoder.weight"], "decoder.bias": torch.randn(V)}


def language_model(state: State, words: Tensor, tau: float = 1.0) -> Tensor:
    """Its forward in evaluation: gates in the order f, i, o, g."""
    x = state["encoder.weight"][words]
    cells = [name.removesuffix("weight_hh") for name in state if name.endswith("weight_hh")]
    for cell in cells:
        h = c = x.new_zeros(x.shape[1], len(state[f"{cell}weight_hh"]))
        outs = []
        for step in x:
            sums = step @ state[f"{cell}weight_ih"] + h @ state[f"{cell}weight_hh"] + state[f"{cell}bias"]
            f, i, o, g = sums.chunk(4, 1)
            c = (f / tau).sigmoid() * c + (i / tau).sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outs.append(h)
        x = torch.stack(outs)
    return x @ state["decoder.weight"].T + state["decoder.bias"]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_g2_lstm(layers: int, tau: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, words = g2_lstm(layers), torch.randint(0, V, (7, 3))
    torch.save(state, tmp_path / "state.pt")
    fields = [f"--field=rnns.{n}.tau={tau}" for n in range(3)] if tau != 1.0 else []
    out = converted(capsys, tmp_path / "state.pt", tmp_path / "m.fastseq", "--from", "g2-lstm", *fields)
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 3 and "divide_temp" in notes[0] and "same weights" in notes[2]
    y, _ = deploy.Model.load(str(tmp_path / "m.fastseq")).run(words.numpy())

    def theirs(state: State) -> Tensor:
        return language_model(state, words, tau)

    assert_within_budget("y", torch.from_numpy(y), theirs, (state,))


def test_a_g2_lstm_is_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its state loads by the names that are told, and gives what the code of its authors gives."""
    state, words = g2_lstm(), torch.randint(0, V, (7, 3))
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "c.pt")
    out = converted(capsys, tmp_path / "c.pt", tmp_path / "state.pt", "--from", "g2-lstm")
    assert 'rnns.1: fastseq.nn.LSTM(8, 9, gates="binary"); ' in out and "encoder: nn.Embedding(11, 6); " in out
    lstms = [fastseq.nn.LSTM(i, o, gates="binary") for i, o in ((E, H), (H, H + 1), (H + 1, E))]
    modules = nn.ModuleDict({"encoder": nn.Embedding(V, E), "rnns": nn.ModuleList(lstms), "decoder": nn.Linear(E, V)})
    modules.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    modules.eval()

    def ours(state: State) -> Tensor:
        x = modules["encoder"](words)
        for lstm in lstms:
            x = lstm(x)[0]
        return modules["decoder"](x).detach()

    assert_within_budget("y", ours(state), lambda state: language_model(state, words), (state,))


def test_lstms_alone() -> None:
    state = {n.removeprefix("rnns.0."): v for n, v in g2_lstm().items() if n.startswith("rnns.0.")}
    found = from_g2_lstm(state)
    assert [*found.state] == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert found.model is not None and [layer["type"] for layer in found.model["layers"]] == ["lstm"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rnns.0.cell_0.bias": None}, "the file has no rnns.0.cell_0.bias (there is encoder.weight, "),
        ({"rnns.0.cell_0.bias": torch.zeros(8)}, "rnns.0.cell_0.bias must be [4*H] = [32], got [8]"),
        ({"rnns.1.cell_0.weight_hh": torch.zeros(36, 9)}, "hh must be [H, 4*H] = [36, 144], got [36, 9]"),
        ({"norm.weight": torch.zeros(3)}, "what these tensors are is not known: norm.weight"),
    ],
)
def test_what_is_wrong_with_a_g2_lstm(change: dict[str, Any], message: str) -> None:
    state = {name: value for name, value in (g2_lstm() | change).items() if value is not None}
    with pytest.raises(ConversionError) as error:
        from_g2_lstm(state)
    assert message in str(error.value)
    with pytest.raises(
        ConversionError, match=r"has no cell_0.weight_ih, as g2-lstm calls it \(there is weight_ih_l0, "
    ):
        from_g2_lstm(nn.LSTM(3, 4).state_dict())


def mimo_mlp(members: int, front: str = "") -> State:
    """The layers of mimo_mlp, as its routine saves them."""
    torch.manual_seed(3)
    sizes = {"layers.0": (E * members, H), "layers.1": (H, H), "final_layer": (H, K * members)}
    layers = {f"{front}{name}": nn.Linear(*size) for name, size in sizes.items()}
    return {f"{n}.{p}": v.detach() for n, layer in layers.items() for p, v in layer.named_parameters()}


def mimo_of_theirs(state: State, x: Tensor, members: int) -> Tensor:
    """Evaluation: the example in all slots, then the mean of the members' probabilities."""
    y = x.repeat(1, members)
    for name in ("layers.0", "layers.1"):
        y = F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"]).relu()
    logits = F.linear(y, state["final_layer.weight"], state["final_layer.bias"])
    return logits.unflatten(1, (members, K)).softmax(-1).mean(1)


@pytest.mark.parametrize("members", [2, 3])
def test_torch_uncertainty(members: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, x = mimo_mlp(members), torch.randn(4, E)
    saved = {f"model.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(K)}
    torch.save({"epoch": 1, "state_dict": saved, "hyper_parameters": {}}, tmp_path / "c.ckpt")
    options = ["--from", "torch-uncertainty", "--members", members]
    out = converted(capsys, tmp_path / "c.ckpt", tmp_path / "m.fastseq", *options)
    assert f"note: the file does not say how many members there are: taken as {members}\n" in out
    y, _ = deploy.Model.load(str(tmp_path / "m.fastseq")).run(x[None].numpy())
    probability = torch.from_numpy(deploy.split_ensemble(y).probability[0].copy())

    def theirs(state: State) -> Tensor:
        return mimo_of_theirs(state, x.to(state["layers.0.weight"].dtype), members)

    assert_within_budget("probability", probability, theirs, (state,))
    converted(capsys, tmp_path / "c.ckpt", tmp_path / "s.pt", *options)
    plain = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(E, H), nn.Linear(H, H)]), "final_layer": nn.Linear(H, K)})

    class Backbone(nn.ModuleDict):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self["layers"]:
                x = layer(x).relu()
            return self["final_layer"](x)

    model = fastseq.nn.MIMO(Backbone(plain), members, first="layers.0", head="final_layer").eval()
    model.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert_within_budget("MIMO", model(x).softmax(-1).mean(1).detach(), theirs, (state,))


def test_convolutions_of_torch_uncertainty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mimo_resnet has no place in a deployed model; its state is that of a MIMO."""
    wide = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2 * K))
    names = {"0.": "conv1.", "1.": "bn1.", "2.": "linear."}
    state = {names[name[:2]] + name[2:]: value for name, value in wide.state_dict().items()}
    torch.save(state, tmp_path / "c.ckpt")
    options = ["--from", "torch-uncertainty", "--members", 2]
    message = converted(capsys, tmp_path / "c.ckpt", tmp_path / "m.fastseq", *options, status=1)
    assert "2-d convolutions, which a deployed model has no place for; a TARGET that ends in .pt takes it" in message
    converted(capsys, tmp_path / "c.ckpt", tmp_path / "s.pt", *options)

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.bn1(self.conv1(x)).mean((2, 3)))

    model = fastseq.nn.MIMO(Backbone(), 2, first="conv1", head="linear").eval()
    model.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    x = torch.randn(4, 3, 5, 5)
    wide.eval()
    theirs = wide[2](wide[1](wide[0](x.repeat(1, 2, 1, 1))).mean((2, 3))).unflatten(1, (2, K))
    torch.testing.assert_close(model(x), theirs)


def test_other_networks_of_torch_uncertainty() -> None:
    state = mimo_mlp(2)
    with pytest.raises(ConversionError, match="layers.0 has 12 input channels, no multiple of members = 5"):
        from_torch_uncertainty(state, 5)
    with pytest.raises(ConversionError, match="final_layer has 10 answers, no multiple of members = 4"):
        from_torch_uncertainty(state, 4)
    for name in ("last_layer.weight", "outc.conv.weight", "final_layer.loc.weight"):
        with pytest.raises(ConversionError, match="from_torch_uncertainty: mimo_"):
            from_torch_uncertainty({f"model.{name}": torch.ones(1)}, 2)
    with pytest.raises(ConversionError, match="has neither layers.0.weight with final_layer.weight"):
        from_torch_uncertainty(nn.Linear(2, 3).state_dict(), 2)
    with pytest.raises(ValueError, match="members must be an integer >= 2, the num_estimators of the network, got 1"):
        from_torch_uncertainty(state, 1)


BASE, EXAMPLES, WARM, RATE = 8, 400, 2.0, 0.3  # adaptdl's batch, data_size, base_warmup_epochs, tuned rate


def adaptdl(progress: float, scheduler: Any = None) -> tuple[Any, float, float]:
    """What AdaptiveDataParallel saves: states of all parts, its gain, and the factor of the rate."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    ones = np.ones(1)
    gns = {"progress": np.float64(progress), "prev_scale": 0.0, "sqr_avg": ones, "var_avg": 0 * ones, "biased": False}
    optimizer.state["gns"] = gns
    return [model.state_dict(), optimizer.state_dict(), scheduler, None], np.float64(1.5), 2.0


@pytest.mark.parametrize("batch", [8, 16, 40])
def test_adaptdl(batch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LEGW goes on where adaptdl stood, with the rates of its formula."""
    k, made = batch / BASE, 6
    torch.save(adaptdl(made * k), tmp_path / "adaptdl-dataparallel")
    options = f"--base-batch {BASE} --base-warmup-epochs {WARM} --examples {EXAMPLES} --batch {batch} --epochs 30"
    arguments = [tmp_path / "adaptdl-dataparallel", tmp_path / "legw.json", "--from", "adaptdl", *options.split()]
    out = converted(capsys, *arguments)
    assert "note: base_batch, base_warmup_epochs, examples and epochs stand in the training script" in out
    found = json.loads((tmp_path / "legw.json").read_text())
    assert found["rates"] == [RATE] and found["progress"] == made * k
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": found["rates"][0], "initial_lr": found["rates"][0]}]
    legw = LEGW(torch.optim.SGD(groups), **found["arguments"])
    rates = []
    for _ in range(12):
        rates += legw.get_last_lr()
        legw.optimizer.step()
        legw.step()
    steps = WARM * k * EXAMPLES / BASE  # its total_steps, of the base batch
    theirs = [RATE * math.sqrt(k) * min(1, k * (made + 1 + n) / steps) for n in range(12)]
    np.testing.assert_allclose(rates, theirs, rtol=1e-12)


def test_what_adaptdl_lacks() -> None:
    options: dict[str, Any] = dict(base_batch=8, batch=16, base_warmup_epochs=2.0, examples=400, epochs=30)
    assert any("decay=" in note for note in from_adaptdl(adaptdl(4, {"last_epoch": 3}), **options)["notes"])
    for broken in ({}, (1, 2, 3), ([{}, {"state": {}}, None, None], 1.0, 1.0)):
        with pytest.raises(ConversionError, match="from_adaptdl: the (file must hold|optimizer's state has no gns)"):
            from_adaptdl(broken, **options)
    with pytest.raises(ValueError, match="batch must be <= examples = 400, got 500"):
        from_adaptdl(adaptdl(4), **(options | {"batch": 500}))


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(g2_lstm(), tmp_path / "c.pt")
    for target, options, message in (
        ("m.fastseq", "--members 3", "--members go with --from"),
        ("m.fastseq", "--from torch-uncertainty", "--from torch-uncertainty needs --members, which its files do"),
        ("m.fastseq", "--from g2-lstm --order a,b", "--from g2-lstm has no use for --order"),
        ("m.fastseq", "--from g2-lstm --dequantize", "--from g2-lstm has no use for --dequantize"),
        ("m.json", "--from g2-lstm", "TARGET must not end in .json with --from g2-lstm"),
        ("m.pt", "--from g2-lstm --weights int8", "--weights is for deployed models, not for .pt"),
        ("m.pt", "", "TARGET must end in .safetensors, .fastseq, .onnx, got"),
        ("m.pt", "--from g2-lstm --state average", "convert: state must be None, since nothing is nested, got"),
    ):
        found = converted(capsys, tmp_path / "c.pt", tmp_path / target, *options.split(), status=1)
        assert found.startswith(message)


def test_whole_modules_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files of g2-lstm's main.py are such; the message says what to do where their code is."""
    torch.save(nn.LSTM(3, 4), tmp_path / "c.pt")
    message = converted(capsys, tmp_path / "c.pt", tmp_path / "m.fastseq", "--from", "g2-lstm", status=1)
    assert "is not read, because that could run code" in message
    assert message.endswith("torch.save(torch.load(PATH).state_dict(), 'state.pt'), and convert this")


def test_deployed_distsup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The averaged bottleneck of a run's file, from encoder outputs to codes."""
    from tests.nn.test_vq_distsup import bottleneck, indices_of_theirs

    state, average = bottleneck(), bottleneck(seed=1)
    front = "bottleneck."
    saved = {"current_iteration": 5, "epoch": 2, "state_dict": {front + n: v for n, v in state.items()}}
    saved["avg_state_dict_0.998000"] = {front + n: v for n, v in average.items()}
    torch.save(saved, tmp_path / "checkpoint_5.pkl")
    x = torch.randn(7, 3, 6)
    for options, own in ([], state), (["--state", "avg_state_dict_0.998000"], average):
        arguments = [tmp_path / "checkpoint_5.pkl", tmp_path / "m.fastseq", "--force", "--from", "distsup", *options]
        assert "commitment" in converted(capsys, *arguments)
        y, _ = deploy.Model.load(str(tmp_path / "m.fastseq")).run(x.numpy())
        assert torch.equal(torch.from_numpy(y), indices_of_theirs(own, x).int())
    model = deploy.read_state(tmp_path / "m.fastseq")
    named = {name: torch.as_tensor(value) for name, value in model["tensors"].items()}
    assert_same_bits("definition", torch.from_numpy(y), run_model(model["layers"], named, x)[0])
    converted(capsys, tmp_path / "checkpoint_5.pkl", tmp_path / "s.pt", "--from", "distsup")
    module = fastseq.nn.load_codebooks(saved["state_dict"], kind="distsup")
    module.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))

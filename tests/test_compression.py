"""``compress``: what changes and what stays, the bytes and errors that the report tells, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import fastseq
from fastseq import reference

I, H = 6, 8  # noqa: E741
NETS: dict[str, Any] = {
    "ours": lambda: fastseq.nn.LSTM(I, H, num_layers=2, bidirectional=True, gates="binary"),
    "stock": lambda: nn.LSTM(I, H, num_layers=2),
    "projection": lambda: fastseq.nn.LSTM(I, H, proj_size=3, bias=False),
    "cell": lambda: fastseq.nn.LSTMCell(I, H),
    "inside": lambda: nn.ModuleDict({"lstm": nn.LSTM(I, H), "head": nn.Linear(H, 2)}),
    "bfloat16": lambda: nn.LSTM(I, H).bfloat16(),
    "float64": lambda: nn.LSTM(I, H).double(),
}


def parts(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Matrices by name and gate, as the values that they stand for; projections by name."""
    found = {}
    state = {name: value for name, value in model.state_dict().items() if value.dim() == 2}
    if isinstance(model, fastseq.nn.CompressedLSTM):
        stored = {n: m for n, m in model.named_children() if isinstance(m, fastseq.nn.StoredMatrix)}
        state = {name: reference.matrix_values(m.matrix(), m.K) for name, m in stored.items()}
    for name, value in state.items():
        if "weight_ih" in name or "weight_hh" in name:
            found |= {(name, gate): part for gate, part in zip("ifgo", value.chunk(4), strict=True)}
        else:
            found[name, ""] = value
    return found


@pytest.mark.parametrize("net", NETS)
def test_rounding_changes_two_gates_and_nothing_else(net: str) -> None:
    model = NETS[net]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, report = fastseq.compress(model, step=0.2, clip=0.4)
    assert type(small) is type(model) and small is not model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(v, before[name]) for name, v in small.state_dict().items() if "weight" not in name)
    old, new = parts(model), parts(small)
    changed = {(m.name, m.gate): m for m in report.matrices}
    assert set(changed) == {key for key in old if key[1] in ("i", "f")} - {("head.weight", "")}
    for key, value in old.items():
        wide = value.float() if value.dtype == torch.bfloat16 else value
        expected = reference.rounded(wide, 0.2, 0.4).to(value.dtype) if key in changed else value
        assert torch.equal(new[key], expected), key
        if key in changed:
            assert changed[key].bytes_after == math.ceil(value.numel() * 3 / 8)  # five values
            assert changed[key].bytes_before == value.numel() * value.element_size()


@pytest.mark.parametrize(("weights", "group"), [("int8", None), ("int4", None), ("int4", 8), ("bfloat16", None)])
def test_stored_weights_are_those_of_the_definition(weights: str, group: int | None) -> None:
    model = fastseq.nn.LSTM(20, 17, proj_size=3)
    small, report = fastseq.compress(model, weights, group=group)
    new = parts(small)
    torch.testing.assert_close(small.bias_l0, model.bias_ih_l0 + model.bias_hh_l0, rtol=0, atol=0)
    for (name, gate), value in parts(model).items():
        if weights == "bfloat16":
            expected, size = value.bfloat16().float(), 2 * value.numel()
        else:
            bits = int(weights[3:])
            integers, scale = reference.integer_rows(value, bits, group)
            expected = reference.integer_values(integers, scale, group)
            size = value.shape[0] * math.ceil(value.shape[1] * bits / 8) + 4 * scale.numel()
        assert torch.equal(new[name, gate], expected), (name, gate)
        rows = [m for m in report.matrices if (m.name, m.gate) == (name, gate)]
        assert [m.bytes_after for m in rows] == [size]


def test_factors_of_each_gate() -> None:
    model = nn.LSTM(I, H).double()
    small, report = fastseq.compress(model, rank={"i": 2, "o": 0.6, "g": 8})
    new, old = parts(small), parts(model)
    for name, K in (("weight_ih_l0", I), ("weight_hh_l0", H)):
        up, down = reference.low_rank(old[name, "i"], 2)
        assert torch.equal(new[name, "i"], up.float() @ down.float())  # they are kept in float32
        rank = reference.rank_of_energy(old[name, "o"], 0.6)
        assert torch.linalg.matrix_rank(new[name, "o"], rtol=1e-5) == rank
        for gate in "fg":  # factors of rank 8 would be larger
            assert torch.equal(new[name, gate], old[name, gate].float())
        sizes = {m.gate: (m.how, m.bytes_after) for m in report.matrices if m.name == name}
        assert sizes == {"i": ("rank 2", 8 * (H + K)), "o": (f"rank {rank}", 4 * rank * (H + K))}


def test_factors_in_eight_bits() -> None:
    model = nn.LSTM(I, H)
    small, report = fastseq.compress(model, "int8", 2)
    for (name, gate), value in parts(small).items():
        if gate in ("i", "f"):
            factors = [reference.integer_rows(v) for v in reference.low_rank(parts(model)[name, gate], 2)]
            up, down = (reference.integer_values(*v) for v in factors)
            assert torch.equal(value, up @ down)
    told = {m.gate: m.how for m in report.matrices}
    assert told == {"i": "rank 2, int8", "f": "rank 2, int8", "g": "int8", "o": "int8"}


@torch.no_grad()
def test_factors_that_were_trained_stay() -> None:
    model = fastseq.nn.LSTM(I, H, rank={"i": 2, "f": 5, "o": 3})
    small, report = fastseq.compress(model, {"i": "int4", "f": "int8", "g": "int4"}, {"f": 3, "o": 3})
    told = {m.gate: m.how for m in report.matrices if m.name == "weight_hh_l0"}
    assert told == {"i": "int4", "f": "rank 3, int8", "g": "int4"}
    new = parts(small)
    ups, downs = model.weight_hh_up_l0.split([2, 5, 3], 1), model.weight_hh_down_l0.split([2, 5, 3])
    assert torch.equal(new["weight_hh_l0", "o"], ups[2] @ downs[2])
    up = reference.part_values(reference.store(ups[0], "int4"), 2)
    assert torch.equal(new["weight_hh_l0", "i"], up @ downs[0])  # lower factors lie in one array, and one is float32
    x = torch.randn(5, 2, I)
    assert (small(x)[0] - model(x)[0]).abs().max() < 0.2
    before = sum(v.numel() for v in (*ups, *downs)) * 4 - 4 * (3 * 2 * H)
    assert sum(m.bytes_before for m in report.matrices if m.name == "weight_hh_l0") == before + 4 * H * H
    with pytest.raises(ValueError, match="model must be without rank"):
        fastseq.compress(model, step=0.2)


def test_a_tied_matrix_is_compressed_once() -> None:
    model = nn.ModuleList([nn.LSTM(H, H), nn.LSTM(H, H)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    small, report = fastseq.compress(model, step=0.2)
    assert small[1].weight_hh_l0 is small[0].weight_hh_l0  # type: ignore[index]
    assert len(report.matrices) == 3 * 2
    small, report = fastseq.compress(model, "int8")
    assert small[1].weight_hh_l0 is small[0].weight_hh_l0  # type: ignore[index]
    assert len(report.matrices) == 3 * 4


def test_a_module_that_is_used_twice_is_replaced_in_both_places() -> None:
    lstm = nn.LSTM(H, H)
    small, _ = fastseq.compress(nn.ModuleDict({"a": lstm, "b": nn.Sequential(lstm)}), "int8")
    assert isinstance(small["a"], fastseq.nn.CompressedLSTM) and small["b"][0] is small["a"]  # type: ignore[index]


def test_gates_in_different_storage() -> None:
    small, report = fastseq.compress(nn.LSTM(24, 16), {"i": "int4", "g": "int8"}, rank={"f": 2, "i": 3}, group=8)
    told = {m.gate: m.how for m in report.matrices if m.name == "weight_ih_l0"}
    assert told == {"i": "rank 3, int4", "f": "rank 2", "g": "int8 by 8"}
    i, f, g, o = small.weight_ih_l0.matrix()
    assert [v.rows.values.dtype for v in (i, f, g, o)] == [torch.uint8, torch.float32, torch.int8, torch.float32]
    assert i.down is not None and f.down is not None
    assert i.down.values.dtype == f.down.values.dtype == torch.float32  # the most that one of them asks for


def test_matrices_in_different_storage() -> None:
    """What is not named stays; the names hold for every layer and direction, and for cells."""
    forms: Any = {"weight_ih": "int8", "weight_hh": {"i": "bfloat16", "o": "int4"}, "weight_hr": "bfloat16"}
    model = nn.LSTM(24, 16, num_layers=2, proj_size=8, bidirectional=True)
    small, report = fastseq.compress(model, forms, group=8)
    for name, matrix in ((n, m) for n, m in small.named_children() if isinstance(m, fastseq.nn.StoredMatrix)):
        found = [reference.storage_of(gate.rows) for gate in matrix.matrix()]
        expected = {"ih": ["int8"] * 4, "hh": ["bfloat16", "float32", "float32", "int4"], "hr": ["bfloat16"]}
        assert found == expected[name[7:9]], name
    assert {(m.name[7:9], m.gate) for m in report.matrices} == {("ih", g) for g in "ifgo"} | {
        ("hh", "i"),
        ("hh", "o"),
        ("hr", ""),
    }
    for gate in "ifgo":
        alone = parts(fastseq.compress(model, "int8", group=8).model)["weight_ih_l1_reverse", gate]
        assert torch.equal(parts(small)["weight_ih_l1_reverse", gate], alone)
        assert torch.equal(parts(small)["weight_hh_l1", "f"], parts(model)["weight_hh_l1", "f"])
    cell = nn.LSTMCell(I, H)
    changed = {m.name for m in fastseq.compress(cell, {"weight_hh": "int4"}).report.matrices}
    assert changed == {"weight_hh"}


def test_factors_of_a_matrix_are_stored_as_it_says() -> None:
    small, _ = fastseq.compress(nn.LSTM(24, 16), {"weight_hh": {"i": "int4", "f": "int8"}}, rank=3)
    for matrix, rows, down in (
        (small.weight_ih_l0, ["float32"] * 2, "float32"),
        (small.weight_hh_l0, ["int4", "int8"], "int8"),
    ):
        gates = matrix.matrix()[:2]
        assert [reference.storage_of(gate.rows) for gate in gates] == rows
        assert all(gate.down is not None and reference.storage_of(gate.down) == down for gate in gates)


def test_factors_that_are_nearest_to_what_they_make() -> None:
    """Inputs that lie in few dimensions need few factors, wherever the weights are large."""
    torch.manual_seed(4)
    x = torch.randn(50, 4, 2) @ torch.randn(2, 24)
    lstm = nn.LSTM(24, 16, num_layers=2, bidirectional=True)
    small, report = fastseq.compress(lstm, rank=2, gates="ifgo", nearest="outputs", inputs=x)
    gate, whole = small.weight_ih_l0_reverse.matrix()[2], lstm.weight_ih_l0_reverse.chunk(4)[2]
    assert gate.down is not None
    torch.testing.assert_close(x @ gate.down.values.mT @ gate.rows.values.mT, x @ whole.mT, rtol=1e-3, atol=1e-3)
    plain = fastseq.compress(lstm, rank=2, gates="ifgo", inputs=x).report
    assert report.steps[0].middle < 0.8 * plain.steps[0].middle
    padded = fastseq.compress(nn.Sequential(nn.LSTMCell(24, 16)), rank=2, nearest="outputs", inputs=x[0]).report
    assert {m.how for m in padded.matrices} == {"rank 2"}


class Tagger(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.lstm = fastseq.nn.LSTM(I, H, batch_first=batch_first)
        self.cell = nn.LSTMCell(H, H)

    def forward(self, x: Any) -> Tensor:
        out = self.lstm(x)[0]
        out = out if isinstance(out, Tensor) else out.data[None, :2]
        state = None
        for step in out.unbind(1 if self.lstm.batch_first else 0):
            state = self.cell(step, state)
        assert state is not None
        return state[0]


@pytest.mark.parametrize("kind", ["dense", "batch_first", "packed"])
def test_errors_by_step(kind: str) -> None:
    torch.manual_seed(3)
    model = Tagger(kind == "batch_first").train()
    x: Any = torch.randn(5, 2, I)
    given = {"dense": x, "batch_first": x.transpose(0, 1), "packed": pack_sequence(list(x.unbind(1)))}[kind]
    small, report = fastseq.compress(model, "int4", inputs=given, metric=lambda m: float(len(list(m.parameters()))))
    assert model.training and small.training
    steps = {s.module: s for s in report.steps}
    assert set(steps) == {"lstm", "cell"}
    with torch.no_grad():
        assert small.cell is not model.cell and type(small.cell) is nn.LSTMCell
        ours, theirs = small.lstm(x.transpose(0, 1) if kind == "batch_first" else x)[0], None  # type: ignore[operator]
        theirs = model.lstm(x.transpose(0, 1) if kind == "batch_first" else x)[0]
    if kind == "batch_first":
        ours, theirs = ours.transpose(0, 1), theirs.transpose(0, 1)
    for t, found in ((0, steps["lstm"].first), (2, steps["lstm"].middle), (4, steps["lstm"].last)):
        assert found == pytest.approx(float((ours[t] - theirs[t]).norm() / theirs[t].norm()), rel=1e-4)
        assert 0 < found < 1
    assert report.metric == (8.0, 4.0) and report.milliseconds is not None


def test_the_report_is_text_data_and_a_picture(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    _, report = fastseq.compress(NETS["inside"](), "int8")
    text = str(report)
    assert "lstm.weight_hh_l0  i     int8" in text and "left as they are, 72 bytes: head: Linear" in text
    total = 4 * (4 * H * (I + H))
    assert f"{4 * H * (I + H) + 2 * 4 * 4 * H:,} of {total:,} bytes, 2.5 times less" in text
    data = json.loads(json.dumps(report.as_dict()))
    assert data["bytes_before"] == total and data["matrices"][0]["gate"] == "i"
    report.plot().savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_noise_of_a_known_size() -> None:
    model = nn.LSTM(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight_hh_l0.copy_(torch.tensor([[1.1], [1.0], [1.0], [1.0]]))
    report = fastseq.compress(model, step=1.0).report
    found = {(m.name, m.gate): m.snr for m in report.matrices}
    assert found["weight_hh_l0", "i"] == pytest.approx(20 * math.log10(1.1 / 0.1))
    assert found["weight_hh_l0", "f"] == math.inf


def parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.LSTM(I, H), "weight_hh_l0")


def broken() -> nn.Module:
    model = nn.LSTM(I, H)
    model.weight_hh_l0.data[0, 0] = math.nan
    return nn.Sequential(model)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (None, {}, "weights must be given, or rank, or step, got none of them"),
        (None, {"weights": "int3"}, "weights must be one of 'int8', 'int4', 'bfloat16', got 'int3'"),
        (None, {"rank": 0}, "rank must be a whole number > 0, or a share of the squares in (0, 1), got 0"),
        (None, {"rank": 1.5}, "rank must be a whole number > 0, or a share of the squares in (0, 1), got 1.5"),
        (None, {"rank": {"x": 3}}, "rank must be a number, or one for each of some gates i, f, g, o, got {'x': 3}"),
        (None, {"step": -1.0}, "step must be a finite number > 0, got -1.0"),
        (None, {"step": 0.2, "weights": "int8"}, "step must be None beside weights or rank, got 0.2"),
        (None, {"clip": 0.2, "rank": 3}, "clip must be None without step, got 0.2"),
        (None, {"step": 0.2, "clip": 0.1}, "clip must be None, or at least step, got 0.1"),
        (None, {"step": 0.2, "gates": "ix"}, "gates must be different letters of 'ifgo', got 'ix'"),
        (None, {"rank": 3, "group": 8}, "group must be None, or a multiple of 8 with weights 'int8' or 'int4', got 8"),
        (None, {"weights": "int8", "group": 4}, "group must be None, or a multiple of 8 with weights 'int8' or 'int4'"),
        (None, {"weights": {"x": "int8"}}, "weights must be a form, or one for each of some gates i, f, g, o, got"),
        (None, {"weights": {"i": "int2"}}, "weights['i'] must be one of 'int8', 'int4', 'bfloat16', got 'int2'"),
        (None, {"weights": {}}, "weights must be a form, or one for each of some gates i, f, g, o, got {}"),
        (
            None,
            {"weights": {"weight_ih": "int8", "i": "int8"}},
            "weights must be for each of some matrices weight_ih, weight_hh, weight_hr, got {'weight_ih': 'int8', 'i'",
        ),
        (None, {"weights": {"weight_ih": None}}, "weights['weight_ih'] must be one of 'int8', 'int4', 'bfloat16', got"),
        (
            None,
            {"weights": {"weight_ih": {"x": "int8"}}},
            "weights['weight_ih'] must be a form, or one for each of some",
        ),
        (
            None,
            {"weights": {"weight_hh": {"i": "int2"}}},
            "weights['weight_hh']['i'] must be one of 'int8', 'int4', 'b",
        ),
        (None, {"weights": {"weight_hr": {"i": "int8"}}}, "weights['weight_hr'] must be one of 'int8', 'int4', 'bfloa"),
        (
            None,
            {"weights": {"weight_hh": "bfloat16"}, "group": 8},
            "group must be None, or a multiple of 8 with weights",
        ),
        (None, {"rank": 3, "nearest": "none"}, "nearest must be one of 'weights', 'outputs', got 'none'"),
        (None, {"rank": 3, "nearest": "outputs"}, "nearest must be 'weights' without a rank and inputs, got 'outputs'"),
        (None, {"step": 0.2, "trainable": True}, "trainable must be False beside step, got True"),
        (lambda: fastseq.compress(nn.LSTM(I, H), "int8").model, {"rank": 3}, "model must be not compressed yet"),
        (lambda: nn.GRU(I, H), {"rank": 3}, "model must be a module with an LSTM or LSTMCell inside, got GRU"),
        (parametrized, {"rank": 3}, "model must be without parametrizations (remove them first)"),
        (broken, {"rank": 3}, "model.0.weight_hh_l0 must be finite, got a matrix with NaN or infinity"),
    ],
)
def test_bad_arguments(make: Any, options: dict[str, Any], message: str) -> None:
    model = nn.LSTM(I, H) if make is None else make()
    with pytest.raises(ValueError) as error:
        fastseq.compress(model, **options)
    assert f"compress: {message}" in str(error.value)


def test_a_model_is_a_module() -> None:
    with pytest.raises(TypeError, match="compress: model should be of type nn.Module, got: dict"):
        fastseq.compress({}, "int8")  # type: ignore[arg-type]

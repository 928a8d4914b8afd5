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


def parts(state: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Matrices by name and gate; projections, biases and the rest by name."""
    found = {}
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
    old, new = parts(before), parts(small.state_dict())
    changed = {(m.name, m.gate): m for m in report.matrices}
    assert set(changed) == {key for key in old if key[1] in ("i", "f")}
    for key, value in old.items():
        wide = value.float() if value.dtype == torch.bfloat16 else value
        expected = reference.rounded(wide, 0.2, 0.4).to(value.dtype) if key in changed else value
        assert torch.equal(new[key], expected), key
        if key in changed:
            assert changed[key].bytes_after == math.ceil(value.numel() * 3 / 8)  # five values
            assert changed[key].bytes_before == value.numel() * value.element_size()


@pytest.mark.parametrize(("weights", "group"), [("int8", None), ("int4", None), ("int4", 4), ("bfloat16", None)])
def test_stored_weights_are_those_of_the_definition(weights: str, group: int | None) -> None:
    model = fastseq.nn.LSTM(I, H, proj_size=3)
    small, report = fastseq.compress(model, weights, group=group)
    new = parts(small.state_dict())
    for (name, gate), value in parts(model.state_dict()).items():
        if "bias" in name:
            expected, size = value, None
        elif weights == "bfloat16":
            expected, size = value.bfloat16().float(), 2 * value.numel()
        else:
            bits = int(weights[3:])
            integers, scale = reference.integer_rows(value, bits, group)
            expected = reference.integer_values(integers, scale, group)
            size = value.numel() * bits // 8 + 4 * scale.numel()
        assert torch.equal(new[name, gate], expected), (name, gate)
        rows = [m for m in report.matrices if (m.name, m.gate) == (name, gate)]
        assert [m.bytes_after for m in rows] == ([] if size is None else [size])


def test_factors_of_each_gate() -> None:
    model = nn.LSTM(I, H).double()
    small, report = fastseq.compress(model, rank={"i": 2, "o": 0.6, "g": 8})
    new, old = parts(small.state_dict()), parts(model.state_dict())
    for name, K in (("weight_ih_l0", I), ("weight_hh_l0", H)):
        up, down = reference.low_rank(old[name, "i"], 2)
        assert torch.equal(new[name, "i"], up @ down)
        rank = reference.rank_of_energy(old[name, "o"], 0.6)
        assert torch.linalg.matrix_rank(new[name, "o"]) == rank
        for gate in "fg":  # factors of rank 8 would be larger
            assert torch.equal(new[name, gate], old[name, gate])
        sizes = {m.gate: (m.how, m.bytes_after) for m in report.matrices if m.name == name}
        assert sizes == {"i": ("rank 2", 16 * (H + K)), "o": (f"rank {rank}", 8 * rank * (H + K))}


def test_factors_in_eight_bits() -> None:
    model = nn.LSTM(I, H)
    small, report = fastseq.compress(model, "int8", 2)
    for (name, gate), value in parts(small.state_dict()).items():
        if gate in ("i", "f"):
            factors = [reference.integer_rows(v) for v in reference.low_rank(parts(model.state_dict())[name, gate], 2)]
            up, down = (reference.integer_values(*v) for v in factors)
            assert torch.equal(value, up @ down)
    told = {m.gate: m.how for m in report.matrices}
    assert told == {"i": "rank 2, int8", "f": "rank 2, int8", "g": "int8", "o": "int8"}


def test_a_tied_matrix_is_compressed_once() -> None:
    model = nn.ModuleList([nn.LSTM(H, H), nn.LSTM(H, H)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    small, report = fastseq.compress(model, step=0.2)
    assert small[1].weight_hh_l0 is small[0].weight_hh_l0  # type: ignore[index]
    assert len(report.matrices) == 3 * 2


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
        ours, theirs = small.lstm(x.transpose(0, 1) if kind == "batch_first" else x)[0], None  # type: ignore[operator]
        theirs = model.lstm(x.transpose(0, 1) if kind == "batch_first" else x)[0]
    if kind == "batch_first":
        ours, theirs = ours.transpose(0, 1), theirs.transpose(0, 1)
    for t, found in ((0, steps["lstm"].first), (2, steps["lstm"].middle), (4, steps["lstm"].last)):
        assert found == pytest.approx(float((ours[t] - theirs[t]).norm() / theirs[t].norm()), rel=1e-4)
        assert 0 < found < 1
    assert report.metric == (8.0, 8.0) and report.milliseconds is not None


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
        (
            None,
            {"rank": 3, "group": 4},
            "group must be None, or a whole number > 0 with weights 'int8' or 'int4', got 4",
        ),
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

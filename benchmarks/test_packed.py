"""Packed weights: providers compute the same layer, and the gate, the tables and self-timed calls keep their word."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

from benchmarks import harness, packed, packed_dksplit, packed_layer, packed_table, run
from benchmarks.packed_case import FORMS, Case, Provider, inputs, snr, truth

THREADS = 2
SMALL = {
    "int8": Case(12, 3, 48, "int8"),
    "forms": Case(10, 1, 64, "forms"),
    "stream": Case(1, 1, 40, "stream"),
    "cabi": Case(100, 1, 24, "cabi"),
    "load": Case(4, 1, 16, "load"),
}
PAIRS = [(case, provider) for mode, case in SMALL.items() for provider in packed_table.providers(mode, case, None)]
SPEED = [(Case(100, 1, 256, "int8"), Provider(name, "int8")) for name in ("fastseq", "onnxruntime", "torch")]
SPEED += [(Case(1, 1, 256, "stream"), provider) for _, provider in SPEED]


def work_of(case: Case, provider: Provider) -> tuple[packed.Work, dict[str, float]]:
    works, reasons = harness.gated(packed, case, [provider], THREADS)
    reason = reasons.get(provider, "passed")
    if reason.startswith(harness.ABSENT):
        pytest.skip(reason)
    assert reason == "passed"
    work, facts = works[provider]
    return work, facts


@pytest.mark.parametrize("case, provider", PAIRS, ids=lambda v: getattr(v, "label", None) or f"{v.mode}-{v.name}")
def test_providers_agree(case: Case, provider: Provider) -> None:
    """Every provider passes the gate, integers leave a trace, and rows come out."""
    work, facts = work_of(case, provider)
    assert facts["snr_db"] > 110 if provider.form == "float32" else facts["snr_db"] < 70
    assert work.outputs().shape == inputs(case).x.shape


def test_integers_are_alike() -> None:
    """Those of other runtimes are within some decibels of ours: they round to as many bits."""
    case = SMALL["int8"]
    ours = work_of(case, Provider("fastseq", "int8"))[1]["snr_db"]
    for name in ("onnxruntime", "torch"):
        if importlib.util.find_spec(name):
            assert abs(work_of(case, Provider(name, "int8"))[1]["snr_db"] - ours) < 12


def test_steps_are_the_whole() -> None:
    case = SMALL["stream"]
    whole = packed.setup(Case(len(inputs(case).x), 1, case.H, "int8"), Provider("fastseq", "int8"), 1)
    model = packed_layer.deployed(packed.setup(case, Provider("fastseq", "int8"), 1).state)
    y = model.run(inputs(case).x.numpy())[0]
    np.testing.assert_array_equal(packed.setup(case, Provider("fastseq", "int8"), 1).outputs(), y)
    assert whole.outputs().shape == y.shape


@pytest.mark.parametrize("form", FORMS)
def test_gate_refuses_another_layer(form: str) -> None:
    case, provider = SMALL["forms"], Provider("fastseq", form)
    work, _ = work_of(case, provider)
    wrong = work._replace(outputs=lambda: work.outputs() * 1.2)
    assert packed.judge(case, provider, wrong)[0].startswith("y: ")
    rival = Provider("onnxruntime", form)
    noise = torch.randn(truth(case).shape) * truth(case).std()
    assert packed.judge(case, rival, work._replace(outputs=lambda: noise))[0].startswith("y: ")


def test_decibels() -> None:
    one = torch.ones(10)
    assert snr(one, one) == float("inf") and abs(snr(one * 1.1, one) - 20) < 1e-4


def test_self_timed_calls() -> None:
    told = iter([(1.0, {"a": 1.0}), (2.0, {"a": 5.0}), (2.0, {"a": 3.0}), (2.0, {"a": 2.0})])
    call = harness.SelfTimed(lambda: next(told))
    samples = harness.interleave({"it": call}, rounds=3)
    assert list(samples["it"].values()) == [2.0, 2.0, 2.0] and call.facts() == {"a": 2.5}


@pytest.mark.parametrize("mode", SMALL)
def test_tables(mode: str) -> None:
    """Drawn with the rivals that are installed, and with none."""
    case = SMALL[mode]
    for only in (None, ["fastseq"]):
        providers = packed_table.providers(mode, case, only)
        rows = harness.measure(packed, case, providers, 1, rounds=1)
        table = packed_table.TABLES[mode]([{**row, "table": mode} for row in rows])
        assert table.lines and all(len(line) == len(table.header) for line in table.lines)
        assert all(row["gate"] == "passed" for row in rows if row["label"].startswith("fastseq"))


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dksplit", None)
    packed_dksplit.package.cache_clear()
    case = Case(6, 2, 384, "dksplit")
    rows = harness.measure(packed, case, packed_table.providers("dksplit", case, None), 1)
    assert {row["gate"] for row in rows} == {"not installed: dksplit"}
    assert any("no time: " in note for note in packed_table.dksplit(rows).notes)


def test_dksplit() -> None:
    if importlib.util.find_spec("dksplit") is None:
        pytest.skip("dksplit is not installed (pip install --no-deps dksplit)")
    case = Case(12, 3, 384, "dksplit")
    rows = harness.measure(packed, case, packed_table.providers("dksplit", case, None), 1, rounds=1)
    assert all(row["gate"] == "passed" for row in rows)
    assert len(packed_table.dksplit(rows).lines) == 1


@pytest.mark.parametrize("case, provider", SPEED, ids=lambda v: getattr(v, "label", None) or f"{v.mode}-{v.name}")
def test_speed(benchmark, case: Case, provider: Provider) -> None:
    with harness.threads(THREADS):
        work, _ = work_of(case, provider)
        benchmark.group = f"{case.mode} {case.name}"
        benchmark(work.run)


def test_wrong_usage(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["run", "packed", "--providers", "rocket"])
    with pytest.raises(SystemExit) as exit:
        run.arguments()
    assert exit.value.code == 2 and "rocket is none of fastseq, onnxruntime" in capsys.readouterr().err

"""``pytest benchmarks``: a few cases under pytest-benchmark, and what the harness promises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import harness, lstm, run
from benchmarks.lstm import Case, Provider

THREADS = 2
NAMES = "fastseq", "stock", "onnxruntime", "openvino"
CASES = [
    (
        Case(50, 16, 128, "train"),
        [Provider("fastseq", 0.2), Provider("fastseq"), Provider("stock"), Provider("loop", 0.2)],
    ),
    (Case(100, 1, 256, "train"), [Provider("fastseq", 0.2), Provider("stock")]),
    (Case(100, 1, 256, "infer"), [Provider(name) for name in NAMES]),
    (Case(50, 32, 256, "packed"), [Provider("fastseq", 0.2), Provider("stock")]),
    (Case(1, 1, 256, "stream"), [Provider(name) for name in NAMES]),
]
PAIRS = [(case, provider) for case, providers in CASES for provider in providers]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with harness.threads(THREADS):
        yield


@pytest.mark.parametrize("case, provider", PAIRS, ids=lambda v: getattr(v, "label", None) or f"{v.mode}-{v.name}")
def test_speed(benchmark, case: Case, provider: Provider) -> None:
    for package in {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}.get(provider.name, ()):
        pytest.importorskip(package)
    works, reasons = harness.gated(lstm, case, [provider], THREADS)
    assert provider in works, reasons
    benchmark.group = f"{case.mode} {case.name}"
    benchmark(works[provider][0].run)


def test_gate_refuses_a_small_error() -> None:
    case = Case(5, 3, 16, "train")
    work = lstm.setup(case, Provider("stock"), THREADS)
    budgets, got = lstm.budgets(case, None), work.outputs()
    assert harness.gate(got, budgets, lstm.GRADIENTS) == "passed"
    for name in got:
        wrong = {**got, name: got[name] * (1 + 1e-4)}
        assert harness.gate(wrong, budgets, lstm.GRADIENTS).startswith(f"{name}: error")


def test_gate_refuses_other_noise() -> None:
    case, provider = Case(5, 3, 16, "train"), Provider("fastseq", 1.0)
    work = lstm.setup(case, provider, THREADS)
    assert harness.gate(work.outputs(), lstm.budgets(case, work.noise()), lstm.GRADIENTS) == "passed"
    assert harness.gate(work.outputs(), lstm.budgets(case, -work.noise()), lstm.GRADIENTS).startswith("y: error")


def test_only_a_rival_is_timed_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "gate", lambda *args: "y: error 1.0e-01, budget 1.0e-06")
    ours, rival = Provider("fastseq"), Provider("stock")
    rows = harness.measure(lstm, Case(5, 3, 16, "infer"), [ours, rival], THREADS, rounds=1)
    assert ["ms" in row for row in rows] == [False, True]
    assert {row["gate"] for row in rows} == {"y: error 1.0e-01, budget 1.0e-06"}


@pytest.mark.parametrize(
    "given, said",
    [
        (["--providers", "rocket"], "--providers: rocket is none of fastseq, recompute, stock"),
        (["--mode", "infer,dream"], "--mode: dream is none of train, infer"),
        (["--cases", "T5"], "--cases: case must look like T100_B1_H128, got T5"),
    ],
)
def test_wrong_usage(given: list[str], said: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["run", "lstm", *given])
    with pytest.raises(SystemExit) as exit:
        run.arguments()
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_ratio_pairs_rounds() -> None:
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 2: 6.0}
    assert harness.ratio(ours, theirs) == (0.5, 0.5, 0.5)


def test_rounds_are_interleaved_and_complete() -> None:
    calls: list[str] = []
    providers = {name: (lambda n=name: calls.append(n)) for name in "abc"}
    samples = harness.interleave(providers, rounds=4, every={"c": 2})
    assert {name: sorted(rounds) for name, rounds in samples.items()} == {
        "a": [0, 1, 2, 3],
        "b": [0, 1, 2, 3],
        "c": [0, 2],
    }
    blocks = [name for n, name in enumerate(calls) if n == 0 or calls[n - 1] != name]
    assert len(blocks) >= 8, "providers must alternate, not run one after the other"


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with harness.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

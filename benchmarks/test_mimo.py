"""MIMO: providers compute the same, the gate refuses small errors, and targets are those of the sizes they are for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import harness, mimo, mimo_table, run
from benchmarks.mimo_case import Case, Provider, Work

THREADS = 2
SMALL = {
    **{mode: Case.parse("N40_M3_K17", mode) for mode in ("stats", "nll")},
    **{mode: Case.parse("T5_B6_M3_R2_C7_H8", mode) for mode in ("project", "train", "infer")},
}
PAIRS = [(case, provider) for mode, case in SMALL.items() for provider in mimo_table.providers(mode, case, None)]
SPEED = [
    (Case.parse("N512_M4_K1000", mode), Provider(name)) for mode in ("stats", "nll") for name in ("fastseq", "eager")
]
SPEED += [(Case.parse("T50_B32_M3_R4_C300_H256", "train"), Provider(name)) for name in ("fastseq", "plain", "eager")]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with harness.threads(THREADS):
        yield


def name_of(value: Any) -> str:
    return value.label if isinstance(value, Provider) else f"{value.mode}-{value.name}"


@pytest.mark.parametrize("case, provider", PAIRS, ids=name_of)
def test_providers_agree(case: Case, provider: Provider) -> None:
    works, reasons = harness.gated(mimo, case, [provider], THREADS)
    assert reasons.get(provider, "passed") == "passed" and provider in works
    works[provider][0].run()


@pytest.mark.parametrize("mode", SMALL)
def test_the_gate_refuses_a_small_error(mode: str) -> None:
    case, provider = SMALL[mode], Provider("fastseq")
    work = mimo.setup(case, provider, THREADS)
    for name, value in work.outputs().items():
        wrong = {**work.outputs(), name: value + 1e-3 * value.abs().max()}
        assert mimo.judge(case, provider, Work(work.run, lambda wrong=wrong: wrong))[0].startswith(f"{name}: error")


def test_a_step_without_repetition_may_cost_its_operations() -> None:
    once, four = (Case.parse(f"T50_B32_M3_R{R}_C300_H256", "train") for R in (1, 4))
    assert mimo_table._aim(four, "plain") == 1.0
    assert mimo_table._aim(once, "plain") == pytest.approx(1.05 * (2 * 900 + 3 * 256) / (2 * 300 + 3 * 256))
    assert mimo_table._aim(SMALL["train"], "plain") is None  # only the sizes that targets were set for


def test_a_case_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="case must look like N512_M4_K100, got N512_M4"):
        Case.parse("N512_M4", "nll")


def test_tables_are_drawn_from_rows() -> None:
    case = SMALL["nll"]
    rows = harness.measure(mimo, case, mimo_table.providers("nll", case, ("eager",)), 1, rounds=2)
    table = mimo_table.TABLES["nll"]([{**row, "allocated_mb": 0.0} for row in rows])
    assert table.lines[0][:2] == [case.name, "1"] and len(table.lines[0]) == len(table.header)
    assert "mimo" in run.OPERATORS


@pytest.mark.parametrize("case, provider", SPEED, ids=name_of)
def test_speed(benchmark: Any, case: Case, provider: Provider) -> None:
    works, reasons = harness.gated(mimo, case, [provider], THREADS)
    assert provider in works, reasons
    benchmark.group = f"{case.mode} {case.name}"
    benchmark(works[provider][0].run)

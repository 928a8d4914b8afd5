"""The tables of LEGW, from rows."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import legw_table


def row(k: int, seed: int, figure: float | None, unit: str) -> dict[str, Any]:
    cell = {"task": "t", "kind": "run", "rule": "LEGW", "k": k, "batch": 4 * k, "seed": seed, "figure": figure}
    return {**cell, "unit": unit, "steps": 8 // k, "epochs": 1, "rate": 0.5, "epoch_s": 2.0 / k, "device": "cpu"}


@pytest.mark.parametrize(("unit", "sign"), [("accuracy %", ""), ("bits per character", "-")])
def test_what_a_larger_batch_costs(unit: str, sign: str) -> None:
    """Seed by seed, whichever stands first; of accuracy more is better, of bits less."""
    rows = [row(1, 0, 90.0, unit), row(1, 1, 80.0, unit), row(4, 1, 78.0, unit), row(4, 0, 88.0, unit)]
    (table,) = legw_table.tables(rows)
    *_, faster, worse = table.lines
    assert faster == ["times as fast as x1", "1", "4"]
    assert worse[:2] == ["LEGW worse than x1 by", "-"] and worse[2].startswith(f"{sign}2.0")


def test_no_cost_of_what_diverged() -> None:
    (table,) = legw_table.tables([row(1, 0, 90.0, "accuracy %"), row(4, 0, None, "accuracy %")])
    assert table.lines[-1] == ["LEGW worse than x1 by", "-", "-"]

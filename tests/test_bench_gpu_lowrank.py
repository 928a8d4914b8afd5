"""What ``make gpu`` does with the persistent low-rank LSTM, without a GPU: its checks, its times and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import cuda, parity_persist_lowrank, persist, persist_lowrank, persist_lowrank_loop, tables
from benchmarks.gpu.parity import Kernels, _row
from benchmarks.gpu.part import Context

DRY, REAL = (Context(torch.device("cpu"), dry) for dry in (True, False))


def test_what_passed_is_verified_for_the_source_that_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "source", lambda: "ab")
    checks = list(parity_persist_lowrank.checks(Kernels(DRY, "bfloat16")))
    plan = {"op": "plan", "module": "lstm_persist_lowrank", "dtype": "bfloat16", "cases": len(checks)}
    rows = [plan, *(row for check in checks for row in _row(check, "bfloat16"))]
    gates = [row["gate"] for row in rows if row["op"] == "parity"]
    assert gates.count("passed") == 4 and gates.count("cannot run: it needs a GPU") == 1, gates
    facts = dict.fromkeys(("device", "driver", "torch", "triton", "date", "commit"), "x") | {"capability": "sm_90"}
    assert main.verify(rows, facts, tmp_path / "verified.json") == ["lstm_persist_lowrank: verified for bfloat16"]
    row = json.loads((tmp_path / "verified.json").read_text())["sm_90"]["lstm_persist_lowrank"]
    assert row["source"] == "ab" and row["dtypes"] == ["bfloat16"]


@pytest.mark.parametrize(("op", "place", "name"), [("forward", 3, "h_n"), ("backward", 0, "dx_gates")])
def test_a_wrong_loop_is_seen(op: str, place: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(persist_lowrank_loop, op)

    def wrong(*args: Any, **more: Any) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = right(*args, **more)
        found[place].add_(0.25)
        return found

    monkeypatch.setattr(persist_lowrank_loop, op, wrong)
    call = next(c for c in parity_persist_lowrank.checks(Kernels(DRY, "bfloat16")) if "packed" in c.case)
    assert _row(call, "bfloat16")[0]["gate"].startswith(f"wrong: {name}: error")


def test_every_tile_is_checked_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = type("Tile", (), dict(units=128, rows=8, rank=32, downs=1, threads=256))
    monkeypatch.setattr(persist_lowrank_loop, "tiles", lambda dry: {0: tile, 1: tile})
    checks = list(parity_persist_lowrank.checks(Kernels(REAL, "float16")))
    names = [{c.case.removeprefix(f"tile {n} ") for c in checks if c.case.startswith(f"tile {n} ")} for n in (0, 1)]
    assert names[0] == names[1] >= {"edges", "alone", "full", "long", "packed_reverse", "hard", "streams", "no steps"}
    assert {c.op for c in checks} == {"lstm_persist_lowrank", "lstm_lowrank_forward", "lstm_lowrank_backward"}
    assert not list(parity_persist_lowrank.checks(Kernels(REAL, "float32")))
    assert "parity:persist_lowrank-float16-0/1" in main.PERSIST_PARITY
    tools = [unit.name for unit in persist.units(REAL, "sanitizer")]
    assert tools[2:] == ["memcheck persist_lowrank_loop", "racecheck persist_lowrank_loop"]


def test_times_and_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    [unit] = persist_lowrank.units(DRY)
    rows = unit.run()
    assert [(r["gate"], r["mode"], r["tile"]) for r in rows] == [("passed", m, 6) for m in ("forward", "backward")]
    rows += [{**r, "tile": "triton", "blocks": "-", "us_per_step": 2.5} for r in rows]
    drawn = tables.of_rows(rows)[0]
    assert "low-rank" in drawn.title and [line[2] for line in drawn.lines] == ["6", "triton"]
    assert drawn.lines[1][-2:] == ["2.5", "2.5"]
    monkeypatch.setattr(persist_lowrank_loop, "room", lambda *args: (133, 132))
    assert [row["gate"] for row in unit.run()] == [
        "cannot run: needs 133 blocks of threads at a time, the device holds 132"
    ]

"""The model of costs against the result rows that it was fitted to, and in what it must not get wrong without any."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastseq.ops import lstm_costs
from fastseq.ops.lstm_costs import Cost, Tile

ROWS = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3.jsonl"
NARROW, WIDE = (Tile(16, *sizes, 256, 0, 0) for sizes in ((8, 1024), (32, 1024)))


def measured() -> list[tuple[int, int, int, str, float]]:
    """T, B, H, mode and microseconds a call of our LSTM in bfloat16, as it chose its way in triton."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    last = {(r["case"], r["mode"]): r for r in rows if r.get("provider") == "fastseq" and r.get("dtype") == "bfloat16"}
    sizes = {key: re.fullmatch(r"T(\d+)_B(\d+)_H(\d+)", key[0]) for key in last}
    return [(*map(int, m.groups()), key[1], 1e3 * last[key]["ms"]) for key, m in sizes.items() if m]  # type: ignore[misc]


def test_ways_in_triton_cost_what_was_measured() -> None:
    found = measured()
    assert len(found) >= 12
    for T, B, H, mode, microseconds in found:
        forward = lstm_costs.triton(T, B, H, H <= 128).of(T)
        both = forward + lstm_costs.triton(T, B, H, H <= 128, backward=True).of(T)
        model = forward if mode == "infer" else both
        assert model == pytest.approx(microseconds, rel=0.1), f"T{T}_B{B}_H{H} {mode}"


def test_more_work_costs_more() -> None:
    for backward in (False, True):
        steps = [lstm_costs.persist(NARROW, 8, H, backward=backward).step for H in (64, 256, 512, 1024)]
        assert steps == sorted(steps)
        few, many = (lstm_costs.persist(t, t.rows, 1024, 1, backward).step for t in (NARROW, WIDE))
        assert few < many


def test_many_rows_are_cheaper_in_blocks_of_many_only_for_want_of_room() -> None:
    assert NARROW.grid(33, 1000) == (63, 5) and WIDE.grid(33, 1000) == (63, 2)
    assert lstm_costs.persist(NARROW, 64, 1024).step < lstm_costs.persist(WIDE, 64, 1024).step


def test_torch_costs_what_was_measured() -> None:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    found = [r for r in rows if r.get("provider", "").startswith("stock") and r["case"].startswith("T") and "ms" in r]
    assert len(found) >= 40
    for row in found:
        T, B, H = map(int, re.fullmatch(r"T(\d+)_B(\d+)_H(\d+)", row["case"]).groups())  # type: ignore[union-attr]
        half = row["dtype"] == "float16" or row["provider"] == "stock float16"
        if row["ms"] is None or row["dtype"] == "float32" or H < 256:
            continue
        passes = (False, True) if row["mode"] == "train" else (False,)
        model = sum(lstm_costs.cudnn(B, H, half, backward).of(T) for backward in passes)
        inside = half and B >= 16 and H <= 1024
        assert model == pytest.approx(1e3 * row["ms"], rel=0.25 if inside else 0.6), row["case"]


def test_clusters_follow_each_other_where_there_is_no_room() -> None:
    """Two groups of rows of 16 blocks each, on a device for one of them; and a push costs less than an exchange."""
    cluster = Tile(32, 8, 512, 256, 1, 0)
    both, one = (lstm_costs.persist(cluster, 16, 512, room=room) for room in (32, 16))
    assert one == Cost(2 * both.start, 2 * both.step)
    assert both.step < lstm_costs.persist(cluster._replace(cluster=0), 16, 512).step
    assert cluster.grid(16, 300) == (16, 2) and cluster._replace(cluster=0).grid(16, 300) == (10, 2)  # a power of two


def test_persistent_loops_cost_what_was_measured() -> None:
    """And the tile that the model would take is nearly the fastest of those that have room."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    found = [r for r in rows if r.get("table") == "persist loop" and "us_per_step" in r]
    newest = max(r["run"] for r in found)
    calls: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in (r for r in found if r["run"] == newest):
        B, H = map(int, re.fullmatch(r"T\d+_B(\d+)_H(\d+)", row["case"]).groups())  # type: ignore[union-attr]
        tile = Tile(*(row[name] for name in Tile._fields))
        passes = row["mode"] == "backward", row["dtype"] == "int8"
        cost = lstm_costs.persist(tile, B, H, 1, *passes, row["room"])
        assert cost.step == pytest.approx(row["us_per_step"], rel=0.4), row["label"]
        calls.setdefault((row["case"], row["mode"], row["dtype"]), []).append((cost.step, row["us_per_step"]))
    assert len(calls) >= 20
    for call, tiles in calls.items():
        assert min(tiles)[1] <= 1.25 * min(measured for _, measured in tiles), call

"""The tables of LEGW against other rules, from their rows: one per task, a line per rule, a column per batch."""

from __future__ import annotations

import statistics

from benchmarks.mimo_quality_table import interval
from benchmarks.table import Row, Table

RULES = ("LEGW", "linear, fixed warm-up", "sqrt, no warm-up", "as tuned, no warm-up")


def _cell(rows: list[Row]) -> str:
    """Mean and 95 % interval over seeds, or how many of them ran away."""
    if not rows:
        return "-"
    lost = sum(row["figure"] is None for row in rows)
    if lost:
        return f"{lost} of {len(rows)} diverged"
    return interval([row["figure"] for row in rows], 1 if "%" in rows[0]["unit"] else 3)


def _worse(base: list[Row], rows: list[Row]) -> str:
    """How much quality a larger batch costs, seed by seed."""
    pairs = [(b["figure"], r["figure"]) for b in base for r in rows if b["seed"] == r["seed"]]
    if rows == base or not pairs or any(None in pair for pair in pairs):
        return "-"
    accuracy = "%" in base[0]["unit"]  # of which more is better
    return interval([b - r if accuracy else r - b for b, r in pairs], 1 if accuracy else 3)


def _table(task: str, rows: list[Row], grid: list[Row]) -> Table:
    factors, rules = sorted({row["k"] for row in rows}), sorted({row["rule"] for row in rows}, key=RULES.index)
    by = {(rule, k): [r for r in rows if (r["rule"], r["k"]) == (rule, k)] for rule in rules for k in factors}
    bare = {k: by[rules[-1], k] for k in factors if k == 1}  # the two rules without a warm-up are one there
    lines = [[rule, *(_cell(by[rule, k] or bare.get(k, [])) for k in factors)] for rule in rules]
    last = {k: [row for row in rows if row["k"] == k] for k in factors}
    lines.append(["steps", *(f"{last[k][0]['steps']:,}" for k in factors)])
    seconds = {k: statistics.median(r["epoch_s"] for r in last[k]) for k in factors}
    lines.append(["seconds an epoch", *(f"{seconds[k]:.2g}" for k in factors)])
    lines.append(["times as fast as x1", *(f"{seconds[factors[0]] / seconds[k]:.2g}" for k in factors)])
    lines.append(["LEGW worse than x1 by", *(_worse(by[RULES[0], factors[0]], by[RULES[0], k]) for k in factors)])
    one = rows[0]
    tried = ", ".join(f"{row['rate']:g}: {row['loss'] if row['loss'] is not None else 'diverged'}" for row in grid)
    notes = [
        f"mean and 95 % interval of {len({r['seed'] for r in rows})} seeds, {one['epochs']} epochs, "
        f"rate {one['rate']:g} at the base batch; {one['device']}, one thread",
        f"held-out loss by rate: {tried}",
    ]
    return Table(f"{task}, {one['unit']}", ["batch", *(f"{last[k][0]['batch']} (x{k})" for k in factors)], lines, notes)


def tables(rows: list[Row]) -> list[Table]:
    runs = {(r["task"], r["rule"], r["k"], r["seed"]): r for r in rows if r["kind"] == "run"}
    found = []
    for task in dict.fromkeys(row["task"] for row in runs.values()):
        grid = [r for r in rows if (r["task"], r["kind"]) == (task, "grid")]
        found.append(_table(task, [r for r in runs.values() if r["task"] == task], grid))
    return found

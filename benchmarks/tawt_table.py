"""The tables of TAWT, from their rows: accuracy and weights of each kind of training, and the times of its signals."""

from __future__ import annotations

from benchmarks.mimo_quality_table import interval
from benchmarks.table import Row, Table


def _gain(rows: list[Row], base: list[Row]) -> str:
    """By how much seeds are better than those of another kind, in points."""
    there = {row["seed"]: row["accuracy"] for row in base}
    pairs = [100 * (row["accuracy"] - there[row["seed"]]) for row in rows if row["seed"] in there]
    return interval(pairs, 2) if pairs else "-"


def _quality(task: str, rows: list[Row]) -> Table:
    kinds = list(dict.fromkeys((row["paradigm"], row["weighting"]) for row in rows))
    by = {kind: [row for row in rows if (row["paradigm"], row["weighting"]) == kind] for kind in kinds}
    lines = []
    for (paradigm, weighting), found in by.items():
        gain = _gain(found, by.get((paradigm, "schedule only"), [])) if weighting == "learned" else "-"
        last = [row["weights"][-1] for row in found if row["weights"]]
        means = [sum(values) / len(values) for values in zip(*last, strict=True)]
        weights = " ".join(f"{mean:.3f}" for mean in means) or "-"
        accuracy = interval([100 * row["accuracy"] for row in found], 2)
        lines.append([paradigm, weighting, accuracy, gain, weights, f"{found[0]['steps']:,}"])
    counts = sorted({len(found) for found in by.values()})
    one, seeds = rows[0], " to ".join(dict.fromkeys(str(n) for n in (counts[0], counts[-1])))
    header = ["training", "weights", "accuracy %", "over schedule only", "last weights", "steps"]
    notes = [
        f"mean and 95 % interval of {seeds} seeds; {one['source']:,} examples of each source, {one['epochs']} epochs; "
        f"Python {one['python']}; {one['device']}, one thread",
        f"weights are of {', '.join(one['tasks'])}, in this order",
    ]
    return Table(f"{one['tasks'][-1].capitalize()}, {task}", header, lines, notes)


def _speed(rows: list[Row]) -> Table:
    ours = rows[-1]
    lines = [
        [label, f"{ours['ms'][label]:.3g}", f"{low:.2f} [{middle:.2f}, {high:.2f}]"]
        for label, (low, middle, high) in ours["ratios"].items()
    ]
    lines.append(["fastseq", f"{ours['ms']['fastseq']:.3g}", "1"])
    note = f"{ours['gradients']} gradients of {ours['size']:,} numbers, float32; {ours['device']}, one thread"
    return Table("Cosines with the target's gradient", ["", "ms", "time of ours over it"], lines, [note])


def tables(rows: list[Row]) -> list[Table]:
    runs = {(r["task"], r["paradigm"], r["weighting"], r["seed"]): r for r in rows if r["kind"] == "run"}
    names = dict.fromkeys(row["task"] for row in runs.values())
    found = [_quality(task, [r for r in runs.values() if r["task"] == task]) for task in names]
    speed = [row for row in rows if row["kind"] == "speed"]
    return [*found, _speed(speed)] if speed else found

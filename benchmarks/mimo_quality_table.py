"""The tables of MIMO's quality on real data, from its rows."""

from __future__ import annotations

import statistics
from collections import defaultdict

from benchmarks.table import Row, Table

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # 97.5 % quantile, by seeds
# title -> field, how many times it is printed, digits
FIGURES = {
    "accuracy %": ("accuracy", 100, 1),
    "NLL": ("nll", 1, 3),
    "ECE %": ("ece", 100, 1),
    "NLL, tempered": ("warm_nll", 1, 3),
    "ECE %, tempered": ("warm_ece", 100, 1),
    "member accuracy %": ("member_accuracy", 100, 1),
    "disagreement %": ("disagreement", 100, 1),
}


def interval(values: list[float], digits: int) -> str:
    """Mean, and half the width of its 95 % interval."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) not in STUDENT:
        return mean
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.{digits}f}"


def _table(task: str, inputs: str, rows: list[Row]) -> Table:
    by_model: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_model[row["model"]].append(row)
    lines = []
    for model, found in by_model.items():
        line = [model]
        for field, factor, digits in FIGURES.values():
            line.append(interval([factor * row[field] for row in found], digits))
        middle = {
            name: statistics.median(row[name] for row in found) for name in ("step_ms", "example_us", "temperature")
        }
        line += [f"{middle['temperature']:.2f}", f"{middle['step_ms']:.3g}", f"{middle['example_us']:.3g}"]
        lines.append([*line, f"{found[0]['parameters']:,}"])
    header = ["model", *FIGURES, "temperature", "ms a step", "us an example", "parameters"]
    seeds = len({row["seed"] for row in rows})
    note = f"mean and 95 % interval of {seeds} seeds, {rows[0]['steps']:,} steps; {rows[0]['device']}, one thread"
    return Table(f"{task.capitalize()}, {inputs} examples", header, lines, [note])


def tables(rows: list[Row]) -> list[Table]:
    last = {(row["task"], row["inputs"], row["model"], row["seed"]): row for row in rows}
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for (task, inputs, _, _), row in last.items():
        groups[task, inputs].append(row)
    return [_table(*key, found) for key, found in groups.items()]

"""The tables of ADT beside other trainings, from their rows."""

from __future__ import annotations

import statistics

from benchmarks.mimo_quality_table import interval
from benchmarks.table import Row, Table

METHODS = ("standard", "PGD training", "ADT exp", "ADT exp_am", "ADT imp_am")
FIGURES = ("natural", "FGSM", "PGD-20", "PGD-100", "MIM", "C&W", "SPSA", "features", "worst")


def _table(task: str, rows: list[Row]) -> Table:
    lines = []
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if own:
            figures = [interval([row[name] for row in own], 1) for name in FIGURES]
            lines.append([method, *figures, f"{statistics.median(row['epoch_s'] for row in own):.2g}"])
    one, seeds = rows[0], [len([row for row in rows if row["method"] == line[0]]) for line in lines]
    many = f"{min(seeds)} to {max(seeds)} seeds" if min(seeds) < max(seeds) else f"{seeds[0]} seed(s)"
    note = (
        f"accuracy %, mean and 95 % interval of {many}, {one['epochs']} epochs, eps {one['eps']:g}; "
        f"{one['device']}, one thread"
    )
    return Table(task, ["training", *FIGURES, "s an epoch"], lines, [note])


def _speed(rows: list[Row]) -> Table:
    lines = [
        [row["case"], f"{row['ms']:.4g}", f"{row['theirs_ms']:.4g}", "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"])]
        for row in rows
    ]
    note = f"median of paired ratios and its 95 % interval; {rows[-1]['device']}, {rows[-1]['threads']} thread"
    return Table("Search for perturbations", ["", "ms", "against, ms", "ratio"], lines, [note])


def tables(rows: list[Row]) -> list[Table]:
    quality = {(r["task"], r["method"], r["seed"]): r for r in rows if r["kind"] == "quality"}
    tasks = dict.fromkeys(row["task"] for row in quality.values())
    found = [_table(task, [row for row in quality.values() if row["task"] == task]) for task in tasks]
    speed = {row["case"]: row for row in rows if row["kind"] == "speed"}
    return found + ([_speed(list(speed.values()))] if speed else [])

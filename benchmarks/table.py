"""Tables that are printed from rows: cells, targets, and the two forms for the terminal and for pages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.harness import ABSENT

Row = dict[str, Any]


class Table(NamedTuple):
    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str]


def by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """case -> label of the provider -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["label"]] = row
    return found


def ms(row: Row | None, unit: float = 1.0) -> str:
    if row is None:
        return "-"
    if "ms" not in row:
        return "-" if row["gate"].startswith(ABSENT) else "gate"
    return f"{row['ms'] * unit:.3g}" + ("" if row["gate"] == "passed" else "*")


def ratio(row: Row, label: str) -> str:
    if label not in row.get("ratios", {}):
        return "-"
    median, low, high = row["ratios"][label]
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def times_faster(row: Row, label: str) -> str:
    if label not in row.get("ratios", {}):
        return "-"
    median, low, high = (1 / value for value in row["ratios"][label])
    return f"{median:.1f}x [{high:.1f}, {low:.1f}]"


def aim(row: Row, label: str | None, target: float | None, factor: bool = False) -> str:
    """The target, as a ratio or as how many times faster, and whether the median meets it."""
    if target is None or label not in row.get("ratios", {}):
        return "-"
    verdict = "met" if row["ratios"][label][0] <= target else "missed"
    return f"{1 / target:.1f}x {verdict}" if factor else f"{target:.2f} {verdict}"


def limit(row: Row) -> str:
    """The nearer of the two limits of the machine."""
    if "fma_of_peak" not in row:
        return "-"
    if row["fma_of_peak"] >= row["bandwidth_of_peak"]:
        return f"{row['fma_of_peak']:.0%} FMA"
    return f"{row['bandwidth_of_peak']:.0%} read"


def summary(name: str, ratios: Iterable[tuple[str, float]]) -> str:
    found = list(ratios)
    if not found:
        return f"{name}: nothing to compare"
    mean = math.exp(sum(math.log(value) for _, value in found) / len(found))
    worst = max(found, key=lambda item: item[1])
    return f"{name}: worst {worst[1]:.2f} ({worst[0]}), geometric mean {mean:.2f} of {len(found)}"


def met(lines: list[list[str]]) -> list[str]:
    verdicts = [cell.split()[-1] for line in lines for cell in line if cell.endswith((" met", " missed"))]
    return [f"targets met: {verdicts.count('met')} of {len(verdicts)}"] if verdicts else []


def failed(rows: list[Row]) -> list[str]:
    """What the star beside a time means, and why others have none."""
    beyond = [f"{r['label']} {r['case']} ({r['gate']})" for r in rows if "ms" in r and r["gate"] != "passed"]
    without: dict[str, list[str]] = {}
    for row in rows:
        if "ms" not in row:
            without.setdefault(f"{row['case']} ({row['gate']})", []).append(row["label"])
    notes = [f"* beyond the error budget of the tests: {'; '.join(beyond)}"] if beyond else []
    reasons = "; ".join(f"{', '.join(dict.fromkeys(labels))} {why}" for why, labels in without.items())
    return [*notes, f"no time: {reasons}"] if without else notes


def text(table: Table) -> str:
    """The table for a terminal: columns aligned."""
    cells = [table.header, *table.lines]
    widths = [max(len(line[n]) for line in cells if n < len(line)) for n in range(len(table.header))]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in cells]
    return "\n".join([table.title, drawn[0], "-" * len(drawn[0]), *drawn[1:], *table.notes])


def markdown(table: Table) -> str:
    """The table for a page."""
    lines = [table.header, ["---"] * len(table.header), *table.lines]
    drawn = ["| " + " | ".join([*line, *[""] * (len(table.header) - len(line))]) + " |" for line in lines]
    return "\n".join([f"**{table.title}**", "", *drawn, "", *(f"{note}  " for note in table.notes)]).rstrip()

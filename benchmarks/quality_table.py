"""The tables of the quality benchmark, from its rows."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable

from benchmarks.quality_compressed import AS_TRAINED, HARD
from benchmarks.table import Row, Table

WITHIN = 0.01  # of the soft gates' value: what hard gates may cost


def spread(values: Iterable[float], form: str = ".3f") -> str:
    """Mean, and the standard deviation where there is more than one value."""
    found = list(values)
    text = f"{statistics.fmean(found):{form}}"
    return text if len(found) == 1 else f"{text} ± {statistics.stdev(found):{form.removeprefix('+')}}"


def grouped(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """Way -> model -> rows of the seeds, in the order of the rows; where there are two of one model, the later."""
    last = {(row["way"], row["model"], row["seed"], row["steps"]): row for row in rows}
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for (way, model, _, _), row in last.items():
        found[way][model].append(row)
    return found


def _smaller(rows: list[Row]) -> str:
    found = [row["bytes_before"] / row["bytes_after"] for row in rows if row.get("bytes_after")]
    return f"{statistics.fmean(found):.1f}" if found else "-"


def _share(way: str, H: int) -> str:
    """Of the hidden size, what the rank of a way is."""
    rank = re.search(r"rank (\d+)$", way)
    return f", {int(rank[1]) / H:.0%} of H" if rank else ""


def compressed(rows: list[Row]) -> Table:
    """What every way costs every model."""
    ways = grouped(rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    form = ".3f" if rows[0]["metric"].startswith("bits") else ".2f"
    lines = []
    for way, group in ways.items():
        line = [way + _share(way, rows[0]["H"])]
        for model in models:
            found = group.get(model, [])
            if way == AS_TRAINED or not found:
                line.append(spread((row["test"] for row in found), form) if found else "-")
            else:
                mean = statistics.fmean(row["test"] for row in found)
                line.append(f"{mean:{form}} ({spread((row['cost'] for row in found), '+' + form)})")
        lines.append([*line, _smaller([row for found in group.values() for row in found])])
    title = f"{rows[0]['task'].capitalize()}: {rows[0]['metric']} on held-out text, and in brackets what it costs"
    return Table(title, ["", *models, "times fewer bytes"], lines, [*_budget(rows), *_verdicts(ways)])


def _verdicts(ways: dict[str, dict[str, list[Row]]]) -> list[str]:
    """In how many ways a model loses less than the stock one, and in how many it ends up best."""
    cost: dict[str, dict[str, float]] = {}
    best: list[str] = []
    for way in (way for way in ways if way not in (AS_TRAINED, HARD)):
        cost[way] = {model: statistics.fmean(row["cost"] for row in found) for model, found in ways[way].items()}
        value = {model: statistics.fmean(row["test"] for row in found) for model, found in ways[way].items()}
        if len(value) > 1:
            best.append(min(value, key=value.__getitem__))
    notes = []
    for model in dict.fromkeys(model for found in cost.values() for model in found if model != "stock"):
        both = [found for found in cost.values() if model in found and "stock" in found]
        notes.append(f"{model} in {sum(found[model] < found['stock'] for found in both)} of {len(both)}")
    lowest = ", ".join(f"{model} in {best.count(model)} of {len(best)}" for model in dict.fromkeys(best))
    return [
        f"ways of compression that cost less than they cost stock: {', '.join(notes) or 'nothing to compare'}",
        f"lowest after compression: {lowest or 'nothing to compare'}",
    ]


def _budget(rows: list[Row]) -> list[str]:
    first = rows[0]
    sizes = ", ".join(f"{name} {first[name]}" for name in ("T", "B", "E", "H", "symbols"))
    minutes = [row["minutes"] for row in rows]
    seeds = len({row["seed"] for row in rows})
    steps = " or ".join(f"{count:,}" for count in sorted({row["steps"] for row in rows}))
    commits = ", ".join(dict.fromkeys(row["commit"] or "unknown" for row in rows))
    return [
        f"mean{' ± standard deviation' if seeds > 1 else ''} of {seeds} seed{'s'[: seeds > 1]}; "
        f"{first['parameters']:,} parameters ({sizes})",
        f"{steps} steps of training ({first['epoch']:,} are an epoch), {min(minutes):.0f} to "
        f"{max(minutes):.0f} minutes on one thread",
        f"{', '.join(dict.fromkeys(row['device'] for row in rows))}; commit {commits}",
    ]


def hard(rows: list[Row]) -> Table:
    """Hard gates against soft ones, seed by seed, and where the gates are."""
    ways = grouped(rows)
    lines = []
    for model, found in ways[HARD].items():
        soft = {row["seed"]: row for row in ways[AS_TRAINED][model]}
        pairs = [(row, soft[row["seed"]]) for row in found if row["seed"] in soft]
        costs = [own["test"] / other["test"] - 1 for own, other in pairs]
        values = [spread(row["test"] for row in side) for side in zip(*pairs, strict=True)]
        verdict = f"{sum(cost <= WITHIN for cost in costs)} of {len(costs)}"
        shares = [
            "/".join(f"{statistics.fmean(row['near'][gate][end] for _, row in pairs):.0%}" for end in (0, 1))
            for gate in "if"
        ]
        lines.append([model, values[1], values[0], ", ".join(f"{cost:+.1%}" for cost in costs), verdict, *shares])
    header = ["model", "soft", "hard", "change, seed by seed", f"within {WITHIN:.0%}"]
    title = f"{rows[0]['task'].capitalize()}: hard gates at evaluation, {rows[0]['metric']}"
    notes = ["near 0/1: share of gates of the soft model below 0.1 and above 0.9"]
    return Table(title, [*header, "i near 0/1", "f near 0/1"], lines, notes)


def tables(rows: list[Row]) -> list[Table]:
    return [hard(rows), compressed(rows)] if rows else []

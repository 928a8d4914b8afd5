"""Tables from the rows of a run on a GPU, and those of docs/gpu.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import harness, table
from benchmarks.gpu.part import Row
from benchmarks.gpu.targets import fastest_exact_rival, find, own_lookup, targets
from benchmarks.table import Table, by_case, failed, ms

MARKS = "<!-- bench:gpu -->", "<!-- /bench:gpu -->"
PENDING = "GPU numbers are pending: nothing here was measured on one. `make gpu` does it, in ten minutes."


def limits(rows: list[Row]) -> Table:
    lines = [[r["case"], f"{r['value']:.4g}", r["unit"]] for r in rows if "value" in r]
    return Table("What the device can do", ["what", "measured", "unit"], lines, [])


def stock(rows: list[Row]) -> Table:
    """nn.LSTM: forward and training step, and the kernel that takes most of the forward."""
    dtypes = [d for d in ("float16", "bfloat16", "float32") if any(r["dtype"] == d for r in rows)]
    header = ["case", *(f"{d} us/step" for d in dtypes), *(f"{d} trains" for d in dtypes), "kernels of the first"]
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows):
        T = int(case[1:].split("_")[0])
        cells, names = [], ""
        for mode in ("infer", "train"):
            for dtype in dtypes:
                row = find(rows, case=case, mode=mode, dtype=dtype)
                cells.append(f"{row['ms'] * 1e3 / T:.2f}" if row else "-")
                names = names or "; ".join((row or {}).get("kernels", [])[:1])
        lines.append([case, *cells, names])
    return Table("Stock nn.LSTM, one layer", header, lines, failed(rows))


def _over(row: Row, group: dict[str, Row], label: str) -> str:
    return table.times_faster(row, label) if label in group else "-"


def lstm(rows: list[Row], title: str = "LSTM, one layer") -> Table:
    header = ["case", "dtype", "mode", "provider", "ms", "us/step", "than stock", "than loop", "TFLOP/s", "peak MB"]
    lines = []
    for key in dict.fromkeys((r["mode"], r["dtype"]) for r in rows):
        for case, group in by_case([r for r in rows if (r["mode"], r["dtype"]) == key]).items():
            for label, r in group.items():
                line = [case, key[1], key[0], label, ms(r), f"{r['us_per_step']:.3g}" if "ms" in r else "-"]
                line += [_over(r, group, "stock"), _over(r, group, "loop")]
                lines.append([*line, f"{r['tflops']:.3g}" if "ms" in r else "-", f"{r.get('peak_mb', '-')}"])
    return Table(title, header, lines, failed(rows))


def persist(rows: list[Row]) -> Table:
    return lstm(rows, "Persistent LSTM, one layer")


def loop(rows: list[Row]) -> Table:
    """A line for each tile: what the cost model is fitted to."""
    header = ["case", "dtype", "tile", "units", "rows", "blocks", "of", "forward us/step", "backward us/step"]
    lines = []
    for case, dtype, tile in dict.fromkeys((r["case"], r["dtype"], r["tile"]) for r in rows):
        mine = {r["mode"]: r for r in rows if (r["case"], r["dtype"], r["tile"]) == (case, dtype, tile)}
        steps = [f"{mine[m]['us_per_step']:.3g}" if "ms" in mine.get(m, {}) else "-" for m in ("forward", "backward")]
        first = next(iter(mine.values()))
        lines.append([case, dtype, str(tile), *(str(first[k]) for k in ("units", "rows", "blocks", "room")), *steps])
    return Table("The loop of the persistent LSTM alone, by tile", header, lines, failed(rows))


def lowrank(rows: list[Row]) -> Table:
    """The same of the persistent low-rank LSTM, and of Triton's kernels."""
    found = loop([{"units": "-", **r} for r in rows])
    return found._replace(title="The loop of the persistent low-rank LSTM alone, by tile, and Triton's operators")


def vq(rows: list[Row]) -> Table:
    header = ["case", "dtype", "provider", "ms", "TFLOP/s", "wrong indices", "peak MB", "fastseq's time over it"]
    lines = []
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        for case, group in by_case([r for r in rows if r["dtype"] == dtype]).items():
            ours = group.get("fastseq", {})
            for label, r in group.items():
                line = [case, dtype, label, ms(r), f"{r['tflops']:.4g}" if "ms" in r else "-"]
                line += [f"{r['wrong']:.2%}" if "wrong" in r else "-", f"{r.get('peak_mb', '-')}"]
                lines.append([*line, table.ratio(ours, label)])
    return Table("Lookup of the nearest code, cold cache", header, lines, failed(rows))


def few_rows(rows: list[Row]) -> Table:
    header = ["case", "dtype", "provider", "us", "wrong indices", "one launch's time over it"]
    lines = []
    for case, group in by_case(rows).items():
        ours = group.get("fastseq cuda", {})
        for label, r in group.items():
            wrong = f"{r['wrong']:.2%}" if "wrong" in r else "-"
            lines.append([case, r["dtype"], label, ms(r, 1e3), wrong, table.ratio(ours, label)])
    return Table("Lookup of few rows, through M codebooks", header, lines, failed(rows))


def layers(rows: list[Row]) -> Table:
    header = ["case", "dtype", "mode", "provider", "ms", "peak MB", "fastseq's time over it"]
    lines = []
    for mode in dict.fromkeys(r["mode"] for r in rows):
        for case, group in by_case([r for r in rows if r["mode"] == mode]).items():
            ours = group.get("fastseq", {})
            for label, r in group.items():
                line = [case, r["dtype"], mode, label, ms(r), f"{r.get('peak_mb', '-')}", table.ratio(ours, label)]
                lines.append(line)
    return Table("Layers", header, lines, failed(rows))


def mimo(rows: list[Row]) -> Table:
    header = ["case", "mode", "provider", "ms", "GB/s of what must move", "peak MB", "fastseq's time over it"]
    lines = []
    for mode in dict.fromkeys(r["mode"] for r in rows):
        for case, group in by_case([r for r in rows if r["mode"] == mode]).items():
            ours = group.get("fastseq", {})
            for label, r in group.items():
                speed = f"{r['gbs']:.4g}" if "gbs" in r else "-"
                lines.append([case, mode, label, ms(r), speed, f"{r.get('peak_mb', '-')}", table.ratio(ours, label)])
    return Table("MIMO in float32, forward and backward", header, lines, failed(rows))


def tests(rows: list[Row]) -> Table:
    header, lines, notes = ["suite", "files", "passed", "skipped", "failed"], [], []
    for suite in dict.fromkeys(r["suite"] for r in rows):
        mine = [r for r in rows if r["suite"] == suite]
        counts = [str(sum(r.get(key, 0) for r in mine)) for key in ("passed", "skipped")]
        wrong = sum(r.get("failed", 0) + r.get("error", 0) for r in mine)
        lines.append([suite, str(len(mine)), *counts, str(wrong)])
        notes += [f"{suite} {r['case']}: {r['gate']}" for r in mine if r["gate"] != "passed"]
    return Table("Tests", header, lines, notes)


def parity(rows: list[Row]) -> Table:
    lines = [[r["case"], ", ".join(r["dtypes"]) or "-", str(r["cases"]), r["gate"]] for r in rows]
    return Table("Kernels against float64", ["module", "verified for", "cases", "verdict"], lines, [])


def aims(rows: Sequence[Row]) -> Table:
    lines = []
    for t in targets(rows):
        value = "-" if t.value is None else f"{t.value:.3g} {t.unit}".strip()
        lines.append([t.name, value, f"{'>=' if t.at_least else '<='} {t.aim:g} {t.unit}".strip(), t.verdict])
    counts = ", ".join(f"{sum(line[3] == v for line in lines)} {v}" for v in ("met", "missed", "open"))
    return Table("Targets", ["what", "measured", "target", "verdict"], lines, [f"targets: {counts}"])


TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "parity": parity,
    "persist": persist,
    "persist loop": loop,
    "lowrank loop": lowrank,
    "limits": limits,
    "stock": stock,
    "lstm": lstm,
    "vq": vq,
    "few rows": few_rows,
    "mimo": mimo,
    "layers": layers,
    "tests": tests,
}


def of_rows(rows: Sequence[Row]) -> list[Table]:
    found = []
    for name, draw in TABLES.items():
        mine = [r for r in rows if r.get("table") == name and "processor" not in r]
        if mine:
            found.append(draw(mine))
    return [*found, aims(rows)]


def newest(folder: Path) -> list[Row]:
    """Of each table the rows of its last run on a GPU, among all files of rows."""
    rows = [r for path in sorted(folder.glob("*.jsonl")) for r in harness.read(path) if "capability" in r]
    last: dict[tuple[str, str], str] = {}
    for r in rows:
        key = r.get("table", ""), r.get("suite", "")
        last[key] = max(r["run"], last.get(key, ""))
    return [r for r in rows if r["run"] == last[r.get("table", ""), r.get("suite", "")]]


def brief_lstm(rows: Sequence[Row]) -> Table:
    """Ours and stock nn.LSTM in the same dtype, microseconds a step."""
    header = ["case", "dtype", "mode", "fastseq us/step", "binary gates", "stock", "fastseq is faster by"]
    lines = []
    for key in dict.fromkeys((r["case"], r["dtype"], r["mode"]) for r in rows if r.get("table") == "lstm"):
        shared = dict(zip(("case", "dtype", "mode"), key, strict=True))
        found = [find(rows, table="lstm", label=n, **shared) for n in ("fastseq", "fastseq binary p=0.2", "stock")]
        ours, _, theirs = found
        if ours and theirs:
            steps = [f"{r['us_per_step']:.3g}" if r else "-" for r in found]
            lines.append([*key, *steps, table.times_faster(ours, "stock")])
    return Table("LSTM, one layer of as many inputs as units", header, lines, [])


def brief_persist(rows: Sequence[Row]) -> Table:
    """The persistent LSTM where it has room, Triton's kernels and stock nn.LSTM, microseconds a step."""
    header = ["case", "dtype", "mode", "persistent us/step", "Triton", "stock", "stock float16", "faster than stock by"]
    mine = [r for r in rows if r.get("table") == "persist"]
    lines = []
    for key in dict.fromkeys((r["case"], r["dtype"], r["mode"]) for r in mine):
        shared = dict(zip(("case", "dtype", "mode"), key, strict=True))
        found = [find(mine, **shared, label=n) for n in ("fastseq persist", "fastseq", "stock", "stock float16")]
        if found[0] and found[2]:
            steps = [f"{r['us_per_step']:.3g}" if r else "-" for r in found]
            lines.append([*key, *steps, table.times_faster(found[0], "stock")])
    return Table("Persistent LSTM, one layer of as many inputs as units", header, lines, [])


def brief_vq(rows: Sequence[Row]) -> Table:
    """Ours and the fastest of those whose indices are exact."""
    header = ["case", "dtype", "fastseq ms", "TFLOP/s", "peak MB", "fastest exact rival", "fastseq's time over it"]
    lines = []
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in rows if r.get("table") == "vq"):
        ours = own_lookup(rows, case, dtype)
        rival = fastest_exact_rival(rows, case, dtype)
        if ours and rival:
            own = [ms(ours), f"{ours['tflops']:.4g}", f"{ours.get('peak_mb', '-')}"]
            lines.append([case, dtype, *own, rival["label"], table.ratio(ours, rival["label"])])
    return Table("Lookup of the nearest code, cold cache; every index is the definition's", header, lines, [])


def brief(rows: Sequence[Row], full: str) -> list[str]:
    """What docs/gpu.md shows."""
    drawn = [t for t in (brief_persist(rows), brief_lstm(rows), brief_vq(rows)) if t.lines]
    missed = [f"{t.name}: {t.value:.3g} {t.unit}".strip() for t in targets(rows) if t.verdict == "missed"]
    told = [f"Missed of {len(targets(rows))} targets: {'; '.join(missed)}."] if missed else []
    return [*(table.markdown(t) for t in drawn), *told, f"{source(rows)} All tables: `{full}`."]


def source(rows: Sequence[Row]) -> str:
    """Where the figures are from: the runs, with their tables where there are several."""
    runs = {r["run"]: r for r in rows}
    tables = {run: dict.fromkeys(r["table"] for r in rows if r["run"] == run and "table" in r) for run in runs}
    told = []
    for run, first in sorted(runs.items()):
        tree = "" if first["clean"] else " with uncommitted changes"
        of = f" ({', '.join(tables[run])})" if len(runs) > 1 else ""
        versions = f"driver {first['driver']}, CUDA {first['cuda']}, torch {first['torch']}, Triton {first['triton']}"
        told.append(f"on {first['device']}, {versions}, commit {first['commit']}{tree}, {run[:10]}{of}")
    return f"Measured {'; '.join(told)}."


def write_markdown(folder: Path, readme: Path) -> None:
    """Put the newest rows between the marks in ``readme``, or say there that numbers are pending; all tables go into
    ``gpu.md`` of ``folder``.

    Raises:
        SystemExit: without marks.
    """
    begin, end = MARKS
    text = readme.read_text()
    if begin not in text or end not in text:
        raise SystemExit(f"{readme.name} lacks the marks {begin} and {end}")
    rows = newest(folder)
    full = folder / "gpu.md"
    if rows:
        drawn = [table.markdown(t) for t in of_rows(rows)]
        full.write_text("\n\n".join(["# On a GPU", source(rows), *drawn]) + "\n")
    shown = brief(rows, f"{folder.parent.name}/{folder.name}/{full.name}") if rows else [PENDING]
    block = "\n\n".join([begin, *shown, end])
    readme.write_text(re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.S))

"""What is measured of the LSTM by default, the figures aimed at, and the tables that are printed from rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.lstm import Case, Provider

Row = dict[str, Any]


class Target(NamedTuple):
    """Largest time relative to a rival that counts as met."""

    train: float  # against stock nn.LSTM
    infer: float  # against the fastest rival
    loop: float  # against the per-step loop


THREE, LESS = 1 / 3, 1 / 2.3
TARGETS = {
    (100, 1, 128): Target(0.6, 0.7, THREE),
    (100, 1, 256): Target(0.6, 0.7, THREE),
    (50, 16, 128): Target(0.7, 0.7, THREE),
    (100, 1, 512): Target(0.7, 0.75, THREE),
    (50, 1, 1024): Target(0.6, 1.0, THREE),
    (50, 8, 512): Target(0.8, 1.0, THREE),
    (50, 32, 256): Target(0.9, 1.0, THREE),
    (50, 32, 512): Target(0.9, 1.0, LESS),
    (35, 64, 650): Target(0.9, 1.0, LESS),
    (35, 64, 1024): Target(0.9, 1.0, LESS),
}
PACKED_TARGET = 0.5

# torch.compile unrolls the loop: minutes of compilation beyond this, so by default it is a rival here only.
COMPILED = (50, 16, 128)
SHAPES = {
    "train": list(TARGETS),
    "infer": list(TARGETS),
    "stream": [(1, 1, 128), (1, 1, 256), (1, 1, 512)],
    "packed": [(50, 16, 128), (100, 32, 256)],
    "memory": [(50, 16, 128), (50, 32, 512)],
    "scaling": [
        *((T, 1, 256) for T in (10, 50, 200)),
        *((50, B, 256) for B in (4, 16, 64)),
        *((50, 8, H) for H in (64, 128, 256, 512)),
    ],
}
PROVIDERS = {
    "train": [
        Provider("stock"),
        Provider("fastseq", 1.0),
        Provider("fastseq", 0.2),
        Provider("fastseq"),
        Provider("loop", 1.0),
        Provider("loop", 0.2),
    ],
    "infer": [Provider("stock"), Provider("fastseq"), Provider("onnxruntime"), Provider("openvino")],
    "stream": [Provider("stock"), Provider("fastseq"), Provider("onnxruntime"), Provider("openvino")],
    "packed": [Provider("stock"), Provider("fastseq", 0.2), Provider("fastseq")],
    "scaling": [Provider("stock"), Provider("fastseq", 0.2)],
    "memory": [Provider("stock"), Provider("fastseq", 0.2), Provider("recompute", 0.2)],
}
SECONDS = {"train": 8.0, "infer": 3.0, "stream": 1.5, "packed": 4.0, "memory": 2.0, "scaling": 0.5}


def cases(mode: str) -> list[Case]:
    return [Case(*shape, "train" if mode in ("memory", "scaling") else mode) for shape in SHAPES[mode]]


def providers(mode: str, case: Case, only: Sequence[str] | None) -> list[Provider]:
    """Those of the mode, or of them and torch.compile those named in ``only``."""
    chosen = list(PROVIDERS[mode])
    if mode == "train" and ((case.T, case.B, case.H) == COMPILED if only is None else "compile" in only):
        chosen.append(Provider("compile", 0.2))
    return chosen if only is None else [p for p in chosen if p.name in only or p.name in ("fastseq", "recompute")]


def _beyond(rows: list[Row]) -> list[str]:
    """What the star beside a time means."""
    found = [f"{r['label']} {r['case']} ({r['gate']})" for r in rows if "ms" in r and r["gate"] != "passed"]
    return [f"* beyond the error budget of the tests: {'; '.join(found)}"] if found else []


class Table(NamedTuple):
    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str]


def _ms(row: Row | None, unit: float = 1.0) -> str:
    if row is None:
        return "-"
    if "ms" not in row:
        return "gate"
    return f"{row['ms'] * unit:.3g}" + ("" if row["gate"] == "passed" else "*")


def _ratio(row: Row, label: str) -> str:
    if label not in row.get("ratios", {}):
        return "-"
    median, low, high = row["ratios"][label]
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def _times_faster(row: Row, label: str) -> str:
    if label not in row.get("ratios", {}):
        return "-"
    median, low, high = (1 / value for value in row["ratios"][label])
    return f"{median:.1f}x [{high:.1f}, {low:.1f}]"


def _aim(row: Row, label: str | None, target: float | None, factor: bool = False) -> str:
    """The target, as a ratio or as how many times faster, and whether the median meets it."""
    if target is None or label not in row.get("ratios", {}):
        return "-"
    verdict = "met" if row["ratios"][label][0] <= target else "missed"
    return f"{1 / target:.1f}x {verdict}" if factor else f"{target:.2f} {verdict}"


def _limit(row: Row) -> str:
    """The nearer of the two limits of the machine."""
    if "fma_of_peak" not in row:
        return "-"
    if row["fma_of_peak"] >= row["bandwidth_of_peak"]:
        return f"{row['fma_of_peak']:.0%} FMA"
    return f"{row['bandwidth_of_peak']:.0%} read"


def _target(row: Row) -> Target | None:
    return TARGETS.get(Case.parse(row["case"], row["mode"]).shape)


def _summary(name: str, ratios: Iterable[tuple[str, float]]) -> str:
    found = list(ratios)
    if not found:
        return f"{name}: nothing to compare"
    mean = math.exp(sum(math.log(value) for _, value in found) / len(found))
    worst = max(found, key=lambda item: item[1])
    return f"{name}: worst {worst[1]:.2f} ({worst[0]}), geometric mean {mean:.2f} of {len(found)}"


def _by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["label"]] = row
    return found


def _ours(group: dict[str, Row]) -> list[Row]:
    return [row for label, row in group.items() if label.split()[0] == "fastseq"]


def _gates(row: Row) -> str:
    return f"binary, p={row['noise_probability']:g}" if row["gates"] == "binary" else "sigmoid"


def train(rows: list[Row]) -> Table:
    header = ["case", "gates", "fastseq ms", "nn.LSTM ms", "vs nn.LSTM", "target"]
    header += ["faster than loop", "target", "than compiled", "GFLOP/s", "of limit"]
    lines, stock, loop = [], [], []
    for case, group in _by_case(rows).items():
        for row in _ours(group):
            p = f" p={row['noise_probability']:g}" if row["gates"] == "binary" else ""
            target = _target(row) if p else None
            line = [case, _gates(row), _ms(row), _ms(group.get("stock")), _ratio(row, "stock")]
            line += [_aim(row, "stock", target and target.train), _times_faster(row, f"loop{p}")]
            line += [_aim(row, f"loop{p}", target and target.loop, factor=True), _times_faster(row, f"compile{p}")]
            lines.append([*line, f"{row.get('gflops', 0):.0f}", _limit(row)])
            ratios = row.get("ratios", {})
            if p:
                stock += [(f"{case}{p}", ratios["stock"][0])] if "stock" in ratios else []
                loop += [(f"{case}{p}", ratios[f"loop{p}"][0])] if f"loop{p}" in ratios else []
    notes = [
        _summary("binary gates, time over that of nn.LSTM", stock),
        _summary("binary gates, time over that of the loop", loop),
        *_met(lines),
        *_beyond(rows),
    ]
    return Table("Training step (forward and backward)", header, lines, notes)


def _met(lines: list[list[str]]) -> list[str]:
    verdicts = [cell.split()[-1] for line in lines for cell in line if cell.endswith((" met", " missed"))]
    return [f"targets met: {verdicts.count('met')} of {len(verdicts)}"] if verdicts else []


def _rivals(rows: list[Row], title: str, unit: float, unit_name: str) -> Table:
    """fastseq against the fastest of the others."""
    rivals = ["stock", "onnxruntime", "openvino"]
    header = ["case", f"fastseq {unit_name}", "nn.LSTM", "ONNX Runtime", "OpenVINO"]
    header += ["vs nn.LSTM", "vs fastest", "which", "target", "GFLOP/s", "GB/s", "of limit"]
    lines, found = [], []
    for case, group in _by_case(rows).items():
        timed = {name: group[name] for name in rivals if "ms" in group.get(name, {})}
        fastest = min(timed, key=lambda name: timed[name]["ms"]) if timed else "-"
        for row in _ours(group):
            times = [_ms(r, unit) for r in (row, *map(group.get, rivals))]
            target = _target(row) if row["mode"] == "infer" else None
            line = [case, *times, _ratio(row, "stock"), _ratio(row, fastest), fastest]
            line.append(_aim(row, fastest, target and target.infer))
            lines.append([*line, f"{row.get('gflops', 0):.0f}", f"{row.get('gb_s', 0):.0f}", _limit(row)])
            if fastest in row.get("ratios", {}):
                found.append((case, row["ratios"][fastest][0]))
    notes = [_summary("time over that of the fastest rival", found), *_met(lines), *_beyond(rows)]
    return Table(title, header, lines, notes)


def infer(rows: list[Row]) -> Table:
    return _rivals(rows, "Inference", 1.0, "ms")


def stream(rows: list[Row]) -> Table:
    return _rivals(rows, "Streaming, one step per call", 1e3, "us")


def packed(rows: list[Row]) -> Table:
    header = ["case", "gates", "fastseq ms", "nn.LSTM ms", "vs nn.LSTM", "target", "GFLOP/s", "of limit"]
    lines = []
    for case, group in _by_case(rows).items():
        for row in _ours(group):
            line = [case, _gates(row), _ms(row), _ms(group.get("stock")), _ratio(row, "stock")]
            line += [_aim(row, "stock", PACKED_TARGET), f"{row.get('gflops', 0):.0f}", _limit(row)]
            lines.append(line)
    return Table(
        "Training step, PackedSequence with lengths drawn from 10 to T", header, lines, [*_met(lines), *_beyond(rows)]
    )


def scaling(rows: list[Row]) -> Table:
    counts = sorted({row["threads"] for row in rows})
    by_threads = {count: _by_case([r for r in rows if r["threads"] == count]) for count in counts}
    header = ["case"]
    for count in counts:
        header += [f"fastseq ms, {count} thread{'s'[: count > 1]}", "vs nn.LSTM", "of limit"]
    lines = []
    for case in _by_case(rows):
        line = [case]
        for count in counts:
            for row in _ours(by_threads[count].get(case, {})):
                line += [_ms(row), _ratio(row, "stock"), _limit(row)]
        lines.append(line)
    return Table("Scaling of the training step (binary gates, p=0.2)", header, lines, _beyond(rows))


def memory(rows: list[Row]) -> Table:
    header = ["case", "provider", "kept for backward MB", "peak MB", "ms", "vs nn.LSTM"]
    lines = [
        [row["case"], row["label"], f"{row['saved_mb']:.2f}", f"{row['peak_mb']:.2f}", _ms(row), _ratio(row, "stock")]
        for row in rows
        if "ms" in row
    ]
    return Table("Memory of the training step, inputs and weights not counted", header, lines, [])


TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "train": train,
    "infer": infer,
    "stream": stream,
    "packed": packed,
    "scaling": scaling,
    "memory": memory,
}


def text(table: Table) -> str:
    """The table for a terminal: columns aligned."""
    cells = [table.header, *table.lines]
    widths = [max(len(line[n]) for line in cells if n < len(line)) for n in range(len(table.header))]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in cells]
    return "\n".join([table.title, drawn[0], "-" * len(drawn[0]), *drawn[1:], *table.notes])


def markdown(table: Table) -> str:
    """The table for README."""
    lines = [table.header, ["---"] * len(table.header), *table.lines]
    drawn = ["| " + " | ".join([*line, *[""] * (len(table.header) - len(line))]) + " |" for line in lines]
    return "\n".join([f"**{table.title}**", "", *drawn, "", *(f"{note}  " for note in table.notes)]).rstrip()

"""What is measured of the LSTM by default, the figures aimed at, and the tables that are printed from rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.lstm import Case, Provider, Work
from benchmarks.memory import of_training
from benchmarks.table import Row, Table, aim, by_case, failed, limit, met, ms, ratio, summary, times_faster


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
QUICK = ("stock", "loop", "onnxruntime", "openvino")  # rivals that are ready at once
EXAMPLE = "T100_B1_H128"


def cases(mode: str, names: Sequence[str] | None = None) -> list[Case]:
    """Those of the mode, or those of these names.

    Raises:
        ValueError: a name that is none.
    """
    kind = "train" if mode in ("memory", "scaling") else mode
    if names is None:
        return [Case(*shape, kind) for shape in SHAPES[mode]]
    found = [Case.parse(name, kind) for name in names]
    return [case._replace(T=1) for case in found] if mode == "stream" else found


def thread_counts(mode: str, count: int) -> list[int]:
    return sorted({1, count}) if mode == "scaling" else [count]


def memory_of(mode: str) -> Callable[[Work], dict[str, float]] | None:
    """What the rows of the mode say about memory."""
    return (lambda work: of_training(work.run, work.leaves)) if mode == "memory" else None


def providers(mode: str, case: Case, only: Sequence[str] | None) -> list[Provider]:
    """Those of the mode, or of them and torch.compile those named in ``only``."""
    chosen = list(PROVIDERS[mode])
    if mode == "train" and ((case.T, case.B, case.H) == COMPILED if only is None else "compile" in only):
        chosen.append(Provider("compile", 0.2))
    return chosen if only is None else [p for p in chosen if p.name in only or p.name in ("fastseq", "recompute")]


def _target(row: Row) -> Target | None:
    return TARGETS.get(Case.parse(row["case"], row["mode"]).shape)


def _ours(group: dict[str, Row]) -> list[Row]:
    return [row for label, row in group.items() if label.split()[0] == "fastseq"]


def _gates(row: Row) -> str:
    return f"binary, p={row['noise_probability']:g}" if row["gates"] == "binary" else "sigmoid"


def train(rows: list[Row]) -> Table:
    header = ["case", "gates", "fastseq ms", "nn.LSTM ms", "vs nn.LSTM", "target"]
    header += ["faster than loop", "target", "than compiled", "GFLOP/s", "of limit"]
    lines, stock, loop = [], [], []
    for case, group in by_case(rows).items():
        for row in _ours(group):
            p = f" p={row['noise_probability']:g}" if row["gates"] == "binary" else ""
            target = _target(row) if p else None
            line = [case, _gates(row), ms(row), ms(group.get("stock")), ratio(row, "stock")]
            line += [aim(row, "stock", target and target.train), times_faster(row, f"loop{p}")]
            line += [aim(row, f"loop{p}", target and target.loop, factor=True), times_faster(row, f"compile{p}")]
            lines.append([*line, f"{row.get('gflops', 0):.0f}", limit(row)])
            ratios = row.get("ratios", {})
            if p:
                stock += [(f"{case}{p}", ratios["stock"][0])] if "stock" in ratios else []
                loop += [(f"{case}{p}", ratios[f"loop{p}"][0])] if f"loop{p}" in ratios else []
    notes = [
        summary("binary gates, time over that of nn.LSTM", stock),
        summary("binary gates, time over that of the loop", loop),
        *met(lines),
        *failed(rows),
    ]
    return Table("Training step (forward and backward)", header, lines, notes)


def _rivals(rows: list[Row], title: str, unit: float, unit_name: str) -> Table:
    """fastseq against the fastest of the others."""
    rivals = ["stock", "onnxruntime", "openvino"]
    header = ["case", f"fastseq {unit_name}", "nn.LSTM", "ONNX Runtime", "OpenVINO"]
    header += ["vs nn.LSTM", "vs fastest", "which", "target", "GFLOP/s", "GB/s", "of limit"]
    lines, found = [], []
    for case, group in by_case(rows).items():
        timed = {name: group[name] for name in rivals if "ms" in group.get(name, {})}
        fastest = min(timed, key=lambda name: timed[name]["ms"]) if timed else "-"
        for row in _ours(group):
            times = [ms(r, unit) for r in (row, *map(group.get, rivals))]
            target = _target(row) if row["mode"] == "infer" else None
            line = [case, *times, ratio(row, "stock"), ratio(row, fastest), fastest]
            line.append(aim(row, fastest, target and target.infer))
            lines.append([*line, f"{row.get('gflops', 0):.0f}", f"{row.get('gb_s', 0):.0f}", limit(row)])
            if fastest in row.get("ratios", {}):
                found.append((case, row["ratios"][fastest][0]))
    notes = [summary("time over that of the fastest rival", found), *met(lines), *failed(rows)]
    return Table(title, header, lines, notes)


def infer(rows: list[Row]) -> Table:
    return _rivals(rows, "Inference", 1.0, "ms")


def stream(rows: list[Row]) -> Table:
    return _rivals(rows, "Streaming, one step per call", 1e3, "us")


def packed(rows: list[Row]) -> Table:
    header = ["case", "gates", "fastseq ms", "nn.LSTM ms", "vs nn.LSTM", "target", "GFLOP/s", "of limit"]
    lines = []
    for case, group in by_case(rows).items():
        for row in _ours(group):
            line = [case, _gates(row), ms(row), ms(group.get("stock")), ratio(row, "stock")]
            line += [aim(row, "stock", PACKED_TARGET), f"{row.get('gflops', 0):.0f}", limit(row)]
            lines.append(line)
    return Table(
        "Training step, PackedSequence with lengths drawn from 10 to T", header, lines, [*met(lines), *failed(rows)]
    )


def scaling(rows: list[Row]) -> Table:
    counts = sorted({row["threads"] for row in rows})
    by_threads = {count: by_case([r for r in rows if r["threads"] == count]) for count in counts}
    header = ["case"]
    for count in counts:
        header += [f"fastseq ms, {count} thread{'s'[: count > 1]}", "vs nn.LSTM", "of limit"]
    lines = []
    for case in by_case(rows):
        line = [case]
        for count in counts:
            for row in _ours(by_threads[count].get(case, {})):
                line += [ms(row), ratio(row, "stock"), limit(row)]
        lines.append(line)
    return Table("Scaling of the training step (binary gates, p=0.2)", header, lines, failed(rows))


def memory(rows: list[Row]) -> Table:
    header = ["case", "provider", "kept for backward MB", "peak MB", "ms", "vs nn.LSTM"]
    lines = [
        [row["case"], row["label"], f"{row['saved_mb']:.2f}", f"{row['peak_mb']:.2f}", ms(row), ratio(row, "stock")]
        for row in rows
        if "ms" in row
    ]
    return Table("Memory of the training step, inputs and weights not counted", header, lines, failed(rows))


TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "train": train,
    "infer": infer,
    "stream": stream,
    "packed": packed,
    "scaling": scaling,
    "memory": memory,
}

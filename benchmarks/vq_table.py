"""What is measured of vector quantization by default, the figures aimed at, and the tables printed from rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks import vq
from benchmarks.harness import ABSENT
from benchmarks.memory import of_call
from benchmarks.table import Row, Table, aim, by_case, failed, limit, met, ms, ratio, summary, times_faster
from benchmarks.vq_case import WORDS_D, Case, Provider, Work

THEIRS = "vector-quantize-pytorch"


class Target(NamedTuple):
    """What counts as met; None: nothing is aimed at."""

    lookup: dict[str, float]  # provider -> largest time relative to faiss
    layer: float  # largest time of the evaluated layer relative to vector-quantize-pytorch
    rate: float | None  # least rate of the lookup relative to that of torch's sgemm


TARGETS = {
    (4096, 512, 64): Target({"fastseq": 0.7}, 1 / 6, 1.0),
    (16384, 1024, 64): Target({"fastseq": 0.4}, 1 / 20, 1.1),
    (16384, 1024, 256): Target({"fastseq-plain": 0.9, "fastseq-screened": 0.75}, 1 / 8, 1.1),
    (65536, 8192, 64): Target({"fastseq": 0.35}, 1 / 40, 1.2),
    (32768, 1024, 8): Target({"fastseq": 0.6}, 1 / 200, None),
    (8192, 16384, 32): Target({"fastseq": 0.35}, 1 / 80, 1.1),
    (64, 1024, 64): Target({"fastseq": 1.0}, 1 / 5, None),
    (1, 1024, 64): Target({"fastseq-numpy": 1.0}, 1 / 5, None),
}
TRAIN_TARGET, PLAIN_TARGET, RESIDUAL_TARGET = 1 / 10, 1 / 2, 1 / 20
TRAINED = 4096  # least rows of a training step that is measured
FEW = 64  # most rows of a case that the numpy door is measured on, and not whether to screen
RESIDUAL, WORDS = (4096, 1024, 8, 8), (32000, 1024, WORDS_D, 1)
# torch.compile unrolls the loop over chunks: minutes of compilation beyond this, so by default it is no rival there
COMPILED = 1 << 26

PROVIDERS = {
    "lookup": tuple(vq.LOOKUPS),
    "words": tuple(vq.LOOKUPS),
    "eval": ("fastseq", THEIRS, "plain", "compile"),
    "train": ("fastseq", THEIRS, "plain", "compile"),
    "residual": ("fastseq", THEIRS),
}
SECONDS = {"lookup": 4.0, "words": 4.0, "eval": 6.0, "train": 10.0, "residual": 10.0}
QUICK = ("faiss", "cdist", "expanded", *vq.PRODUCTS, THEIRS, "plain")  # rivals that are ready at once
EXAMPLE = "N4096_K512_D64"


def cases(mode: str, names: Sequence[str] | None = None) -> list[Case]:
    """Those of the mode, or of these names those that are for this mode.

    Raises:
        ValueError: a name that is none.
    """
    kinds = ("eval", "train") if mode == "residual" else (mode,)
    if names is not None:
        found = [Case.parse(name, kind) for name in names for kind in kinds]
        levels = [case for case in found if (case.M > 1) == (mode == "residual")]
        return [case for case in levels if mode != "words" or case.D == WORDS_D]
    if mode == "residual":
        return [Case(*RESIDUAL, kind) for kind in kinds]
    if mode == "words":
        return [Case(*WORDS, mode)]
    return [Case(*shape, 1, mode) for shape in TARGETS if mode != "train" or shape[0] >= TRAINED]


def providers(mode: str, case: Case, only: Sequence[str] | None) -> list[Provider]:
    """Those of the mode, or of its rivals those named in ``only``."""
    names = [name for name in PROVIDERS[mode] if only is None or name in only or name in vq.OURS]
    if only is None and case.N * case.K > COMPILED:
        names = [name for name in names if name != "compile"]
    others = ("fastseq-numpy",) if case.N > FEW else ("fastseq-plain", "fastseq-screened")
    names = [name for name in names if name not in others]
    return [Provider(name, rotation) for rotation in ((False, True) if case.trains else (False,)) for name in names]


def thread_counts(mode: str, count: int) -> list[int]:
    return [count]


def memory_of(mode: str) -> Callable[[Work], dict[str, float]]:
    """What the rows of the mode say about memory."""
    return lambda work: of_call(work.run)


def _target(row: Row) -> Target | None:
    return TARGETS.get(Case.parse(row["case"], row["mode"]).shape)


def _ours(group: dict[str, Row]) -> list[Row]:
    """Our rows, without those of a path that this case or machine does not have."""
    rows = [row for label, row in group.items() if label.startswith("fastseq")]
    return [row for row in rows if not row["gate"].startswith(ABSENT)]


def _ms_mb(row: Row | None) -> str:
    """Milliseconds, and megabytes at the peak: see MEMORY."""
    if row is None or "ms" not in row:
        return ms(row)
    return f"{ms(row)} / {max(row['allocated_mb'], row.get('resident_mb', 0)):.3g}"


MEMORY = (
    "MB: the most memory that the call needs beside its arguments, results included; what torch's allocator handed "
    "out, or the growth of the process, whichever is more"
)


def _notes(rows: list[Row], lines: list[list[str]]) -> list[str]:
    return [*met(lines), MEMORY, *failed(rows)]


def _rate(row: Row, label: str) -> tuple[float, float, float] | None:
    """Our operations per second over those of ``label``: median, low, high."""
    if label not in row.get("ratios", {}):
        return None
    case = Case.parse(row["case"], row["mode"])
    share = case.flops / vq.flops(case, Provider(label))
    median, low, high = (share / value for value in row["ratios"][label])
    return median, high, low


def _rate_cell(row: Row, label: str) -> str:
    found = _rate(row, label)
    return "-" if found is None else "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def _rate_aim(row: Row, target: Target | None) -> str:
    """Whether the path that users get reaches the rate."""
    found = _rate(row, "square")
    if found is None or target is None or target.rate is None or row["label"] != "fastseq":
        return "-"
    return f"{target.rate:.1f} {'met' if found[0] >= target.rate else 'missed'}"


def _lookups(rows: list[Row], title: str) -> Table:
    header = ["case", "path", "ms / MB", "faiss", "cdist", "expanded", "vs faiss", "target"]
    header += ["of sgemm rate", "target", "of x @ c.T", "GFLOP/s", "of limit", "not float64's", "left open"]
    lines, found = [], []
    for case, group in by_case(rows).items():
        for row in _ours(group):
            target = _target(row) if row["table"] == "lookup" else None
            line = [case, row["label"], *(_ms_mb(r) for r in (row, *map(group.get, ("faiss", "cdist", "expanded"))))]
            line += [ratio(row, "faiss"), aim(row, "faiss", target and target.lookup.get(row["label"]))]
            line += [_rate_cell(row, "square"), _rate_aim(row, target), _rate_cell(row, "sgemm")]
            line += [f"{row.get('gflops', 0):.3g}", limit(row), str(row.get("not_nearest", "-"))]
            lines.append([*line, f"{row['open_rows']:.2%}" if "open_rows" in row else "-"])
            if "faiss" in row.get("ratios", {}):
                found.append((f"{case} {row['label']}", row["ratios"]["faiss"][0]))
    notes = [
        summary("time over that of faiss", found),
        f"of sgemm rate: operations per second over those of torch's product of two {vq.SQUARE} x {vq.SQUARE} "
        "matrices; of x @ c.T: over those of the product of rows and codes alone",
        "not float64's: rows whose code is not the nearest in float64, all within the rounding of float32 scores",
        "left open: rows that the 8-bit screen alone does not decide; fastseq chooses between screened and plain",
        *_notes(rows, lines),
    ]
    return Table(title, header, lines, notes)


def lookup(rows: list[Row]) -> Table:
    return _lookups(rows, "Lookup: the index of the nearest code")


def words(rows: list[Row]) -> Table:
    return _lookups(rows, "Lookup of word embeddings (wordllama), codes from k-means")


def _layers(rows: list[Row], title: str, aims: Callable[[Row], tuple[float | None, float | None]]) -> Table:
    """fastseq against the other layers; ``aims``: largest times relative to THEIRS and to the plain layer."""
    trains = any(row["mode"] == "train" for row in rows)
    header = ["case", *(["gradient"] if trains else []), "fastseq ms / MB", THEIRS, "plain", "compiled"]
    header += [f"faster than {THEIRS}", "target", "than plain", "target", "than compiled", "target"]
    header += ["GFLOP/s", "of limit"]
    lines, found = [], []
    for case, group in by_case(rows).items():
        for row in _ours(group):
            end = " rotation" if row["rotation"] else ""
            theirs, plain, compiled = (f"{name}{end}" for name in (THEIRS, "plain", "compile"))
            line = [case, *([end.strip() or "straight"] if trains else [])]
            line += [_ms_mb(r) for r in (row, *map(group.get, (theirs, plain, compiled)))]
            for label, target in zip((theirs, plain, compiled), (aims(row) + aims(row)[1:]), strict=True):
                line += [times_faster(row, label), aim(row, label, target, factor=True)]
            lines.append([*line, f"{row.get('gflops', 0):.3g}", limit(row)])
            if theirs in row.get("ratios", {}):
                found.append((f"{case}{end}", row["ratios"][theirs][0]))
    return Table(title, header, lines, [summary(f"time over that of {THEIRS}", found), *_notes(rows, lines)])


def evaluation(rows: list[Row]) -> Table:
    def aims(row: Row) -> tuple[float | None, float | None]:
        target = _target(row)
        return target and target.layer, None

    return _layers(rows, "Layer, evaluation", aims)


def train(rows: list[Row]) -> Table:
    def aims(row: Row) -> tuple[float | None, float | None]:
        return (TRAIN_TARGET, PLAIN_TARGET) if _target(row) else (None, None)

    return _layers(rows, "Layer, training step (forward, backward, moving averages)", aims)


def residual(rows: list[Row]) -> Table:
    header = ["case", "step", "gradient", "fastseq ms / MB", THEIRS, "faster", "target", "GFLOP/s", "of limit"]
    lines = []
    for mode in ("eval", "train"):
        for case, group in by_case([row for row in rows if row["mode"] == mode]).items():
            for row in _ours(group):
                end = " rotation" if row["rotation"] else ""
                gradient = (end.strip() or "straight") if mode == "train" else "-"
                line = [case, mode, gradient, _ms_mb(row), _ms_mb(group.get(f"{THEIRS}{end}"))]
                target = RESIDUAL_TARGET if Case.parse(case, mode)[:4] == RESIDUAL else None
                line += [times_faster(row, f"{THEIRS}{end}"), aim(row, f"{THEIRS}{end}", target, factor=True)]
                lines.append([*line, f"{row.get('gflops', 0):.3g}", limit(row)])
    return Table("Residual quantizer (M levels, projected to D and back)", header, lines, _notes(rows, lines))


TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "lookup": lookup,
    "words": words,
    "eval": evaluation,
    "train": train,
    "residual": residual,
}

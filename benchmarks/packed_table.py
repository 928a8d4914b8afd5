"""What is measured of packed weights by default, the figures aimed at, and the tables that are printed from rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks.packed_case import FORMS, Case, Provider, Work
from benchmarks.table import Row, Table, aim, by_case, failed, limit, met, ms, ratio, summary, times_faster

ORT = "onnxruntime int8"
# largest time of int8 relative to ONNX Runtime's int8
TARGETS = {
    (100, 1, 128): 0.6,
    (100, 1, 256): 0.6,
    (100, 1, 512): 0.6,
    (50, 1, 1024): 0.75,
    (50, 8, 512): 0.8,
    (50, 32, 256): 0.95,
    (50, 32, 512): 0.95,
    (35, 64, 1024): 0.95,
}
# form -> against which, and the largest time relative to that
FORM_TARGETS = {
    "int4": ("fastseq int8", 1.0),
    "int4 by 32": ("fastseq int8", 1.0),
    "rank H/8": ("fastseq float32", 1 / 3),
}
STREAM_TARGET = 0.3

SHAPES = {"int8": list(TARGETS), "forms": [(100, 1, 1024)], "stream": [(1, 1, 256)]}
PAIRS = {
    "int8": {
        "fastseq": ("int8", "bfloat16", "float32"),
        "onnxruntime": ("int8", "float32"),
        "openvino": ("float32",),
        "torch": ("int8", "float32"),
    },
    "forms": {"fastseq": tuple(FORMS), "onnxruntime": ("int8", "float32")},
    "stream": {
        "fastseq": ("int8", "float32"),
        "onnxruntime": ("int8", "float32"),
        "openvino": ("float32",),
        "torch": ("int8", "float32"),
    },
}
SECONDS = {"int8": 4.0, "forms": 4.0, "stream": 2.0}
QUICK = None  # all rivals are ready at once
EXAMPLE = "T100_B1_H128"


def cases(mode: str, names: Sequence[str] | None = None) -> list[Case]:
    """Those of the mode, or of these names those that are for this mode.

    Raises:
        ValueError: a name that is none.
    """
    if names is None:
        return [Case(*shape, mode) for shape in SHAPES[mode]]
    found = [Case.parse(name, mode) for name in names]
    if mode == "stream":
        found = [case._replace(T=1, B=1) for case in found]
    return list(dict.fromkeys(found))


def thread_counts(mode: str, count: int) -> list[int]:
    """Both tables of the layers are of one thread and of ``count``; steps of one row are the work of one."""
    return sorted({1, count}) if mode in ("int8", "forms", "dksplit") else [1]


def memory_of(mode: str) -> Callable[[Work], dict[str, float]] | None:
    """Nothing."""
    return None


def providers(mode: str, case: Case, only: Sequence[str] | None) -> list[Provider]:
    """Those of the mode, or of its rivals those named in ``only``."""
    chosen = [Provider(name, form) for name, forms in PAIRS[mode].items() for form in forms]
    return [p for p in chosen if only is None or p.name in only or p.name == "fastseq"]


def _groups(rows: list[Row]) -> Iterator[tuple[str, str, dict[str, Row]]]:
    """case, threads, label -> row."""
    for case in by_case(rows):
        for count in sorted({row["threads"] for row in rows if row["case"] == case}):
            yield case, str(count), by_case([row for row in rows if row["threads"] == count])[case]


def _fastest(group: dict[str, Row]) -> str:
    timed = {label: row["ms"] for label, row in group.items() if "ms" in row and not label.startswith("fastseq")}
    return min(timed, key=lambda label: timed[label]) if timed else "-"


def _db(row: Row | None) -> str:
    return f"{row['snr_db']:.1f}" if row and "snr_db" in row else "-"


SNR = (
    "dB: output against the layer with float32 weights computed in float64; where a rival's int8 stands, "
    "ONNX Runtime's is quantize_dynamic with a scale for each row, torch's is quantize_dynamic (deprecated, engine x86)"
)


def int8(rows: list[Row]) -> Table:
    rivals = [ORT, "onnxruntime float32", "openvino float32", "torch int8", "torch float32"]
    names = ["ORT int8", "ORT float32", "OpenVINO float32", "torch int8", "torch float32"]
    header = ["case", "threads", "fastseq int8 ms", "bfloat16", "float32", *names]
    header += ["vs ORT int8", "target", "vs fastest", "which"]
    header += ["dB: fastseq int8", "ORT int8", "torch int8", "GB/s", "of limit"]
    lines, found = [], []
    for case, count, group in _groups(rows):
        row = group["fastseq int8"]
        own = [ms(group.get(f"fastseq {form}")) for form in ("int8", "bfloat16", "float32")]
        fastest = _fastest(group)
        target = TARGETS.get(Case.parse(case, "int8").shape)
        line = [case, count, *own, *(ms(group.get(label)) for label in rivals), ratio(row, ORT), aim(row, ORT, target)]
        line += [ratio(row, fastest), fastest, _db(row), _db(group.get(ORT)), _db(group.get("torch int8"))]
        lines.append([*line, f"{row.get('gb_s', 0):.1f}", limit(row)])
        if ORT in row.get("ratios", {}):
            found.append((f"{case}, {count} threads", row["ratios"][ORT][0]))
    notes = [summary("int8, time over that of ONNX Runtime's int8", found), *met(lines), SNR, LIMIT, *failed(rows)]
    return Table("One layer in 8 bits, the whole sequence in a call", header, lines, notes)


LIMIT = (
    "of limit: of the rate of float32 fused multiply-adds, or of reading as many bytes as the recurrent weights have"
)


def forms(rows: list[Row]) -> Table:
    header = ["case", "threads", "fastseq", "ms", "vs int8", "vs float32", "target", "vs ORT int8", "dB", "GB/s"]
    lines = []
    for case, count, group in _groups(rows):
        for form in FORMS:
            row = group.get(f"fastseq {form}")
            if row is None:
                continue
            against, target = FORM_TARGETS.get(form, (None, None))
            line = [case, count, form, ms(row), ratio(row, "fastseq int8"), times_faster(row, "fastseq float32")]
            line += [aim(row, against, target, factor=against == "fastseq float32"), ratio(row, ORT), _db(row)]
            lines.append([*line, f"{row.get('gb_s', 0):.1f}"])
        for label in (ORT, "onnxruntime float32"):
            row = group.get(label)
            lines.append([case, count, f"({label})", ms(row), "-", "-", "-", "-", _db(row), "-"])
    notes = [
        *met(lines),
        "vs float32: how many times as fast; the targets are to be faster than int8 (int4) and 3 times as fast as "
        "float32 (rank)",
        SNR,
        *failed(rows),
    ]
    return Table("One layer in every form of its weights", header, lines, notes)


def stream(rows: list[Row]) -> Table:
    labels = ["fastseq int8", "fastseq float32", ORT, "onnxruntime float32", "openvino float32"]
    labels += ["torch int8", "torch float32"]
    header = ["case", *(f"{label} us" for label in labels)]
    header += ["int8 vs ORT int8", "target", "float32 vs ORT float32", "vs fastest", "which", "dB: int8", "ORT int8"]
    lines = []
    for case, _, group in _groups(rows):
        row, plain, fastest = group["fastseq int8"], group["fastseq float32"], _fastest(group)
        line = [case, *(ms(group.get(label), 1e3) for label in labels), ratio(row, ORT), aim(row, ORT, STREAM_TARGET)]
        line += [ratio(plain, "onnxruntime float32"), ratio(row, fastest), fastest, _db(row), _db(group.get(ORT))]
        lines.append(line)
    notes = [
        *met(lines),
        "one thread; each call gets numpy arrays (torch: tensors) and returns them, the rivals' states go through "
        "Python from call to call",
        SNR,
        *failed(rows),
    ]
    return Table("Streaming from Python, one step per call", header, lines, notes)


TABLES: dict[str, Callable[[list[Row]], Table]] = {"int8": int8, "forms": forms, "stream": stream}

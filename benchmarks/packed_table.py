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
# largest time of the product's model relative to ONNX Runtime's of its network, and its exact mode's to ours
PRODUCT_H = 384
PRODUCT_TARGETS = {
    (16, 1, PRODUCT_H): 0.6,
    (24, 16, PRODUCT_H): 0.8,
    (24, 64, PRODUCT_H): 0.8,
    (24, 256, PRODUCT_H): 0.8,
}
EXACT_TARGET = 1 / 3
FORM_CASES = ("T100_B1_H1024",)
STREAM_TARGET = 0.3

RATE = 48_000  # steps a second of sound
SHAPES = {
    "int8": list(TARGETS),
    "forms": [(100, 1, 1024)],
    "stream": [(1, 1, 256)],
    "cabi": [(RATE, 1, H) for H in (16, 24, 40, 64)],
    "load": [(4, 1, 64)],
    "dksplit": list(PRODUCT_TARGETS),
}
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
    "cabi": {name: ("int8", "float32") for name in ("fastseq", "onnxruntime", "ncnn")},
    "load": {name: ("float32",) for name in ("fastseq", "onnxruntime", "openvino", "torch")},
    "dksplit": {
        "fastseq": ("labels", "words"),
        "onnxruntime": ("batch", "row by row"),
        "dksplit": ("exact=True", "exact=False"),
    },
}
SECONDS = {"int8": 4.0, "forms": 4.0, "stream": 2.0, "cabi": 10.0, "load": 30.0, "dksplit": 6.0}
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
    if mode == "dksplit":
        found = [case._replace(H=PRODUCT_H) for case in found]
    if mode == "cabi":
        found = [case for case in found if case.B == 1]
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
            against, target = FORM_TARGETS.get(form, (None, None)) if case in FORM_CASES else (None, None)
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


def cabi(rows: list[Row]) -> Table:
    header = ["case", "runtime", "from", "us a step", "p50", "p99", f"of real time at {RATE // 1000} kHz"]
    header += ["fastseq int8 over it", "fastseq float32 over it", "dB"]
    lines = []
    for case, _, group in _groups(rows):
        for label, row in group.items():
            if "ms" not in row:
                continue
            quantiles = [f"{row[key]:.3g}" for key in ("p50_us", "p99_us")]
            line = [case, label, "C" if label.startswith("fastseq") else "Python", ms(row, 1e3), *quantiles]
            line.append(f"{row['ms'] / 1e3 * RATE:.4f}")
            line += [ratio(group.get(f"fastseq {form}", {}), label) for form in ("int8", "float32")]
            lines.append([*line, _db(row)])
    loads = [row["load_ms"] for row in rows if "load_ms" in row]
    notes = [
        "of real time: what the steps of a second take; below 1 a stream keeps up",
        "fastseq: a C program over the C ABI (benchmarks/packed_stream.c); the others are "
        "called from Python, ONNX Runtime through IO binding, ncnn by an extractor for each step",
        f"the program loads a model in {max(loads):.2g} ms" if loads else "the program was not run",
        "one thread; each step is timed on its own, with the clock's some 25 ns (Python: 60 ns) in it",
        *failed(rows),
    ]
    return Table("Streaming from C, one step per call", header, lines, notes)


def load(rows: list[Row]) -> Table:
    header = ["runtime", "ms to the first result", "numpy", "import", "load", "first result", "without numpy"]
    header += ["fastseq over it", "MB on disk", "MB in memory"]
    lines = []
    for _, _, group in _groups(rows):
        for label, row in group.items():
            if "ms" not in row:
                continue
            parts = [row[f"{part}_ms"] for part in ("numpy", "import", "load", "first")]
            line = [label.split()[0], ms(row), *(f"{part:.3g}" for part in parts), f"{row['ms'] - parts[0]:.3g}"]
            line += [ratio(group["fastseq float32"], label), f"{row['disk_mb']:.1f}", f"{row['resident_mb']:.0f}"]
            lines.append(line)
    first = Case.parse(rows[0]["case"], "load")
    notes = [
        f"a fresh process: numpy, then the runtime are imported, a float32 LSTM of {first.H} units is loaded and run "
        f"on {first.T} steps; Python's own start is not in it",
        "MB on disk: the package with its own libraries, without numpy and whatever else it needs; fastseq: without "
        "what its build with torch adds. MB in memory: the most that the process had",
        *(
            f"{row['library_mb']:.1f} MB of ours are libfastseq.so, all that C needs"
            for row in rows
            if "library_mb" in row
        ),
        *failed(rows),
    ]
    return Table("Start of a process, and size of the runtime", header, lines, notes)


def dksplit(rows: list[Row]) -> Table:
    header = ["rows, letters", "threads", "labels ms", "ORT batch", "ORT row by row", "vs ORT batch", "target"]
    header += ["vs row by row", "words ms", "names/s", "exact mode", "faster than exact mode", "target"]
    header += ["than exact=False", "equal to exact: ours", "exact=False"]
    lines, found = [], []
    for case, count, group in _groups(rows):
        T, B, _ = shape = Case.parse(case, "dksplit").shape
        labels, words = group["fastseq labels"], group["fastseq words"]
        batch, alone, exact = "onnxruntime batch", "onnxruntime row by row", "dksplit exact=True"
        others = [ms(group.get(label)) for label in (batch, alone)]
        line = [f"{B}, {T}", count, ms(labels), *others, ratio(labels, batch)]
        line += [aim(labels, batch, PRODUCT_TARGETS.get(shape)), ratio(labels, alone), ms(words)]
        line += [_names(words, B), _names(group.get(exact), B), times_faster(words, exact)]
        line += [aim(words, exact, EXACT_TARGET if B > 1 else None, factor=True)]
        line += [times_faster(words, "dksplit exact=False"), _share(words), _share(group.get("dksplit exact=False"))]
        lines.append(line)
        if batch in labels.get("ratios", {}):
            found.append((f"{B}, {T}, {count} threads", labels["ratios"][batch][0]))
    notes = [
        summary("time over that of ONNX Runtime's batch", found),
        *met(lines),
        "labels: letters to labels, the Viterbi path in it; ORT: the network of the package's own int8 file alone, of "
        "which the package finds the path in numpy; row by row is what its exact mode does",
        "words: names to words, by either; every row of ours is the same alone and in the batch, to the bit",
        *failed(rows),
    ]
    return Table("DKSplit 1.0: three bidirectional LSTM layers of 8 bits", header, lines, notes)


def _names(row: Row | None, count: int) -> str:
    return f"{1e3 * count / row['ms']:,.0f}" if row and "ms" in row else "-"


def _share(row: Row | None) -> str:
    return f"{row['equal'] * row['names']:.0f} of {row['names']}" if row and "equal" in row else "-"


TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "int8": int8,
    "forms": forms,
    "stream": stream,
    "cabi": cabi,
    "load": load,
    "dksplit": dksplit,
}

"""Tables in the pages, drawn from the rows in ``benchmarks/results``.

``python -m docs.tables`` writes what stands between two marks of a page, such as <!-- rows:legw --> and
<!-- /rows:legw -->; the tests compare. Nothing in between is typed by hand.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import adt_table, harness, legw_table, mimo_quality_table, quality_table, run, table, tawt_table
from benchmarks.gpu import tables as gpu_tables
from benchmarks.table import Row, Table

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"<!-- ((?:rows|bench):[\w-]+) -->\n.*?<!-- /\1 -->", re.S)

EPYC = "amd-epyc-family-25-model-1-2-cores"
XEON = "intel-r-xeon-r-processor-family-6-model-207-2-cores"
MACHINES = {"lstm": EPYC, "vq": XEON, "packed": XEON, "mimo": XEON}  # whose rows the pages show


def rows(name: str) -> list[Row]:
    """Of a file in ``benchmarks/results``; in the order of their runs.

    Raises:
        FileNotFoundError: there is no such file, or it is empty.
    """
    found = harness.read(harness.RESULTS / f"{name}.jsonl")
    if not found:
        raise FileNotFoundError(f"benchmarks/results/{name}.jsonl has no rows")
    return found


def newest(op: str, part: str) -> list[Row]:
    """The rows of one table of an operator, of its last run on the machine that the pages show."""
    mine = [row for row in rows(MACHINES[op]) if (row["op"], row["table"]) == (op, part)]
    last = max(row["run"] for row in mine)
    return [row for row in mine if row["run"] == last]


def commit(row: Row) -> str:
    """And whether something was not committed yet, as the settings of an experiment."""
    return f"`{row['commit']}`" + ("" if row["clean"] else " with changes")


def measured(found: list[Row]) -> str:
    """On what the rows were measured."""
    devices, commits, days = (
        ", ".join(dict.fromkeys(values))
        for values in zip(*((r["device"], commit(r), r["run"][:10]) for r in found), strict=True)
    )
    return f"Measured on {devices}, torch {found[0]['torch']}, commit {commits}, {days}."


def drawn(found: list[Row], tables: list[Table]) -> str:
    return "\n\n".join([*(table.markdown(one) for one in tables), measured(found)])


def legw() -> str:
    found = rows("legw")
    return drawn(found, legw_table.tables(found))


def tawt() -> str:
    found = rows("tawt")
    return drawn(found, tawt_table.tables(found))


def adt() -> str:
    found = rows("adt")
    return drawn(found, adt_table.tables(found))


def mimo_quality() -> str:
    found = rows("mimo_quality")
    return drawn(found, mimo_quality_table.tables(found))


def g2lstm() -> str:
    """Of both tasks what compression costs, then what gates of exactly 0 and 1 do."""
    found = rows("quality")
    tasks = [[row for row in found if row["task"] == task] for task in dict.fromkeys(row["task"] for row in found)]
    with_hard = [mine for mine in tasks if any(row["way"] == quality_table.HARD for row in mine)]
    tables = [quality_table.compressed(mine) for mine in tasks] + [quality_table.hard(mine) for mine in with_hard]
    return drawn(found, tables)


def speech() -> str:
    """Of each recipe and size of the codebook, one run."""
    found = rows("vq_speech")
    header = ["codebook", "K", "used", "perplexity", "error, dB", "language from one code %", "ms a step"]
    lines = [
        [
            *(row["recipe"], f"{row['K']:,}", f"{row['used']:,}", f"{row['perplexity']:,.0f}", f"{row['error']:.2f}"),
            *(f"{100 * row['language_of_code']:.0f}", f"{row['ms_per_step']:.1f}"),
        ]
        for row in found
    ]
    one, seeds = found[0], len({row["seed"] for row in found})
    note = f"{one['steps']} steps, {seeds} seed{'s'[: seeds > 1]}; {len(one['languages'])} languages, held-out speech"
    return drawn(found, [Table("Codebooks on frames of speech", header, lines, [note])])


def scaling() -> str:
    """Two processes beside one."""
    found = list({row["case"]: row for row in rows("scaling")}.values())
    header = ["case", "ms, one process", "two", "in all-reduce", "efficiency, by the clock", "by processor time"]
    lines = [
        [
            row["case"],
            *(f"{row[name]:.3g}" for name in ("ms_one", "ms_two", "ms_all_reduce")),
            *(f"{row[name]:.2f}" for name in ("efficiency", "cpu_efficiency")),
        ]
        for row in found
    ]
    loads = " and ".join(f"{row['load']:.1f}" for row in found)
    note = f"{found[0]['rounds']} rounds; the machine's load was {loads} on two cores, so these are lower bounds"
    return drawn(
        found, [Table("A training step on two processes, and with half the rows on one", header, lines, [note])]
    )


def projection() -> str:
    """What all-reduces of an LSTM would take beside its step on an H100: a calculation, of one measured time."""
    H, T, inside, beyond, turn = 1024, 1024, 450e9, 50e9, 10e-6  # bytes a second within 8 GPUs and between; seconds
    (row,) = (
        r
        for r in gpu_tables.newest(harness.RESULTS)
        if (r.get("table"), r["case"], r.get("mode"), r.get("label")) == ("lstm", f"T{T}_B16_H{H}", "train", "fastseq")
    )
    step, gradients = T * row["us_per_step"] * 1e-6, 4 * 4 * H * (2 * H + 2)
    lines = []
    for N in (8, 64, 1024):
        reduce = 2 * (N - 1) / N * gradients / (inside if N <= 8 else beyond) + 2 * math.log2(N) * turn
        lines.append([f"{N:,}", f"{1e3 * reduce:.2g}", f"{step / (step + reduce):.2f}"])
    note = f"a step of {1e3 * step:.1f} ms ({row['dtype']}, T = {T}), {gradients / 1e6:.0f} MB of gradients"
    source = f"The step was measured on {row['device']}, torch {row['torch']}, commit `{row['commit']}`."
    drawn_table = table.markdown(Table("Computed", ["GPUs", "ms in all-reduces", "efficiency"], lines, [note]))
    return f"{drawn_table}\n\n{source}"


def silero() -> str:
    """Silero VAD, deployed in fewer bits."""
    found = [row for row in rows("products") if row["product"] == "silero"]
    forms = {form: [row for row in found if row["form"] == form] for form in dict.fromkeys(r["form"] for r in found)}
    frames = sum(row["frames"] for row in forms["float32"])
    lines = [
        [
            *(form, f"{mine[0]['bytes'] / forms['float32'][0]['bytes']:.0%}"),
            f"{1 - sum(row['decisions_that_differ'] for row in mine) / sum(row['frames'] for row in mine):.3%}",
            f"{max(row['largest_difference'] for row in mine):.2g}",
            "yes" if all(row["within_limits"] for row in mine) else "no",
        ]
        for form, mine in forms.items()
    ]
    header = ["weights", "bytes", "decisions as the package's", "largest difference", "within 0.02"]
    note = (
        f"{frames:,} frames of {sum(row['recordings'] for row in forms['float32']):,} recordings; {found[0]['package']}"
    )
    return drawn(found, [Table("Silero VAD through compress and deploy", header, lines, [note])])


def bench(op: str) -> Callable[[], str]:
    """The tables of ``python -m benchmarks.run op``."""
    return lambda: run.markdown(op, harness.RESULTS / f"{MACHINES[op]}.jsonl")


def gpu() -> str:
    return "\n\n".join(gpu_tables.brief(gpu_tables.newest(harness.RESULTS), "benchmarks/results/gpu.md"))


def persist_trials() -> str:
    """How the persistent kernels came to their present form, and where a step goes."""
    found = rows("h100-trials")
    loops = [r for r in found if r["table"] == "persist loop" and (r["dtype"], r["mode"]) == ("bfloat16", "forward")]
    forms = list(dict.fromkeys(r["variant"] for r in loops))
    lines = []
    for B, H in itertools.product((1, 16), (256, 512, 1024, 2048)):
        mine = [r for r in loops if r["case"] == f"T1024_B{B}_H{H}"]
        steps = [[r["us_per_step"] for r in mine if r["variant"] == form] for form in forms]
        lines.append([f"B{B}_H{H}", *(f"{min(step):.2f}" if step else "-" for step in steps)])
    told = "; ".join(f"{n}: {form}" for n, form in enumerate(forms, 1))
    tried = Table(
        "The loop alone, us a step by its fastest tile", ["case", *map(str, range(1, len(forms) + 1))], lines, [told]
    )
    phases = [r for r in found if r["table"] == "cycles of a step by phase" and r["mode"] == "forward"]
    names = [name for name, _ in phases[0]["phases"]]
    lines = []
    for r in phases:
        spent = dict(r["phases"])
        blocks = "cluster" if r["cluster"] else "grid"
        lines.append([r["case"], f"{r['tile']}, {blocks}", *(str(spent.get(name, "-")) for name in names)])
    note = "of the second form, before its code was made shorter, in a build that looks at the clock"
    clocked = Table("Cycles of a step", ["case", "tile", *names], lines, [note])
    moved = [r for r in found if r["table"] == "gather of a projection"]
    (copy,) = (r for r in gpu_tables.newest(harness.RESULTS) if r.get("case") == "memory copy")
    lines = [[r["variant"].strip("_"), f"{r['us']:.0f}", f"{r['gbs']:.0f}"] for r in moved]
    lines.append(["a copy", "-", f"{copy['value']:.0f}"])
    mimo = Table(
        "A first layer of MIMO in Triton, beside its product", ["kernel", "us", "GB/s"], lines, [moved[0]["case"]]
    )
    one = found[-1]
    source = f"Measured on {one['device']}, torch {one['torch']}, Triton {one['triton']}, {one['date']}."
    return "\n\n".join([*(table.markdown(t) for t in (tried, clocked, mimo)), source])


def spread(ratios: list[float]) -> str:
    """From the best to the worst, and the geometric mean."""
    low, high = min(ratios), max(ratios)
    ends = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"
    return f"{ends}, geometric mean {statistics.geometric_mean(ratios):.2g}"


def ratios_of(op: str, part: str, ours: str, theirs: str) -> list[float]:
    """Our time over theirs, of every case where both were timed."""
    found = newest(op, part)
    return [r["ratios"][theirs][0] for r in found if r["label"] == ours and theirs in r.get("ratios", {})]


def headline() -> str:
    """The README's table: what is compared, in how many cases, and our time over theirs."""
    compared = [
        ("LSTM with binary gates, training step", "`nn.LSTM`", "lstm", "train", "fastseq p=0.2", "stock"),
        ("the same", "binary gates in a loop over steps", "lstm", "train", "fastseq p=0.2", "loop p=0.2"),
        ("LSTM, inference", "`nn.LSTM`", "lstm", "infer", "fastseq", "stock"),
        ("the same", "ONNX Runtime", "lstm", "infer", "fastseq", "onnxruntime"),
        ("packed sequences, training step", "`nn.LSTM`", "lstm", "packed", "fastseq", "stock"),
        ("lookup of the nearest code", "faiss", "vq", "lookup", "fastseq", "faiss"),
        ("`ensemble_stats`", "plain torch", "mimo", "stats", "fastseq", "eager"),
        ("folded MIMO-LSTM, prediction", "an ensemble of as many", "mimo", "infer", "fastseq", "ensemble"),
    ]
    lines, shown = [], []
    for what, against, op, part, ours, theirs in compared:
        found = ratios_of(op, part, ours, theirs)
        machine, commit = (newest(op, part)[0][name] for name in ("device", "commit"))
        shown.append(machine)
        lines.append([what, against, str(len(found)), spread(found), f"{machine.split(' (')[0]}, `{commit[:7]}`"])
    on_gpu = [
        ("LSTM in bfloat16, training and inference, Triton", "cuDNN in bfloat16", "lstm", "fastseq", "stock"),
        ("the same, weights kept on the chip", "cuDNN in bfloat16", "persist", "fastseq persist", "stock"),
        ("the same", "cuDNN in float16", "persist", "fastseq persist", "stock float16"),
    ]
    measured = gpu_tables.newest(harness.RESULTS)
    for what, against, part, ours, theirs in on_gpu:
        steps = [row for row in measured if row.get("table") == part and row["label"] == ours]
        found = [row["ratios"][theirs][0] for row in steps if theirs in row.get("ratios", {})]
        where = f"{steps[0]['device']}, `{steps[0]['commit'][:7]}`"
        lines.append([what, against, str(len(found)), spread(found), where])
    header = ["what", "against", "cases", "our time over theirs", "device, commit"]
    return table.markdown(Table("Less than 1 is faster", header, lines, []))


PIECES: dict[str, Callable[[], str]] = {
    **{f"bench:{op}": bench(op) for op in MACHINES},
    "bench:gpu": gpu,
    "rows:persist_trials": persist_trials,
    "rows:headline": headline,
    "rows:g2lstm": g2lstm,
    "rows:legw": legw,
    "rows:tawt": tawt,
    "rows:adt": adt,
    "rows:mimo": mimo_quality,
    "rows:speech": speech,
    "rows:scaling": scaling,
    "rows:projection": projection,
    "rows:silero": silero,
}


def pages() -> list[Path]:
    """All that users read: the README and the pages."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def marks(text: str) -> Iterator[tuple[str, str]]:
    """The names of the marks of a page, and what is written there from the first mark to the last."""
    for found in MARKED.finditer(text):
        yield found[1], found[0]


def block(name: str) -> str:
    """What belongs there, marks included."""
    return f"<!-- {name} -->\n\n{PIECES[name]()}\n\n<!-- /{name} -->"


def main() -> None:
    for page in pages():
        text = page.read_text()
        for name, old in marks(text):
            text = text.replace(old, block(name))
        page.write_text(text)


if __name__ == "__main__":
    main()

"""What is measured of MIMO by default, the figures aimed at, and the tables printed from rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.memory import of_call
from benchmarks.mimo_case import Case, Provider, Work
from benchmarks.table import Row, Table, aim, by_case, failed, limit, met, ms, ratio

SHAPES = {
    "stats": ["N512_M4_K100", "N512_M4_K1000", "N512_M4_K10000"],
    "nll": ["N512_M4_K100", "N512_M4_K1000", "N512_M4_K10000"],
    "project": ["T50_B32_M3_R4_C300_H256", "T50_B32_M3_R2_C300_H256", "T50_B32_M3_R1_C300_H256"],
    "train": ["T50_B32_M3_R4_C300_H256", "T50_B32_M3_R1_C300_H256"],
    "infer": ["T50_B32_M3_R1_C300_H256", "T100_B1_M3_R1_C300_H256", "T50_B32_M3_R1_C64_H256"],
}
PROVIDERS = {
    "stats": ("fastseq", "eager", "compile"),
    "nll": ("fastseq", "eager", "compile"),
    "project": ("fastseq", "gathered", "eager"),
    "train": ("fastseq", "plain", "tiled", "eager"),
    "infer": ("fastseq", "plain", "ensemble", "tiled", "stock", "eager"),
}
# largest times relative to a rival
AIMS: dict[str, dict[str, float]] = {
    "stats": {"compile": 1 / 2, "eager": 1 / 5},
    "nll": {"compile": 1 / 2, "eager": 1 / 5},
    "project": {"eager": 0.5},
    "train": {"plain": 1.0},
    "infer": {"plain": 1.03, "ensemble": 1 / 2.8, "tiled": 1 / 1.8},
}
PLAIN_ALLOWANCE = 1.05  # of a step without repetition, over its ratio of operations
SECONDS = {"stats": 4.0, "nll": 6.0, "project": 6.0, "train": 8.0, "infer": 6.0}
QUICK = ("eager", "plain", "ensemble", "tiled")  # rivals that are ready at once
EXAMPLE = "N512_M4_K100"
MEANING = {
    "stats": "",
    "nll": "",
    "project": "gathered: our gather, then one product; eager: a selection per slot, stack, F.linear",
    "train": "plain: our LSTM with C channels and as many rows; tiled: our LSTM with M*C channels on rows put together "
    "by torch; eager: the same with torch.nn.LSTM",
    "infer": "plain: one model of C channels; ensemble: M of them; stock: M of torch.nn.LSTM; tiled: the input M times "
    "side by side, our LSTM; eager: the same, torch.nn.LSTM",
}
TITLES = {
    "stats": "Statistics of an ensemble (`ensemble_stats`)",
    "nll": "Loss of all slots (`mimo_nll`), forward and backward",
    "project": "First layer of rows of M examples (`mimo_project`), forward and backward",
    "train": "Training step of a MIMO-LSTM",
    "infer": "Prediction: folded MIMO-LSTM and its heads",
}


def cases(mode: str, names: Sequence[str] | None = None) -> list[Case]:
    """Those of the mode, or of these names those that are for this mode.

    Raises:
        ValueError: a name that is none.
    """
    if names is None:
        return [Case.parse(name, mode) for name in SHAPES[mode]]
    return [Case.parse(name, mode) for name in names if (name[0] == "N") == (mode in ("stats", "nll"))]


def providers(mode: str, case: Case, only: Sequence[str] | None) -> list[Provider]:
    return [Provider(name) for name in PROVIDERS[mode] if only is None or name in only or name in ("fastseq", "plain")]


def thread_counts(mode: str, count: int) -> list[int]:
    """One and all of them: a target holds for both."""
    return sorted({1, count})


def memory_of(mode: str) -> Callable[[Work], dict[str, float]]:
    return lambda work: of_call(work.run)


def _aim(case: Case, rival: str) -> float | None:
    """Of the case; figures are for the sizes that are measured by default."""
    target = AIMS[case.mode].get(rival)
    if case.name not in SHAPES[case.mode]:
        return None
    if case.mode == "train" and target is not None and case.R == 1:
        return PLAIN_ALLOWANCE * case.step_ratio
    if case.mode == "project" and case.R != 4:
        return None
    return None if case.mode == "infer" and rival == "tiled" and case.C != 300 else target


def _table(rows: list[Row]) -> Table:
    mode = rows[0]["mode"]
    rivals = [name for name in PROVIDERS[mode] if name != "fastseq"]
    header = ["case", "threads", "fastseq ms / MB"]
    for name in rivals:
        header += [f"{name} ms / MB", f"time over {name}", *(["target"] if name in AIMS[mode] else [])]
    header += ["of limit"]
    lines = []
    for threads in sorted({row["threads"] for row in rows}):
        for name, group in by_case([row for row in rows if row["threads"] == threads]).items():
            case, ours = Case.parse(name, mode), group["fastseq"]
            line = [name, str(threads), _ms_mb(ours)]
            for rival in rivals:
                line += [_ms_mb(group.get(rival)), ratio(ours, rival)]
                line += [aim(ours, rival, _aim(case, rival))] if rival in AIMS[mode] else []
            lines.append([*line, limit(ours)])
    notes = [MEANING[mode], *met(lines), *failed(rows)]
    return Table(TITLES[mode], header, lines, [note for note in notes if note])


def _ms_mb(row: Row | None) -> str:
    if row is None or "ms" not in row:
        return ms(row)
    return f"{ms(row)} / {max(row['allocated_mb'], row.get('resident_mb', 0)):.3g}"


TABLES: dict[str, Callable[[list[Row]], Table]] = dict.fromkeys(SHAPES, _table)

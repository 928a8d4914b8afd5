"""The figures aimed at, computed from the rows of one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.gpu.part import Row

LARGE, TALL = "N65536_K8192_D256", "N1000000_K1024_D64"
EXACT_BYTES = (64, 8, 1 << 20)  # that a lookup may take per row, per number of the codebook, and in any case
RATE = {"bfloat16": 0.6, "bfloat16/float32": 0.3}  # least share of the measured rate of the bf16 product
FASTER, BINARY, LOOP = 2.0, 1.15, 20.0
LSTM_B, LSTM_H = (1, 16), (256, 512, 1024)


class Target(NamedTuple):
    """value: None where a row is missing; then the target is open."""

    name: str
    value: float | None
    aim: float
    unit: str
    at_least: bool = True

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "open"
        return "met" if (self.value >= self.aim if self.at_least else self.value <= self.aim) else "missed"


def find(rows: Iterable[Row], **fields: object) -> Row | None:
    """The last row with a time (or a value) and these fields."""
    found = [r for r in rows if all(r.get(k) == v for k, v in fields.items()) and ("ms" in r or "value" in r)]
    return found[-1] if found else None


def is_exact(row: Row) -> bool:
    """Whether no index differs from the definition's, and none from float64's beyond what rounding decides."""
    return row["gate"] == "passed" and not row.get("undefined")


def _ratio(a: Row | None, b: Row | None) -> float | None:
    """Time of ``a`` over that of ``b``: paired in rounds where they ran together."""
    if a is None or b is None or a["gate"] != "passed":
        return None
    paired = a.get("ratios", {}).get(b["label"])
    return float(paired[0] if paired else a["ms"] / b["ms"])


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value


def fastest_exact_rival(rows: Sequence[Row], case: str, dtype: str) -> Row | None:
    """Of those whose indices are float64's but where rounding in float32 decides."""
    rivals = [r for r in rows if r["op"] == "vq" and r["case"] == case and r["dtype"] == dtype and "ms" in r]
    exact = [r for r in rivals if r["provider"] != "fastseq" and r["gate"] == "passed"]
    return min(exact, key=lambda r: r["ms"]) if exact else None


def _lookups(rows: Sequence[Row]) -> Iterable[Target]:
    product = find(rows, case="matmul bfloat16")
    for dtype, least in RATE.items():
        row = find(rows, op="vq", case=LARGE, dtype=dtype, label="fastseq")
        share = row["tflops"] / product["value"] if row and product and is_exact(row) else None
        yield Target(f"lookup {LARGE} {dtype}, exact: share of the bf16 product", share, least, "")
    for case in (LARGE, TALL):
        row = find(rows, op="vq", case=case, dtype="bfloat16", label="fastseq")
        N, K, D = (int(part[1:]) for part in case.split("_"))
        most = (EXACT_BYTES[0] * N + EXACT_BYTES[1] * K * D + EXACT_BYTES[2]) / 1e6
        yield Target(f"lookup {case}: memory of order N + K", row and row.get("peak_mb"), round(most, 1), "MB", False)
    for case, dtype in ((TALL, "bfloat16"), (TALL, "float32")):
        row, rival = (
            find(rows, op="vq", case=case, dtype=dtype, label="fastseq"),
            fastest_exact_rival(rows, case, dtype),
        )
        name = f"lookup {case} {dtype}: time over the fastest exact rival ({rival['label'] if rival else 'none'})"
        yield Target(name, _ratio(row, rival) if row and is_exact(row) else None, 1.0, "", False)


def _lstms(rows: Sequence[Row]) -> Iterable[Target]:
    for H in LSTM_H:
        for B in LSTM_B:
            for mode in ("infer", "train"):
                shared = {"op": "lstm", "table": "lstm", "case": f"T1024_B{B}_H{H}", "mode": mode, "dtype": "bfloat16"}
                ours, stock = (find(rows, **shared, label=label) for label in ("fastseq", "stock"))
                value = _inverse(_ratio(ours, stock))
                yield Target(f"LSTM {shared['case']} {mode} bf16: times faster than stock", value, FASTER, "x")
    shared = {"op": "lstm", "table": "lstm", "dtype": "bfloat16"}
    for case, mode in (("T1024_B16_H512", "train"), ("T1024_B16_H512", "infer")):
        both = {**shared, "case": case, "mode": mode}
        ours, binary, loop = (find(rows, **both, label=n) for n in ("fastseq", "fastseq binary p=0.2", "loop"))
        yield Target(f"LSTM {case} {mode}: binary over sigmoid gates", _ratio(binary, ours), BINARY, "", False)
        yield Target(f"LSTM {case} {mode}: times faster than the loop", _inverse(_ratio(ours, loop)), LOOP, "x")


def targets(rows: Sequence[Row]) -> list[Target]:
    return [*_lookups(rows), *_lstms(rows)]

"""The figures aimed at, computed from the rows of one run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.gpu.part import Row

LARGE, TALL = "N65536_K8192_D256", "N1000000_K1024_D64"
EXACT_BYTES = (64, 8, 1 << 20)  # that a lookup may take per row, per number of the codebook, and in any case
RATE = {"bfloat16": 0.6, "bfloat16/float32": 0.3}  # least share of the measured rate of the bf16 product
FASTER, BINARY, LOOP = 2.0, 1.15, 20.0
LSTM_B, LSTM_H = (1, 16), (256, 512, 1024)
# Of the persistent LSTM: us per step of the model, by rows; H = 256, 512, 1024, 2048.
FLOOR = {1: (0.7, 1.1, 1.6, 2.4), 16: (0.7, 1.1, 1.8, 3.8), 64: (0.7, 1.1, 3.1, 9.1), 256: (0.95, 2.4, 6.9, 18.8)}
FLOOR_H = (256, 512, 1024, 2048)
AIMED = {*((1, H) for H in FLOOR_H), *((16, H) for H in FLOOR_H[:3])}  # where AIM holds, elsewhere 1
AIM, OVER_FLOOR, BACKWARD, FLASHRNN = 3.0, 1.3, 1.8, 2.0


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


def own_lookup(rows: Sequence[Row], case: str, dtype: str) -> Row | None:
    """The faster of Triton's and CUDA's exact ways, of which only one is to stay; its label says which."""
    both = (find(rows, op="vq", case=case, dtype=dtype, label=label) for label in ("fastseq", "fastseq cuda"))
    timed = [row for row in both if row and "ms" in row and is_exact(row)]
    return min(timed, key=lambda r: r["ms"]) if timed else find(rows, op="vq", case=case, dtype=dtype, label="fastseq")


def _lookups(rows: Sequence[Row]) -> Iterable[Target]:
    product = find(rows, case="matmul bfloat16")
    for dtype, least in RATE.items():
        row = own_lookup(rows, LARGE, dtype)
        share = row["tflops"] / product["value"] if row and product and is_exact(row) else None
        yield Target(f"lookup {LARGE} {dtype}, exact: share of the bf16 product", share, least, "")
    for case in (LARGE, TALL):
        row = own_lookup(rows, case, "bfloat16")
        N, K, D = (int(part[1:]) for part in case.split("_"))
        most = (EXACT_BYTES[0] * N + EXACT_BYTES[1] * K * D + EXACT_BYTES[2]) / 1e6
        yield Target(f"lookup {case}: memory of order N + K", row and row.get("peak_mb"), round(most, 1), "MB", False)
    for case, dtype in ((TALL, "bfloat16"), (TALL, "float32")):
        row, rival = own_lookup(rows, case, dtype), fastest_exact_rival(rows, case, dtype)
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


def _fastest(rows: Sequence[Row], **fields: object) -> Row | None:
    """Of all tiles."""
    found = [r for r in rows if all(r.get(k) == v for k, v in fields.items()) and "ms" in r]
    return min(found, key=lambda r: r["ms"]) if found else None


def _fastest_lstm(rows: Sequence[Row], **fields: object) -> Row | None:
    """Ours where each call may choose: the persistent one, or Triton's where that is faster or alone has room."""
    return _fastest([r for r in rows if r.get("label") in ("fastseq persist", "fastseq")], **fields)


def _persistent(rows: Sequence[Row]) -> Iterable[Target]:
    """None where the run had no persistent LSTM."""
    if not any(r.get("table") in ("persist", "persist loop") for r in rows):
        return
    for (B, steps), (n, H) in itertools.product(FLOOR.items(), enumerate(FLOOR_H)):
        case = f"T1024_B{B}_H{H}"
        for mode in ("infer", "train"):
            shared = {"table": "persist", "case": case, "mode": mode, "dtype": "bfloat16"}
            value = _inverse(_ratio(_fastest_lstm(rows, **shared), find(rows, **shared, label="stock")))
            aim = AIM if (B, H) in AIMED else 1.0
            yield Target(f"persistent LSTM {case} {mode} bf16: times faster than stock", value, aim, "x")
        shared = {"table": "persist loop", "case": case, "dtype": "bfloat16"}
        forward, backward = (_fastest(rows, **shared, mode=mode) for mode in ("forward", "backward"))
        over = forward["us_per_step"] / steps[n] if forward else None
        yield Target(f"persistent LSTM {case}: step over the model's {steps[n]:g} us", over, OVER_FLOOR, "", False)
        value = _ratio(backward, forward) if forward else None
        yield Target(f"persistent LSTM {case}: backward over forward", value, BACKWARD, "", False)
    shared = {"table": "lstm", "case": "T1024_B16_H512", "mode": "train", "dtype": "bfloat16"}
    ours, theirs = (find(rows, **shared, label=label) for label in ("fastseq persist", "FlashRNN"))
    yield Target("persistent LSTM: times faster than FlashRNN", _inverse(_ratio(ours, theirs)), FLASHRNN, "x")


def targets(rows: Sequence[Row]) -> list[Target]:
    return [*_persistent(rows), *_lookups(rows), *_lstms(rows)]

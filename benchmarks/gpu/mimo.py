"""MIMO on a GPU: a first layer over gathered examples, losses and statistics, forward and backward, beside plain torch.

The bytes that a case must move, each once, stand beside its time: at the speed of a copy nothing is left to win."""

from __future__ import annotations

import functools

import torch

from benchmarks import mimo
from benchmarks.gpu import providers
from benchmarks.gpu.part import Context, Row, Unit
from benchmarks.gpu.providers import Call
from benchmarks.mimo_case import ROWS, Case, Provider

SECONDS = 0.5  # of the rounds of one case
CASES = {
    "project": ("T50_B512_M3_R4_C300_H256", "T50_B32_M3_R4_C300_H256"),
    "nll": ("N4096_M4_K1000", "N512_M4_K100"),
    "stats": ("N4096_M4_K1000", "N10000_M3_K10"),
    "train": ("T50_B512_M3_R4_C300_H256",),
}
DRY = {"project": ("T3_B4_M2_R2_C5_H4",), "nll": ("N9_M2_K5",)}
LABELS = {"project": ("fastseq", "gathered", "eager"), "train": ("fastseq", "tiled", "eager")}
LABELS |= dict.fromkeys(ROWS, ("fastseq", "eager", "compile"))


def _bytes(case: Case) -> int:
    """What a case cannot do without: logits read, and where there is a gradient once more and it written; examples and
    gates, and the gradient of these; each once, in float32."""
    if case.mode in ROWS:
        return 4 * case.N * case.M * case.K * (3 if case.mode == "nll" else 1)
    return 4 * case.T * (2 * case.B * case.C + 2 * case.rows * 4 * case.H)


def measure(case: Case, context: Context, labels: tuple[str, ...]) -> list[Row]:
    if hasattr(torch.backends.cudnn, "rnn"):
        torch.backends.cudnn.rnn.fp32_precision = "ieee"  # as the gate has it: all of them in float32

    def prepare(label: str) -> tuple[Call, Row]:
        provider = Provider(label)
        work = mimo.setup(case, provider, torch.get_num_threads())
        return work.run, {"gate": mimo.judge(case, provider, work)[0]}

    shared: Row = {"op": "mimo", "table": "mimo", "case": case.name, "mode": case.mode, "dtype": "float32"}
    rows = providers.measure(context, shared, labels, prepare, SECONDS)
    for row in rows:
        if "ms" in row and case.mode != "train":
            row["gbs"] = float(f"{_bytes(case) / row['ms'] / 1e6:.4g}")
    return rows


def units(context: Context) -> list[Unit]:
    found = []
    for mode, names in context.pick(CASES, DRY).items():
        labels = LABELS[mode][: context.pick(3, 2)]
        for name in names:
            case = Case.parse(name, mode)._replace(device=context.device.type)
            found.append(Unit(f"{mode} {name}", 6.0, functools.partial(measure, case, context, labels)))
    return found

"""What ``make gpu`` does with the compiled lookup of few rows, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import parity_lookup, providers, tables, targets
from benchmarks.gpu.parity import Kernels, _row
from benchmarks.gpu.part import Context
from fastseq.ops import vq_cuda, vq_lookup
from fastseq.ops._select import allowed

DRY, REAL = (Context(torch.device("cpu"), dry) for dry in (True, False))


def gates(dtype: str) -> dict[str, str]:
    return {c.case: _row(c, dtype)[0]["gate"] for c in parity_lookup.checks(Kernels(DRY, dtype))}


def test_what_a_dry_run_checks() -> None:
    no = "cannot run: it needs a GPU"
    assert gates("bfloat16") == {"odd": "passed", "one": "passed", "repeats": "passed", "streams": no, "graph": no}
    assert not list(parity_lookup.checks(Kernels(REAL, "tf32")))
    found = list(parity_lookup.checks(Kernels(REAL, "float32")))
    assert {c.op for c in found} == {"vq_lookup", *vq_cuda.BACKEND} and {c.module for c in found} == {"vq_lookup"}
    assert "parity:lookup-float32-0/1" in main.PERSIST_PARITY and main.COMPILED["lookup"] == "vq_lookup"


@pytest.mark.parametrize(
    ("place", "words"), [(0, "index: 1 of"), (1, "distance: error"), (2, "score: bits differ"), (3, "quantized: ")]
)
def test_a_wrong_lookup_is_seen(place: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, runs = vq_lookup.lookup, iter(range(9))

    def wrong(*args: Any) -> vq_lookup.Found:
        found = right(*args)
        if place != 2 or next(runs) == 1:  # scores are compared with those of other parts alone
            found[place].view(-1)[:1].add_(1)
        return found

    monkeypatch.setattr(vq_lookup, "lookup", wrong)
    check = next(iter(parity_lookup.checks(Kernels(DRY, "float32"))))
    assert _row(check, "float32")[0]["gate"].startswith(f"wrong: {words}")


def test_table() -> None:
    shared = {"op": "vq_lookup", "table": "few rows", "case": "N1", "dtype": "float32", "gate": "passed", "wrong": 0.0}
    rows = [
        {**shared, "label": "fastseq cuda", "ms": 0.02, "ratios": {"expanded float32": [0.5, 0.4, 0.6]}},
        {**shared, "label": "expanded float32", "ms": 0.04, "wrong": 0.25},
    ]
    drawn = next(t for t in tables.of_rows(rows) if t.title == "Lookup of few rows, through M codebooks")
    assert drawn.lines == [
        ["N1", "float32", "fastseq cuda", "20", "0.00%", "-"],
        ["N1", "float32", "expanded float32", "40", "25.00%", "0.50 [0.40, 0.60]"],
    ]


def test_the_faster_exact_way_counts() -> None:
    def row(label: str, ms: float, **more: Any) -> dict[str, Any]:
        shared = {"op": "vq", "case": "N1", "dtype": "bfloat16", "gate": "passed", "wrong": 0.0, "undefined": 0}
        return {**shared, "label": label, "ms": ms, **more}

    triton, cuda = row("fastseq", 2.0), row("fastseq cuda", 1.0)
    assert targets.own_lookup([triton, cuda], "N1", "bfloat16") == cuda
    assert targets.own_lookup([triton, row("fastseq cuda", 3.0)], "N1", "bfloat16") == triton
    assert targets.own_lookup([triton, {**cuda, "undefined": 1}], "N1", "bfloat16") == triton
    assert targets.own_lookup([triton], "N1", "bfloat16") == triton


def test_ours_by_the_kernels_that_the_label_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSEQ_BACKEND", raising=False)
    for label, name in {"fastseq": "triton", "fastseq triton": "triton", providers.CUDA: "cuda", "cdist": None}.items():
        with providers.forced(REAL, label):
            assert allowed() == name, label
    with providers.forced(DRY, providers.CUDA):
        assert allowed() is None

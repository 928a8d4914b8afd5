"""``pytest benchmarks``: a few cases of vector quantization under pytest-benchmark, and what its gate promises."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import harness, memory, run, table, vq, vq_case, vq_gate, vq_table
from benchmarks.harness import CannotRun
from benchmarks.vq_case import WORDS_D, Case, Provider

THREADS = 2
SMALL = Case(40, 24, 6, 1, "train")
PACKAGES = {"faiss": "faiss", vq_table.THEIRS: "vector_quantize_pytorch"}
LOOKED_UP = ("fastseq", "fastseq-plain", "fastseq-screened", "faiss", "cdist", "expanded")
LAYERS = ("fastseq", vq_table.THEIRS, "plain")
CASES = [
    *((Case(4096, 512, 64, 1, "lookup"), Provider(name)) for name in LOOKED_UP),
    *((Case(1, 1024, 64, 1, "lookup"), Provider(name)) for name in ("fastseq", "fastseq-numpy", "faiss")),
    *((Case(4096, 512, 64, 1, "eval"), Provider(name)) for name in LAYERS),
    *((Case(4096, 512, 64, 1, "train"), Provider(name, way)) for name in LAYERS for way in (False, True)),
    *((Case(1024, 256, 8, 4, "train"), Provider(name)) for name in LAYERS[:2]),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with harness.threads(THREADS):
        yield


@pytest.mark.parametrize("case, provider", CASES, ids=lambda v: getattr(v, "label", None) or f"{v.mode}-{v.name}")
def test_speed(benchmark, case: Case, provider: Provider) -> None:
    if provider.name in PACKAGES:
        pytest.importorskip(PACKAGES[provider.name])
    works, reasons = harness.gated(vq, case, [provider], THREADS)
    if provider.name == "fastseq-screened" and reasons.get(provider, "").startswith(harness.ABSENT):
        pytest.skip(reasons[provider])
    assert provider in works, reasons
    benchmark.group = f"{case.mode} {case.name}"
    benchmark(works[provider][0].run)


def plain_outputs(case: Case = SMALL, rotation: bool = False) -> dict[str, Tensor]:
    got = vq.setup(case, Provider("plain", rotation), THREADS).outputs()
    assert vq_gate.judge(case, rotation, got)[0] == "passed"
    return got


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("name", ["quantized", "loss", "dx", "cluster_size", "codebook"])
def test_gate_refuses_a_small_error(name: str, rotation: bool) -> None:
    got = plain_outputs(rotation=rotation)
    got[name] = got[name] * (1 + 1e-4)
    assert vq_gate.judge(SMALL, rotation, got)[0].startswith(f"{name}: error")


def test_gate_refuses_the_gradient_of_the_other_way() -> None:
    assert vq_gate.judge(SMALL, False, plain_outputs(rotation=True))[0].startswith("dx: error")


def test_gate_refuses_one_wrong_index() -> None:
    case = SMALL._replace(mode="lookup")
    work = vq.setup(case, Provider("expanded"), THREADS)
    assert vq.judge(case, Provider("expanded"), work) == ("passed", {"not_nearest": 0})
    index = work.outputs()["index"]
    index[7] = (index[7] + 1) % case.K
    verdict, facts = vq_gate.judge(case, False, {"index": index})
    assert verdict.startswith("index: the score of row 7 exceeds the smallest by")
    assert facts == {"not_nearest": 1}


def test_gate_takes_either_of_two_equal_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = vq_case.inputs(Case(5, 3, 4, 1, "lookup"))
    twins = given._replace(codebooks=given.codebooks[:, [0, 1, 1]])
    monkeypatch.setattr(vq_gate, "inputs", lambda case: twins)
    monkeypatch.setattr(vq_gate, "_of_case", vq_gate._of_shape.__wrapped__)
    near = vq_gate.nearest(twins.x.double(), twins.x, twins.codebooks[0]).index
    other = torch.where(near == 0, 0, 3 - near)[:, None]
    assert bool((near != 0).any())
    verdict, facts = vq_gate.judge(Case(5, 3, 4, 1, "lookup"), False, {"index": other})
    assert (verdict, facts) == ("passed", {"not_nearest": int((near != 0).sum())})


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda index: index[:-1], "index: shape [39, 1], expected [40, 1]"),
        (lambda index: index * 0 - 1, "index: torch.int64 in -1..-1, expected integers in 0..23"),
        (lambda index: index * 0 + 24, "index: torch.int64 in 24..24, expected integers in 0..23"),
        (lambda index: index * 0.0, "index: torch.float32 in 0.0..0.0, expected integers in 0..23"),
    ],
)
def test_gate_refuses_what_is_no_index(change: Callable[[Tensor], Tensor], said: str) -> None:
    got = plain_outputs()
    assert vq_gate.judge(SMALL, False, {**got, "index": change(got["index"])}) == (said, {})


def test_gate_judges_every_level() -> None:
    pytest.importorskip("vector_quantize_pytorch")
    case = Case(40, 24, 6, 3, "train")
    got = vq.setup(case, Provider(vq_table.THEIRS), THREADS).outputs()
    assert vq_gate.judge(case, False, got) == ("passed", {"not_nearest": 0})
    assert {"dweight_in", "dbias_in", "dweight_out", "dbias_out"} <= set(got)
    wrong = {**got, "index": got["index"].roll(1, dims=1)}
    assert vq_gate.judge(case, False, wrong)[0].startswith("index: the score of row")


def test_what_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise CannotRun("needs more memory")

    monkeypatch.setitem(vq.LOOKUPS, "cdist", refuse)
    case = SMALL._replace(mode="lookup")
    rows = harness.measure(vq, case, [Provider("cdist"), Provider("expanded")], THREADS, rounds=1)
    assert [("ms" in row, row["gate"]) for row in rows] == [(False, "cannot run: needs more memory"), (True, "passed")]
    assert table.failed(rows) == ["no time: cdist N40_K24_D6 (cannot run: needs more memory)"]


def test_words_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    case = Case(50, 8, WORDS_D, 1, "words")
    works, reasons = harness.gated(vq, case, [Provider("expanded")], THREADS)
    assert (works, reasons) == ({}, {Provider("expanded"): "not installed: wordllama"})


def test_words() -> None:
    if importlib.util.find_spec("wordllama") is None:
        pytest.skip("wordllama is not installed")
    case = Case(500, 16, WORDS_D, 1, "words")
    works, reasons = harness.gated(vq, case, [Provider("fastseq"), Provider("expanded")], THREADS)
    assert (len(works), reasons) == (2, {})
    with pytest.raises(CannotRun, match="there are 32000 word embeddings of 256 numbers"):
        vq_case.inputs(case._replace(N=32001))


def test_random_numbers_are_the_same_each_time() -> None:
    given = vq_case.inputs(SMALL)
    vq_case._random.cache_clear()
    again = vq_case.inputs(SMALL)
    assert all(torch.equal(a, b) for a, b in zip(given[:3], again[:3], strict=True))


@pytest.mark.parametrize(
    "given, said",
    [
        (["--providers", "stock"], "--providers: stock is none of fastseq, vector-quantize-pytorch, plain, compile"),
        (["--mode", "lookup,stream"], "--mode: stream is none of lookup, words, eval, train, residual"),
        (["--cases", "T100_B1_H128"], "--cases: case must look like N4096_K512_D64 or N4096_K1024_D8_M8, got T100"),
        (["--cases", "N0_K4_D4"], "--cases: case must look like N4096_K512_D64 or N4096_K1024_D8_M8, got N0_K4_D4"),
    ],
)
def test_wrong_usage(given: list[str], said: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["run", "vq", *given])
    with pytest.raises(SystemExit) as exit:
        run.arguments()
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_named_cases_go_to_the_modes_that_are_for_them() -> None:
    names = ["N9_K8_D7", f"N9_K8_D{WORDS_D}", "N9_K8_D7_M3"]
    found = {mode: [case.name for case in vq_table.cases(mode, names)] for mode in vq_table.TABLES}
    assert found == {
        "lookup": names[:2],
        "words": [names[1]],
        "eval": names[:2],
        "train": names[:2],
        "residual": [names[2]] * 2,
    }
    assert [case.mode for case in vq_table.cases("residual")] == ["eval", "train"]
    assert all(case.N >= vq_table.TRAINED for case in vq_table.cases("train"))


def row(label: str, ratios: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    """A row of a lookup of the case N4096_K512_D64, as far as a table reads it."""
    known = {"case": "N4096_K512_D64", "mode": "lookup", "table": "lookup", "gate": "passed", "allocated_mb": 0.5}
    return {**known, "label": label, "ms": 2.0, "ratios": ratios, "gflops": 134.2, **more}


def test_lookup_table_holds_the_targets() -> None:
    share = 2 * 4096 * 512 * 64 / (2 * vq.SQUARE**3)  # of the operations of the square product
    ours = row("fastseq", {"faiss": [0.65, 0.6, 0.7], "square": [share / 0.9, share / 1.0, share / 0.8]})
    rows = [{**ours, "resident_mb": 0.7}, row("faiss", {}, ms=3.0)]
    drawn = vq_table.lookup(rows)
    (line,) = (dict(zip(drawn.header, line, strict=True)) for line in drawn.lines)
    assert (line["ms / MB"], line["faiss"], line["vs faiss"]) == ("2 / 0.7", "3 / 0.5", "0.65 [0.60, 0.70]")
    assert drawn.lines[0][7:10] == ["0.70 met", "0.90 [0.80, 1.00]", "1.0 missed"]
    assert "targets met: 1 of 2" in drawn.notes


def test_train_table_pairs_gradients() -> None:
    ratios = {f"{name} rotation": [0.08, 0.07, 0.09] for name in (vq_table.THEIRS, "plain", "compile")}
    ours = row("fastseq rotation", {**ratios, "plain": [9.0, 9.0, 9.0]}, mode="train", table="train", rotation=True)
    drawn = vq_table.train([ours])
    (line,) = drawn.lines
    assert line[1] == "rotation"
    assert line[6:12] == ["12.5x [11.1, 14.3]", "10.0x met", *["12.5x [11.1, 14.3]", "2.0x met"] * 2]


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="resident memory is measured on Linux only")
def test_memory_of_a_call_sees_what_torch_does_not() -> None:
    count = 5_000_000  # of float32: 20 MB
    hidden = memory.of_call(lambda: np.ones(count, np.float32))
    assert hidden["allocated_mb"] == 0 and 19 <= hidden["resident_mb"] <= 25
    seen = memory.of_call(lambda: torch.ones(count) + torch.ones(count))
    assert seen["allocated_mb"] == 60 and 59 <= seen["resident_mb"] <= 65

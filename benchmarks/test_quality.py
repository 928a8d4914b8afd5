"""``pytest benchmarks``: the arithmetic of the quality benchmark and its tables, on models of a few numbers."""

from __future__ import annotations

import math
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastseq.nn
from benchmarks import quality, quality_case, quality_compressed, quality_corpus, quality_table, quality_words, table
from benchmarks.quality_case import KINDS, Task, Trained

BOOK = """Holy Bible.
Ge1:1 In the beginning God's word, and light.
Ge1:2 And the light.
Ge2:1 The light; the word.
1Sm1:1 Light!
"""


def model() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.LSTM(3, 4)])


def task(**changes: Any) -> Task:
    """Predict zeros from three numbers."""

    def loss(found: Any, batch: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        y, (h, c) = found[0](batch, state)
        return y.square().mean(), (h.detach(), c.detach())

    def evaluate(found: Any) -> dict[str, float]:
        with torch.no_grad():
            return {"test": float(found[0](torch.ones(5, 2, 3))[0].sum())}

    given: dict[str, Any] = {
        "name": "zeros",
        "metric": "bits per zero",
        "kinds": ("stock", "binary"),
        "seeds": 1,
        "steps": 6,
        "peak": 1e-2,
        "clip": 1.0,
        "ranks": (1,),
        "sizes": {"T": 5, "B": 2, "E": 3, "H": 4, "symbols": 1, "epoch": 2},
        "build": lambda kind: nn.ModuleList([fastseq.nn.LSTM(3, 4, **kind.options)]),
        "batch": lambda step, seed: torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(step)),
        "loss": loss,
        "evaluate": evaluate,
    }
    return Task(**{**given, **changes})


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [quality_case.learning_rate(1.0, done, 1000) for done in range(1000)]
    assert rates[0] == 1 / quality_case.WARM_UP and max(rates) == rates[quality_case.WARM_UP - 1]
    assert rates[-1] == pytest.approx(0.1, rel=0.01)


def test_gates_cool_down_by_equal_factors() -> None:
    kind = KINDS["sharpened-cooling"]
    found = nn.ModuleList([fastseq.nn.LSTM(3, 4, **kind.options)])
    taus = []
    for progress in (0.0, 0.5, 1.0):
        quality_case.cool(found, kind, progress)
        taus.append(found[0].tau)
    assert taus == pytest.approx([1.0, 0.1**0.5, 0.1])
    quality_case.cool(found, KINDS["sharpened"], 1.0)
    assert found[0].tau == taus[-1]


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_case, "KEPT", tmp_path)
    monkeypatch.setattr(quality_case, "SAVE_SECONDS", -1.0)  # after every step
    whole = quality_case.train(task(), KINDS["binary"], 0, 6, lambda text: None)
    quality_case.kept(task(), KINDS["binary"], 0, 6).unlink()

    def stop(step: int, seed: int) -> torch.Tensor:
        if step == 4:
            raise KeyboardInterrupt
        return task().batch(step, seed)  # type: ignore[no-any-return]

    with pytest.raises(KeyboardInterrupt):
        quality_case.train(task(batch=stop), KINDS["binary"], 0, 6, lambda text: None)
    torch.manual_seed(5)
    said: list[str] = []
    again = quality_case.train(task(), KINDS["binary"], 0, 6, said.append)
    assert len(said) == 2 and again.seconds > 0
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_batches_go_on_row_by_row() -> None:
    found = quality_words.batches(torch.arange(26), T=4, B=2)
    assert [part.shape for part in found] == [(5, 2)] * 3
    assert [part[0].tolist() for part in found] == [[0, 12], [4, 16], [8, 20]]
    assert all(torch.equal(part[1:] - part[:-1], torch.ones(4, 2, dtype=torch.int64)) for part in found)


def test_perplexity_of_guessing_is_the_vocabulary() -> None:
    found = quality_words.WordModel(7, KINDS["binary"]).eval()
    nn.init.zeros_(found.embedding)
    text = quality_words.batches(torch.arange(41) % 7, 4, 2)
    assert quality_words.perplexity(found, text) == pytest.approx(7)
    assert quality_words.loss(found, text[0], None)[0].item() == pytest.approx(math.log(7))


def test_locked_dropout_has_one_mask() -> None:
    x = quality_words.locked(torch.ones(5, 3, 40), 0.5, True)
    assert torch.equal(x, x[:1].expand(5, 3, 40)) and set(x.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(quality_words.locked(x, 0.5, False), x)


def test_chapters_and_split() -> None:
    found = quality_corpus.chapters(BOOK)
    assert found[0] == ["in", "the", "beginning", "god's", "word", ",", "and", "light", ".", "and", "the", "light", "."]
    assert found[1:] == [["the", "light", ";", "the", "word", "."], ["light", "!"]]
    words = quality_corpus.split(found, every=2, rare=2)
    assert [len(words.training), len(words.validation), len(words.test)] == [0, 15, 6]
    words = quality_corpus.split([*found, *found], every=4, rare=3)
    assert words.vocabulary == ["<unk>", "the", "light", "."]
    assert words.validation.tolist() == [1, 2, 0, 1, 0, 3, 2, 0]
    assert words.test.tolist()[7:] == [2, 3, 0, 1, 2, 3] and len(words.training) == 21


@pytest.mark.skipif(shutil.which("gzip") is None, reason="no gzip here")
def test_decoding_of_blocks() -> None:
    def block(text: str) -> bytes:  # compress(1) with no string found twice: 9 bits for each letter
        return sum(ord(letter) << 9 * k for k, letter in enumerate(text)).to_bytes(-(-9 * len(text) // 8), "little")

    blocks = [block("In the"), block(" begin"), block("ning")]
    begin = quality_corpus.COUNT_AT + 4 * (1 + len(blocks)) + len(quality_corpus.MAGIC)
    starts = [begin + sum(map(len, blocks[:k])) for k in range(len(blocks))]
    head = bytes(quality_corpus.COUNT_AT) + struct.pack(">4I", len(blocks), *starts)
    assert quality_corpus.decoded(head + quality_corpus.MAGIC + b"".join(blocks)) == "In the beginning"


def test_without_apt_the_user_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="put usr/lib/bible.data of Debian's package bible-kjv-text at .*bible.data"):
        quality_corpus.fetch(tmp_path / "bible.data")


def test_hard_gates_and_their_shares() -> None:
    found = model()
    hard: Any = quality_compressed.hardened(found)
    x = torch.randn(5, 2, 3)
    gates = hard[0](x, return_gates=True)[2][0]
    assert set(torch.cat([gates.i, gates.f]).unique().tolist()) <= {0.0, 1.0}
    own = quality_compressed.twin(found[0])
    assert torch.allclose(own(x)[0], found[0](x)[0], atol=1e-6)
    assert quality_compressed.near(torch.tensor([0.05, 0.5, 0.95, 0.99])) == [0.25, 0.5]
    with torch.no_grad():
        found[0].bias_ih_l0[:4], found[0].bias_ih_l0[4:8] = 50.0, -50.0  # type: ignore[operator]
    assert quality_compressed.gate_shares(task(), found) == {"i": [0.0, 1.0], "f": [1.0, 0.0]}


def test_rows_tell_what_was_missing() -> None:
    trained = Trained(model().eval(), 90.0)
    whole = {row["way"]: row for row in quality_compressed.rows(task(), KINDS["stock"], 0, 6, trained, {})}
    assert list(whole) == list(quality_compressed.ways((1,))) and whole["as trained"]["cost"] == 0
    assert whole["int8"]["cost"] == whole["int8"]["test"] - whole["as trained"]["test"] != 0
    assert whole["i, f rank 1"]["bytes_before"] == 4 * 2 * (4 * 3 + 4 * 4)
    assert whole["i, f rank 1"]["bytes_after"] == 4 * 2 * (4 + 3 + 4 + 4)
    part = {way: whole[way] for way in whole if way != "int8"}
    assert [row for row in quality_compressed.rows(task(), KINDS["stock"], 0, 6, trained, part)] == [whole["int8"]]
    assert quality.known([*whole.values()], "zeros", "stock", 0, 6) == whole
    assert quality.known([*whole.values()], "zeros", "stock", 1, 6) == {}


def made(name: str, seed: int, way: str, test: float, cost: float) -> dict[str, Any]:
    head = {"task": "zeros", "metric": "bits per zero", "model": name, "seed": seed, "steps": 6000, "way": way}
    sizes = {"T": 5, "B": 2, "E": 3, "H": 4, "symbols": 9, "epoch": 1234, "parameters": 5678, "minutes": 2.0 + seed}
    near = {"near": {"i": [0.1, 0.5], "f": [0.25, 0.5]}} if way == "as trained" else {}
    size = {"bytes_before": 80, "bytes_after": 20} if way == "int8" else {}
    where = {"device": "a processor", "commit": "0123"}
    return {**head, **sizes, **near, **size, **where, "test": test, "cost": cost}


ROWS = [
    *(made(name, seed, "as trained", 2.0, 0.0) for name in ("stock", "binary") for seed in (0, 1)),
    *(made("stock", seed, "hard gates", 2.5, 0.5) for seed in (0, 1)),
    *(made("binary", seed, "hard gates", 2.01 + 0.02 * seed, 0.01 + 0.02 * seed) for seed in (0, 1)),
    *(made("stock", seed, "int8", 2.25, 0.25) for seed in (0, 1)),
    *(made("binary", seed, "i, f rank 1", 2.5, 0.5) for seed in (0, 1)),
    *(made("binary", seed, "int8", 2.1 + 0.1 * seed, 0.1 + 0.1 * seed) for seed in (0, 1)),
]


def test_table_of_compression() -> None:
    found = quality_table.compressed(ROWS)
    assert found.lines == [
        ["as trained", "2.000 ± 0.000", "2.000 ± 0.000", "-"],
        ["hard gates", "2.500 (+0.500 ± 0.000)", "2.020 (+0.020 ± 0.014)", "-"],
        ["int8", "2.250 (+0.250 ± 0.000)", "2.150 (+0.150 ± 0.071)", "4.0"],
        ["i, f rank 1, 25% of H", "-", "2.500 (+0.500 ± 0.000)", "-"],
    ]
    assert found.notes[-2] == "ways of compression that cost less than they cost stock: binary in 1 of 1"
    assert found.notes[-1] == "lowest after compression: binary in 1 of 1"
    assert found.notes[1] == "6,000 steps of training (1,234 are an epoch), 2 to 3 minutes on one thread"
    assert "| int8 | 2.250 (+0.250 ± 0.000) | 2.150 (+0.150 ± 0.071) | 4.0 |" in table.markdown(found)


def test_table_of_hard_gates() -> None:
    found = quality_table.hard(ROWS)
    assert found.lines[0] == [
        "stock",
        "2.000 ± 0.000",
        "2.500 ± 0.000",
        "+25.0%, +25.0%",
        "0 of 2",
        "10%/50%",
        "25%/50%",
    ]
    assert found.lines[1][1:5] == ["2.000 ± 0.000", "2.020 ± 0.014", "+0.5%, +1.5%", "1 of 2"]


def test_tables_of_few_rows() -> None:
    assert quality_table.tables([]) == []
    assert (
        quality_table.compressed([*ROWS, made("binary", 0, "int8", 3.1, 1.1)]).lines[2][2] == "2.650 (+0.650 ± 0.636)"
    )
    alone = quality_table.compressed([ROWS[0]])
    assert alone.lines == [["as trained", "2.000", "-"]] and alone.notes[0].startswith("mean of 1 seed;")

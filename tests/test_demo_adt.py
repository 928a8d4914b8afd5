"""The chapter on ADT: its trainings, what it says of their numbers, and a tiny run of all of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastseq import demo
from fastseq.demo import adt_training, report
from fastseq.demo.adt_training import KINDS, OURS, STANDARD, Setting
from fastseq.demo.mimo_digits import Digits
from fastseq.demo.report import Chapter, Table
from tests.test_demo import check_page
from tests.test_demo_mimo import images
from tests.tolerance import assert_same_bits

TINY = Setting(H=8, steps=6, batch=8, radii=(0.0, 0.1), images=12)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    training, held_out, test = (images(count, generator) for count in (72, 8, 40))
    return Digits(training, held_out, test, test)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_the_same_again(kind, data):
    first, second = (adt_training.train(kind, 3, TINY, data) for _ in range(2))
    assert_same_bits("head", first.model.head.weight, second.model.head.weight)
    assert first.withstood == second.withstood and len(first.withstood) == 2
    assert first.withstood[0] >= first.withstood[1] and first.seconds > 0


def test_trainings_learn_different_models(data):
    heads = [adt_training.train(kind, 3, TINY, data).model.head.weight for kind in KINDS]
    assert all(bool((a != b).any()) for a, b in ((heads[0], heads[1]), (heads[1], heads[2])))


def test_plain_training_learns(data):
    found = adt_training.train(STANDARD, 0, dataclasses.replace(TINY, H=16, steps=150, radii=(0.0,)), data)
    assert found.withstood[0] > 0.5  # one in eight by chance


def test_seeds_that_do_not_fit_are_left_out(data):
    told = []
    runs = adt_training.train_all([5, 6, 7], TINY, data, 0.0, lambda done, note: told.append((done, note)))
    assert [(r.seed, r.kind) for r in runs] == [(5, kind) for kind in KINDS]
    assert told[-1] == (1.0, "out of time")


@pytest.fixture
def chapter():
    for module in ("matplotlib", "sklearn"):
        pytest.importorskip(module, reason="the demo extra is not installed")
    from fastseq.demo.chapters import adt

    return adt


@pytest.mark.parametrize("seeds", [1, 2])
def test_adt_chapter(seeds, chapter, tmp_path, monkeypatch, data):
    monkeypatch.setattr(chapter, "digits", lambda: data)
    stages = []
    budget = demo.Budget(60.0, 5, lambda stage, done, note: stages.append((stage, done)))
    sections = chapter.run(budget, chapter.Sizes(seeds=seeds, setting=TINY))
    assert stages[-1] == ("perturbed digits", 1.0)
    out = tmp_path / "r.html"
    report.write(out, "fastseq demo", [("seed", "5")], [Chapter(chapter.TITLE, sections)])
    words = " ".join(check_page(out.read_text(encoding="utf-8")).words)
    for part in ("under attack with 0.1", "Against PGD training", "times as long", "read as"):
        assert part in words
    assert ("without an interval" in words) == (seeds == 1)
    _, withstood = [block for section in sections for block in section.blocks if isinstance(block, Table)]
    assert [row[0] for row in withstood.rows] == list(KINDS) and withstood.rows[-1][0] == OURS


@pytest.mark.parametrize("seconds, count, steps", [(3.0, 1, 60), (20.0, 3, 200)])
def test_a_quick_run_has_less_of_everything(seconds, count, steps, chapter, monkeypatch, data):
    class Asked(Exception):
        pass

    def train_all(seeds, setting, *others):
        raise Asked(len(seeds), setting.steps, torch.get_num_threads())

    monkeypatch.setattr(chapter, "digits", lambda: data)
    monkeypatch.setattr(chapter, "train_all", train_all)
    with pytest.raises(Asked) as asked:
        chapter.run(demo.Budget(seconds))
    assert asked.value.args == (count, steps, 1)

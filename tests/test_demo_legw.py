"""The chapter on LEGW: its trainings, what it says of their numbers, and a tiny run of all of it."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from fastseq import demo
from fastseq.demo import legw_training, report
from fastseq.demo.legw_training import LINEAR, NONE, OURS, RULES, Setting
from fastseq.demo.mimo_digits import Digits
from fastseq.demo.mimo_training import RowLSTM
from fastseq.demo.report import Chapter, Table
from tests.test_demo import check_page
from tests.test_demo_mimo import images
from tests.tolerance import assert_same_bits

TINY = Setting(H=8, rate=0.1, base=4, warmup_epochs=0.25, epochs=3, factors=(1, 4))


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    training, held_out, test = (images(count, generator) for count in (72, 8, 40))
    return Digits(training, held_out, test, test)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(("rule", "highest", "warmup"), [(OURS, 0.2, 4), (LINEAR, 0.4, 0.75), (NONE, 0.1, 0)])
def test_the_rules(rule, highest, warmup):
    found = legw_training.scheduled(RowLSTM(4), rule, 4, TINY, 72)
    s = found.schedule
    assert (s.steps_per_epoch, s.epochs, s.warmup_steps) == (4, 3, pytest.approx(warmup))
    assert found.base_lrs[0] * s.factor(11) == pytest.approx(highest)


def test_a_training_is_the_same_again_and_learns(data):
    setting = dataclasses.replace(TINY, H=16, epochs=25)
    runs = [legw_training.train(OURS, 1, 3, setting, data) for _ in range(2)]
    assert_same_bits("losses", *(torch.tensor(r.losses) for r in runs))
    assert runs[0].accuracy == runs[1].accuracy > 0.5  # one in eight by chance
    assert len(runs[0].losses) == 25 and runs[0].seconds > 0


def test_a_training_that_runs_away_has_infinite_losses(data):
    found = legw_training.train(NONE, 1, 0, dataclasses.replace(TINY, rate=1e38), data)
    assert found.losses[-1] == math.inf


def test_seeds_that_do_not_fit_are_left_out(data):
    told = []
    runs = legw_training.train_all([5, 6, 7], TINY, data, 0.0, lambda done, note: told.append((done, note)))
    assert [(r.seed, r.k, r.rule) for r in runs] == [(5, k, rule) for k in (1, 4) for rule in RULES]
    assert told[-1] == (1.0, "out of time")
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# --- the chapter


@pytest.fixture
def chapter():
    for module in ("matplotlib", "sklearn"):
        pytest.importorskip(module, reason="the demo extra is not installed")
    from fastseq.demo.chapters import legw

    return legw


@pytest.mark.parametrize("seeds", [1, 2])
def test_legw_chapter(seeds, chapter, tmp_path, monkeypatch, data):
    monkeypatch.setattr(chapter, "digits", lambda: data)
    stages = []
    budget = demo.Budget(60.0, 5, lambda stage, done, note: stages.append((stage, done)))
    sections = chapter.run(budget, chapter.Sizes(seeds=seeds, setting=TINY))
    assert stages[-1] == ("growing batches", 1.0)
    out = tmp_path / "r.html"
    report.write(out, "fastseq demo", [("seed", "5")], [Chapter(chapter.TITLE, sections)])
    page = check_page(out.read_text(encoding="utf-8"))
    words = " ".join(page.words)
    assert "mathdefault" not in words  # ticks of a logarithmic axis are plain numbers
    for part in ("with 4 times the batch", "Against linear scaling, with 4", "times less", "warm-up steps"):
        assert part in words
    assert ("without an interval" in words) == (seeds == 1)
    plan, accuracy, _ = [block for section in sections for block in section.blocks if isinstance(block, Table)]
    assert [row[0] for row in accuracy.rows] == list(RULES)
    assert [row[:5] for row in plan.rows] == [("4", "1", "0.100", "0.25", "4"), ("16", "4", "0.200", "1", "4")]


@pytest.mark.parametrize("seconds, count, epochs", [(4.0, 1, 6), (25.0, 3, 16)])
def test_a_quick_run_has_less_of_everything(seconds, count, epochs, chapter, monkeypatch, data):
    class Asked(Exception):
        pass

    def train_all(seeds, setting, *others):
        raise Asked(seeds, setting.epochs, torch.get_num_threads())

    monkeypatch.setattr(chapter, "digits", lambda: data)
    monkeypatch.setattr(chapter, "train_all", train_all)
    torch.set_num_threads(2)
    with pytest.raises(Asked) as asked:
        chapter.run(demo.Budget(seconds, 7))
    assert asked.value.args == ([7 + k for k in range(count)], epochs, 1)
    assert torch.get_num_threads() == 2


def runs(*accuracies):
    return [SimpleNamespace(accuracy=value) for value in accuracies]


def test_the_verdict_follows_the_numbers(chapter):
    said = chapter._verdict(OURS, runs(0.95, 0.97), runs(0.955, 0.96), 32)
    assert said == "LEGW keeps its accuracy with 32 times the batch: 96.0 to 95.8 %."
    said = chapter._verdict(LINEAR, runs(0.95, 0.97), runs(0.5, 0.7), 8)
    assert said == "Linear scaling loses 36.0 points of accuracy with 8 times the batch: 96.0 to 60.0 %."


def test_the_comparison_follows_the_numbers(chapter):
    said = chapter._against(LINEAR, runs(0.9, 0.91, 0.92), runs(0.8, 0.81, 0.82), 4)
    expected = "Against linear scaling, with 4 times the batch, the accuracy of LEGW in points is 10.0 ± 0.0 higher."
    assert said == expected
    said = chapter._against(NONE, runs(0.80, 0.81), runs(0.90, 0.81), 8)
    assert said.endswith("in points is 5.0 ± 63.5 lower, which 2 seeds do not tell from no difference.")

"""The chapter on TAWT: its data against what Python says of it, its trainings, and a tiny run of all of it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fastseq import demo
from fastseq.demo import python_tags, report, tawt_training
from fastseq.demo.python_tags import NONE, TAGS, TASKS, Corpus, Windows, corpus, tagged
from fastseq.demo.report import Chapter, Table
from fastseq.demo.tawt_training import (
    FIXED,
    JOINT,
    KINDS,
    LEARNED,
    LONG,
    NORMALIZED,
    PRETRAINING,
    SCHEDULE,
    SINGLE,
    TARGET,
    Setting,
)
from tests.test_demo import check_page
from tests.tolerance import assert_same_bits

TINY = Setting(H=6, target=8, source=16, batch=4, epochs=2, tuning=4)


@pytest.fixture(scope="module")
def data():
    return corpus(4, 80, 12)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# --- the tags


def tags(text, task):
    return [
        (token.text, TAGS[task][tag]) for token in tagged(text) for tag in [token.tags[TASKS.index(task)]] if tag >= 0
    ]


SOURCE = """\
class Box(Base):
    side = 2

    async def area(self, *sizes, unit=b"m"):
        # a comment
        self.all, n = [k.value for k in sizes], f"{unit.x}"
        return scale(self.side ** 1.5, by=sizes[0]) if n else {}
"""


def test_roles_of_names():
    assert tags(SOURCE, "name role") == [
        ("Box", "class"),
        ("Base", "loaded"),
        ("side", "stored"),
        ("area", "function"),
        ("self", "parameter"),
        ("sizes", "parameter"),
        ("unit", "parameter"),
        ("self", "loaded"),
        ("all", "attribute"),
        ("n", "stored"),
        ("k", "loaded"),
        ("value", "attribute"),
        ("k", "stored"),
        ("sizes", "loaded"),
        ("scale", "called"),
        ("self", "loaded"),
        ("side", "attribute"),
        ("by", "keyword argument"),
        ("sizes", "loaded"),
        ("n", "loaded"),
    ]
    assert tags("a.b(c)(d=e)\n", "name role")[:3] == [("a", "loaded"), ("b", "method"), ("c", "loaded")]


def test_types_and_operator_classes():
    found = dict(tags(SOURCE, "token type"))
    for text, tag in (("class", "keyword"), ("Box", "name"), ("2", "integer"), ("1.5", "other number")):
        assert found[text] == tag
    assert found['b"m"'] == "bytes" and found["**"] == "operator" and found["\n"] == found["<indent>"] == "layout"
    found = dict(tags(SOURCE, "operator class"))
    classes = {"class": "definition", "(": "open", "}": "close", "=": "assign", "**": "arithmetic", "return": "flow"}
    assert {text: found[text] for text in classes} == classes
    assert found["in"] == "compare" and "Box" not in found and "# a comment" not in found


def test_contexts_are_of_what_is_innermost():
    found = tags("x = f(a[1], (2, g(3)))\ndef h(y): return [z for z in y]\n", "context")
    by = {text: context for text, context in found}
    inside = {"x": "module", "f": "module", "a": "call", "1": "subscript", "2": "collection", "3": "call"}
    inside |= {"g": "collection", "y": "comprehension", "return": "function", "h": "signature", "z": "comprehension"}
    assert {text: by[text] for text in inside} == inside


def test_windows_are_of_other_files_and_the_same_each_time(data):
    assert data.training.x.shape == (80, python_tags.T) and data.test.x.shape == (12, python_tags.T)
    again = corpus.__wrapped__(4, 80, 12)
    assert_same_bits(
        "x labels", (data.training.x, data.test.labels["context"]), (again.training.x, again.test.labels["context"])
    )
    rows = [set(map(tuple, part.x.tolist())) for part in (data.training, data.test)]
    assert not rows[0] & rows[1]
    for task in TASKS:
        labels = data.training.labels[task]
        assert ((labels >= 0) & (labels < len(TAGS[task])) | (labels == NONE)).all() and (labels >= 0).any()
    assert 0 < int((data.training.x == 0).sum()) < data.training.x.numel() / 2


# --- the trainings


def test_each_task_has_windows_of_its_own(data):
    numbered = Corpus(Windows(torch.arange(80)[:, None].expand(80, python_tags.T), data.training.labels), data.test)
    found = tawt_training.batches(3, TINY, numbered)
    assert [len(b.x) for b in found] == [16, 16, 16, 8] and [len(b) for b in found] == [4, 4, 4, 2]
    assert len({int(x) for b in found for x in b.x[:, 0]}) == 56
    for task, b in zip(TASKS, found, strict=True):
        assert torch.equal(b.labels, data.training.labels[task][b.x[:, 0]])
    assert sorted(int(n) for x, _ in found[0] for n in x[:, 0]) == sorted(found[0].x[:, 0].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_of_each_kind(kind, data):
    first, again = (tawt_training.train(kind, 1, TINY, data) for _ in range(2))
    assert first.accuracy == again.accuracy and first.weights == again.weights
    steps = {SINGLE: 4, LONG: 28, PRETRAINING: 28, JOINT: 28, NORMALIZED: 28}
    assert first.steps == steps[kind[0]]
    last = first.weights[-1] if first.weights else None
    if kind[0] in (SINGLE, LONG):
        assert last is None
    elif kind[1] == LEARNED:
        assert len(set(last)) == 4 and (last[TARGET] == 0) == (kind[0] == PRETRAINING)
    else:
        assert len(set(last[:TARGET])) == 1
        equal = {JOINT: 1 / 4, NORMALIZED: 2 / 5, PRETRAINING: 0}[kind[0]]
        assert (last[TARGET] == pytest.approx(equal)) == (kind[1] == FIXED or kind[0] == PRETRAINING)


def test_rates_fall_to_zero_in_each_stage():
    assert [tawt_training._left(step, [2, 4]) for step in range(7)] == [1, 0.5, 1, 0.75, 0.5, 0.25, 0]


def test_a_training_learns(data):
    setting = dataclasses.replace(TINY, H=16, epochs=30, target=32)
    assert tawt_training.train((LONG, FIXED), 0, setting, data).accuracy > 0.6  # 0.46 are of the most frequent tag


def test_seeds_that_do_not_fit_are_left_out(data):
    told = []
    kinds = [(LONG, FIXED), (JOINT, LEARNED)]
    runs = tawt_training.train_all([5, 6], kinds, TINY, data, 0.0, lambda done, note: told.append((done, note)))
    assert [(r.seed, r.kind) for r in runs] == [(5, kind) for kind in kinds]
    assert told[-1] == (1.0, "out of time")


# --- the chapter


@pytest.fixture
def chapter():
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    from fastseq.demo.chapters import tawt

    return tawt


@pytest.mark.parametrize("seeds", [1, 2])
def test_tawt_chapter(seeds, chapter, tmp_path):
    stages = []
    budget = demo.Budget(60.0, 5, lambda stage, done, note: stages.append((stage, done)))
    kinds = KINDS if seeds == 1 else chapter._QUICK.kinds
    sections = chapter.run(budget, chapter.Sizes(seeds=seeds, files=4, tests=12, kinds=kinds, setting=TINY))
    assert stages[-1] == ("weighted tasks", 1.0)
    out = tmp_path / "r.html"
    report.write(out, "fastseq demo", [("seed", "5")], [Chapter(chapter.TITLE, sections)])
    words = " ".join(check_page(out.read_text(encoding="utf-8")).words)
    for part in ("Normalized joint: learned weights against schedule only", "against the target alone for long:"):
        assert part in words
    assert ("without an interval" in words) == (seeds == 1)
    example, accuracy = [block for section in sections for block in section.blocks if isinstance(block, Table)]
    assert ("area", "name", "-", "signature", "function") in example.rows
    assert [row[:2] for row in accuracy.rows] == [tuple(kind) for kind in kinds]


@pytest.mark.parametrize("seconds, count, epochs", [(4.0, 1, 5), (20.0, 3, 8)])
def test_a_quick_run_has_less_of_everything(seconds, count, epochs, chapter, monkeypatch, data):
    class Asked(Exception):
        pass

    def train_all(seeds, kinds, setting, *others):
        raise Asked(seeds, setting.epochs, torch.get_num_threads())

    monkeypatch.setattr(chapter, "corpus", lambda *sizes: data)
    monkeypatch.setattr(chapter, "train_all", train_all)
    torch.set_num_threads(2)
    with pytest.raises(Asked) as asked:
        chapter.run(demo.Budget(seconds, 7))
    assert asked.value.args == ([7 + k for k in range(count)], epochs, 1)
    assert torch.get_num_threads() == 2


def test_what_is_said_follows_the_numbers(chapter):
    def runs(*accuracies):
        return [SimpleNamespace(accuracy=value) for value in accuracies]

    cells = {
        (LONG, FIXED): runs(0.9, 0.91),
        (JOINT, SCHEDULE): runs(0.7, 0.8),
        (JOINT, LEARNED): runs(0.75, 0.85),
    }
    said = [block.text for block in chapter._in_short(cells).blocks]
    assert said[0] == "Joint: learned weights against schedule only, accuracy in points: 5.00 ± 0.00 higher."
    assert said[1].startswith(
        "Joint, learned weights, against the target alone for long: 10.50 ± 57.18 lower, which 2 "
    )

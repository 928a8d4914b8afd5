"""The chapter on MIMO: its images, its training, what it says of its numbers, and a tiny run of all of it."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import fastseq.nn
from fastseq import demo
from fastseq.demo import mimo_deployed, mimo_digits, mimo_training, report
from fastseq.demo.mimo_digits import Digits, Images
from fastseq.demo.mimo_training import KINDS, PLAIN, Figures, Setting, predict
from fastseq.demo.report import Chapter, Picture, Table
from fastseq.functional import ensemble_stats
from tests.test_demo import check_page
from tests.tolerance import assert_same_bits, assert_within_budget

TINY = Setting(H=12, steps=20, batch=16, R=2)
HALF = "MIMO, ρ = 0.5"


def images(count: int, generator: torch.Generator) -> Images:
    """A bright row on black, which is the label."""
    labels = torch.randint(8, (count,), generator=generator)
    x = 0.2 * torch.rand(count, 8, 8, generator=generator)
    x[torch.arange(count), labels] += 0.7
    return Images(x, labels)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    training, held_out, test = (images(count, generator) for count in (80, 30, 40))
    noisy = test.x + 0.3 * torch.randn(test.x.shape, generator=generator)
    return Digits(training, held_out, test, test._replace(x=noisy.clamp(0, 1)))


# --- images


def test_digits_are_split_and_only_the_shifted_ones_differ():
    pytest.importorskip("sklearn", reason="the demo extra is not installed")
    found, again = mimo_digits.digits(), mimo_digits.digits()
    assert [len(part.x) for part in found] == [1000, 297, 500, 500]
    for part, other in zip(found, again, strict=True):
        assert torch.equal(part.x, other.x)
        assert part.x.shape[1:] == (8, 8)
        assert (float(part.x.min()), float(part.x.max())) == (0.0, 1.0)
        assert set(part.labels.tolist()) == set(range(10))
    assert torch.equal(found.test.labels, found.shifted.labels)
    assert not torch.equal(found.test.x, found.shifted.x)
    seen = {tuple(x.flatten().tolist()) for x in found.training.x}
    assert not any(tuple(x.flatten().tolist()) in seen for part in found[1:3] for x in part.x)


def test_turned_by_a_quarter():
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))

    def quarters(x):
        return torch.stack([x[0], x[1].rot90(1), x[2].rot90(2)])

    found = mimo_digits.turned(x, torch.tensor([0.0, 90.0, 180.0]))
    # the angles' sines are rounded, so a pixel takes as much of its neighbour as a distance of 4 * 1e-7 lets in
    assert float((found - quarters(x)).abs().max()) < 1e-5


# --- training


def test_an_ensemble_begins_with_the_one_lstm(data):
    told = []
    runs = mimo_training.train_all([3], TINY, data, 0.0, lambda done, note: told.append((done, note)))
    assert [(r.kind, r.seed) for r in runs] == [(kind, 3) for kind in KINDS]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (1.0, "")
    plain, ensemble, *mimo = runs
    assert ensemble.networks[0] is plain.networks[0]
    assert len(ensemble.networks) == 3
    assert ensemble.parameters == 3 * plain.parameters
    logits = predict(ensemble.networks, data.test.x)
    assert logits.shape == (40, 3, 10)
    assert_same_bits("logits", logits[:, :1], predict(plain.networks, data.test.x))
    assert not torch.equal(logits[:, 0], logits[:, 1])
    for r in mimo:
        (network,) = r.networks
        assert isinstance(network, fastseq.nn.MIMO)
        assert network.first.is_folded
        assert not network.training
    assert {len(r.steps) for r in runs} == {TINY.steps}


def test_the_folded_network_is_the_ensemble_of_its_slots(data):
    network, _ = mimo_training.train(0.5, 0, TINY, data.training)
    found = predict([network], data.test.x)
    network.unfold()

    def slots(double, x):
        tiled = x[:, None].expand(-1, 3, -1, -1)
        return network.to(double.dtype)(tiled.contiguous(), mode="multiplex")

    with torch.no_grad():
        assert_within_budget("logits", found, slots, [torch.zeros(1), data.test.x])


def test_all_kinds_learn(data):
    runs = mimo_training.train_all([0], Setting(H=16, steps=150, batch=32), data, 0.0, lambda done, note: None)
    for r in runs:
        assert r.clean.accuracy > 0.5, r.kind  # one in eight by chance


def test_seeds_that_do_not_fit_are_left_out(data):
    told = []
    runs = mimo_training.train_all([0, 1, 2], TINY, data, 0.0, lambda done, note: told.append(note))
    assert {r.seed for r in runs} == {0}
    assert told[-1] == "out of time"


def test_figures_are_those_of_the_mean():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]]])
    labels = torch.tensor([0, 1, 0])
    found = Figures.of(logits, labels)
    p = logits.double().softmax(-1).mean(1)
    right = p[torch.arange(3), labels]
    expected = (2 / 3, -right.log().mean(), 2 * ((1 - right) ** 2).mean(), 2 / 3, 2 / 3, p.amax(1).mean())
    got = (found.accuracy, found.nll, found.brier, found.member_accuracy, found.disagreement, found.confidence)
    assert got == pytest.approx([float(value) for value in expected], rel=1e-6)
    assert float(found.histogram[0].sum()) == 3


# --- without torch


def test_a_process_without_torch_says_the_same(data):
    network, _ = mimo_training.train(0.0, 1, TINY, data.training)
    found = mimo_deployed.answers(network, 0.5, data.shifted)

    def by_torch(double, x):
        stats = ensemble_stats(network.to(double.dtype)(x) / 0.5)
        return stats.probability, stats.disagreement

    with torch.no_grad():
        assert_within_budget("probability disagreement", found[:2], by_torch, [torch.zeros(1), data.shifted.x])
    assert found.bytes > 4 * 4 * 12 * (8 + 12)
    assert found.microseconds > 0


# --- the chapter


@pytest.fixture
def chapter():
    for module in ("matplotlib", "sklearn"):
        pytest.importorskip(module, reason="the demo extra is not installed")
    from fastseq.demo.chapters import mimo

    return mimo


@pytest.mark.parametrize("seeds", [1, 2])
def test_mimo_chapter(seeds, chapter, tmp_path, monkeypatch, data):
    monkeypatch.setattr(chapter, "digits", lambda: data)
    stages = []
    budget = demo.Budget(2.0 if seeds == 2 else 0.2, 5, lambda stage, done, note: stages.append((stage, done)))
    sections = chapter.run(budget, chapter.Sizes(seeds=seeds, setting=TINY))
    ended = {stage for stage, done in stages if done == 1}
    assert ended == {"training ensembles", "timing ensembles", "drawing ensembles"}
    out = tmp_path / "r.html"
    report.write(out, "fastseq demo", [("seed", "5")], [Chapter(chapter.TITLE, sections)])
    page = check_page(out.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 8  # a row of images, two of two diagrams, a row of curves
    words = " ".join(page.words)
    for part in (
        "on shifted images",
        "A temperature fitted on MIMO",
        "split_ensemble",
        "fresh weights; parameters",
        "ECE 0.",
    ):
        assert part in words
    assert ("One seed on one machine" in words) == (seeds == 1)
    tables = [block for section in sections for block in section.blocks if isinstance(block, Table)]
    assert not re.search(r"\bnan\b|\binf\b", str([table.rows for table in tables]))
    assert sum(isinstance(block, Picture) for section in sections for block in section.blocks) == 4


@pytest.mark.parametrize("seconds, count, steps", [(7.0, 1, 200), (40.0, 5, 400)])
def test_a_quick_run_has_less_of_everything(seconds, count, steps, chapter, monkeypatch, data):
    class Asked(Exception):
        pass

    def train_all(seeds, setting, *others):
        raise Asked(seeds, setting.steps, torch.get_num_threads())

    monkeypatch.setattr(chapter, "digits", lambda: data)
    monkeypatch.setattr(chapter, "train_all", train_all)
    torch.set_num_threads(2)
    with pytest.raises(Asked) as asked:
        chapter.run(demo.Budget(seconds, 7))
    assert asked.value.args == ([7 + k for k in range(count)], steps, 1)
    assert torch.get_num_threads() == 2


def results(accuracy, nll, ece=(0.1, 0.2, 0.3), brier=(0.1, 0.2, 0.3), temperature=1.0):
    """Runs with these values, one per seed, of clean and shifted images alike."""

    def run(*values):
        found = Figures(*values, values[0], 0.1, values[0], torch.zeros(3, 15))
        parts = dict.fromkeys(("clean", "shifted", "warm_clean", "warm_shifted"), found)
        return SimpleNamespace(temperature=temperature, **parts)

    return [run(*values) for values in zip(accuracy, nll, ece, brier, strict=True)]


def test_the_verdict_follows_the_numbers(chapter):
    mine = results([0.90, 0.91, 0.92], [0.3, 0.4, 0.6], ece=[0.2, 0.3, 0.4])
    theirs = results([0.86, 0.87, 0.88], [0.3, 0.5, 0.5])
    said = chapter._verdict(HALF, mine, theirs, PLAIN)
    assert said == (
        "MIMO, ρ = 0.5 in place of one LSTM: on clean images it is better in accuracy, worse in ECE, not told apart in "
        "NLL and Brier (accuracy from 87.0 to 91.0 %, NLL from 0.433 to 0.433); on shifted images it is better in "
        "accuracy, worse in ECE, not told apart in NLL and Brier (accuracy from 87.0 to 91.0 %, NLL from 0.433 to "
        "0.433). Of 8 figures: 2 better, 2 worse, 4 not told apart."
    )
    lost = results([0.80, 0.81, 0.82], [1.3, 1.4, 1.5])
    said = chapter._verdict(HALF, lost, theirs, PLAIN)
    assert "worse in accuracy and NLL, not told apart in ECE and Brier" in said
    assert "Of 8 figures: 0 better, 4 worse, 4 not told apart. It loses more than it wins" in said
    assert "loses more" not in chapter._verdict(HALF, theirs, lost, PLAIN)
    one = chapter._verdict(HALF, mine[:1], theirs[:1], PLAIN)  # without an interval any difference counts
    assert "better in accuracy, worse in ECE, not told apart in NLL and Brier" in one


def test_what_a_temperature_does_follows_the_numbers(chapter):
    mine, theirs = (results([0.9] * 3, [0.2, 0.2, v], temperature=t) for v, t in ((0.2, 0.5), (0.3, 1.5)))
    said = chapter._warm_verdict(HALF, mine, theirs)
    assert "is 0.50, which sharpens them; that of one LSTM is 1.50, which softens them." in said
    assert "on clean images MIMO, ρ = 0.5 is not told apart in accuracy, NLL, ECE and Brier" in said


def test_what_the_mean_adds_follows_the_numbers(chapter):
    def part(accuracy, member, apart):
        return SimpleNamespace(accuracy=accuracy, member_accuracy=member, disagreement=apart)

    clean, shifted = part(0.9, 0.8, 0.25), part(0.7, 0.6, 0.125)
    said = chapter._gap(HALF, [SimpleNamespace(clean=clean, shifted=shifted)])
    assert "right on 80.0 % of the clean and 60.0 % of the shifted images, their mean on 90.0 % and 70.0 %" in said
    assert "They disagree no more where images are shifted: 12.5 % of their pairs against 25.0 %." in said
    said = chapter._gap(HALF, [SimpleNamespace(clean=shifted, shifted=clean)])
    assert "They disagree more where images are shifted: 25.0 % of their pairs against 12.5 %." in said


def test_who_is_honest_about_turned_images_follows_the_numbers(chapter):
    def turned(accuracy, confidence):
        return [SimpleNamespace(at_angles=[None, SimpleNamespace(accuracy=accuracy, confidence=confidence)])]

    said = chapter._far({PLAIN: turned(0.11, 0.8), HALF: turned(0.12, 0.26)})
    assert said == (
        "With images turned by 90 degrees, from the most to the least honest: MIMO, ρ = 0.5 is right on 12 % and sure "
        "by 26 % and one LSTM is right on 11 % and sure by 80 %."
    )


def test_figures_beside_each_other(chapter):
    from matplotlib.figure import Figure

    from fastseq.demo import pictures

    def figures():
        made = []
        for width in (2.0, 3.0):
            figure = Figure(figsize=(width, width))
            axes = figure.add_subplot()
            axes.plot([0, 1], [0, 1], label=f"line {width:g}")
            axes.legend()
            made.append(figure)
        return made

    svg = pictures.beside(figures)
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert 'viewBox="0 0 360 216"' in svg  # points: 144 and 216 wide
    assert re.search(r'<svg [^>]*x="144"[^>]*width="216"', svg)
    assert "var(--ground)" in svg
    assert "currentColor" in svg
    page = check_page(report.html("t", [], [Chapter("c", [report.Section("s", [Picture(svg, "seen")])])]))
    assert {"line 2", "line 3"} <= {word.strip() for word in page.words}

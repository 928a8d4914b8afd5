"""The chapter on vector quantization: its patches, its statistics, its training, and a tiny run of all of it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastseq.nn
from fastseq import demo
from fastseq.demo import report, vq_autoencoder, vq_photographs, vq_timing, vq_training
from fastseq.demo.report import Chapter, Picture, Section, Table
from fastseq.demo.vq_autoencoder import AVERAGES, GRADIENT, RECIPES, ROBUST
from fastseq.demo.vq_photographs import Patches, Photographs
from fastseq.demo.vq_spread import Spread, difference
from fastseq.demo.vq_timing import NONE, OURS, THEIRS, Timed
from fastseq.demo.vq_training import Measured, Setting
from tests.test_demo import Page, check_page

TINY = Setting(side=4, N=128, hidden=8, D=4, rate=3e-3, rounds=5)


@pytest.fixture(scope="module")
def noise():
    """Two photographs of 16 x 24 random pixels."""
    generator = torch.Generator().manual_seed(0)
    return Photographs(4, *(torch.rand(16, 24, 3, generator=generator) - 0.5 for _ in range(2)))


@pytest.fixture
def small_reservoir(monkeypatch):
    monkeypatch.setattr(vq_autoencoder, "reservoir_size", lambda K: 256)


# --- photographs


def test_the_photographs_are_cut_to_patches():
    for module in ("sklearn", "PIL"):
        pytest.importorskip(module, reason="the demo extra is not installed")
    found = vq_photographs.photographs(5)
    for image in (found.training, found.held_out):
        assert image.shape == (425, 640, 3)
        assert image.min() == -0.5
        assert image.max() <= 0.5
        assert image.std() > 0.1
    assert not torch.equal(found.training, found.held_out)


def test_patches_make_the_image_again(noise):
    rows = vq_photographs.patches(noise.training, 4)
    assert rows.shape == (24, 48)
    assert torch.equal(rows[7].view(4, 4, 3), noise.training[4:8, 4:8])  # the second of the second row
    assert torch.equal(vq_photographs.image_of(rows, 16, 24, 4), noise.training)


def test_training_patches_are_laid_out_as_those_that_are_measured(noise):
    image = noise.training[:5, :4]  # a window of 4 x 4 fits in two places
    places = torch.cat([vq_photographs.patches(image[k : k + 4], 4) for k in (0, 1)])
    batch = next(Patches(image, 4, 50, 0))
    which = (batch[:, None] == places).all(-1)
    assert which.any(1).all()
    assert which.any(0).all()


def test_training_patches_follow_the_seed(noise):
    one, same, other = (Patches(noise.training, 4, 20, seed) for seed in (1, 1, 2))
    first = next(one)
    assert torch.equal(first, next(same))
    assert not torch.equal(first, next(other))
    assert not torch.equal(first, next(one))


# --- statistics


def test_interval_of_the_mean():
    assert Spread.of([1.0, 2.0, 3.0]).text(2) == "2.00 ± 2.48"  # 4.303 / sqrt(3)
    assert Spread.of([0.0, 2000.0]).text(0) == "1,000 ± 12,706"
    assert Spread.of([4.0]) == Spread(4.0, None)
    assert Spread.of([4.0]).text(1) == "4.0"


def test_a_difference_says_which_way_it_points_and_whether_it_is_one():
    assert difference([1.0, 2.0, 3.0], [3.0, 4.0, 5.0], 1) == "2.0 ± 0.0 lower"
    assert difference([3.0, 4.1, 5.0], [1.0, 2.0, 3.0], 1) == "2.0 ± 0.1 higher"
    assert difference([1.0, 5.0], [3.0, 4.0], 1) == "0.5 ± 19.1 lower, which 2 seeds do not tell from no difference"
    assert difference([1.0], [2.0], 1) == "1.0 lower, with one seed and so without an interval"


# --- training


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_differ_in_the_quantizer_alone(recipe, noise):
    run = vq_training.runner(recipe, 16, 3, TINY, noise.training)
    other = vq_training.autoencoder(TINY, 3)
    for name, value in other.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value)
    assert torch.equal(next(run.batches), next(Patches(noise.training, 4, TINY.N, 3)))
    quantizer = run.model.quantizer
    assert isinstance(quantizer, fastseq.nn.VectorQuantize)
    assert isinstance(quantizer._codebook.embed, nn.Parameter) == (recipe != AVERAGES)
    assert (quantizer.batch_norm_at, quantizer.reinit is None) == (
        ("codes", False) if recipe == ROBUST else (None, True)
    )
    rates = {id(p): group["lr"] / TINY.rate for group in run.optimiser.param_groups for p in group["params"]}
    assert rates.keys() == {id(p) for p in run.model.parameters()}
    assert {rate for key, rate in rates.items() if key != id(quantizer._codebook.embed)} == {1.0}
    assert rates.get(id(quantizer._codebook.embed)) == {GRADIENT: 1.0, AVERAGES: None, ROBUST: 10.0}[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_learn(recipe, noise, small_reservoir):
    run = vq_training.runner(recipe, 16, 0, TINY, noise.training)
    rows = vq_photographs.patches(noise.training, 4)
    errors = []
    for _ in range(4):
        for _ in range(40):
            run.step(0.0)
        errors.append(vq_training.measure(run.model, rows, 16).error)
        fastseq.nn.next_epoch(run.model)
    assert errors[-1] < errors[-3]  # both with codes


@pytest.fixture
def slow_steps(monkeypatch):
    """A clock on which a training step takes 10 ms and nothing else takes any time."""
    now, step = [0.0], vq_training.train_step

    def train_step(*args):
        step(*args)
        now[0] += 0.01

    monkeypatch.setattr(vq_training, "train_step", train_step)
    monkeypatch.setattr(vq_training, "time", SimpleNamespace(perf_counter=lambda: now[0]))


def test_training_keeps_the_clocks(noise, small_reservoir, slow_steps, caplog):
    kinds = [(recipe, 16) for recipe in RECIPES]
    told = []
    with caplog.at_level(logging.WARNING, "fastseq"):
        found = vq_training.train_all(kinds, [0, 1], TINY, noise, 1.5, lambda done, note: told.append(done))
    assert not caplog.records  # no new codes were left out for lack of rows
    assert (found.seeds, found.out_of_time, told[-1]) == ([0, 1], False, 1.0)
    assert told == sorted(told)
    assert [(r.recipe, r.K, r.seed) for r in found.runners] == [(*kind, seed) for seed in (0, 1) for kind in kinds]
    for run in found.runners:
        assert len(run.curve) == len(run.clocks) == TINY.rounds
        assert run.clocks == sorted(run.clocks)
        assert [point is None for point in run.curve] == [run.recipe == ROBUST] + [False] * 4
        assert run.seconds >= found.seconds
        for point in (*run.curve, run.held_out):
            assert point is None or 1 <= point.perplexity <= point.used <= 16
    assert [r.recipe for r in found.of(ROBUST, 16)] == [ROBUST] * 2
    (reinit,) = (m for m in found.of(ROBUST, 16)[0].model.modules() if isinstance(m, fastseq.nn.Reinit))
    assert (reinit.active, reinit.epoch) == (False, TINY.rounds + 1)


def test_the_last_learning_rate_is_a_tenth(noise):
    run = vq_training.runner(GRADIENT, 8, 0, TINY, noise.training)
    run.step(1.0)
    assert [f"{group['lr'] / TINY.rate:.6f}" for group in run.optimiser.param_groups] == ["0.100000"]


def test_without_time_one_seed_is_trained_whole(noise, small_reservoir):
    told = []
    found = vq_training.train_all([(ROBUST, 8)], [4, 5], TINY, noise, 0.0, lambda done, note: told.append(note))
    assert (found.seeds, found.out_of_time, told[-1]) == ([4], True, "out of time")
    (run,) = found.runners
    assert len(run.curve) == TINY.rounds
    assert len(run.steps) >= 3 * 3 + 2  # 256 rows, and one to make codes of them, in three of five epochs


def test_error_is_in_steps_of_the_pixels(noise):
    class Half(nn.Module):
        def forward(self, x):
            return x + 0.5 / 255, torch.zeros(len(x), dtype=torch.int64), x.new_zeros(())

    found = vq_training.measure(Half(), vq_photographs.patches(noise.training, 4), 7)
    assert (f"{found.error:.4f}", found.perplexity, found.used) == ("0.5000", 1.0, 1)


# --- timing


def test_both_libraries_do_the_same_work(noise):
    pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    told = []
    kinds = [(GRADIENT, 8), (AVERAGES, 16)]
    found = vq_timing.time_all(kinds, 0, TINY, noise, 0.0, lambda done, note: told.append(note))
    assert [(t.recipe, t.K) for t in found] == kinds
    for timed in found:
        assert set(timed.milliseconds) == {OURS, THEIRS, NONE}
        assert {len(values) for values in timed.milliseconds.values()} == {1}
        assert timed.equal == 1.0
    assert told[0] == f"K 8, {GRADIENT}"


def test_ratio_is_taken_within_a_turn():
    timed = Timed(AVERAGES, 8, {OURS: [1.0, 2.0, 4.0], THEIRS: [3.0, 6.0, 12.0], NONE: [1.0] * 3}, 1.0)
    assert timed.ratio() == (3.0, 3.0, 3.0)


# --- the chapter


@pytest.fixture
def chapter(monkeypatch, small_reservoir):
    for module in ("matplotlib", "sklearn", "PIL"):
        pytest.importorskip(module, reason="the demo extra is not installed")
    from fastseq.demo.chapters import vq

    return vq


@pytest.mark.parametrize("compared", [True, False])
def test_vq_chapter(compared, chapter, tmp_path, monkeypatch):
    if compared:
        pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    else:
        monkeypatch.setattr(vq_timing, "find_spec", lambda name: None)
    stages = []
    budget = demo.Budget(1.5, 5, lambda stage, done, note: stages.append((stage, done)))
    recipes = RECIPES if compared else (AVERAGES, ROBUST)
    sizes = chapter.Sizes(K=(6, 16), seeds=2 if compared else 1, recipes=recipes, setting=replace(TINY, rounds=4))
    sections = chapter.run(budget, sizes)
    assert {stage for stage, done in stages if done == 1} == {
        "training quantizers",
        "timing quantizers",
        "drawing photographs",
    }
    out = tmp_path / "r.html"
    report.write(out, "fastseq demo", [("seed", "5")], [Chapter(chapter.TITLE, sections)])
    page = check_page(out.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == (6 if compared else 5)
    words = " ".join(page.words)
    for part in ("K = 16: after ", "held-out photograph", "perplexity", "Reconstruction error over time"):
        assert part in words
    assert ("vector-quantize-pytorch is not installed" in words) == (not compared)
    assert ("their time to ours" in words) == compared
    assert ("and also trains plain by gradient" in words) == (not compared)
    tables = [block for section in sections for block in section.blocks if isinstance(block, Table)]
    assert {len(table.rows) for table in tables} == ({3, 4, 6} if compared else {2, 4})
    assert not re.search(r"\bnan\b|\binf\b", str([table.rows for table in tables]))


@pytest.mark.parametrize("seconds, quick", [(20.0, True), (90.0, False)])
def test_a_quick_run_has_less_of_everything(seconds, quick, chapter, monkeypatch):
    class Asked(Exception):
        pass

    def train_all(kinds, seeds, *others):
        raise Asked(kinds, seeds)

    monkeypatch.setattr(chapter, "train_all", train_all)
    with pytest.raises(Asked) as asked:
        chapter.run(demo.Budget(seconds, 7))
    kinds, seeds = asked.value.args
    assert seeds == ([7, 8, 9] if quick else [7, 8, 9, 10, 11])
    assert kinds == [(r, K) for K in (512, 4096) for r in ((AVERAGES, ROBUST) if quick else RECIPES)]


def results(errors, held_out, perplexities, seconds=2.0):
    """Runs with these values, one per seed."""

    def run(error, held, perplexity):
        return SimpleNamespace(seconds=seconds, end=Measured(error, perplexity, 9), held_out=Measured(held, 1.0, 9))

    return [run(*values) for values in zip(errors, held_out, perplexities, strict=True)]


def test_the_verdict_follows_the_numbers(chapter):
    mine = results([10.0, 11.0, 12.0], [20.0, 21.0, 22.0], [300.0, 301.0, 302.0])
    gradient = results([14.0, 15.0, 16.0], [18.0, 19.0, 20.0], [30.0, 31.0, 32.0])
    averages = results([15.0, 16.0, 17.0], [30.0, 31.0, 32.0], [40.0, 41.0, 42.0])
    said = chapter._verdict({GRADIENT: gradient, AVERAGES: averages, ROBUST: mine}, 512)
    assert said.startswith("K = 512: after the same time of training the robust recipe")
    assert "a perplexity of 301 ± 2 codes, against 41 ± 2 (plain by averages)." in said
    assert "on the training photograph is 11.0 ± 2.5 against 15.0 ± 2.5 (plain by gradient): 4.0 ± 0.0 lower." in said
    assert "on the held-out one is 21.0 ± 2.5 against 19.0 ± 2.5 (plain by gradient): 2.0 ± 0.0 higher." in said
    slow = results([1.0], [1.0], [1.0], seconds=3.0)
    said = chapter._verdict({AVERAGES: averages[:1], ROBUST: slow}, 4096)
    assert "K = 4,096: after 3 seconds of training, longer than the 2 of the plain ones, the robust recipe" in said
    mixed = results([11.0, 10.0, 13.0], [20.0, 21.0, 22.0], [1.0, 1.0, 1.0])
    said = chapter._verdict({AVERAGES: mixed, ROBUST: mine}, 512)
    assert "0.3 ± 2.9 lower, which 3 seeds do not tell from no difference." in said


@pytest.mark.parametrize(
    "theirs, said", [([8.0] * 5, "faster"), ([1.0] * 5, "slower"), ([1.0, 1.0, 2.0, 4.0, 4.0], "not told apart")]
)
def test_the_speed_follows_the_numbers(theirs, said, chapter):
    timed = Timed(AVERAGES, 512, {OURS: [2.0] * 5, THEIRS: theirs, NONE: [1.0] * 5}, 1.0)
    assert chapter._faster(timed).endswith(f"in the middle 60 % of 5 turns): {said}.")


def test_pictures_of_photographs_and_bands(chapter):
    from fastseq.demo import pictures

    pixels = torch.arange(27, dtype=torch.uint8).view(3, 3, 3).numpy()
    svgs = [
        pictures.images([("K = 1", [("one <&>", pixels), ("two", pixels)]), ("K = 2", [("a", pixels), ("b", pixels)])]),
        pictures.bands([("$t$", "x", "y", {"a": ("#d9822b", [1.0, 2.0], [3.0, 4.0], [0.5, 0.0])})]),
    ]
    source = report.html(
        "t",
        [],
        [
            Chapter(
                "c",
                [
                    Section("s", [Picture(svg, "seen") for svg in svgs]),
                ],
            )
        ],
    )
    page = check_page(source)
    assert page.tags.count("svg") == 2
    assert page.tags.count("image") == 4
    assert {"one <&>", "K = 2", "$t$"} <= {word.strip() for word in page.words}


@pytest.mark.parametrize("lowest", [1.0, -1.0])
def test_bands_of_what_is_never_negative_begin_at_zero(lowest):
    pictures = pytest.importorskip("fastseq.demo.pictures", reason="matplotlib is not installed")
    svg = pictures.bands([("t", "x", "y", {"a": ("#d9822b", [0.0, 1.0], [lowest, 2.0], [50.0, 50.0])})])
    labels = [word.strip() for word in Page(svg).words]
    assert ("\N{MINUS SIGN}40" in labels) == (lowest < 0)
    assert "50" not in labels or lowest < 0


def test_bytes_of_pixels(chapter):
    values = torch.tensor([-0.6, -0.5, 0.0, 0.5, 0.7]).view(1, 5, 1)
    assert chapter._pixels(values).flatten().tolist() == [0, 0, 128, 255, 255]


def test_the_middle_is_cut_at_the_edges_of_patches(chapter, noise):
    assert torch.equal(chapter._middle(noise.training, 4), noise.training[:, 4:20])

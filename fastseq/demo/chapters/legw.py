"""LEGW (You et al. 2019): one tuned learning rate serves batches that grow, against two other rules."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastseq.demo import Budget, pictures
from fastseq.demo.legw_training import FIXED, LINEAR, NONE, OURS, RULES, Run, Setting, scheduled, train_all
from fastseq.demo.mimo_digits import Digits, digits
from fastseq.demo.mimo_training import RowLSTM, one_thread
from fastseq.demo.report import Picture, Section, Table, Text
from fastseq.demo.vq_spread import Spread, difference
from fastseq.recipes.legw_plan import rates_figure

TITLE = "A learning rate goes with the batch"
ABOUT = (
    "With more examples in each step (a larger batch) training is faster, but the learning rate that was tuned for a "
    "small batch no longer fits, and accuracy falls. LEGW (You et al. 2019) says how to change the rate, so that "
    "nothing is tuned anew: 16 times the batch takes 4 times the rate, reached as slowly as before. Less accuracy "
    "lost is better."
)
FULL_SECONDS, QUICK_SECONDS = 25.0, 4.0

_COLOURS = dict(zip(RULES, ("blue", "orange", "violet"), strict=True))
_POINTS = 1.0  # of accuracy: what is called kept


@dataclass(frozen=True)
class Sizes:
    """seeds: at most so many."""

    seeds: int = 3
    setting: Setting = field(default_factory=Setting)


_FULL, _QUICK = Sizes(), Sizes(seeds=1, setting=Setting(epochs=6, factors=(1, 16)))
Cells = Mapping[tuple[str, int], Sequence[Run]]  # by rule and k, in the order of the seeds


def run(budget: Budget, sizes: Sizes | None = None) -> list[Section]:
    """Train, measure and describe; see ``fastseq.demo``. sizes: None means less of all where there is little time."""
    sizes = sizes or (_FULL if budget.seconds >= FULL_SECONDS / 2 else _QUICK)
    data, seeds = digits(), [budget.seed + k for k in range(sizes.seeds)]

    def told(done: float, note: str) -> None:
        budget.progress("growing batches", done, note)

    with one_thread():
        found = train_all(seeds, sizes.setting, data, 0.9 * budget.seconds, told)
    cells = {
        (rule, k): [r for r in found if (r.rule, r.k) == (rule, k)] for rule in RULES for k in sizes.setting.factors
    }
    return [_in_short(cells, sizes), _setting(cells, sizes, data), _accuracy(cells, sizes), _losses(cells, sizes)]


def _percent(runs: Sequence[Run]) -> list[float]:
    """Accuracy of each seed."""
    return [100 * r.accuracy for r in runs]


def _in_short(cells: Cells, sizes: Sizes) -> Section:
    first, last = sizes.setting.factors[0], sizes.setting.factors[-1]
    lines = [_verdict(rule, cells[rule, first], cells[rule, last], last) for rule in RULES]
    lines += [_against(rule, cells[OURS, last], cells[rule, last], last) for rule in RULES if rule != OURS]
    small, large = (1e3 * statistics.median(r.seconds for r in cells[OURS, k]) for k in (first, last))
    lines.append(
        f"An epoch takes {small:.0f} ms with batches of {first * sizes.setting.base} and {large:.0f} ms with those of "
        f"{last * sizes.setting.base}, {small / large:.1f} times less."
    )
    return Section("In short", [Text(line) for line in lines])


def _verdict(rule: str, small: Sequence[Run], large: Sequence[Run], k: int) -> str:
    """From the measured values, whichever way they point."""
    before, after = (statistics.fmean(_percent(runs)) for runs in (small, large))
    word = "keeps" if after > before - _POINTS else "loses"
    what = "its accuracy" if word == "keeps" else f"{before - after:.1f} points of accuracy"
    return f"{rule[:1].upper() + rule[1:]} {word} {what} with {k} times the batch: {before:.1f} to {after:.1f} %."


def _against(rule: str, mine: Sequence[Run], theirs: Sequence[Run], k: int) -> str:
    said = difference(_percent(mine), _percent(theirs), 1)
    return f"Against {rule}, with {k} times the batch, the accuracy of {OURS} in points is {said}."


def _setting(cells: Cells, sizes: Sizes, data: Digits) -> Section:
    s, n = sizes.setting, len(cells[OURS, 1])
    schedules = [scheduled(RowLSTM(s.H), OURS, k, s, len(data.training.x)).schedule for k in s.factors]
    what = (
        f"An LSTM of {s.H} units (fastseq.nn.LSTM) reads the rows of scikit-learn's digits, {len(data.training.x):,} "
        f"for training and {len(data.test.x)} for the test. SGD with momentum 0.9, {s.epochs} epochs always; rate "
        f"{s.rate:g} and {s.warmup_epochs:g} epochs of warm-up were settled once for batches of {s.base}. "
        f"{n} seed{'s' if n > 1 else ''}"
        + (f", instead of {sizes.seeds}: the time ran out." if n < sizes.seeds else ".")
    )
    rules = (
        f"With k times the batch, {OURS} (fastseq.recipes.LEGW) takes sqrt(k) times the rate and k times the epochs of "
        f"warm-up, which are as many steps. {LINEAR.capitalize()} takes k times the rate and a warm-up of "
        f"{FIXED * s.epochs:g} epochs. {NONE.capitalize()}: nothing changes, and there is no warm-up."
    )
    head = ("batch", "k", "highest rate", "warm-up epochs", "warm-up steps", "steps")
    rows = [
        (f"{p.batch:g}", f"{p.k:g}", f"{s.rate * p.scale:.3f}", f"{p.warmup_epochs:g}", f"{p.warmup_steps:.0f}")
        + (f"{p.steps:,.0f}",)
        for p in schedules
    ]
    drawn = pictures.beside(lambda: [rates_figure(schedules, s.rate)])
    picture = Picture(drawn, f"The learning rate of {OURS} by epoch and by step", "As fastseq.recipes.plan draws it.")
    return Section(
        "What is compared", [Text(what), Text(rules), Table(head, rows, f"What {OURS} makes of each batch."), picture]
    )


def _accuracy(cells: Cells, sizes: Sizes) -> Section:
    s = sizes.setting
    several = len(cells[OURS, 1]) > 1
    rows = [(rule, *(Spread.of(_percent(cells[rule, k])).text(1) for k in s.factors)) for rule in RULES]
    head = ("rule", *(f"batch {k * s.base}" for k in s.factors))
    caption = "Accuracy on test images, %" + (": mean ± 95 % interval over seeds." if several else ", one seed.")
    times = [
        (f"batch {k * s.base}", f"{1e3 * statistics.median(r.seconds for r in cells[OURS, k]):.0f}") for k in s.factors
    ]
    return Section(
        "Accuracy while the batch grows",
        [Table(head, rows, caption), Table(("", "ms an epoch, one thread"), times)],
    )


def _losses(cells: Cells, sizes: Sizes) -> Section:
    s = sizes.setting

    def series(k: int) -> pictures.Series:
        return {
            rule: (
                pictures.COLOURS[_COLOURS[rule]],
                [float(epoch + 1) for epoch in range(s.epochs)],
                [statistics.fmean(r.losses[epoch] for r in cells[rule, k]) for epoch in range(s.epochs)],
            )
            for rule in RULES
        }

    panels = [("epoch", f"training loss, batch {k * s.base}", series(k)) for k in s.factors]
    picture = Picture(
        pictures.curves(panels),
        f"Training loss by epoch with batches of {', '.join(str(k * s.base) for k in s.factors)}",
        "Mean of an epoch's batches and of the seeds. While the rate warms up the loss of a large batch lags behind.",
    )
    return Section("On the way", [picture])

"""ADT (Dong et al. 2020): an LSTM that learns on the worst distribution of perturbations, against two others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fastseq.demo import Budget, pictures
from fastseq.demo.adt_training import KINDS, OURS, PGD, STANDARD, Run, Setting, train_all
from fastseq.demo.mimo_digits import Digits, digits
from fastseq.demo.mimo_training import one_thread
from fastseq.demo.report import Picture, Section, Table, Text
from fastseq.demo.vq_spread import Spread, difference
from fastseq.recipes import Threat, attacks

TITLE = "Learning on the worst of perturbations"
ABOUT = (
    "A change of a picture that is too small for the eye can make a network read another digit. Training on changed "
    "pictures helps against it. The usual way (PGD) trains on the one worst change that it finds, ADT (Dong et al. "
    "2020) on a whole distribution of bad ones. What counts is how many pictures stay right under attack: more is "
    "better."
)
FULL_SECONDS, QUICK_SECONDS = 20.0, 3.0

_COLOURS = dict(zip(KINDS, ("orange", "violet", "blue"), strict=True))
_SHOWN = 6  # images


@dataclass(frozen=True)
class Sizes:
    """seeds: at most so many."""

    seeds: int = 3
    setting: Setting = field(default_factory=Setting)


_FULL = Sizes()
_QUICK = Sizes(seeds=1, setting=Setting(H=32, steps=60, batch=32, radii=(0.0, 0.1), images=100))
Cells = Mapping[str, Sequence[Run]]  # by kind, in the order of the seeds


def run(budget: Budget, sizes: Sizes | None = None) -> list[Section]:
    """Train, attack and describe; see ``fastseq.demo``. sizes: None means less of all where there is little time."""
    sizes = sizes or (_FULL if budget.seconds >= FULL_SECONDS / 2 else _QUICK)
    data, seeds = digits(), [budget.seed + k for k in range(sizes.seeds)]

    def told(done: float, note: str) -> None:
        budget.progress("perturbed digits", done, note)

    with one_thread():
        found = train_all(seeds, sizes.setting, data, 0.9 * budget.seconds, told)
        cells = {kind: [r for r in found if r.kind == kind] for kind in KINDS}
        return [_in_short(cells, sizes), _setting(cells, sizes, data), _withstood(cells, sizes, data)]


def _percent(runs: Sequence[Run], k: int) -> list[float]:
    """What withstands the radius number k, of each seed."""
    return [100 * r.withstood[k] for r in runs]


def _in_short(cells: Cells, sizes: Sizes) -> Section:
    s = sizes.setting
    at = s.radii.index(s.eps)
    lines = []
    for kind in KINDS:
        clean, hit = (statistics.fmean(_percent(cells[kind], k)) for k in (0, at))
        name = kind[:1].upper() + kind[1:]
        lines.append(f"{name}: {clean:.1f} % of the test images right, {hit:.1f} % under attack with {s.eps:g}.")
    for other in (STANDARD, PGD):
        said = difference(_percent(cells[OURS], at), _percent(cells[other], at), 1)
        lines.append(f"Against {other}, what withstands the attacks with {OURS} is in points {said}.")
    times = {kind: statistics.median(r.seconds for r in cells[kind]) for kind in KINDS}
    lines.append(f"A step with {OURS} takes {times[OURS] / times[PGD]:.1f} times as long as one of {PGD}.")
    return Section("In short", [Text(line) for line in lines])


def _setting(cells: Cells, sizes: Sizes, data: Digits) -> Section:
    s, n = sizes.setting, len(cells[OURS])
    what = (
        f"An LSTM of {s.H} units (fastseq.nn.LSTM) reads the rows of scikit-learn's digits, pixels of 0 to 1, "
        f"{len(data.training.x):,} for training. {s.steps} steps of {s.batch} images. {n} seed{'s' if n > 1 else ''}"
        + (f", instead of {sizes.seeds}: the time ran out." if n < sizes.seeds else ".")
    )
    how = (
        f"Each pixel may be changed by at most {s.eps:g}, of which the training has all from its middle on. "
        f"{PGD} learns on images that 7 steps of the gradient's sign have made as bad as they could. {OURS} "
        "(fastseq.recipes.ADT) learns on samples of a distribution of perturbations, sought for each image in 7 steps "
        "of 5 samples, that is bad and spread out."
    )
    ms = [(kind, f"{1e3 * statistics.median(r.seconds for r in cells[kind]):.1f}") for kind in KINDS]
    return Section("What is compared", [Text(what), Text(how), Table(("", "ms a step, one thread"), ms)])


def _withstood(cells: Cells, sizes: Sizes, data: Digits) -> Section:
    s = sizes.setting
    rows = [(kind, *(Spread.of(_percent(cells[kind], k)).text(1) for k in range(len(s.radii)))) for kind in KINDS]
    several = ": mean ± 95 % interval over seeds." if len(cells[OURS]) > 1 else ", one seed."
    caption = "Test images that stay right whatever two attacks do, %, by the largest change of a pixel" + several
    series: pictures.Series = {
        kind: (
            pictures.COLOURS[_COLOURS[kind]],
            list(s.radii),
            [statistics.fmean(_percent(cells[kind], k)) for k in range(len(s.radii))],
        )
        for kind in KINDS
    }
    drawn = pictures.curves([("largest change of a pixel", "right under attack, %", series)])
    note = "The attacks are ones that no training has seen: 20 steps on the margin of logits, and MIM."
    table = Table(("training", *(f"{radius:g}" for radius in s.radii)), rows, caption)
    return Section(
        "What withstands",
        [
            Picture(drawn, "Right under attack by the largest change of a pixel", note),
            table,
            _shown(cells, sizes, data),
        ],
    )


def _shown(cells: Cells, sizes: Sizes, data: Digits) -> Picture:
    """Images, and what the attack on the margin makes of them, for the plain model and for ours."""
    x, labels = data.test.x[:_SHOWN], data.test.labels[:_SHOWN]
    lines = [("as they are", _row(x, [str(int(label)) for label in labels]))]
    for kind in (STANDARD, OURS):
        model = cells[kind][0].model
        hit = attacks.cw(model, x, labels, Threat(sizes.setting.eps, clamp=(0.0, 1.0)), steps=20)
        with torch.no_grad():
            said = model(hit).argmax(1)
        lines.append((kind, _row(hit, [f"read as {int(digit)}" for digit in said])))
    return Picture(pictures.images(lines), "Digits before and after an attack", "Each model is attacked on its own.")


def _row(x: torch.Tensor, titles: Sequence[str]) -> list[tuple[str, NDArray[np.uint8]]]:
    pixels = (255 * x).round().byte()[..., None].expand(-1, -1, -1, 3).numpy()
    return list(zip(titles, pixels, strict=True))

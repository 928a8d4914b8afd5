"""MIMO (Havasi et al., ICLR 2021) on an LSTM: an ensemble inside one network, against one LSTM and three of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseq.calibration import reliability_diagram
from fastseq.demo import Budget, mimo_deployed, pictures
from fastseq.demo.mimo_digits import DEGREES, NOISE, Digits, digits, turned
from fastseq.demo.mimo_training import (
    ANGLES,
    ENSEMBLE,
    KINDS,
    PLAIN,
    RHO,
    Figures,
    M,
    Run,
    Setting,
    one_thread,
    predict,
    train_all,
)
from fastseq.demo.race import time_in_turns
from fastseq.demo.report import Block, Picture, Section, Table, Text
from fastseq.demo.vq_spread import Spread

TITLE = "An ensemble inside one LSTM reads digits"
ABOUT = (
    "Several networks that vote (an ensemble) are more often right than one, and know better when they are unsure, "
    "but cost several times as much. MIMO (Havasi et al. 2021) trains several inside one network: it takes several "
    "images side by side and answers for each. With the same image in all places it is an ensemble for little more "
    "than the price of one. What counts is right answers, and probabilities that can be believed."
)
FULL_SECONDS, QUICK_SECONDS = 40.0, 7.0

_COLOURS = dict(zip(KINDS, ("orange", "violet", "green", "blue"), strict=True))
_PARTS = {"clean": "on clean images", "shifted": "on shifted images"}


@dataclass(frozen=True)
class Figure:
    """A column of the tables. better: 1 where more is better, -1 where less is, 0 where neither."""

    name: str
    value: Callable[[Figures], float]
    digits: int
    better: int


_ACCURACY = Figure("accuracy, %", lambda f: 100 * f.accuracy, 1, 1)
_NLL = Figure("NLL", lambda f: f.nll, 3, -1)
_ECE = Figure("ECE", lambda f: f.ece, 3, -1)
_BRIER = Figure("Brier", lambda f: f.brier, 3, -1)
_JUDGED = (_ACCURACY, _NLL, _ECE, _BRIER)
_MEMBERS = (
    Figure("accuracy of a member, %", lambda f: 100 * f.member_accuracy, 1, 0),
    Figure("disagreement", lambda f: f.disagreement, 3, 0),
)


@dataclass(frozen=True)
class Sizes:
    """seeds: at most so many."""

    seeds: int = 5
    setting: Setting = field(default_factory=Setting)


_FULL, _QUICK = Sizes(), Sizes(seeds=1, setting=Setting(steps=200))
Runs = Mapping[str, Sequence[Run]]  # by kind, in the order of the seeds


def run(budget: Budget, sizes: Sizes | None = None) -> list[Section]:
    """Train, measure and describe; see ``fastseq.demo``. sizes: None means less of all where there is little time."""
    with one_thread():
        return _run(budget, sizes or (_FULL if budget.seconds >= FULL_SECONDS / 2 else _QUICK))


def _run(budget: Budget, sizes: Sizes) -> list[Section]:
    data, seeds = digits(), [budget.seed + k for k in range(sizes.seeds)]
    found = train_all(seeds, sizes.setting, data, 0.8 * budget.seconds, _told(budget, "training ensembles"))
    runs = {kind: [r for r in found if r.kind == kind] for kind in KINDS}
    times = _timing(runs, data, 0.08 * budget.seconds, _told(budget, "timing ensembles"))
    budget.progress("drawing ensembles", 0.0, "")
    best = min(RHO, key=lambda kind: statistics.fmean(r.held_out.nll for r in runs[kind]))
    sections = [
        _in_short(runs, best, times),
        _setting(data, runs, sizes, best),
        _figures(runs),
        _temperature(runs),
        _diagrams(runs),
        _rotation(runs),
        _speed(times, runs, data),
        mimo_deployed.section(runs[best][0], data.shifted),
    ]
    budget.progress("drawing ensembles", 1.0, "")
    return sections


def _told(budget: Budget, stage: str) -> Callable[[float, str], None]:
    return lambda done, note: budget.progress(stage, done, note)


def _values(runs: Sequence[Run], part: str, figure: Figure) -> list[float]:
    """One of each seed; part: "clean", "shifted", "warm_clean" or "warm_shifted"."""
    return [figure.value(getattr(r, part)) for r in runs]


# --- what the numbers say


def _in_short(runs: Runs, best: str, times: Mapping[str, Mapping[str, Sequence[float]]]) -> Section:
    lines = [_verdict(kind, runs[kind], runs[PLAIN], PLAIN) for kind in (*RHO, ENSEMBLE)]
    lines.append(_warm_verdict(best, runs[best], runs[PLAIN]))
    lines += [_gap(best, runs[best]), _far(runs)]
    one = {name: statistics.median(values) for name, values in times["one image"].items()}
    lines.append(
        f"One image takes {1e3 * one[PLAIN]:.0f} µs of {PLAIN}, {1e3 * one[best]:.0f} µs of {best} folded "
        f"({one[best] / one[PLAIN]:.2f} times) and {1e3 * one[ENSEMBLE]:.0f} µs of {ENSEMBLE} "
        f"({one[ENSEMBLE] / one[PLAIN]:.2f} times)."
    )
    n = len(runs[PLAIN])
    lines.append(
        f"{n} seeds on one machine; a difference counts where it is larger than its 95 % interval (Student's t)."
        + (" Two seeds tell few differences apart; where there is time there are more." if n == 2 else "")
        if n > 1
        else "One seed on one machine, so nothing is known of the spread: no difference here is certain."
    )
    return Section("In short", [Text(line) for line in lines])


def _standing(mine: Sequence[float], theirs: Sequence[float], better: int) -> str:
    """ "better", "worse" or "not told apart", by pairs of the same seed."""
    found = Spread.of([better * (a - b) for a, b in zip(mine, theirs, strict=True)])
    if found.mean == 0 or (found.half is not None and abs(found.mean) <= found.half):
        return "not told apart"
    return "better" if found.mean > 0 else "worse"


def _standings(mine: Sequence[Run], theirs: Sequence[Run], part: str) -> dict[str, list[str]]:
    """Names of the figures by how they stand."""
    names: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
    for figure in _JUDGED:
        word = _standing(_values(mine, part, figure), _values(theirs, part, figure), figure.better)
        names[word].append(figure.name.removesuffix(", %"))
    return names


def _said(standings: Mapping[str, Sequence[str]]) -> str:
    """ "better in NLL and Brier, worse in ECE, not told apart in accuracy"."""
    return ", ".join(f"{word} in {_listed(found)}" for word, found in standings.items() if found)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _apart(mine: Sequence[Run], theirs: Sequence[Run], part: str, figure: Figure) -> str:
    """ "68.0 to 70.1" of the means, theirs first."""
    values = (statistics.fmean(_values(runs, part, figure)) for runs in (theirs, mine))
    return " to ".join(f"{value:.{figure.digits}f}" for value in values)


def _verdict(kind: str, mine: Sequence[Run], theirs: Sequence[Run], other: str) -> str:
    """From the measured values, whichever way they point."""
    parts, counts = [], {"better": 0, "worse": 0, "not told apart": 0}
    for part, where in _PARTS.items():
        found = _standings(mine, theirs, part)
        counts = {word: count + len(found[word]) for word, count in counts.items()}
        changes = (_apart(mine, theirs, part, figure) for figure in (_ACCURACY, _NLL))
        accuracy, likelihood = changes
        parts.append(f"{where} it is {_said(found)} (accuracy from {accuracy} %, NLL from {likelihood})")
    total = " ".join(f"{count} {word}," for word, count in counts.items()).removesuffix(",")
    text = f"{_upper(kind)} in place of {other}: {'; '.join(parts)}. Of {sum(counts.values())} figures: {total}."
    if kind in RHO and counts["worse"] > counts["better"]:
        text += (
            " It loses more than it wins: MIMO needs a network with room for several, and a small one may have none."
        )
    return text


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _warm_verdict(kind: str, mine: Sequence[Run], theirs: Sequence[Run]) -> str:
    """What one temperature does to the comparison."""
    t = {name: statistics.fmean(r.temperature for r in runs) for name, runs in ((kind, mine), (PLAIN, theirs))}
    words = {name: "sharpens" if value < 1 else "softens" for name, value in t.items()}
    parts = "; ".join(
        f"{where} {kind} is {_said(_standings(mine, theirs, f'warm_{part}'))}" for part, where in _PARTS.items()
    )
    return (
        f"A temperature fitted on {kind}'s held-out answers is {t[kind]:.2f}, which {words[kind]} them; that of "
        f"{PLAIN} is {t[PLAIN]:.2f}, which {words[PLAIN]} them. With their temperatures, {parts}."
    )


def _gap(kind: str, runs: Sequence[Run]) -> str:
    """What the mean of the members adds to one of them."""

    def percent(value: Callable[[Run], float]) -> float:
        return 100 * statistics.fmean(value(r) for r in runs)

    apart = percent(lambda r: r.clean.disagreement), percent(lambda r: r.shifted.disagreement)
    return (
        f"The {M} members of {kind} are right on {percent(lambda r: r.clean.member_accuracy):.1f} % of the clean and "
        f"{percent(lambda r: r.shifted.member_accuracy):.1f} % of the shifted images, their mean on "
        f"{percent(lambda r: r.clean.accuracy):.1f} % and {percent(lambda r: r.shifted.accuracy):.1f} %. They disagree "
        f"{'more' if apart[1] > apart[0] else 'no more'} where images are shifted: {apart[1]:.1f} % of their pairs "
        f"against {apart[0]:.1f} %."
    )


def _far(runs: Runs) -> str:
    """What the models make of images that none of them can read, as turned by the last angle they are."""

    def percent(kind: str, value: Callable[[Figures], float]) -> float:
        return 100 * statistics.fmean(value(r.at_angles[-1]) for r in runs[kind])

    sure = [
        f"{kind} is right on {percent(kind, lambda f: f.accuracy):.0f} % and sure by "
        f"{percent(kind, lambda f: f.confidence):.0f} %"
        for kind in sorted(runs, key=lambda kind: abs(percent(kind, lambda f: f.confidence - f.accuracy)))
    ]
    return f"With images turned by {ANGLES[-1]} degrees, from the most to the least honest: {_listed(sure)}."


# --- the sections


def _setting(data: Digits, runs: Runs, sizes: Sizes, best: str) -> Section:
    s, n = sizes.setting, len(runs[PLAIN])
    images = (
        f"scikit-learn's digits (sklearn.datasets.load_digits), 8 x 8 pixels: {len(data.training.x):,} for training, "
        f"{len(data.held_out.x)} held out for the temperature, {len(data.test.x)} for the test, which are also "
        f"judged shifted: turned by up to {DEGREES:.0f} degrees either way, with noise of deviation {NOISE:g} on "
        "pixels of 0 to 1. No training image is turned or noisy."
    )
    model = (
        f"An image is a sequence of its 8 rows. {_upper(PLAIN)}: fastseq.nn.LSTM of {s.H} units and a linear layer on "
        f"its last state. {_upper(ENSEMBLE)}: that one and two more from other first weights, probabilities averaged. "
        f"MIMO: the same network given to fastseq.nn.MIMO, which makes its first layer take {M} images side by side "
        f"and its last one answer for each; {runs[best][0].networks[0].report}. To predict, the same image is in all "
        f"slots, so the weights of the slots are summed once (folded), and the {M} answers are averaged."
    )
    rules = (
        f"All train for {s.steps} steps of Adam on {s.batch} distinct images each, one-cycle learning rate up to "
        f"{s.rate:g}. With MIMO each image lies in R = {s.R} rows of every slot; ρ is the share of rows that hold one "
        f"image in all slots. Seeds: {n}{_why(n, sizes)} Split and shift are the same for all. "
        f"Where one of the two ρ is picked, it is the one with the lower NLL on held-out images: {best}."
    )
    rows = [
        (kind, f"{found[0].parameters:,}", f"{statistics.median(r.milliseconds for r in found):.1f}")
        for kind, found in runs.items()
    ]
    head = ("model", "parameters", "ms per training step, median, one thread")
    shown = Picture(
        pictures.images(_examples(data)), "Digits as they are, shifted, and turned by 45 degrees", "Of the test images."
    )
    return Section("What is compared", [Text(images), shown, Text(model), Text(rules), Table(head, rows)])


def _why(n: int, sizes: Sizes) -> str:
    if n < sizes.seeds:
        return f", instead of {sizes.seeds}: the time ran out."
    more = f" A full run has {_FULL.seeds}, and {_FULL.setting.steps} steps."
    return "." + (more if n < _FULL.seeds else "")


def _examples(data: Digits) -> list[tuple[str, list[tuple[str, NDArray[np.uint8]]]]]:
    count = 8
    far = turned(data.test.x[:count], torch.full((count,), 45.0))
    return [
        (label, [("", _pixels(image)) for image in images[:count]])
        for label, images in (("clean", data.test.x), ("shifted", data.shifted.x), ("45°", far))
    ]


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    """[H, W] of 0..1 as gray bytes [H, W, 3]."""
    found: NDArray[np.uint8] = (255 * image).round().clamp(0, 255).to(torch.uint8)[..., None].expand(-1, -1, 3).numpy()
    return found


def _table(runs: Runs, part: str, figures: Sequence[Figure], caption: str) -> Table:
    rows = [
        (kind, *(Spread.of(_values(found, part, figure)).text(figure.digits) for figure in figures))
        for kind, found in runs.items()
    ]
    return Table(("model", *(figure.name for figure in figures)), rows, caption)


def _over(runs: Runs) -> str:
    return ": mean ± 95 % interval over seeds" if len(runs[PLAIN]) > 1 else ", one seed"


def _figures(runs: Runs) -> Section:
    told = (
        "Of the mean of the members' probabilities: accuracy; NLL, the negative log-likelihood of the right digit; "
        "ECE, the error of calibration over 15 bins; Brier, the squared distance of the probabilities to the right "
        "answer. More accuracy is better, less of the others. Disagreement is the share of the pairs of members that "
        "name different digits. All by fastseq.functional.ensemble_stats."
    )
    tables = [
        _table(runs, part, (*_JUDGED, *_MEMBERS), f"{where.capitalize()}{_over(runs)}.")
        for part, where in _PARTS.items()
    ]
    return Section("Clean and shifted images", [Text(told), *tables])


def _temperature(runs: Runs) -> Section:
    told = (
        "fastseq.calibration.fit_temperature divides all logits of a model by one number, the one that makes the "
        "held-out images most likely; below 1 it makes the model surer, above 1 less so. Held-out images are clean, so "
        "a temperature need not fit shifted ones. These tables are with the temperature."
    )
    rows = [(kind, Spread.of([r.temperature for r in found]).text(2)) for kind, found in runs.items()]
    tables = [
        _table(runs, f"warm_{part}", _JUDGED, f"{where.capitalize()}, with the temperature{_over(runs)}.")
        for part, where in _PARTS.items()
    ]
    return Section("With a temperature", [Text(told), Table(("model", "temperature"), rows), *tables])


def _diagrams(runs: Runs) -> Section:
    gaps = {
        kind: 100 * statistics.fmean(r.shifted.confidence - r.shifted.accuracy for r in found)
        for kind, found in runs.items()
    }
    told = (
        "Mean confidence less accuracy on shifted images without a temperature, in points: "
        f"{_listed([f'{kind} {gap:+.1f}' for kind, gap in gaps.items()])}. Above 0 a model is surer than it is right."
    )
    blocks: list[Block] = [Text(told)]
    for pair in (KINDS[:2], KINDS[2:]):
        svg = pictures.beside(lambda pair=pair: [_diagram(runs[kind], kind) for kind in pair])  # type: ignore[misc]
        blocks.append(
            Picture(
                svg,
                f"Reliability diagrams of {_listed(pair)} on shifted images",
                "fastseq.calibration.reliability_diagram, shifted images of all seeds together: above the dashed line "
                "a model is less sure than it is right, below it surer.",
            )
        )
    return Section("Confidence and what it is worth", blocks)


def _diagram(runs: Sequence[Run], kind: str):  # type: ignore[no-untyped-def]
    return reliability_diagram(torch.stack([r.shifted.histogram for r in runs]).sum(0), title=kind)


def _rotation(runs: Runs) -> Section:
    def series(kinds: Sequence[str], value: Callable[[Figures], float]) -> pictures.Series:
        return {
            kind: (
                pictures.COLOURS[_COLOURS[kind]],
                [float(angle) for angle in ANGLES],
                [statistics.fmean(value(r.at_angles[k]) for r in runs[kind]) for k in range(len(ANGLES))],
            )
            for kind in kinds
        }

    panels = [
        ("degrees", "accuracy", series(KINDS, lambda f: f.accuracy)),
        ("degrees", "mean confidence", series(KINDS, lambda f: f.confidence)),
        ("degrees", "disagreement", series([kind for kind in KINDS if kind != PLAIN], lambda f: f.disagreement)),
    ]
    picture = Picture(
        pictures.curves(panels),
        f"Accuracy, confidence and disagreement while all test images are turned by 0 to {ANGLES[-1]} degrees",
        "Test images turned without noise, mean over seeds. A model that knew what it does not know would lose "
        "confidence as fast as accuracy. One LSTM has no members and so no disagreement.",
    )
    return Section("Growing rotation", [picture, Text(" ".join(_turn(kind, runs[kind]) for kind in KINDS))])


def _turn(kind: str, runs: Sequence[Run]) -> str:
    """From upright to the last angle."""

    def of(value: Callable[[Figures], float], k: int) -> float:
        return statistics.fmean(value(r.at_angles[k]) for r in runs)

    accuracy, confidence, apart = (
        [of(value, k) for k in (0, -1)]
        for value in (lambda f: 100 * f.accuracy, lambda f: 100 * f.confidence, lambda f: f.disagreement)
    )
    members = f", disagreement from {apart[0]:.2f} to {apart[1]:.2f}" if kind != PLAIN else ""
    return (
        f"{_upper(kind)}: from 0 to {ANGLES[-1]} degrees accuracy goes from {accuracy[0]:.0f} to {accuracy[1]:.0f} %, "
        f"confidence from {confidence[0]:.0f} to {confidence[1]:.0f} %{members}."
    )


# --- time


@torch.no_grad()
def _timing(
    runs: Runs, data: Digits, seconds: float, report: Callable[[float, str], None]
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of whole predictions, probabilities averaged over members, of the first seed's networks in turns."""
    networks = {kind: runs[kind][0].networks for kind in KINDS}
    inputs = {"one image": data.test.x[:1], "all test images": data.test.x}
    found = {}
    for n, (name, x) in enumerate(inputs.items()):

        def call(kind: str, x: Tensor = x) -> Callable[[], object]:
            return lambda: predict(networks[kind], x).softmax(-1).mean(1)

        functions = {kind: call(kind) for kind in networks}
        found[name] = time_in_turns(functions, seconds / 2, lambda done, note, n=n: report((n + done) / 2, note))  # type: ignore[misc]
    return found


def _speed(times: Mapping[str, Mapping[str, Sequence[float]]], runs: Runs, data: Digits) -> Section:
    medians = {name: {kind: statistics.median(v) for kind, v in found.items()} for name, found in times.items()}
    one, all_images = medians["one image"], medians["all test images"]
    rows = [
        (
            kind,
            f"{1e3 * one[kind]:.0f}",
            f"{one[kind] / one[PLAIN]:.2f}",
            f"{all_images[kind]:.2f}",
            f"{all_images[kind] / all_images[PLAIN]:.2f}",
        )
        for kind in KINDS
    ]
    head = ("model", "one image, µs", "to one LSTM", f"{len(data.test.x)} images, ms", "to one LSTM")
    calls = min(len(v) for found in times.values() for v in found.values())
    caption = (
        f"Medians of at least {calls} predictions in turns, in torch, one thread: logits, "
        "probabilities and their mean over members. MIMO is folded."
    )
    return Section("Time of a prediction", [Table(head, rows, caption)])

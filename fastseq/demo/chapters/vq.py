"""Vector quantization of photographs: plain codebooks against the recipe of Lancucki et al., IJCNN 2020."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastseq.demo import Budget, pictures, vq_autoencoder, vq_timing
from fastseq.demo.report import Block, Picture, Section, Table, Text
from fastseq.demo.vq_autoencoder import AVERAGES, GRADIENT, RECIPES, ROBUST
from fastseq.demo.vq_photographs import Photographs, image_of, patches, photographs
from fastseq.demo.vq_spread import Spread, difference
from fastseq.demo.vq_timing import NONE, OURS, THEIRS, Timed
from fastseq.demo.vq_training import Measured, Runner, Setting, Trained, train_all

TITLE = "A vector quantizer learns photographs"
ABOUT = (
    "A vector quantizer replaces each little patch of an image by the most similar one of a list of patterns, the "
    "codebook; then its number in the list is all that must be stored. Often training ends with only a few patterns "
    "in use. Lancucki et al. (2020) have a recipe against this. More patterns in use and a smaller error are better."
)
FULL_SECONDS, QUICK_SECONDS = 90.0, 17.0

_COLOURS = {GRADIENT: "orange", AVERAGES: "green", ROBUST: "blue"}
_CROP = 160  # pixels
_LESS = "lower is better"


@dataclass(frozen=True)
class Sizes:
    """K: codes, of a codebook each. seeds: how many. recipes: ways to learn a codebook, ``ROBUST`` and plain ones."""

    K: tuple[int, ...] = (512, 4096)
    seeds: int = 5
    recipes: tuple[str, ...] = RECIPES
    setting: Setting = field(default_factory=Setting)


_FULL, _QUICK = Sizes(), Sizes(seeds=3, recipes=(AVERAGES, ROBUST))


def run(budget: Budget, sizes: Sizes | None = None) -> list[Section]:
    """Train, measure and describe; see ``fastseq.demo``. sizes: None means smaller ones where there is little time."""
    sizes = sizes or (_FULL if budget.seconds >= FULL_SECONDS / 2 else _QUICK)
    budget.progress("training quantizers", 0.0, "")
    data, setting = photographs(sizes.setting.side), sizes.setting
    kinds = [(recipe, K) for K in sizes.K for recipe in sizes.recipes]
    seeds = [budget.seed + k for k in range(sizes.seeds)]
    found = train_all(kinds, seeds, setting, data, 0.78 * budget.seconds, _told(budget, "training quantizers"))
    plain = [kind for kind in kinds if kind[0] != ROBUST]
    seconds = min(0.14 * budget.seconds, budget.remaining())
    times = vq_timing.time_all(plain, budget.seed, setting, data, seconds, _told(budget, "timing quantizers"))
    budget.progress("drawing photographs", 0.0, "")
    sections = [
        _in_short(found, sizes, times),
        _setting(data, sizes, found),
        _use(found, sizes),
        _errors(found, sizes),
        _reconstructions(found, sizes, data),
        _codes(found, sizes),
        _speed(times, setting),
    ]
    budget.progress("drawing photographs", 1.0, "")
    return sections


def _told(budget: Budget, stage: str) -> Callable[[float, str], None]:
    return lambda done, note: budget.progress(stage, done, note)


def _values(runners: Sequence[Runner], value: Callable[[Runner], float]) -> list[float]:
    return [float(value(r)) for r in runners]


def _error(runner: Runner) -> float:
    return runner.end.error


def _held_out_error(runner: Runner) -> float:
    return runner.held_out.error


def _perplexity(runner: Runner) -> float:
    return runner.end.perplexity


def _in_short(found: Trained, sizes: Sizes, times: Sequence[Timed]) -> Section:
    lines = [_verdict({recipe: found.of(recipe, K) for recipe in sizes.recipes}, K) for K in sizes.K]
    if vq_timing.rival():
        lines.append(_faster(next(t for t in times if (t.recipe, t.K) == (AVERAGES, max(sizes.K)))))
    else:
        lines.append(_absent())
    n = len(found.seeds)
    lines.append(
        f"{n} seeds on one machine, ± is the 95 % interval of the mean over them (Student's t)."
        if n > 1
        else "One seed on one machine, so nothing is known of the spread."
    )
    return Section("In short", [Text(line) for line in lines])


def _verdict(runs: dict[str, list[Runner]], K: int) -> str:
    """From the measured values, whichever way they point."""
    robust, plain = runs[ROBUST], [recipe for recipe in runs if recipe != ROBUST]

    def best(value: Callable[[Runner], float], sign: int) -> str:
        return min(plain, key=lambda recipe: sign * statistics.fmean(_values(runs[recipe], value)))

    other = best(_perplexity, -1)
    mine, theirs = (Spread.of(_values(runs[name], _perplexity)) for name in (ROBUST, other))
    spent, given = (statistics.fmean(r.seconds for name in names for r in runs[name]) for names in ((ROBUST,), plain))
    same = "the same time of training"
    if spent > 1.1 * given:
        same = f"{spent:.2g} seconds of training, longer than the {given:.2g} of the plain ones,"
    text = (
        f"K = {K:,}: after {same} the {ROBUST} spreads the training photograph over a perplexity of "
        f"{mine.text(0)} codes, against {theirs.text(0)} ({other})."
    )
    for value, where in ((_error, "on the training photograph"), (_held_out_error, "on the held-out one")):
        other = best(value, 1)
        pair = (_values(robust, value), _values(runs[other], value))
        mine, theirs = (Spread.of(values) for values in pair)
        text += (
            f" Its reconstruction error {where} is {mine.text(1)} against {theirs.text(1)} ({other}): "
            f"{difference(*pair, digits=1)}."
        )
    return text


def _faster(timed: Timed) -> str:
    middle, low, high = timed.ratio()
    ms = {name: statistics.median(timed.milliseconds[name]) for name in (OURS, THEIRS)}
    word = "faster" if low > 1 else "slower" if high < 1 else "not told apart"
    return (
        f"A training step of the same autoencoder, K = {timed.K:,}, {timed.recipe}: {ms[OURS]:.1f} ms with "
        f"fastseq.nn.VectorQuantize, {ms[THEIRS]:.1f} ms with that of {THEIRS}, {middle:.1f} times the time "
        f"({low:.1f} to {high:.1f} in the middle 60 % of {len(timed.milliseconds[OURS])} turns): {word}."
    )


def _absent() -> str:
    return (
        f"{THEIRS} is not installed, so no training step was compared with it: pip install 'fastseq-kernels[demo]' "
        "installs it."
    )


def _setting(data: Photographs, sizes: Sizes, found: Trained) -> Section:
    s = sizes.setting
    H, W, _ = data.training.shape
    shown = f"{W} x {H} pixels, {H * W // s.side**2:,} patches of {s.side} x {s.side}"
    text = (
        "The photographs are the two that scikit-learn ships (sklearn.datasets.load_sample_images). Trained on is "
        f"china.jpg ({shown}), held out is flower.jpg, another subject in other colours. Training patches come from "
        "anywhere in the photograph, also overlapping; measured is on all patches side by side."
    )
    model = (
        f"The autoencoder makes one code of a patch: {3 * s.side**2} numbers, {s.hidden} units, {s.D} numbers, the "
        f"nearest of K codes, {s.hidden} units, {3 * s.side**2} numbers. Trained with Adam on {s.N:,} patches per "
        f"step, learning rate {s.rate:g} falling to a tenth, mean squared error plus commitment loss times "
        f"{vq_autoencoder.COMMITMENT}, gradients passed straight through. First weights of the network and patches are "
        "the same for equal seeds; only the quantizer differs. All quantizers are fastseq.nn.VectorQuantize."
    )
    of = f", instead of {sizes.seeds}: the time ran out" if found.out_of_time else ""
    left_out = [recipe for recipe in RECIPES if recipe not in sizes.recipes]
    also = f" and also trains {', '.join(left_out)}" if left_out else ""
    few = f" A full run has {_FULL.seeds} seeds{also}." if sizes.seeds < _FULL.seeds or left_out else ""
    rules = (
        f"Each run trains for {found.seconds:.2g} seconds on its own clock; the runs of one seed take turns, so that "
        f"whatever else the machine does falls on all alike. Seeds: {len(found.seeds)}{of}.{few} Evaluation is off the "
        "clock; all that the recipe does is on it, new codes by k-means too. On a slow machine it is given longer: "
        "until it has seen the vectors that these are made from. Error is the root of the mean squared "
        "error of red, green and blue in steps of 1/255. Perplexity is how many evenly used codes would carry as much."
    )
    return Section("What is compared", [Text(text), Text(model), Text(rules), _recipes(sizes, found)])


def _recipes(sizes: Sizes, found: Trained) -> Table:
    a = vq_autoencoder
    epoch = f"{found.seconds / sizes.setting.rounds:.2g} s"
    rows = (
        (GRADIENT, "random", f"Adam, rate {sizes.setting.rate:g}, as the network", "no"),
        (AVERAGES, "random", "moving averages, decay 0.8", "no"),
        (
            ROBUST,
            f"k-means of what the encoder puts out, after an epoch ({epoch}) without quantization, and again in the "
            f"first steps of the next {a.LAST - a.FIRST} epochs",
            f"Adam, rate {a.MULTIPLIER * sizes.setting.rate:g}, its moments reset with new codes",
            "of the vectors to be quantized",
        ),
    )
    caption = (
        f"The recipe is batch_norm='codes', reinit=Reinit(AfterWarmup({a.FIRST}, {a.LAST - 1})) and "
        f"codebook_parameter_groups of fastseq.nn (Lancucki et al. 2020); k-means++ and {a.LLOYD} rounds of Lloyd on a "
        f"reservoir of {', '.join(f'{a.reservoir_size(K):,}' for K in sizes.K)} vectors for "
        f"K = {', '.join(f'{K:,}' for K in sizes.K)}. Options that are not named have their defaults."
    )
    head = ("quantizer", "first codes", "codes learn by", "batch norm")
    return Table(head, [row for row in rows if row[0] in sizes.recipes], caption)


def _use(found: Trained, sizes: Sizes) -> Section:
    rows = []
    for K in sizes.K:
        for recipe in sizes.recipes:
            runs = found.of(recipe, K)
            used = Spread.of([r.end.used for r in runs])
            perplexity, share = Spread.of(_values(runs, _perplexity)), statistics.fmean(r.end.used / K for r in runs)
            held = Spread.of([r.held_out.perplexity for r in runs])
            rows.append((f"K {K:,}, {recipe}", used.text(0), f"{share:.1%}", perplexity.text(0), held.text(0)))
    head = ("quantizer", "codes used", "of all", "perplexity", "perplexity, held out")
    patches_of = sizes.setting.side
    caption = (
        f"At the end, mean ± 95 % interval over seeds, of all {patches_of} x {patches_of} patches of a photograph."
    )
    picture = Picture(
        _curves(found, sizes, "perplexity of the codes", lambda m: m.perplexity),
        "Perplexity of the codes over training time, by quantizer and size of the codebook",
        "On the training photograph; bands are 95 % intervals of the mean. The curve of the recipe begins where it "
        "begins to quantize.",
    )
    return Section("Codes in use", [picture, Table(head, rows, caption)])


def _errors(found: Trained, sizes: Sizes) -> Section:
    rows = []
    for K in sizes.K:
        for recipe in sizes.recipes:
            runs = found.of(recipe, K)
            steps = [seconds for r in runs for seconds in r.steps]
            fast, middle, slow = 1e3 * np.quantile(steps, (0.2, 0.5, 0.8))
            errors = (Spread.of(_values(runs, value)).text(1) for value in (_error, _held_out_error))
            spent = f"{statistics.fmean(r.seconds for r in runs):.2f}"
            made = f"{statistics.fmean(len(r.steps) for r in runs):,.0f}"
            rows.append((f"K {K:,}, {recipe}", *errors, spent, made, f"{middle:.1f} ({fast:.1f} to {slow:.1f})"))
    head = (
        "quantizer",
        "error",
        "error, held out",
        "seconds",
        "steps",
        "ms per step, median (20 to 80 %)",
    )
    picture = Picture(
        _curves(found, sizes, "error on the training photograph", lambda m: m.error),
        "Reconstruction error over training time, by quantizer and size of the codebook",
        f"Root mean squared error in steps of 1/255, {_LESS}; bands are 95 % intervals of the mean.",
    )
    caption = f"At the end, mean ± 95 % interval over seeds; {_LESS}. New codes by k-means count as part of a step."
    return Section("Reconstruction error over time", [picture, Table(head, rows, caption)])


def _curves(found: Trained, sizes: Sizes, label: str, value: Callable[[Measured], float]) -> str:
    panels: list[tuple[str, str, str, pictures.Bands]] = []
    for K in sizes.K:
        series = {}
        for recipe in sizes.recipes:
            x, y, half = [], [], []
            runs = found.of(recipe, K)
            for k, points in enumerate(zip(*(r.curve for r in runs), strict=True)):
                values = [value(point) for point in points if point is not None]
                if len(values) == len(points):
                    spread = Spread.of(values)
                    x.append(statistics.fmean(r.clocks[k] for r in runs))
                    y.append(spread.mean)
                    half.append(spread.half or 0.0)
            series[recipe] = (pictures.COLOURS[_COLOURS[recipe]], x, y, half)
        panels.append((f"K = {K:,}", "seconds of training", "" if panels else label, series))
    return pictures.bands(panels)


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    """[H, W, 3] in -0.5..0.5 as bytes."""
    found: NDArray[np.uint8] = (255 * (image + 0.5)).round().clamp(0, 255).to(torch.uint8).numpy()
    return found


def _middle(image: Tensor, side: int) -> Tensor:
    """The middle of the image, cut at the edges of patches."""
    H, W, _ = image.shape
    size = min(_CROP, H, W) // side * side
    top, left = (H - size) // 2 // side * side, (W - size) // 2 // side * side
    return image[top : top + size, left : left + size].contiguous()


@torch.no_grad()
def _reconstructions(found: Trained, sizes: Sizes, data: Photographs) -> Section:
    blocks: list[Block] = [
        Text("The middle of each photograph at its own resolution, by the models of the first seed.")
    ]
    for image, name, value in (
        (data.held_out, "The held-out photograph", _held_out_error),
        (data.training, "The training photograph", _error),
    ):
        part = _middle(image, data.side)
        rows, said = [], []
        for K in sizes.K:
            shown = [("original", _pixels(part))]
            for recipe in sizes.recipes:
                r = found.of(recipe, K)[0]
                y = r.model.eval()(patches(part, data.side))[0]
                shown.append((recipe, _pixels(image_of(y, part.shape[0], part.shape[1], data.side))))
                said.append(f"K {K:,}, {recipe}: {value(r):.1f}")
            rows.append((f"K = {K:,}", shown))
        caption = f"{name}. Error on the whole of it: {'; '.join(said)}."
        blocks.append(Picture(pictures.images(rows), f"{name} and what each model makes of it", caption))
    return Section("Reconstructions", blocks)


@torch.no_grad()
def _codes(found: Trained, sizes: Sizes) -> Section:
    """Every code of the smallest codebook as the patch that the decoder makes of it."""
    K, side = min(sizes.K), sizes.setting.side
    shown, counts = [], []
    for recipe in sizes.recipes:
        r = found.of(recipe, K)[0]
        decoded = r.model.eval().patches_of_codes()
        order = decoded.mean(-1).argsort()
        lines = next(n for n in range(int(K**0.5), 0, -1) if K % n == 0)
        shown.append((recipe, _pixels(image_of(decoded[order], lines * side, K // lines * side, side))))
        counts.append(f"{recipe} uses {r.end.used}")
    told = (
        f"Each of the {K:,} codes, used or not, as the {side} x {side} patch that the decoder makes of it, from dark "
        f"to bright, by the models of the first seed. For the training photograph {', '.join(counts)}."
    )
    return Section("The codes", [Text(told), Picture(pictures.images([("", shown)]), "The patch behind every code")])


def _speed(times: Sequence[Timed], setting: Setting) -> Section:
    compared = vq_timing.rival()
    rows = []
    for timed in times:
        ms = {name: statistics.median(values) for name, values in timed.milliseconds.items()}
        row = [f"K {timed.K:,}, {timed.recipe}", f"{ms[NONE]:.1f}", f"{ms[OURS]:.1f}"]
        if compared:
            middle, low, high = timed.ratio()
            row += [f"{ms[THEIRS]:.1f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        rows.append((*row, f"{len(timed.milliseconds[OURS])}"))
    theirs = (f"{THEIRS}, ms", "their time to ours (20 to 80 %)") if compared else ()
    head = ("quantizer", f"{NONE}, ms", f"{OURS}, ms", *theirs, "turns")
    caption = (
        f"Whole training steps of the autoencoder on {setting.N:,} patches: forward, backward, Adam. Medians of turns "
        "in which each makes one step; the ratio is taken within a turn."
    )
    blocks: list[Block] = [Table(head, rows, caption)]
    if compared:
        equal = min(timed.equal for timed in times if timed.equal is not None)
        blocks.append(
            Text(
                f"Both are VectorQuantize with the same arguments, ours in place of that of {THEIRS} {compared}, and "
                f"start from the same state_dict. From there they give {equal:.2%} of the patches the same code, in "
                "the case where they agree least."
            )
        )
        blocks += [_bars(timed) for timed in times if (timed.recipe, timed.K) == (AVERAGES, times[-1].K)]
    else:
        blocks.append(Text(_absent()))
    return Section("Milliseconds per training step", blocks)


def _bars(timed: Timed) -> Picture:
    ms = {name: statistics.median(timed.milliseconds[name]) for name in (NONE, OURS, THEIRS)}
    colours = {NONE: "green", OURS: "blue", THEIRS: "orange"}
    drawn = {name: (pictures.COLOURS[colours[name]], value) for name, value in ms.items()}
    label = f"milliseconds per training step, K = {timed.K:,}, {timed.recipe}"
    return Picture(
        pictures.bars(label, drawn), f"{label}: " + ", ".join(f"{name} {value:.1f}" for name, value in ms.items())
    )

"""TAWT (Chen et al. 2022): weights of other tasks, learned while training, against their schedule without learning."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastseq.demo import Budget, pictures
from fastseq.demo.mimo_training import one_thread
from fastseq.demo.python_tags import TAGS, TASKS, Corpus, T, corpus, tagged
from fastseq.demo.report import Picture, Section, Table, Text
from fastseq.demo.tawt_training import (
    FIXED,
    KINDS,
    LEARNED,
    LONG,
    NORMALIZED,
    PRETRAINING,
    SCHEDULE,
    TARGET,
    Kind,
    Run,
    Setting,
    encoders,
    examples,
    features,
    train_all,
)
from fastseq.demo.vq_spread import Spread, difference
from fastseq.recipes import distances_figure, task_distances

TITLE = "Weights for other tasks"
ABOUT = (
    "A task with few examples can learn from related tasks that have many. How much each of these should count is "
    "mostly guessed; TAWT (Chen et al. 2022) learns it while training, from gradients that are computed anyway. What "
    "counts is the accuracy of the task with few examples, the target: higher is better."
)
FULL_SECONDS, QUICK_SECONDS = 20.0, 4.0

_LINE = "def area(self, unit=1):\n    return self.scale(unit)[0]\n"
_COLOURS = dict(zip(TASKS, ("green", "orange", "violet", "blue"), strict=True))
_TOKENS = 400  # of each task, for the distances


@dataclass(frozen=True)
class Sizes:
    """seeds: at most so many. files, tests: modules to read, and windows for the test."""

    seeds: int = 3
    files: int = 24
    tests: int = 300
    kinds: Sequence[Kind] = tuple(kind for kind in KINDS if kind[0] in (LONG, PRETRAINING, NORMALIZED))
    setting: Setting = field(
        default_factory=lambda: Setting(H=32, target=32, source=320, batch=16, epochs=8, tuning=150)
    )


_QUICK = Sizes(
    seeds=1,
    files=8,
    tests=80,
    kinds=((LONG, FIXED), (NORMALIZED, SCHEDULE), (NORMALIZED, LEARNED)),
    setting=Setting(H=24, target=32, source=128, batch=16, epochs=5),
)
Cells = Mapping[Kind, Sequence[Run]]  # in the order of the seeds


def run(budget: Budget, sizes: Sizes | None = None) -> list[Section]:
    """Train, measure and describe; see ``fastseq.demo``. sizes: None means less of all where there is little time."""
    sizes = sizes or (Sizes() if budget.seconds >= FULL_SECONDS / 2 else _QUICK)
    s, seeds = sizes.setting, [budget.seed + k for k in range(sizes.seeds)]
    data = corpus(sizes.files, len(TASKS) * s.source, sizes.tests)

    def told(done: float, note: str) -> None:
        budget.progress("weighted tasks", done, note)

    with one_thread():
        found = train_all(seeds, sizes.kinds, s, data, 0.7 * budget.remaining(), told)
        distances = _distances(budget.seed, s, data)
    cells = {kind: [r for r in found if r.kind == kind] for kind in sizes.kinds}
    return [_in_short(cells), _setting(cells, sizes, data), _accuracy(cells), _weights(cells), distances]


def _percent(runs: Sequence[Run]) -> list[float]:
    """Accuracy of each seed."""
    return [100 * r.accuracy for r in runs]


def _in_short(cells: Cells) -> Section:
    single = _percent(cells[LONG, FIXED])
    lines = []
    for (paradigm, weights), runs in cells.items():
        if weights == LEARNED:
            control = difference(_percent(runs), _percent(cells[paradigm, SCHEDULE]), 2)
            alone = difference(_percent(runs), single, 2)
            lines.append(f"{paradigm.capitalize()}: learned weights against {SCHEDULE}, accuracy in points: {control}.")
            lines.append(f"{paradigm.capitalize()}, learned weights, against the target alone for long: {alone}.")
    return Section("In short", [Text(line) for line in lines])


def _setting(cells: Cells, sizes: Sizes, data: Corpus) -> Section:
    s, n = sizes.setting, len(cells[LONG, FIXED])
    target = TASKS[TARGET]
    what = (
        f"The tokens of Python's own standard library, of up to {sizes.files} modules, in windows of {T}, are tagged "
        f"exactly in four ways by tokenize and ast. The target, {target}, has {s.target} windows; the other three are "
        f"sources of {s.source} windows each, of other places. A BiLSTM of 2 x {s.H} units (fastseq.nn.LSTM) is shared "
        "and each task has a linear head. "
        f"Accuracy is of the target's tags in {len(data.test.x)} windows of other modules. "
        f"{n} seed{'s' if n > 1 else ''}"
        + (f", instead of {sizes.seeds}: the time ran out." if n < sizes.seeds else ".")
    )
    how = (
        f"Joint training has all tasks in mixed order, {s.epochs} epochs. Weights begin equal or, normalized, so that "
        "every task counts alike whatever its size. Learned ones (fastseq.recipes.TaskWeights) move after each epoch, "
        "with the cosine of a task's gradient to the target's in the exponent, over the BiLSTM; these gradients are "
        "those of training itself. The target's own cosine is 1, so its weight grows whatever the others do: "
        f"{SCHEDULE} is this growth with nothing learned, and what learned weights must be held against. "
        "In pre-training the target is not in the sum."
    )
    rows = [
        (token.text.strip() or "newline", *(TAGS[task][tag] if tag >= 0 else "-" for task, tag in pairs))
        for token in tagged(_LINE)
        for pairs in [list(zip(TASKS, token.tags, strict=True))]
    ]
    table = Table(("token", *TASKS), rows, "Two lines of Python and their tags.")
    return Section("What is compared", [Text(what), Text(how), table])


def _accuracy(cells: Cells) -> Section:
    several = len(cells[LONG, FIXED]) > 1
    rows = [
        (kind[0], kind[1], Spread.of(_percent(runs)).text(2), f"{runs[0].steps:,}", f"{_seconds(runs):.2f}")
        for kind, runs in cells.items()
    ]
    caption = "Accuracy of the target, %" + (": mean ± 95 % interval over seeds." if several else ", one seed.")
    bars = {
        f"{kind[0]}, {kind[1]}": (pictures.COLOURS["blue" if kind[1] == LEARNED else "orange"], mean)
        for kind, runs in cells.items()
        for mean in [statistics.fmean(_percent(runs))]
    }
    picture = Picture(pictures.bars("accuracy of the target, %", bars), "Accuracy of the target by kind of training")
    table = Table(("training", "weights", "accuracy", "steps", "seconds"), rows, caption)
    return Section("Accuracy of the target", [table, picture])


def _seconds(runs: Sequence[Run]) -> float:
    return statistics.median(r.seconds for r in runs)


def _weights(cells: Cells) -> Section:
    def series(runs: Sequence[Run]) -> pictures.Series:
        epochs = len(runs[0].weights)
        return {
            task: (
                pictures.COLOURS[_COLOURS[task]],
                [float(epoch + 1) for epoch in range(epochs)],
                [statistics.fmean(r.weights[epoch][t] for r in runs) for epoch in range(epochs)],
            )
            for t, task in enumerate(TASKS)
        }

    shown = [kind for kind in cells if kind[1] == LEARNED]
    shown = shown if len(shown) > 1 else [kind for kind in cells if kind[0] == shown[0][0]]
    panels = [("epoch", f"{paradigm}, {weights}", series(cells[paradigm, weights])) for paradigm, weights in shown]
    caption = "Mean of the seeds, after each epoch."
    return Section("Weights", [Picture(pictures.curves(panels), "Weights of the four tasks by epoch", caption)])


def _distances(seed: int, setting: Setting, data: Corpus) -> Section:
    models = [features(model) for model in encoders(seed, setting, data)]
    found = task_distances(models, [examples(data, task, _TOKENS) for task in TASKS])
    drawn = pictures.beside(lambda: [distances_figure(found, TASKS)])
    caption = (
        "What the best linear head for a task (column) loses on the representation that was trained for another one "
        f"(row), {setting.source} windows each, on {_TOKENS} tokens (fastseq.recipes.task_distances)."
    )
    return Section("Distance between the tasks", [Picture(drawn, "A matrix of distances between tasks", caption)])

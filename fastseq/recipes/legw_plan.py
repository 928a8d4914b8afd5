"""``plan``: what LEGW does with a row of batch sizes, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fastseq import _check
from fastseq.recipes.legw import Schedule

_HEAD = ("batch", "k", "highest rate", "warm-up epochs", "warm-up steps", "steps an epoch", "steps")
_POINTS = 200  # of a curve, evenly, and again by equal factors


def plan(
    lr: float,
    base_batch: float,
    batches: Iterable[int],
    base_warmup_epochs: float,
    examples: int,
    epochs: float,
    decay: str = "constant",
    *,
    drop_last: bool = False,
    gamma: float = 0.1,
    power: float = 2.0,
    milestones: Sequence[float] = (),
    decay_start: float | None = None,
) -> Any:
    """Print a table of what ``LEGW`` makes of each batch size, and draw the rates.

    Args:
        lr: tuned with ``base_batch``.
        batches: sizes of the whole batch of an optimizer step.
        examples: of an epoch. drop_last: whether a last batch that is not full is left out.
        base_batch, base_warmup_epochs, epochs, decay, gamma, power, milestones, decay_start: as in ``LEGW``.

    Returns:
        A matplotlib figure. A batch whose warm-up would not end is in the table, marked, and drawn dotted.

    Raises:
        ImportError: without matplotlib or rich. ArgumentError: for a value out of its range.
    """
    try:
        import matplotlib  # noqa: F401
        from rich.console import Console
    except ImportError:
        raise ImportError("plan needs matplotlib and rich: pip install matplotlib rich") from None
    _check.positive("plan", "lr", lr)
    _check.count("plan", "examples", examples)
    schedules = []
    for batch in batches:
        _check.count("plan", "batches", batch)
        steps = examples // batch if drop_last else math.ceil(examples / batch)
        if not steps:
            _check.fail("plan", "batches", f"at most the examples, {examples}, with drop_last", batch)
        own = base_batch, batch, base_warmup_epochs, steps, epochs, decay, gamma, power, tuple(milestones), decay_start
        schedules.append(Schedule(*own))
    if not schedules:
        _check.fail("plan", "batches", "one or more sizes", "none")
    Console().print(_table(schedules, lr))
    return rates_figure(schedules, lr)


def rates_figure(schedules: Sequence[Schedule], lr: float) -> Any:
    """A matplotlib figure of the rates, by epoch and by step; dotted where the warm-up does not end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_epoch, by_step = figure.subplots(1, 2)
    for s in schedules:
        at = _points(s)
        rates = [lr * s.factor(step) for step in at]
        style = {"label": f"{s.batch:g}", "linestyle": "-" if s.complete else ":"}
        by_epoch.plot([step / s.steps_per_epoch for step in at], rates, **style)
        by_step.plot([step + 1 for step in at], rates, **style)
    by_epoch.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    by_step.set(xlabel="step", xscale="log", ylim=(0, None))
    by_step.xaxis.set_major_formatter("{x:g}")
    by_epoch.legend(title="batch")
    return figure


def _table(schedules: Sequence[Schedule], lr: float) -> Any:
    from rich import box
    from rich.table import Table

    late = not all(s.complete for s in schedules)
    caption = "* the warm-up does not end before the training: LEGW refuses it" if late else None
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for name in _HEAD:
        table.add_column(name, justify="right")
    for s in schedules:
        warmup = f"{s.warmup_epochs:.4g}" + ("" if s.complete else " *")
        counts = f"{s.warmup_steps:,.4g}", f"{s.steps_per_epoch:,}", f"{math.ceil(s.steps):,}"
        table.add_row(f"{s.batch:,g}", f"{s.k:g}", f"{lr * s.scale:.4g}", warmup, *counts)
    return table


def _points(s: Schedule) -> list[int]:
    """Steps to draw: evenly and by equal factors over the training, and on both sides of each bend."""
    last = math.ceil(s.steps) - 1
    bends = [s.warmup_steps, *(s.steps_per_epoch * e for e in (*s.milestones, s.decay_start or 0.0))]
    spread = {last * n // _POINTS for n in range(_POINTS + 1)}
    spread |= {round((last + 1) ** (n / _POINTS)) - 1 for n in range(_POINTS + 1)}
    return sorted(spread | {max(0, min(last, math.ceil(bend) + d)) for bend in bends for d in (-1, 0)})

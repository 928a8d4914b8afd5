"""Trainings from several seeds within a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence


def that_fit(seeds: Sequence[int], seconds: float, report: Callable[[float, str], None]) -> Iterator[tuple[float, int]]:
    """As many of the seeds as will have been trained when the time is over, if all take as long; at least one.

    Args:
        report: of the share that is done, 0 to 1, and a note; called at the end.

    Yields:
        The share that is done before, and the seed.
    """
    begin = time.perf_counter()
    for n, seed in enumerate(seeds):
        spent = time.perf_counter() - begin
        if n and spent * (n + 1) / n > seconds:
            return report(1.0, "out of time")
        yield n / len(seeds), seed
    report(1.0, "")

"""Means over seeds with 95 % intervals, and what may be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % point of Student's t for 1, 2, ... degrees of freedom
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Spread:
    """A mean and half the width of its 95 % interval (Student's t); ``half`` is None for a single value."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value per seed; 1 to 10 of them."""
        mean = statistics.fmean(values)
        if len(values) == 1:
            return cls(mean, None)
        return cls(mean, _STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values)))

    def text(self, digits: int) -> str:
        """As "1.23 ± 0.04"."""
        mean = f"{self.mean:,.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:,.{digits}f}"


def difference(mine: Sequence[float], theirs: Sequence[float], digits: int) -> str:
    """What the values of equal seeds say: "4.80 ± 0.31 lower", whichever way they point, or that they say nothing."""
    pairs = [a - b for a, b in zip(mine, theirs, strict=True)]
    found = Spread.of(pairs)
    size = Spread(abs(found.mean), found.half).text(digits)
    word = "lower" if found.mean < 0 else "higher"
    if found.half is None:
        return f"{size} {word}, with one seed and so without an interval"
    if abs(found.mean) > found.half:
        return f"{size} {word}"
    return f"{size} {word}, which {len(pairs)} seeds do not tell from no difference"

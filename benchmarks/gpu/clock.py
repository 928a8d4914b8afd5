"""Time that is shared out: parts by importance, and inside a part its cases, the least important dropped first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """What a part may take. importance: 0 is kept longest."""

    name: str
    importance: int
    least: float  # seconds below which it is not worth starting
    wanted: float  # seconds that all of its cases take


def shares(parts: Sequence[Share], seconds: float) -> dict[str, float]:
    """Seconds for each part; 0 for those that are dropped.

    The more important ones get the least that they need first, then what they want.
    """
    ordered = sorted(parts, key=lambda part: part.importance)
    given = {part.name: 0.0 for part in parts}
    for field in ("least", "wanted"):
        for part in ordered:
            if field == "wanted" and not given[part.name]:
                continue
            more = getattr(part, field) - given[part.name]
            if field == "wanted":
                more = min(more, seconds)
            if 0 < more <= seconds:
                given[part.name] += more
                seconds -= more
    return given


class Clock:
    """What is left of a number of seconds, and what had to be dropped."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + seconds
        self.dropped: list[str] = []

    @property
    def left(self) -> float:
        return max(0.0, self._end - self._now())

    def has(self, seconds: float, name: str) -> bool:
        """Whether ``name`` still fits. Once something did not, nothing that comes after it does: cases are given in the
        order of importance, and a short unimportant one must not take the place of a long important one."""
        if self.dropped or seconds > self.left:
            self.dropped.append(name)
            return False
        return True

"""The demonstrations behind ``fastseq demo``: one file in ``fastseq/demo/chapters`` per chapter.

A chapter is a module with ``TITLE`` (a heading), ``ABOUT`` (what it is about, for readers who know neither the paper
nor the code), ``FULL_SECONDS`` and ``QUICK_SECONDS`` (that it aims for) and ``run(budget) -> list[Section]``. Its file
name is the NAME that ``fastseq demo NAME`` takes; adding the file is all the registration there is. All chapters
together leave room below six minutes for `make demo`, and below one for --quick.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from fastseq.demo.report import Chapter

Progress = Callable[[str, float, str], None]  # stage, fraction done in [0, 1], a short remark


def _silent(stage: str, fraction: float, remark: str) -> None:
    """Progress for callers that want none."""


@dataclass
class Budget:
    """What one chapter may spend, and how it says where it is.

    Args:
        seconds: wall time the chapter should aim for.
        seed: for every random choice of the chapter.
        progress: called with a stage, the fraction of it that is done, and a remark.
    """

    seconds: float
    seed: int = 0
    progress: Progress = _silent
    begin: float = field(default_factory=time.perf_counter)

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.begin + self.seconds - time.perf_counter())


def names() -> list[str]:
    """The chapters that exist, in alphabetical order; imports none of them."""
    folder = Path(__file__).with_name("chapters")
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))


def load(name: str) -> ModuleType:
    """The module of chapter ``name``.

    Raises:
        ValueError: there is no such chapter.
    """
    if name not in names():
        raise ValueError(f"demo: NAME must be one of {', '.join(names())}, got {name!r}")
    return importlib.import_module(f"{__name__}.chapters.{name}")


def run(chosen: Iterable[str], quick: bool, seed: int = 0, progress: Progress = _silent) -> list[Chapter]:
    """Run chapters one after the other; what one has left over or overdrawn, the next ones get or lack.

    Args:
        chosen: chapter names. quick: take their ``QUICK_SECONDS``. seed, progress: as in ``Budget``.
    """
    modules = [load(name) for name in chosen]
    shares = [float(module.QUICK_SECONDS if quick else module.FULL_SECONDS) for module in modules]
    end = time.perf_counter() + sum(shares)
    chapters = []
    for k, module in enumerate(modules):
        part = max(0.0, end - time.perf_counter()) * shares[k] / sum(shares[k:])
        chapters.append(Chapter(module.TITLE, module.run(Budget(part, seed, progress)), module.ABOUT))
    return chapters

"""What a part of the run is made of, and what it knows of the machine: cases that give rows, one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

Row = dict[str, Any]
BEGIN = "-- "  # before the name of a case, in the log of a part


class Context(NamedTuple):
    """Where a part runs. dry: tiny sizes on the CPU, with its clock, to see that everything works."""

    device: torch.device
    dry: bool

    def pick(self, real: Any, dry: Any) -> Any:
        return dry if self.dry else real


class Unit(NamedTuple):
    """One case of a part. seconds: what it takes, roughly, with compilation. limit: after these it counts as hung."""

    name: str
    seconds: float
    run: Callable[[], list[Row]]
    limit: float | None = None


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Allow only this backend of the operators on CUDA tensors; None: let fastseq choose."""
    before = os.environ.pop("FASTSEQ_BACKEND", None)
    if name is not None:
        os.environ["FASTSEQ_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("FASTSEQ_BACKEND", None)
        if before is not None:
            os.environ["FASTSEQ_BACKEND"] = before


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:200]

"""The choice of a backend: one tuple per operator, searched in order, with a reason for every no."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

logger = logging.getLogger("fastseq")
_told: set[str] = set()


class Backend(NamedTuple):
    """One way to compute an operator. ``why_not(*args)`` is None where it can, else the reason."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]


def allowed() -> str | None:
    """The only backend that FASTSEQ_BACKEND allows, or None."""
    return os.environ.get("FASTSEQ_BACKEND") or None


def choose(op: str, backends: tuple[Backend, ...], *args: Any, **kwargs: Any) -> Backend:
    """The first backend that can run this call.

    Raises:
        RuntimeError: when none can; the message holds every reason.
    """
    only = allowed()
    reasons: list[str] = []
    for backend in backends:
        reason = f"FASTSEQ_BACKEND={only}" if only and only != backend.name else backend.why_not(*args, **kwargs)
        if reason is None:
            if reasons and not only:
                once(f"{op}: using {backend.name}, because {'; '.join(reasons)}")
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"{op}: no backend can run this call ({'; '.join(reasons)})")


def once(message: str) -> None:
    """Warn through the ``fastseq`` logger, once per process and message."""
    if message not in _told:
        _told.add(message)
        logger.warning(message)

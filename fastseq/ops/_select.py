"""The choice of a backend: one tuple per operator, searched in order, with a reason for every no."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

logger = logging.getLogger("fastseq")
_told: set[str] = set()
_watching: list[list[Choice]] = []


def _none(*args: Any, **kwargs: Any) -> None:
    return None


class Backend(NamedTuple):
    """One way to compute an operator.

    ``why_not(*args)`` is None where it can, else the reason. ``doubt(*args)`` is None, or why nobody has seen its
    results be right on this device; then it gives way to a backend without doubt, but for the reference.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    doubt: Callable[..., str | None] = _none


class Choice(NamedTuple):
    """What ``choose`` found for one call."""

    op: str
    backend: Backend | None
    why: str
    reasons: dict[str, str]  # of the other backends


def allowed() -> str | None:
    """The only backend that FASTSEQ_BACKEND allows, or None."""
    return os.environ.get("FASTSEQ_BACKEND") or None


def consider(op: str, backends: tuple[Backend, ...], *args: Any, **kwargs: Any) -> Choice:
    """The backend for this call, why it is the one, and why the others are not."""
    only = allowed()
    reasons: dict[str, str] = {}
    able: list[Backend] = []
    for backend in backends:
        reason = f"FASTSEQ_BACKEND={only}" if only and only != backend.name else backend.why_not(*args, **kwargs)
        if reason is None:
            able.append(backend)
        else:
            reasons[backend.name] = reason
    if not able:
        return Choice(op, None, "none can run", reasons)
    doubts = {backend.name: backend.doubt(*args, **kwargs) for backend in able}
    sure = [b for b in able if doubts[b.name] is None and b.name != "reference"]
    chosen = (sure or able)[0]
    for backend in able:
        if backend is not chosen:
            reasons[backend.name] = doubts[backend.name] or f"{chosen.name} comes first"
    why = f"FASTSEQ_BACKEND={only}" if only else "the first that can run here"
    doubt = doubts[chosen.name]
    return Choice(op, chosen, why if doubt is None else f"{why}; {doubt}", reasons)


def choose(op: str, backends: tuple[Backend, ...], *args: Any, operator: bool = True, **kwargs: Any) -> Backend:
    """The first backend that can run this call and that is not in doubt where another one is sure.

    Args:
        operator: False for a choice that the dispatcher of torch does not see, which ``watch`` then collects.

    Raises:
        RuntimeError: when none can; the message holds every reason.
    """
    if not allowed() and (operator or not _watching):
        for backend in backends:
            if backend.why_not(*args, **kwargs) is None:
                if backend.name != "reference" and backend.doubt(*args, **kwargs) is None:
                    return backend
                break
    choice = consider(op, backends, *args, **kwargs)
    if choice.backend is None:
        listed = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons.items())
        raise RuntimeError(f"{op}: no backend can run this call ({listed})")
    if not operator:
        for seen in _watching:
            seen.append(choice)
    if not allowed():
        _tell(choice)
    return choice.backend


def _tell(choice: Choice) -> None:
    """Say once what a user would want to know: the definition runs, slowly, or a kernel that nobody has seen right."""
    assert choice.backend is not None
    listed = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons.items())
    if choice.backend.name == "reference":
        once(f"{choice.op}: using reference, because {listed}")
    elif "unverified" in choice.why:
        once(f"{choice.op}: using {choice.backend.name}, {choice.why}")


@contextlib.contextmanager
def watch(seen: list[Choice]) -> Iterator[None]:
    """Collect the choices inside a module's call that are made outside of an operator: between torch's own LSTM and
    ours."""
    _watching.append(seen)
    try:
        yield
    finally:
        _watching.remove(seen)


def once(message: str) -> None:
    """Warn through the ``fastseq`` logger, once per process and message."""
    if message not in _told:
        _told.add(message)
        logger.warning(message)

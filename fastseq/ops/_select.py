"""The choice of a backend: one tuple per operator, searched in order, with a reason for every no."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

logger = logging.getLogger("fastseq")
_told: set[Any] = set()
_watching: list[list[Choice]] = []


def _none(*args: Any, **kwargs: Any) -> None:
    return None


class Backend(NamedTuple):
    """One way to compute an operator.

    ``why_not(*args)`` is None where it can, else the reason. ``doubt(*args)`` is None, or why another is better: nobody
    has seen its results be right on this device, or it was measured to be slower. Then it gives way to a backend
    without doubt, but for the reference.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    doubt: Callable[..., str | None] = _none
    detail: Callable[..., str | None] = _none  # of the way that it takes, for ``explain``


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
    found = (why, doubts[chosen.name], chosen.detail(*args, **kwargs))
    return Choice(op, chosen, "; ".join(text for text in found if text), reasons)


def choose(op: str, backends: tuple[Backend, ...], *args: Any, operator: bool = True, **kwargs: Any) -> Backend:
    """The first backend that can run this call and that is not in doubt where another one is sure.

    Args:
        operator: False for a choice that the dispatcher of torch does not see, which ``watch`` then collects.

    Raises:
        RuntimeError: when none can; the message holds every reason.
    """
    only, chosen = allowed(), None
    for backend in backends:
        if (only and only != backend.name) or backend.why_not(*args, **kwargs) is not None:
            continue
        sure = backend.name != "reference" and backend.doubt(*args, **kwargs) is None
        if chosen is None or sure:
            chosen = backend
        if sure:
            break
    if chosen is None:
        raise RuntimeError(f"{op}: no backend can run this call ({_listed(consider(op, backends, *args, **kwargs))})")
    watched = _watching and not operator
    if watched or not (only or sure or (op, chosen.name, *_kind(args)) in _told):
        choice = consider(op, backends, *args, **kwargs)
        for seen in _watching if watched else ():
            seen.append(choice)
        if not only and not sure:
            _told.add((op, chosen.name, *_kind(args)))
            _tell(choice)
    return chosen


def _kind(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What reasons depend on in nearly all cases."""
    first = first_tensor(args)
    return (None, None) if first is None else (first.device, first.dtype)


def first_tensor(args: tuple[Any, ...]) -> Any:
    """The tensor whose device and dtype decide, or None."""
    for a in args:
        if hasattr(a, "device"):
            return a
        if isinstance(a, (list, tuple)) and a and hasattr(a[0], "device"):
            return a[0]
    return None


def _listed(choice: Choice) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in choice.reasons.items())


def _tell(choice: Choice) -> None:
    """Say once what a user would want to know: the definition runs, slowly, or a kernel that nobody has seen right."""
    assert choice.backend is not None
    if choice.backend.name == "reference":
        once(f"{choice.op}: using reference, because {_listed(choice)}")
    else:
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

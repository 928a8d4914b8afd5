"""Argument checks with one form of message: function, argument, what was expected with sizes, what was given.

Works on anything with ``shape``, ``dtype`` and ``device`` (torch and numpy), and imports neither.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NoReturn


class ArgumentError(ValueError, RuntimeError):
    """A wrong argument. torch raises now ``ValueError``, now ``RuntimeError`` for these; handlers of either see it."""


def fail(function: str, name: str, expected: str, got: object) -> NoReturn:
    """Raise ``ArgumentError``: ``lstm: weight_hh must be [4*H, H] = [1024, 256], got [1024, 128]``."""
    raise ArgumentError(f"{function}: {name} must be {expected}, got {got}")


def shape(function: str, name: str, value: Any, symbols: str, *sizes: int) -> None:
    """``value`` has exactly these sizes; ``symbols`` names them ("4*H, H")."""
    if value.shape != sizes:
        fail(function, name, f"[{symbols}] = {list(sizes)}", list(value.shape))


def dtype(function: str, name: str, value: Any, expected: object) -> None:
    """``value`` has the dtype ``expected``."""
    if value.dtype != expected:
        fail(function, name, str(expected), value.dtype)


def device(function: str, name: str, value: Any, expected: object) -> None:
    """``value`` lives on the device ``expected``."""
    if value.device != expected:
        fail(function, name, f"on {expected}", f"one on {value.device}")


def probability(function: str, name: str, value: Any) -> None:
    """``value`` is a number in [0, 1]; NaN and bool are not."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        fail(function, name, "a number in [0, 1]", repr(value))


def positive(function: str, name: str, value: Any) -> None:
    """``value`` is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < float("inf"):
        fail(function, name, "a finite number > 0", repr(value))


def not_negative(function: str, name: str, value: Any) -> None:
    """``value`` is a finite number, zero or above."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < float("inf"):
        fail(function, name, "a finite number >= 0", repr(value))


def count(function: str, name: str, value: Any) -> None:
    """``value`` is an integer above zero."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        fail(function, name, "an integer >= 1", repr(value))


def one_of(function: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        fail(function, name, "one of " + ", ".join(repr(c) for c in choices), repr(value))

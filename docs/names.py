"""The pages of ``docs/api``, which are made of docstrings: the modules that have one, and what is added there."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

MODULES = ("calibration", "compression", "convert", "deploy", "functional", "nn", "recipes", "reference")
COMMENT = re.compile(r"^ +(\w+): (.*?)(?: = [^#]*?)?(?:  # type: [^#]*)?(?:  # (.*))?$")


def public(module: str) -> list[str]:
    """The names of a module that users may rely on."""
    return sorted(getattr(importlib.import_module(module), "__all__", ()))


def fields(record: type) -> list[str]:
    """The fields of a named tuple as lines of reStructuredText, with the comments that give their shapes."""
    lines = []
    for line in inspect.getsource(record).splitlines():
        found = COMMENT.match(line)
        if found and found[1] in record._fields:  # type: ignore[attr-defined]
            name, kind, comment = found.groups()
            lines.append(f"- **{name}** (``{kind}``)" + (f": {comment}" if comment else ""))
    return lines


def complete(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Adds to the docstring of a module a table of its names, to that of a named tuple its fields."""
    if what == "module":
        listed = [each for each in public(name) or options.members if each not in (options.exclude_members or ())]
        lines += ["", ".. autosummary::", "   :nosignatures:", "", *(f"   {each}" for each in listed), ""]
    elif what == "class" and hasattr(thing, "_fields"):
        lines += ["", *fields(thing), ""]


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Fields of named tuples stand with their tuple."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def shortened(
    app: Any, what: str, name: str, thing: Any, options: Any, arguments: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Signatures of compiled functions, which pybind11 writes at length."""
    long = {r"self: [\w.]+(, )?": "", r"typing\.SupportsInt \| typing\.SupportsIndex": "int"}
    long[r"(?:fastseq\._core|numpy|collections\.abc)\.(?=\w)"] = ""
    for pattern, short in long.items() if getattr(thing, "__module__", "") == "fastseq._core" else ():
        arguments, result = (part and re.sub(pattern, short, part) for part in (arguments, result))
    return arguments, result

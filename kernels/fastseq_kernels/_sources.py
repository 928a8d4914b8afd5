"""Content hashes of the kernels' source: what a compiled budget and a passing result row are valid for."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent


def modules() -> list[str]:
    """The modules that hold kernels, one per operator or family."""
    return sorted(p.stem for p in _FOLDER.glob("*.py") if not p.stem.startswith("_"))


def _imports(path: Path) -> set[str]:
    """Modules of this package that the file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastseq_kernels"):
            inner = node.module.removeprefix("fastseq_kernels").removeprefix(".")
            found |= {inner} if inner else {alias.name for alias in node.names}
    return {name for name in found if (_FOLDER / f"{name}.py").exists()}


@functools.cache
def source_hash(module: str) -> str:
    """Of the module and of all that it imports from this package; comments count too."""
    seen: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= _imports(_FOLDER / f"{name}.py") - seen
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(name.encode() + b"\0" + (_FOLDER / f"{name}.py").read_bytes() + b"\0")
    return digest.hexdigest()[:16]

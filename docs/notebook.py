"""``docs/start.md`` as a notebook, ``examples/start.ipynb``: ``python -m docs.notebook`` writes it, a test compares."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "start.md"
NOTEBOOK = ROOT / "examples" / "start.ipynb"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)
LINK = re.compile(r"\]\((?!https?:)([\w/]+\.md)")


def _cell(n: int, kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "cell_type": kind,
        "id": f"cell-{n}",
        "metadata": {},
        "source": text.strip().splitlines(keepends=True),
    }
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def notebook(page: str) -> str:
    """The JSON of a notebook with a cell for each block of Python and for each text between two."""
    parts = BLOCK.split(page)  # text, code, text, ...
    texts = [LINK.sub(r"](../docs/\1", part) if n % 2 == 0 else part for n, part in enumerate(parts)]
    kinds = [("markdown", "code")[n % 2] for n in range(len(texts))]
    cells = [_cell(n, kind, text) for n, (kind, text) in enumerate(zip(kinds, texts, strict=True)) if text.strip()]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.parent.mkdir(exist_ok=True)
    NOTEBOOK.write_text(notebook(PAGE.read_text()))

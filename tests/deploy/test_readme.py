"""The README's way out of torch, line by line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text().split("## Without torch")[1]
    block = re.search(r"```python\n(.*?)```", section, re.S)
    assert block
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block[1], found)
    assert found["state"].shape == (16, found["model"].state_size)
    whole, _ = found["model"].run(np.zeros((1, 1, 64), np.float32))
    np.testing.assert_array_equal(found["y"], whole[0, 0])

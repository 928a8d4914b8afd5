"""The README's way out of torch, line by line: what is saved with torch runs in a process that cannot import it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKED = "import sys\nsys.modules['torch'] = None\n"
CHECKS = """
assert state.shape == (16, model.state_size)
np.testing.assert_array_equal(y, model.run(np.zeros((1, 1, 64), np.float32))[0][0, 0])
print(*model.run(np.ones((1, 1, 64), np.float32))[0].ravel())
"""


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    section = README.read_text().split("## Without torch")[1].split("\n## ")[0]
    with_torch, without = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len((with_torch + without).replace("\n\n", "\n").strip().splitlines()) <= 11
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(with_torch, found)
    command = [sys.executable, "-c", BLOCKED + without + CHECKS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    y = torch.tensor([float(v) for v in done.stdout.split()])
    small: torch.nn.Module = found["small"]  # type: ignore[assignment, name-defined]
    with torch.no_grad():
        torch.testing.assert_close(y, small(torch.ones(1, 1, 64))[0][0, 0], rtol=0, atol=1e-6)

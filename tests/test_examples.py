"""The programs in ``examples`` run at their small size, and do what they are there to show."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import documents

ROOT = Path(__file__).parents[1]

# program -> what it prints, and what must hold of the figures in it
SHOWS: dict[str, tuple[str, Callable[..., bool]]] = {
    "language_model": (r"([\d.]+) bits each(?:.|\n)*int8 weights ([\d.]+)", lambda a, b: a < 4.5 and abs(a - b) < 0.1),
    "tag_sequences": (r"all +([\d.]+)", lambda share: share > 0.6),
    "speech_stream": (r"500 frames without torch: (\d+) bits a second", lambda bits: bits == 1200),
    "image_codec": (r"(\d+) of 256 codes(?:.|\n)* (\d+) of 256 codes", lambda without, having: having > 2 * without),
    "mimo_uncertainty": (r"trained: .*differ ([\d.]+)\n.*differ ([\d.]+)", lambda known, unknown: unknown > known),
    "adt_finetune": (r"attack ([\d.]+)\n.*attack ([\d.]+)", lambda before, after: after > before + 0.05),
    "large_batch_ddp": (r"2 processes, .*accuracy ([\d.]+)", lambda accuracy: accuracy > 0.5),
}
TWO = """
import os
os.environ.update(WORLD_SIZE="2", MASTER_PORT="{port}")
os.environ["RANK"] = "1" if os.fork() == 0 else "0"
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[documents.Outcome, str]]:
    """How each program ended, and what it printed."""
    jobs = []
    for name in SHOWS:
        path = ROOT / "examples" / f"{name}.py"
        before = f"import sys; sys.argv = [{str(path)!r}, '--quick']; __file__ = sys.argv[0]\n"
        before += TWO.format(port=free_port()) if name == "large_batch_ddp" else ""
        code = path.read_text().replace(
            "from __future__ import annotations\n", ""
        )  # must come first, and is not needed
        jobs.append((path.name, 1, tmp_path_factory.mktemp(name), before + code))
    found = documents.run_forked(jobs, documents.IMPORTED)
    texts = [(folder / "printed.txt").read_text() for _, _, folder, _ in jobs]
    return dict(zip(SHOWS, zip(found, texts, strict=True), strict=True))


@pytest.mark.parametrize("name", SHOWS)
def test_example(name: str, ended: dict[str, tuple[documents.Outcome, str]]) -> None:
    (status, said), printed = ended[name]
    assert status == 0, said
    pattern, holds = SHOWS[name]
    found = re.search(pattern, printed)
    assert found and holds(*map(float, found.groups())), printed


def test_all_are_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == SHOWS.keys()
    for name in SHOWS:
        assert f"`{name}.py`" in (ROOT / "docs" / "examples.md").read_text()

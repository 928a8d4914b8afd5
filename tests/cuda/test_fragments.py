"""The maps of csrc/cuda, which a compiler alone can hold to what the kernels need."""

from __future__ import annotations

from pathlib import Path

from tests.cuda import emulated


def test_maps(tmp_path: Path) -> None:
    """Every assertion of the file holds, or it does not compile."""
    emulated.compile_cpp("fragments.cpp", tmp_path / "fragments.o", 0, "-c", "-Werror")

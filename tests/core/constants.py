"""Constants of the C++ core that tests must know: beyond which sizes it cuts its work into blocks."""

from __future__ import annotations

import math
import re
from pathlib import Path

CORE = Path(__file__).parents[2] / "csrc" / "core"


def constant(file: str, name: str) -> int:
    """The value of ``constexpr ... name = value;`` in a file of the core."""
    found = re.search(rf"constexpr \w+ {name} =\s*(\d+);", (CORE / file).read_text())
    assert found, f"{name} is not in {file}"
    return int(found[1])


BLOCK_K = constant("gemm.h", "kBlockK")  # most terms of a sum that are one chain
BLOCK_M = constant("gemm.cpp", "kBlockM")  # rows of a product that are worked on at a time
TILE_ROWS = constant("gemm.h", "kMostTileRows")
PANEL_WIDTH = constant("gemm.h", "kMostPanelWidth")


def block_k(K: int) -> int:
    """Terms of each chain in a sum of K: ``block_k`` of gemm.h."""
    if K <= BLOCK_K:
        return max(1, K)
    blocks = math.ceil(K / BLOCK_K)
    return math.ceil(math.ceil(K / blocks) / 8) * 8

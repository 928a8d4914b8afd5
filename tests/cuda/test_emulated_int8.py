"""The persistent LSTM with int8 weights, run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.ops.lstm import Options
from tests.cuda import emulated
from tests.cuda.emulated import Direction
from tests.cuda.int8_cases import OUTPUTS, Given, check, drawn
from tests.tolerance import assert_same_bits

LOW = (torch.bfloat16, torch.float16)
TILES = [0, 4, 8, emulated.FIRST_CLUSTER + 1]  # each depth, each number of rows, both ways from block to block


def outputs(given: Given, tile: int, reverse: bool = False, lengths: Tensor | None = None, **options: Any) -> Any:
    direction = Direction(*given[:4], reverse, given.scale)
    return emulated.forward([direction], Options(lengths=lengths), tile, **options)[0]


@pytest.mark.parametrize("tile", TILES)
def test_tiles(tile: int) -> None:
    """Two groups of blocks, of which one has few rows, and two blocks, of which one has few units."""
    sizes = emulated.tile_sizes(tile)
    given = drawn(3, sizes.rows + 3, sizes.units + 5, LOW[tile % 2])
    check(given, torch.full((sizes.rows + 3,), 3), False, outputs(given, tile, seed=5))


@pytest.mark.parametrize("rows", [1, 8])
def test_more_blocks_than_with_weights_of_16_bits(rows: int) -> None:
    """A cluster of the deepest."""
    tile = emulated.FIRST_CLUSTER
    given = drawn(3, rows, 8 * emulated.tile_sizes(tile).units + 5, torch.bfloat16)
    check(given, torch.full((rows,), 3), False, outputs(given, tile, seed=5))


@pytest.mark.parametrize(("tile", "dtype"), [(0, LOW[0]), (emulated.FIRST_CLUSTER, LOW[1])], ids=["grid", "cluster"])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths(reverse: bool, tile: int, dtype: torch.dtype) -> None:
    """Rows of other lengths, one without steps; and bits do not depend on the order in which threads run."""
    given, lengths = drawn(6, 11, 39, dtype), torch.tensor([6, 1, 4, 0, 6, 2, 3, 5, 1, 2, 6])
    out = outputs(given, tile, reverse, lengths, seed=3)
    check(given, lengths, reverse, out)
    other = outputs(given, tile, reverse, lengths, seed=4, in_place=True)
    assert_same_bits(OUTPUTS, [v.float() for v in other], [v.float() for v in out])


def test_what_is_not_a_number_counts_as_0() -> None:
    """In the products of others; of the unit itself it stays in c."""
    given = drawn(2, 3, 9, torch.bfloat16)
    given.x_gates[0, 1, 2 * 9 + 4] = torch.nan
    h = outputs(given, 0)[0]
    assert h[:, 1, 4].isnan().all() and h.isnan().sum() == 2

"""The persistent low-rank LSTM's kernels, run on the CPU: every tile, layout and option against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tolerance
from tests.cuda import emulated_lowrank as emulated
from tests.cuda.emulated_lowrank import Given
from tests.cuda.test_emulated import GRADS, LAYOUTS, drawn, each_dtype
from tests.ops import lstm_cases as cases
from tests.ops import test_lstm_lowrank as lowrank
from tests.ops.lstm_cases import Case
from tests.tolerance import assert_same_bits, assert_within_budget

SHARED, SEPARATE = 0, 6  # tiles


def inputs(case: Case, dtype: torch.dtype, downs: int, rank: int) -> tuple[Given, Any]:
    base, generator = drawn(case, dtype), torch.Generator().manual_seed(17)

    def factor(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) / math.sqrt(size[2])).to(dtype)

    up, down = factor(4, case.H, rank), factor(downs, rank, case.H)
    return Given(base.x_gates, up, down, base.h0, base.c0), base.options


def exact(given: Given, options: Any) -> tuple[Any, ...]:
    return *given, tuple(options[1:]), None


def gradients(*inputs: Any) -> tuple[Tensor, ...]:
    """Those of ``GRADS`` by the definition."""
    found = lowrank.definition_gradients(*inputs)
    return found[0], found[3], found[4]


def check(given: Given, options: Any, tile: int, seed: int, out: tuple[Tensor, ...], only_h: bool = False) -> None:
    """Outputs and gradients within the budget of the dtype."""
    dtype = given.h0.dtype
    assert_within_budget(cases.OUTPUTS, [v.to(dtype) for v in out], lowrank.definition, exact(given, options))
    dh, _, _, dh_n, dc_n = cases.upstream(out)
    grads = (dh, None, None) if only_h else (dh, dh_n, dc_n)
    found = emulated.backward(given, out, grads, options, tile, seed)
    all_given = (*exact(given, options), (grads[0], None, None, *grads[1:]))
    assert_within_budget(GRADS, [d.to(dtype) for d in found], gradients, all_given, tolerance.GRADIENTS)


@pytest.mark.parametrize("tile", range(emulated.TILES))
def test_tiles(tile: int) -> None:
    """Two groups of blocks, of which one has few rows, and two blocks, of which one has few units."""
    sizes, dtype = emulated.tile_sizes(tile), (torch.bfloat16, torch.float16)[tile % 2]
    full = Case(2, sizes.rows + 3, sizes.units + 6)
    given, options = inputs(full, dtype, sizes.downs, sizes.rank - tile % 3)
    check(given, options, tile, 5, emulated.forward(given, options, tile, 5))


@each_dtype
@pytest.mark.parametrize("tile", [SHARED, SEPARATE], ids=["shared", "separate"])
@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(case: Case, tile: int, dtype: torch.dtype) -> None:
    """One block, so nothing is exchanged; gates may take the place of the pre-activations; bits do not depend on the
    order in which threads run."""
    given, options = inputs(case, dtype, emulated.tile_sizes(tile).downs, 5)
    out, in_place = (emulated.forward(given, options, tile, seed, seed == 4) for seed in (3, 4))
    assert_same_bits(cases.OUTPUTS, [v.float() for v in in_place], [v.float() for v in out])
    check(given, options, tile, 3, out, only_h=case.T == 6)

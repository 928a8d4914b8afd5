"""The persistent LSTM's kernels, run on the CPU: every tile, layout and option against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tolerance
from tests.cuda import emulated
from tests.cuda.emulated import Direction
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import Case, Inputs
from tests.tolerance import assert_same_bits, assert_within_budget

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
each_dtype = pytest.mark.parametrize("dtype", LOW.values(), ids=LOW.keys())
GRADS = ("dx_gates", "dh0", "dc0")


def drawn(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    args = cases.inputs(case, dtype, seed)
    return args._replace(c0=args.c0.float())


def direction(args: Inputs) -> Direction:
    return Direction(*args[:4], args.options.reverse)


def check(args: Inputs, tile: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Outputs and gradients within the budget of the dtype."""
    dtype = args.h0.dtype
    [out] = emulated.forward([direction(args)], args.options, tile, seed)
    low = [v.to(dtype) for v in out]
    assert_within_budget(cases.OUTPUTS, low, cases.definition, cases.exact(args))
    [again] = emulated.forward([direction(args)], args.options, tile, seed + 1, in_place=True)
    assert_same_bits(cases.OUTPUTS, [v.float() for v in again], [v.float() for v in out])
    dh, _, _, dh_n, dc_n = cases.upstream(out)
    for grads in ((dh, dh_n, dc_n), (dh, None, None)):
        [found] = emulated.backward([direction(args)], [out], [grads], args.options, tile, seed)
        upstream = (grads[0], None, None, *grads[1:])
        given = (*cases.exact(args), upstream)

        def wanted(*inputs: Any) -> tuple[Tensor, ...]:
            all_of = cases.definition_gradients(*inputs)
            return all_of[0], all_of[2], all_of[3]

        assert_within_budget(GRADS, [d.to(dtype) for d in found], wanted, given, tolerance.GRADIENTS)
    return out


@each_dtype
@pytest.mark.parametrize("tile", range(emulated.TILES))
def test_tiles(tile: int, dtype: torch.dtype) -> None:
    """Two groups of blocks, of which one has few rows, and three blocks, of which the last has few units."""
    sizes = emulated.tile_sizes(tile)
    check(drawn(Case(3, sizes.rows + 3, 2 * sizes.units + 5), dtype), tile, 5)


LAYOUTS = {
    "one": Case(1, 1, 1),
    "long": Case(19, 2, 35),
    "reverse": Case(6, 5, 33, reverse=True),
    "lengths": Case(7, 11, 33, layout="lengths"),
    "lengths_reverse": Case(7, 11, 33, layout="lengths", reverse=True),
    "packed": Case(7, 11, 33, layout="packed"),
    "packed_reverse": Case(7, 11, 33, layout="packed", reverse=True),
    "hard": Case(5, 9, 33, hard=True),
    "sharpened": Case(5, 9, 33, tau=0.2),
}


@each_dtype
@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(case: Case, dtype: torch.dtype) -> None:
    check(drawn(case, dtype), 0, 3)

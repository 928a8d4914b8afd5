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
WAYS = {"grid-bfloat16": (0, torch.bfloat16), "cluster-float16": (emulated.FIRST_CLUSTER, torch.float16)}
each_way = pytest.mark.parametrize(("tile", "dtype"), WAYS.values(), ids=WAYS.keys())  # from block to block
each_dtype = pytest.mark.parametrize("dtype", LOW.values(), ids=LOW.keys())
GRADS = ("dx_gates", "dh0", "dc0")


def drawn(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Inputs; those of hard gates are far from 0, where no rounding turns them."""
    args = cases.inputs(case, dtype, seed)
    x = args.x_gates
    if case.hard:
        x = x + 6 * x.sign() * (torch.arange(4 * case.H) < 2 * case.H)
    return args._replace(x_gates=x.to(dtype), c0=args.c0.float())


def direction(args: Inputs) -> Direction:
    return Direction(*args[:4], args.options.reverse)


def outputs(args: Inputs, tile: int, seed: int, in_place: bool = False) -> tuple[Tensor, ...]:
    return emulated.forward([direction(args)], args.options, tile, seed, in_place)[0]


def gradients(*inputs: Any) -> tuple[Tensor, ...]:
    """Those of ``GRADS`` by the definition."""
    found = cases.definition_gradients(*inputs)
    return found[0], found[2], found[3]


def check(args: Inputs, tile: int, seed: int, out: tuple[Tensor, ...], only_h: bool = False) -> None:
    """Outputs and gradients within the budget of the dtype."""
    dtype, exact = args.h0.dtype, cases.exact(args)
    assert_within_budget(cases.OUTPUTS, [v.to(dtype) for v in out], cases.definition, exact)
    dh, _, _, dh_n, dc_n = cases.upstream(out)
    grads = (dh, None, None) if only_h else (dh, dh_n, dc_n)
    [found] = emulated.backward([direction(args)], [out], [grads], args.options, tile, seed)
    given = (*exact, (grads[0], None, None, *grads[1:]))
    assert_within_budget(GRADS, [d.to(dtype) for d in found], gradients, given, tolerance.GRADIENTS)


@pytest.mark.parametrize("tile", range(emulated.TILES))
def test_tiles(tile: int) -> None:
    """Two groups of blocks, of which one has few rows, and two blocks, of which one has few units."""
    sizes, dtype = emulated.tile_sizes(tile), list(LOW.values())[tile % 2]
    args = drawn(Case(3, sizes.rows + 3, sizes.units + 5), dtype)
    check(args, tile, 5, outputs(args, tile, 5))


@pytest.mark.parametrize("tile", range(emulated.FIRST_CLUSTER, emulated.TILES))
def test_one_block(tile: int) -> None:
    """No block has others, and all rows that a tile can have."""
    args = drawn(Case(3, emulated.tile_sizes(tile).rows + 1, 5), torch.bfloat16)
    check(args, tile, 5, outputs(args, tile, 5))


LAYOUTS = {
    "one": Case(1, 1, 1),
    "long": Case(19, 2, 35),
    "reverse": Case(6, 5, 33, reverse=True),
    "lengths": Case(7, 11, 33, layout="lengths"),
    "lengths_reverse": Case(7, 11, 33, layout="lengths", reverse=True),
    "packed": Case(7, 11, 33, layout="packed"),
    "packed_reverse": Case(7, 11, 33, layout="packed", reverse=True),
    "few_reverse": Case(7, 3, 33, layout="lengths", reverse=True),
    "packed_long": Case(67, 2, 33, layout="packed"),
    "packed_long_reverse": Case(67, 2, 33, layout="packed", reverse=True),
    "hard": Case(5, 9, 33, hard=True),
    "sharpened": Case(5, 9, 33, tau=0.2),
}


@each_way
@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(case: Case, tile: int, dtype: torch.dtype) -> None:
    """And gates may take the place of the pre-activations; bits do not depend on the order in which threads run."""
    args = drawn(case, dtype)
    out, in_place = outputs(args, tile, 3), outputs(args, tile, 4, in_place=True)
    assert_same_bits(cases.OUTPUTS, [v.float() for v in in_place], [v.float() for v in out])
    check(args, tile, 3, out, only_h=case.T == 6)


@each_way
def test_both_directions(tile: int, dtype: torch.dtype) -> None:
    """One launch for two directions gives the bits of two."""
    case = Case(4, 9, 35, layout="lengths")
    pair = [drawn(case._replace(reverse=n == 1), dtype, n) for n in (0, 1)]
    options = pair[0].options
    directions = [direction(args) for args in pair]
    both = emulated.forward(directions, options, tile, 3)
    apart = [emulated.forward([d], options, tile, 4)[0] for d in directions]
    for one, other in zip(both, apart, strict=True):
        assert_same_bits(cases.OUTPUTS, [v.float() for v in one], [v.float() for v in other])
    grads = [(out[0].flip(0), None, out[4]) for out in both]
    found = emulated.backward(directions, both, grads, options, tile, 3)
    alone = [
        emulated.backward([d], [o], [g], options, tile, 4)[0] for d, o, g in zip(directions, both, grads, strict=True)
    ]
    for one, other in zip(found, alone, strict=True):
        assert_same_bits(GRADS, [v.float() for v in one], [v.float() for v in other])


@each_dtype
@pytest.mark.parametrize(("unit", "tile"), [(0, 0), (1, 0), (34, 0), (1, emulated.FIRST_CLUSTER)])
def test_what_is_not_finite(unit: int, tile: int, dtype: torch.dtype) -> None:
    """A NaN of one unit is one for all units of its row at the next step, and for no other row; so is a large h0."""
    args = drawn(Case(3, 9, 35), dtype)
    args.x_gates[0, 2, 2 * 35 + unit] = torch.nan
    args.h0[4] = 1000.0
    [out] = emulated.forward([direction(args)], args.options, tile, 3)
    expected = cases.definition(*(t.double() for t in args[:4]), args.options, None)
    for name, got, want in zip(cases.OUTPUTS.split(), out, expected, strict=True):
        assert torch.equal(got.isnan(), want.isnan()), name
    assert out[0][1, 2].isnan().all() and out[0].isnan().sum() == 1 + 2 * 35


@each_way
@pytest.mark.parametrize("reverse", [False, True])
def test_a_row_without_steps_beside_others(reverse: bool, tile: int, dtype: torch.dtype) -> None:
    """It keeps the state that it was given, and the gradient of it."""
    args = drawn(Case(3, 4, 5, layout="lengths", reverse=reverse), dtype)
    args = args._replace(options=args.options._replace(lengths=torch.tensor([0, 3, 0, 2])))
    out = outputs(args, tile, 3)
    for row in (0, 2):
        assert torch.equal(out[3][row], args.h0[row]) and torch.equal(out[4][row], args.c0[row])
    check(args, tile, 3, out)


@each_way
def test_rows_that_have_no_steps(tile: int, dtype: torch.dtype) -> None:
    args = drawn(Case(3, 2, 5, layout="lengths"), dtype)
    options = args.options._replace(lengths=torch.tensor([0, 0]))
    [out] = emulated.forward([direction(args)], options, tile)
    assert not any(v.any() for v in out[:3]) and torch.equal(out[3], args.h0) and torch.equal(out[4], args.c0)
    [found] = emulated.backward([direction(args)], [out], [(out[0], args.h0, args.c0)], options, tile)
    assert not found[0].any() and torch.equal(found[1], args.h0) and torch.equal(found[2], args.c0)

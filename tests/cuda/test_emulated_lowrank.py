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
from tests.cuda.test_emulated import GRADS, LAYOUTS, drawn
from tests.ops import lstm_cases as cases
from tests.ops import test_lstm_lowrank as lowrank
from tests.ops.lstm_cases import Case
from tests.tolerance import assert_same_bits, assert_within_budget

LOW = (torch.bfloat16, torch.float16)


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
    sizes, dtype = emulated.tile_sizes(tile), LOW[tile % 2]
    full = Case(2, sizes.rows + 3, sizes.units + 5 + tile % 2)
    given, options = inputs(full, dtype, sizes.downs, sizes.rank - tile % 3)
    check(given, options, tile, 5, emulated.forward(given, options, tile, 5))


FORMS = {emulated.SHARED: torch.bfloat16, emulated.SEPARATE: torch.float16}
each_form = pytest.mark.parametrize("tile", FORMS, ids=["shared", "separate"])


@each_form
@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(case: Case, tile: int) -> None:
    """One block, so nothing is exchanged; gates may take the place of the pre-activations; bits do not depend on the
    order in which threads run."""
    given, options = inputs(case, FORMS[tile], emulated.tile_sizes(tile).downs, 5)
    out, in_place = (emulated.forward(given, options, tile, seed, seed == 4) for seed in (3, 4))
    assert_same_bits(cases.OUTPUTS, [v.float() for v in in_place], [v.float() for v in out])
    check(given, options, tile, 3, out, only_h=case.T == 6)


@pytest.mark.parametrize(
    ("reverse", "tile"), [(False, emulated.SEPARATE), (True, emulated.SHARED)], ids=["separate", "reverse-shared"]
)
def test_several_blocks(reverse: bool, tile: int) -> None:
    """Rows begin and end at other steps, and bits do not depend on which block is late."""
    case = Case(4, 7, 2 * 128 + 2, layout="packed" if reverse else "lengths", reverse=reverse)
    given, options = inputs(case, LOW[tile == emulated.SHARED], emulated.tile_sizes(tile).downs, 7)
    out, other = (emulated.forward(given, options, tile, seed) for seed in (3, 4))
    assert_same_bits(cases.OUTPUTS, [v.float() for v in other], [v.float() for v in out])
    check(given, options, tile, 3, out)
    grads = (out[0].flip(0), None, out[4])
    found, again = (emulated.backward(given, out, grads, options, tile, seed) for seed in (3, 4))
    assert_same_bits(GRADS, [v.float() for v in again], [v.float() for v in found])


@pytest.mark.parametrize("H", [35, 130])
@each_form
def test_what_is_not_finite(tile: int, H: int) -> None:
    """A NaN of one unit is one for all units of its row at the next step, and for no other row; infinite states give
    no more of them than in the definition, whatever the ranks that the tile has beside those of the call."""
    given, options = inputs(Case(3, 9, H), FORMS[tile], emulated.tile_sizes(tile).downs, 1)
    given.x_gates[0, 2, 3 * H - 1] = torch.nan
    given.h0[4], given.h0[5, 0] = 1000.0, torch.inf
    out = emulated.forward(given, options, tile, 3)
    expected = lowrank.definition(
        *exact(given._replace(**{n: t.double() for n, t in given._asdict().items()}), options)
    )
    for name, got, want in zip(cases.OUTPUTS.split(), out, expected, strict=True):
        assert torch.equal(got.isnan(), want.isnan()), name
    assert out[0][1, 2].isnan().all() and out[0].isnan().sum() == 1 + 2 * H


@pytest.mark.parametrize("reverse", [False, True])
@each_form
def test_rows_without_steps(tile: int, reverse: bool) -> None:
    """They keep the state that they were given, and the gradient of it, beside others and alone."""
    case = Case(3, 4, 5, layout="lengths", reverse=reverse)
    given, options = inputs(case, FORMS[tile], emulated.tile_sizes(tile).downs, 3)
    some, none = (options._replace(lengths=torch.tensor(v)) for v in ([0, 3, 0, 2], [0] * 4))
    out = emulated.forward(given, some, tile, 3)
    assert torch.equal(out[3][::2], given.h0[::2]) and torch.equal(out[4][::2], given.c0[::2])
    check(given, some, tile, 3, out)
    out = emulated.forward(given, none, tile)
    assert not any(v.any() for v in out[:3]) and torch.equal(out[3], given.h0) and torch.equal(out[4], given.c0)
    found = emulated.backward(given, out, (out[0], given.h0, given.c0), none, tile)
    assert not found[0].any() and torch.equal(found[1], given.h0) and torch.equal(found[2], given.c0)


def test_numbers_that_lie_at_odd_places() -> None:
    """Where no pair of units is a word in memory, they are read and written one at a time."""
    given, options = inputs(Case(3, 2, 6), torch.bfloat16, 1, 2)

    def moved(t: Tensor) -> Tensor:
        return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)

    odd = given._replace(x_gates=moved(given.x_gates))
    assert odd.x_gates.data_ptr() % 4 == 2
    out, even = (emulated.forward(v, options, 0) for v in (odd, given))
    assert_same_bits(cases.OUTPUTS, [v.float() for v in out], [v.float() for v in even])
    grads = (out[0], None, None)
    kept = (*out[:2], moved(out[2]))
    found, again = (emulated.backward(given, v, grads, options, 0) for v in (kept, out))
    assert_same_bits(GRADS, [v.float() for v in found], [v.float() for v in again])

"""The LSTM whose gates have factors of unequal ranks or full matrices, against its definition."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastseq import reference
from fastseq.ops.lstm_mixed import BACKENDS, lstm_mixed
from tests import tolerance
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import OUTPUTS, Case, Options
from tests.tolerance import assert_same_bits, assert_within_budget

Ranks = tuple[int, int, int, int]
NAMES = ("x_gates", "weight_hh", "up", "down", "h0", "c0", "h_start", "c_start")
each_backend = pytest.mark.parametrize("backend", cases.backends("lstm_mixed_forward", BACKENDS))
RANKS: dict[str, Ranks] = {
    "equal": (3, 3, 3, 3),
    "unequal": (1, 4, 0, 19),
    "two_full": (3, 2, -1, -1),
    "outer_full": (-1, 2, 5, -1),
    "one_low": (-1, -1, -1, 2),
    "none_low": (-1, -1, -1, -1),
    "no_rank": (0, 0, 0, 0),
}
each_ranks = pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
# no case of one unit: the only gradient of a gate may be a single cancelling 1 - g * g
SOME = ("prime", "over_tile", "no_steps", "no_rows", "all_dense", "all_lengths_reverse", "all_packed")


class Inputs(NamedTuple):
    """Tensors of one call, in the order of ``lstm_mixed``."""

    x_gates: Tensor
    weights: tuple[Tensor | None, Tensor, Tensor]
    ranks: Ranks
    h0: Tensor
    c0: Tensor
    options: tuple[Any, ...]


def inputs(case: Case, ranks: Ranks, dtype: torch.dtype = torch.float32, grad: bool = False) -> Inputs:
    base = cases.inputs(case, dtype, requires_grad=grad)
    generator = torch.Generator().manual_seed(17)
    values, full, H = sum(max(rank, 0) for rank in ranks), sum(rank < 0 for rank in ranks), case.H
    up, down, weight = (torch.randn(*s, generator=generator) for s in ((H, values), (values, H), (full * H, H)))
    scaled = (weight / math.sqrt(H), up / math.sqrt(max(values / 4, 1)), down / math.sqrt(H))
    weight, up, down = (t.to(dtype).requires_grad_(grad) for t in scaled)
    weights = (weight if full else None, up, down)
    return Inputs(base.x_gates, weights, ranks, base.h0, base.c0, tuple(base.options[1:]))


def exact(args: Inputs) -> tuple[Any, ...]:
    """Arguments of ``definition``: those of the call and its noise in float64."""
    base = cases.Inputs(args.x_gates, args.x_gates, args.h0, args.c0, Options(None, *args.options))
    return *args, cases.exact(base)[5]


def definition(x: Tensor, weights: Any, ranks: Ranks, h0: Tensor, c0: Tensor, options: Any, noise: Any) -> Any:
    return reference.lstm_mixed(x, *weights, ranks, h0, c0, *options[:5], noise, *options[10:])


def present(args: Inputs) -> dict[str, Tensor]:
    """The inputs that can require grad, by name."""
    tensors = (args.x_gates, *args.weights, args.h0, args.c0, *args.options[3:5])
    return {name: t for name, t in zip(NAMES, tensors, strict=True) if t is not None}


def with_leaves(args: Inputs, leaves: dict[str, Tensor]) -> Inputs:
    weights = (leaves.get("weight_hh"), leaves["up"], leaves["down"])
    options = (*args.options[:3], leaves.get("h_start"), leaves.get("c_start"), *args.options[5:])
    return Inputs(leaves["x_gates"], weights, args.ranks, leaves["h0"], leaves["c0"], options)


def definition_gradients(*args: Any) -> tuple[Tensor, ...]:
    """Of ``definition`` by autograd: its arguments, then upstream gradients; one per tensor of ``present``."""
    call = Inputs(*args[:6])
    leaves = {name: t.detach().requires_grad_() for name, t in present(call).items()}
    outputs = definition(*with_leaves(call, leaves), args[6])
    pairs = [(v, d) for v, d in zip(outputs, args[7], strict=True) if v.requires_grad]
    outs, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(outs, tuple(leaves.values()), grads, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if d is None else d for d, leaf in zip(found, leaves.values(), strict=True))


def forward(backend: str, args: Inputs, save: int = 2) -> tuple[Tensor, ...]:
    given = (args.x_gates, *args.weights, *args.ranks, args.h0, args.c0, *args.options, save)
    out: tuple[Tensor, ...] = cases.run("lstm_mixed_forward", backend, *given, table=BACKENDS)
    return out


def backward_arguments(args: Inputs, outputs: Any, grads: Any, weights: bool = True) -> tuple[Any, ...]:
    h, c, gates = outputs[:3]
    state = (*args.weights, *args.ranks, args.h0, args.c0, *args.options[:5], *args.options[10:], weights)
    return *grads, gates, h, c, *state


def backward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = cases.run("lstm_mixed_backward", backend, *backward_arguments(*args), table=BACKENDS)
    return out


@pytest.mark.parametrize("case", SOME)
@each_ranks
@each_backend
def test_against_the_definition(backend: str, ranks: Ranks, case: str) -> None:
    args = inputs(cases.NO_PROJECTION[case], ranks)
    outputs = forward(backend, args)
    assert_within_budget(OUTPUTS, outputs, definition, exact(args))
    grads = cases.upstream(outputs)
    order = ("x_gates", "weight_hh", "up", "down", "h0", "c0", "h_start", "c_start")
    found = dict(zip(order, backward(backend, args, outputs, grads), strict=True))
    names = list(present(args))
    got, expected = [found[name] for name in names], (*exact(args), grads)
    assert_within_budget([f"d{n}" for n in names], got, definition_gradients, expected, tolerance.GRADIENTS)


@each_ranks
def test_the_definition_is_that_of_the_full_matrix(ranks: Ranks) -> None:
    args = inputs(cases.NO_PROJECTION["all_lengths"], ranks, torch.float64)
    weight, up, down = args.weights
    lows = [r for r in ranks if r >= 0]
    products = iter([a @ b for a, b in zip(up.split(lows, 1), down.split(lows), strict=True)])
    full = iter(() if weight is None else weight.split(19))
    whole = torch.cat([next(full) if r < 0 else next(products) for r in ranks])
    dense = cases.Inputs(args.x_gates, whole, args.h0, args.c0, Options(None, *args.options))
    for a, b in zip(definition(*exact(args)), cases.definition(*cases.exact(dense)), strict=True):
        assert float((a - b).abs().max()) < 1e-12


@each_backend
def test_what_is_kept(backend: str) -> None:
    """``save`` and ``weights`` decide what comes back, not what it holds."""
    args = inputs(cases.NO_PROJECTION["all_lengths"], (2, -1, 3, -1))
    full = forward(backend, args)
    for save in (0, 1):
        kept = [True, save >= 1, False, True, True]
        for name, keep, a, b in zip(OUTPUTS.split(), kept, forward(backend, args, save), full, strict=True):
            assert_same_bits(name, a, b if keep else b.new_empty(0))
    grads = cases.upstream(full)
    every, some = (backward(backend, args, full, grads, weights) for weights in (True, False))
    for n, name in enumerate(NAMES):
        assert_same_bits(name, some[n], every[n].new_empty(0) if n in (1, 2, 3) else every[n])


@pytest.mark.parametrize("case", ["all_lengths_reverse", "all_packed"])
@pytest.mark.parametrize("ranks", ["unequal", "two_full"])
def test_opcheck(ranks: str, case: str) -> None:
    args = inputs(cases.NO_PROJECTION[case], RANKS[ranks])
    given = (args.x_gates, *args.weights, *args.ranks, args.h0, args.c0, *args.options, 2)
    outputs = torch.ops.fastseq.lstm_mixed_forward(*given)
    for op, call in (
        ("forward", given),
        ("backward", backward_arguments(args, outputs, cases.upstream(outputs))),
    ):
        found = torch.library.opcheck(getattr(torch.ops.fastseq, f"lstm_mixed_{op}").default, call)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("ranks", ["unequal", "two_full"])
def test_autograd(ranks: str) -> None:
    """Every gradient, and second derivatives."""
    case = Case(3, 2, 3, layout="lengths", reset=True, start=True)
    args = inputs(case, tuple(min(r, 2) for r in RANKS[ranks]), torch.float64, grad=True)  # type: ignore[arg-type]
    leaves = present(args)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return lstm_mixed(*with_leaves(args, dict(zip(leaves, tensors, strict=True))))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))
    with pytest.raises(NotImplementedError, match=r"lstm_mixed: forward-mode differentiation \(jvp\)"):
        torch.func.jvp(lambda x: lstm_mixed(x, *args[1:])[0], (args.x_gates,), (args.x_gates,))


def test_vmap() -> None:
    args = inputs(Case(3, 2, 5), (2, 1, -1, -1))
    many = torch.stack((args.x_gates, args.x_gates + 1))
    found = torch.func.vmap(lambda x: lstm_mixed(x, *args[1:])[0])(many)
    assert_same_bits("h h", list(found), [lstm_mixed(x, *args[1:])[0] for x in many])

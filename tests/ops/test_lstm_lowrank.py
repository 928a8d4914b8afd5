"""The low-rank LSTM against its definition: every backend, layout, option, route and dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastseq import functional, reference
from fastseq.ops.lstm_lowrank import BACKENDS, lstm_lowrank
from tests import tolerance
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import ALL, OUTPUTS, Case, Options
from tests.tolerance import assert_same_bits, assert_within_budget

NAMES = ("x_gates", "up", "down", "h0", "c0", "h_start", "c_start")
each_backend = pytest.mark.parametrize("backend", cases.backends("lstm_lowrank_forward", BACKENDS))
each_shared = pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
CASES = {
    "one": Case(1, 1, 1),
    "prime": Case(7, 5, 13),
    "over_tile": Case(2, 18, 33),
    "no_steps": Case(0, 3, 5),
    "no_rows": Case(4, 0, 5),
    "reverse": Case(5, 3, 11, reverse=True),
    "reset_alone": Case(6, 4, 9, reset=True),
    "sharpened": Case(4, 3, 7, tau=0.2),
    "hard": Case(4, 3, 7, hard=True),
    "all_dense": Case(4, 3, 19, **ALL),
    "all_lengths": Case(5, 4, 19, layout="lengths", **ALL),
    "all_lengths_reverse": Case(5, 4, 19, layout="lengths", reverse=True, **ALL),
    "all_packed": Case(5, 4, 19, layout="packed", **ALL),
    "all_packed_reverse": Case(5, 4, 19, layout="packed", reverse=True, **ALL),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Inputs(NamedTuple):
    """Tensors of one call, in the order of ``lstm_lowrank_forward``."""

    x_gates: Tensor
    up: Tensor
    down: Tensor
    h0: Tensor
    c0: Tensor
    options: tuple[Any, ...]


def inputs(case: Case, shared: bool, rank: int = 3, dtype: torch.dtype = torch.float32, grad: bool = False) -> Inputs:
    base = cases.inputs(case, dtype)
    generator = torch.Generator().manual_seed(17)
    up, down = (torch.randn(*shape, generator=generator) for shape in ((4, case.H, rank), (1 if shared else 4, rank, case.H)))
    tensors = (base.x_gates, up / math.sqrt(max(rank, 1)), down / math.sqrt(case.H), base.h0, base.c0)
    floats = [t.to(dtype).requires_grad_(grad) for t in tensors]
    options = tuple(
        v.requires_grad_(grad) if isinstance(v, Tensor) and v.is_floating_point() else v for v in base.options[1:]
    )
    return Inputs(*floats, options)


def exact(args: Inputs) -> tuple[Any, ...]:
    """Arguments of ``definition``: those of the call and its noise in float64."""
    base = cases.Inputs(args.x_gates, args.up, args.h0, args.c0, Options(None, *args.options))
    return *args, cases.exact(base)[5]


def definition(
    x_gates: Tensor, up: Tensor, down: Tensor, h0: Tensor, c0: Tensor, options: tuple[Any, ...], noise: Tensor | None
) -> tuple[Tensor, ...]:
    return reference.lstm_lowrank(x_gates, up, down, h0, c0, *options[:5], noise, *options[10:])


def present(args: Inputs) -> dict[str, Tensor]:
    """The inputs that can require grad, by name."""
    tensors = (*args[:5], *args.options[3:5])
    return {name: t for name, t in zip(NAMES, tensors, strict=True) if t is not None}


def definition_gradients(*args: Any) -> tuple[Tensor, ...]:
    """Of ``definition`` by autograd: its arguments, then upstream gradients; one per tensor of ``present``."""
    call = Inputs(*args[:6])
    leaves = {name: t.detach().requires_grad_() for name, t in present(call).items()}
    starts = tuple(leaves.get(name) for name in NAMES[5:])
    options = (*call.options[:3], *starts, *call.options[5:])
    outputs = definition(*(leaves[name] for name in NAMES[:5]), options, args[6])
    pairs = [(v, d) for v, d in zip(outputs, args[7], strict=True) if d is not None and v.requires_grad]
    outs, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(outs, tuple(leaves.values()), grads, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if d is None else d for d, leaf in zip(found, leaves.values(), strict=True))


def forward(backend: str, args: Inputs, save: int = 2) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = cases.run("lstm_lowrank_forward", backend, *args[:5], *args.options, save, table=BACKENDS)
    return out


def backward(backend: str, args: Inputs, outputs: Any, grads: Any, weights: bool = True) -> tuple[Tensor, ...]:
    h, c, gates = outputs[:3]
    given = (*grads, gates, h, c, *args[1:5], *args.options[:5], *args.options[10:], weights)
    out: tuple[Tensor, ...] = cases.run("lstm_lowrank_backward", backend, *given, table=BACKENDS)
    return out


def check(backend: str, args: Inputs, which: str = "all") -> None:
    """Outputs and gradients are within the budget."""
    outputs = forward(backend, args)
    assert_within_budget(OUTPUTS, outputs, definition, exact(args))
    grads = [d if which in ("all", name) else None for name, d in zip(OUTPUTS.split(), cases.upstream(outputs), strict=True)]
    found = dict(zip(NAMES, backward(backend, args, outputs, grads), strict=True))
    names = [name for name in NAMES if name in present(args)]
    got = [found[name] for name in names]
    expected = (*exact(args), grads)
    assert_within_budget([f"d{n}" for n in names], got, definition_gradients, expected, tolerance.GRADIENTS)


@each_case
@each_shared
@each_backend
def test_against_the_definition(backend: str, shared: bool, case: Case) -> None:
    check(backend, inputs(case, shared))

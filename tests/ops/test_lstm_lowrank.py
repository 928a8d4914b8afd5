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
from tests.ops.lstm_cases import OUTPUTS, Case, Options
from tests.tolerance import assert_same_bits, assert_within_budget

NAMES = ("x_gates", "up", "down", "h0", "c0", "h_start", "c_start")
each_backend = pytest.mark.parametrize("backend", cases.backends("lstm_lowrank_forward", BACKENDS))
each_shared = pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
CASES = {
    **cases.NO_PROJECTION,
    "reset_alone": Case(6, 4, 9, reset=True),
    "sharpened": Case(4, 3, 7, tau=0.2),
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
    up, down = (
        torch.randn(*shape, generator=generator) for shape in ((4, case.H, rank), (1 if shared else 4, rank, case.H))
    )
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
    grads = [
        d if which in ("all", name) else None for name, d in zip(OUTPUTS.split(), cases.upstream(outputs), strict=True)
    ]
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


@contextmanager
def route(name: str, H: int, rank: int) -> Iterator[None]:
    """Kernels by one route, with blocks that do not hold all of H or all ranks, but the ranks of resident factors."""
    from fastseq_kernels import lstm_lowrank as kernels

    block_r = 16 if name != "resident" else 16 * -(-rank // 16)
    with mock.patch.object(kernels, "plan", lambda *_: kernels.Plan(name, 16, block_r, 4, 1)):
        yield


@pytest.mark.parametrize("case", ["all_lengths", "all_packed_reverse"])
@pytest.mark.parametrize("name", ["resident", "loop", "steps"])
@each_shared
@cases.triton_alone
def test_routes(backend: str, shared: bool, name: str, case: str) -> None:
    with route(name, CASES[case].H, 18):
        check(backend, inputs(CASES[case], shared, rank=18))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["resident", "loop"])
@cases.triton_alone
def test_low_precision(backend: str, name: str, dtype: torch.dtype) -> None:
    """c and its gradients are float32, whatever the rest is; the budget is that of the definition in 16 bits."""
    args = inputs(CASES["all_lengths"], name == "resident", dtype=dtype)
    options = tuple(v.float() if n == 4 and v is not None else v for n, v in enumerate(args.options))
    given = args._replace(c0=args.c0.float(), options=options)
    with route(name, 19, 3):
        outputs = forward(backend, given)
        grads = cases.upstream(outputs)
        found = backward(backend, given, outputs, grads)
    assert [v.dtype for v in outputs] == [dtype, torch.float32, dtype, dtype, torch.float32]
    assert [v.dtype for v in found] == [dtype] * 4 + [torch.float32, dtype, torch.float32]
    assert_within_budget(OUTPUTS, [v.to(dtype) for v in outputs], definition, exact(args))
    names = [f"d{name}" for name in NAMES]
    got, expected = [v.to(dtype) for v in found], (*exact(args), [d.to(dtype) for d in grads])
    assert_within_budget(names, got, definition_gradients, expected, tolerance.GRADIENTS)


@pytest.mark.parametrize("name", ["resident", "loop", "steps"])
@cases.triton_alone
def test_row_alone_and_in_a_batch(backend: str, name: str) -> None:
    args = inputs(Case(2, 17, 19, reset=True, start=True), False)
    with route(name, 19, 3):
        outputs = forward(backend, args)
        grads = cases.upstream(outputs)
        found = backward(backend, args, outputs, grads)
        for row in (0, 16):
            own = slice(row, row + 1)
            options = (*args.options[:2], args.options[2][:, own].contiguous(), *args.options[3:])
            alone = Inputs(args.x_gates[:, own].contiguous(), args.up, args.down, args.h0[own], args.c0[own], options)
            got = forward(backend, alone)
            expected = [*(v[:, own] for v in outputs[:3]), *(v[own] for v in outputs[3:])]
            assert_same_bits(OUTPUTS, got, expected)
            given = [d[:, own].contiguous() if d.dim() == 3 else d[own] for d in grads]
            some = backward(backend, alone, got, given)
            assert_same_bits("dx dh0 dc0", [some[0], *some[3:5]], [found[0][:, own], found[3][own], found[4][own]])


@pytest.mark.parametrize("which", ["h", "c", "gates", "h_n", "c_n"])
@each_backend
def test_one_upstream_gradient(backend: str, which: str) -> None:
    check(backend, inputs(CASES["all_lengths_reverse"], True), which)


@pytest.mark.parametrize("given", ["h_start", "c_start"])
@each_backend
def test_one_start_state(backend: str, given: str) -> None:
    args = inputs(CASES["all_dense"], True)
    dropped = 4 if given == "h_start" else 3
    check(backend, args._replace(options=tuple(None if n == dropped else v for n, v in enumerate(args.options))))


@pytest.mark.parametrize("rank", [0, 1, 40])
@each_backend
def test_ranks(backend: str, rank: int) -> None:
    """No rank at all, one, and more than H."""
    check(backend, inputs(CASES["reset_alone"], rank == 1, rank))


@each_backend
def test_what_is_kept(backend: str) -> None:
    """``save`` and ``weights`` decide what comes back, not what it holds."""
    args = inputs(CASES["all_lengths"], True)
    full = forward(backend, args)
    for save in (0, 1):
        part = forward(backend, args, save)
        kept = [True, save >= 1, False, True, True]
        for name, keep, a, b in zip(OUTPUTS.split(), kept, part, full, strict=True):
            assert_same_bits(name, a, b if keep else b.new_empty(0))
    grads = cases.upstream(full)
    every, some = (backward(backend, args, full, grads, weights) for weights in (True, False))
    for n, name in enumerate(NAMES):
        assert_same_bits(name, some[n], every[n].new_empty(0) if n in (1, 2) else every[n])


@each_shared
def test_the_definition_is_that_of_the_full_matrix(shared: bool) -> None:
    args = inputs(CASES["all_lengths"], shared, dtype=torch.float64)
    whole = (args.up @ args.down).flatten(0, 1)
    full = cases.Inputs(args.x_gates, whole, args.h0, args.c0, Options(None, *args.options))
    for a, b in zip(definition(*exact(args)), cases.definition(*cases.exact(full)), strict=True):
        assert float((a - b).abs().max()) < 1e-12


@pytest.mark.parametrize("case", ["all_lengths_reverse", "all_packed"])
@each_shared
def test_opcheck(shared: bool, case: str) -> None:
    args = inputs(CASES[case], shared)
    outputs = torch.ops.fastseq.lstm_lowrank_forward(*args[:5], *args.options, 2)
    given = (*cases.upstream(outputs), outputs[2], *outputs[:2], *args[1:5], *args.options[:5], *args.options[10:])
    for op, call in (("forward", (*args[:5], *args.options, 2)), ("backward", (*given, True))):
        found = torch.library.opcheck(getattr(torch.ops.fastseq, f"lstm_lowrank_{op}").default, call)
        assert set(found.values()) == {"SUCCESS"}


@each_shared
def test_autograd(shared: bool) -> None:
    """Every gradient through ``functional``, and second derivatives."""
    case = Case(3, 2, 3, layout="lengths", reset=True, start=True)
    args = inputs(case, shared, 2, torch.float64, grad=True)
    leaves = tuple(present(args).values())

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        options = (*args.options[:3], *tensors[5:], *args.options[5:])
        return lstm_lowrank(*tensors[:5], options)

    if cases.backends("lstm_lowrank_forward", BACKENDS)[0].marks:  # kernels have no float64
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)
    plain = inputs(case, shared, 2, grad=True)
    outputs = lstm_lowrank(*plain)
    grads = cases.upstream(outputs)
    names = [f"d{name}" for name in present(plain)]
    got = torch.autograd.grad(outputs, tuple(present(plain).values()), grads)
    assert_within_budget(names, got, definition_gradients, (*exact(plain), grads), tolerance.GRADIENTS)


def named(args: Inputs) -> dict[str, Any]:
    """The options of one call by name, as ``functional`` takes them."""
    return dict(zip(functional.RecurrenceOptions._fields, args.options, strict=True))


@pytest.mark.parametrize("case", ["all_dense", "all_lengths_reverse", "all_packed"])
@each_shared
def test_functional(shared: bool, case: str) -> None:
    args = inputs(CASES[case], shared)
    found = functional.lstm_lowrank(*args[:3], args[3:5], return_gates=True, **named(args))
    assert_within_budget(OUTPUTS, (*found[:1], *found[3:], *found[1:3]), definition, exact(args))
    started = functional.lstm_lowrank(*args[:3], **named(args))
    starts = [v.expand(len(args.h0), -1).contiguous() for v in args.options[3:5]]
    assert_within_budget("h", started.h, lambda *a: definition(*a)[0], exact(args._replace(h0=starts[0], c0=starts[1])))
    assert started.c is None and started.gates is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "up_rank": ({"up": torch.zeros(4, 5)}, r"up must be \[4, H, r\], got \[4, 5\]"),
    "down_size": ({"down": torch.zeros(2, 3, 5)}, r"down must be \[4, r, H\] = \[4, 3, 5\], got \[2, 3, 5\]"),
    "down_dtype": ({"down": torch.zeros(1, 3, 5).double()}, "down must be torch.float32, got torch.float64"),
    "x_size": ({"x_gates": torch.zeros(4, 3, 19)}, r"x_gates must be \[T, B, 4\*H\] = \[T, B, 20\], got \[4, 3, 19\]"),
    "x_dtype": ({"x_gates": torch.zeros(4, 3, 20).int()}, "x_gates|up must be torch.int32"),
    "h0_size": ({"hx": (torch.zeros(2, 5), torch.zeros(3, 5))}, r"h0 must be \[B, H\] = \[3, 5\], got \[2, 5\]"),
    "lengths": ({"lengths": torch.zeros(3)}, "lengths must be integers, got torch.float32"),
    "lengths_size": ({"lengths": torch.zeros(2).int()}, r"lengths must be \[B\] = \[3\], got \[2\]"),
    "sizes": ({"batch_sizes": torch.ones(4).long()}, r"x_gates must be packed \[N, 4\*H\]"),
    "reset": ({"reset": torch.zeros(4, 3)}, "reset must be torch.bool, got torch.float32"),
    "seed": ({"seed": torch.zeros(2).long()}, r"seed must be int64 \[1\] on the CPU, got \[2\]"),
    "rows": ({"rows": torch.zeros(3)}, r"rows must be int64 \[3\] on the CPU, got \[3\] of torch.float32"),
    "start": ({"h_start": torch.zeros(4)}, r"h_start must be \[H\] = \[5\], got \[4\]"),
    "tau": ({"tau": 0.0}, "tau must be a finite number > 0, got 0.0"),
    "probability": ({"noise_probability": 2}, r"noise_probability must be a number in \[0, 1\], got 2"),
    "device": ({"down": torch.zeros(1, 3, 5, device="meta")}, "down must be on cpu, got one on meta"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    given = {"x_gates": torch.zeros(4, 3, 20), "up": torch.zeros(4, 5, 3), "down": torch.zeros(1, 3, 5)} | change
    with pytest.raises(ValueError, match=f"lstm_lowrank: ({message})"):
        functional.lstm_lowrank(**given)

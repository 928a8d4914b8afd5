"""Results of the low-rank operators that must be equal bit for bit: threads, batches, runs, doors; and the doors'
errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import lstm_cases as cases
from tests.ops import test_lstm_lowrank as lowrank
from tests.ops import test_lstm_mixed as mixed
from tests.ops.lstm_cases import Case
from tests.tolerance import assert_same_bits

pytestmark = cases.needs_compiled()
each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# More than one block of units, panel, register tile and thread; "deep" has blocks of 128 units.
CASES = {
    "prime": Case(7, 5, 13),
    "all_packed": cases.NO_PROJECTION["all_packed"],
    "wide": Case(3, 3, 301),
    "by_rows": Case(3, 45, 130, reset=True, noise=0.2, reverse=True),
    "tall": Case(3, 131, 67),
    "deep": Case(3, 2, 1100),
    "lengths": Case(5, 37, 130, layout="lengths", **cases.ALL),
    "packed_reverse": Case(5, 37, 130, layout="packed", reverse=True, **cases.ALL),
}
KINDS = {"shared": 5, "separate": 32, "mixed": (3, -1, 37, 16)}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
Door = Callable[[str, tuple[Any, ...]], Any]


def inputs(kind: str, case: Case, dtype: torch.dtype) -> Any:
    if kind == "mixed":
        return mixed.inputs(case, KINDS[kind], dtype)
    return lowrank.inputs(case, kind == "shared", KINDS[kind], dtype)


def calls(args: Any, door: Door) -> list[Tensor]:
    """All outputs, then all gradients."""
    if isinstance(args, mixed.Inputs):
        given: tuple[Any, ...] = (args.x_gates, *args.weights, *args.ranks, args.h0, args.c0, *args.options, 2)
        outputs = door("lstm_mixed_forward", given)
        grads = door("lstm_mixed_backward", mixed.backward_arguments(args, outputs, cases.upstream(outputs)))
        return [*outputs, *grads]
    outputs = door("lstm_lowrank_forward", (*args[:5], *args.options, 2))
    state = (outputs[2], *outputs[:2], *args[1:5], *args.options[:5], *args.options[10:], True)
    return [*outputs, *door("lstm_lowrank_backward", (*cases.upstream(outputs), *state))]


def by_torch(op: str, args: tuple[Any, ...]) -> Any:
    return getattr(torch.ops.fastseq, op)(*args)


def by_numpy(threads: int) -> Door:
    core = cases.numpy_door()

    def door(op: str, args: tuple[Any, ...]) -> Any:
        def one(value: Any) -> Any:
            if isinstance(value, Tensor):
                return int(value) if value is seed else value.numpy()
            return value

        seed = args[-9] if op.endswith("forward") else None
        return tuple(torch.from_numpy(v) for v in getattr(core, op)(*map(one, args), threads=threads))

    return door


def names(found: list[Tensor], what: str = "") -> list[str]:
    return [f"result {n} {what}" for n in range(len(found))]


@each_case
@each_kind
@each_dtype
def test_threads_runs_and_doors(dtype: torch.dtype, kind: str, case: Case) -> None:
    args = inputs(kind, case, dtype)
    torch.set_num_threads(1)
    expected = calls(args, by_torch)
    assert_same_bits(names(expected, "again"), calls(args, by_torch), expected)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same_bits(names(expected, f"{threads} threads"), calls(args, by_torch), expected)
    for threads in (1, 3):
        assert_same_bits(names(expected, f"numpy, {threads}"), calls(args, by_numpy(threads)), expected)


@each_kind
@pytest.mark.parametrize("threads", [1, 2])
def test_row_alone_and_in_a_batch(threads: int, kind: str) -> None:
    torch.set_num_threads(threads)
    args = inputs(kind, Case(3, 29, 130, reset=True, start=True), torch.float32)
    found = calls(args, by_torch)
    full = cases.upstream(tuple(found[:5]))
    for row in (0, 17, 28):
        own = slice(row, row + 1)
        options = (*args.options[:2], args.options[2][:, own].contiguous(), *args.options[3:])
        alone = args._replace(
            x_gates=args.x_gates[:, own].contiguous(), h0=args.h0[own], c0=args.c0[own], options=options
        )

        def with_own_gradients(op: str, given: tuple[Any, ...], own: slice = own) -> Any:
            grads = [d[:, own].contiguous() if d.dim() == 3 else d[own] for d in full]
            return by_torch(op, (*grads, *given[5:]) if op.endswith("backward") else given)

        got = calls(alone, with_own_gradients)
        expected = [*(v[:, own] for v in found[:3]), *(v[own] for v in found[3:5]), found[5][:, own]]
        expected += [found[n][own] for n in (-4, -3)]
        assert_same_bits("h c gates h_n c_n dx dh0 dc0", [*got[:6], *got[-4:-2]], expected)


WRONG: dict[str, tuple[str, dict[int, Any], str]] = {
    "up": ("lowrank", {1: torch.zeros(4, 6, 3)}, r"up must be \[4, H, r\] = \[4, 5, 3\], got \[4, 6, 3\]"),
    "down": ("lowrank", {2: torch.zeros(2, 3, 5)}, r"down must be \[4, r, H\] = \[4, 3, 5\], got \[2, 3, 5\]"),
    "save": ("lowrank", {-1: 3}, "save must be 0, 1 or 2, got 3"),
    "ranks": ("mixed", {4: -2}, "ranks must be at least 0, or -1 for a full gate, got -2"),
    "mixed_up": ("mixed", {2: torch.zeros(5, 7)}, r"up must be \[H, R\] = \[5, 6\], got \[5, 7\]"),
    "mixed_down": ("mixed", {3: torch.zeros(5, 5)}, r"down must be \[R, H\] = \[6, 5\], got \[5, 5\]"),
    "no_weight": ("mixed", {1: None}, r"weight_hh must be \[D\*H, H\] = \[5, 5\], got nothing"),
    "dtype": ("mixed", {3: torch.zeros(6, 5).double()}, "down must be float32, got float64"),
}


@pytest.mark.parametrize(("kind", "change", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors_of_the_doors(kind: str, change: dict[int, Any], message: str) -> None:
    x, state = torch.zeros(2, 3, 20), (torch.zeros(3, 5), torch.zeros(3, 5))
    options = tuple(cases.Options()[1:])
    if kind == "lowrank":
        given: list[Any] = [x, torch.zeros(4, 5, 3), torch.zeros(1, 3, 5), *state, *options, 0]
    else:
        given = [x, torch.zeros(5, 5), torch.zeros(5, 6), torch.zeros(6, 5), 1, 2, 3, -1, *state, *options, 0]
    for n, value in change.items():
        given[n] = value
    for door in (by_torch, by_numpy(1)):
        with pytest.raises((ValueError, RuntimeError), match=f"lstm_{kind}_forward: {message}"):
            door(f"lstm_{kind}_forward", tuple(given))

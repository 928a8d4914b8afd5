"""The int8 LSTM against its definition: exact integer sums, every step from the state that it was given, equal bits."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fastseq import functional, reference
from fastseq.ops import _select
from fastseq.ops.lstm_int8 import BACKENDS
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import ALL, Case, Options
from tests.ops.steps import check_last, states_before
from tests.tolerance import assert_same_bits, assert_within_budget

each_backend = pytest.mark.parametrize("backend", cases.backends("lstm_int8_forward", BACKENDS))
CASES = cases.NO_PROJECTION
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Inputs(NamedTuple):
    """Tensors of one call, in the order of ``lstm_int8_forward``."""

    x_gates: Tensor
    weight_hh: Tensor
    scale: Tensor
    h0: Tensor
    c0: Tensor
    options: tuple[Any, ...]


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    base = cases.inputs(case)
    H = case.H
    generator = torch.Generator().manual_seed(17)
    weight = torch.randint(-128, 128, (4 * H, H), generator=generator, dtype=torch.int8)
    scale = (0.5 + torch.rand(4 * H, generator=generator)) / (64 * max(H, 1) ** 0.5)
    start = None if base.options.h_start is None else base.options.h_start.to(dtype)
    options = (*base.options[1:4], start, *base.options[5:])
    return Inputs(base.x_gates.to(dtype), weight, scale, base.h0.to(dtype), base.c0, options)


def forward(backend: str, args: Inputs, save: int = 2) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = cases.run("lstm_int8_forward", backend, *args[:5], *args.options, save, table=BACKENDS)
    return out


def one_step(backend: str, x: Tensor, weight: Tensor, scale: Tensor, h0: Tensor, **options: Any) -> Tensor:
    """The gates of one step from h0 and c0 = 0."""
    c0 = torch.zeros(h0.shape, dtype=torch.float32)
    args = Inputs(x[None], weight, scale, h0, c0, Options(**options)[1:])
    return forward(backend, args)[2][0]


def integer_sums(h: Tensor, weight: Tensor) -> np.ndarray:
    """By numpy, in 64 bits."""
    q = np.clip(np.rint(h.numpy().astype(np.float32) * np.float32(127)), -127, 127).astype(np.int64)
    return q @ weight.numpy().astype(np.int64).T


def with_ties(B: int, H: int) -> Tensor:
    """h of which many lie halfway between two steps of 1/127, and some beyond one."""
    h = torch.randint(-300, 301, (B, H)).to(torch.float32) / (2 * 127)
    return torch.where(torch.rand(B, H) < 0.5, h, torch.randn(B, H))


@pytest.mark.parametrize(("B", "H"), [(1, 1), (3, 31), (17, 33), (2, 130), (2, 300)])
@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
@each_backend
def test_integer_sums_are_exact(backend: str, B: int, H: int, extreme: bool) -> None:
    """A hard gate opens where x = -sum + 1/2 and stays shut where x = -sum - 1/2; each gate's weights in turn."""
    weight = torch.randint(-128, 128, (4 * H, H), dtype=torch.int8)
    h = with_ties(B, H)
    if extreme:
        weight, h = torch.full_like(weight, -128), torch.full_like(h, -2.0)
    scale = torch.full((4 * H,), 127.0)
    for turned in (weight, weight.roll(2 * H, 0)):
        sums = torch.from_numpy(integer_sums(h, turned)).to(torch.float32)
        for offset, expected in ((0.5, 1.0), (-0.5, 0.0)):
            gates = one_step(backend, offset - sums, turned, scale, h, hard=True)
            assert (gates[:, : 2 * H] == expected).all()


def check_steps(backend: str, args: Inputs) -> None:
    """Each step, from the state before it as the backend left it, is the definition's to the budget.

    Over several steps a rounding of h may turn one way in float32 and another in float64, so whole sequences are not
    compared with float64.
    """
    h, c, gates, h_n, c_n = forward(backend, args)
    noise = cases.exact(cases.Inputs(args.x_gates, args.weight_hh, args.h0, args.c0, Options(None, *args.options)))[5]
    sizes, dense = args.options[1], args
    if sizes is not None:
        index, mask, lengths = reference.packed_index(sizes, len(args.h0))
        h, c, gates, x, reset, noise = (
            None if v is None else reference.unpack(v, index, mask)
            for v in (h, c, gates, args.x_gates, args.options[2], noise)
        )
        dense = args._replace(x_gates=x, options=(lengths, None, reset, *args.options[3:]))
    lengths, start, reverse = dense.options[0], dense.options[3:5], args.options[-1]
    first = args.h0, args.c0
    (h_in, c_in), valid = states_before(h, c, first, lengths, dense.options[2], start, reverse)
    for got in (h, c, gates):
        assert not got[~valid].any(), "not zero beyond a row's end"

    def definition(x: Tensor, scale: Tensor, h: Tensor, c: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        step = (None if noise is None else noise[None], *args.options[10:])
        out = reference.lstm_int8(x[None], args.weight_hh, scale, h, c, None, None, None, None, None, *step)
        return out[0][0], out[1][0].to(x.dtype), out[2][0]

    dtype = args.x_gates.dtype
    inputs = (dense.x_gates[valid], args.scale, h_in[valid], c_in[valid], None if noise is None else noise[valid])
    if valid.any():
        assert_within_budget("h c gates", (h[valid], c[valid].to(dtype), gates[valid]), definition, inputs)
    check_last((h, c, None, h_n, c_n), first, lengths, reverse)


@each_case
@each_backend
def test_every_step(backend: str, case: Case) -> None:
    check_steps(backend, inputs(case))


@pytest.mark.parametrize("case", ["all_lengths", "all_packed_reverse"])
@pytest.mark.parametrize("name", ["loop", "steps"])
@cases.triton_alone
def test_routes(backend: str, name: str, case: str) -> None:
    """Every route gives the same bits: the sums are exact, and what follows them is the same arithmetic."""
    from fastseq_kernels import lstm_int8 as kernels

    args = inputs(Case(4, 5, 70, layout=CASES[case].layout, **ALL))
    resident = forward(backend, args)
    with mock.patch.object(kernels, "plan", lambda *_: kernels.Plan(name, 32, 32, 4, 1)):
        assert_same_bits(cases.OUTPUTS, forward(backend, args), resident)
        check_steps(backend, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_backend
def test_low_precision(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu":
        pytest.skip("cpu: computes float32")
    args = inputs(CASES["all_lengths"], dtype)
    assert [v.dtype for v in forward(backend, args)] == [dtype, torch.float32, dtype, dtype, torch.float32]
    check_steps(backend, args)


@cases.triton_alone
def test_row_alone_and_in_a_batch(backend: str) -> None:
    args = inputs(Case(3, 18, 19, reset=True, start=True))
    outputs = forward(backend, args)
    for row in (0, 17):
        own = slice(row, row + 1)
        options = (*args.options[:2], args.options[2][:, own].contiguous(), *args.options[3:])
        x, h0, c0 = args.x_gates[:, own].contiguous(), args.h0[own], args.c0[own]
        got = forward(backend, Inputs(x, args.weight_hh, args.scale, h0, c0, options))
        assert_same_bits(cases.OUTPUTS, got, [*(v[:, own] for v in outputs[:3]), *(v[own] for v in outputs[3:])])


@each_backend
def test_states_that_are_not_numbers_or_large(backend: str) -> None:
    """h counts as 0 where it is NaN and as 1 or -1 beyond; c keeps its NaN."""
    h0 = torch.tensor([[torch.nan, 0.3, torch.inf, -torch.inf, 5.0]])
    weight, scale = torch.randint(-128, 128, (20, 5), dtype=torch.int8), torch.full((20,), 0.01)
    got = one_step(backend, torch.zeros(1, 20), weight, scale, h0)
    expected = one_step(backend, torch.zeros(1, 20), weight, scale, torch.tensor([[0, 0.3, 1, -1, 1]]))
    assert_same_bits("gates", got, expected)


@pytest.mark.parametrize("save", [0, 1])
@each_backend
def test_what_is_kept(backend: str, save: int) -> None:
    args = inputs(CASES["all_lengths"])
    full, part = forward(backend, args), forward(backend, args, save)
    kept = [True, save >= 1, False, True, True]
    for name, keep, a, b in zip(cases.OUTPUTS.split(), kept, part, full, strict=True):
        assert_same_bits(name, a, b if keep else b.new_empty(0))


@pytest.mark.parametrize("case", ["all_lengths_reverse", "all_packed"])
def test_opcheck(case: str) -> None:
    args = inputs(CASES[case])
    found = torch.library.opcheck(torch.ops.fastseq.lstm_int8_forward.default, (*args[:5], *args.options, 2))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", ["all_dense", "all_packed"])
def test_functional(case: str) -> None:
    args = inputs(CASES[case])
    named = dict(zip(functional.RecurrenceOptions._fields, args.options, strict=True))
    found = functional.lstm_int8(*args[:3], args[3:5], return_gates=True, **named)
    h, c, gates, h_n, c_n = torch.ops.fastseq.lstm_int8_forward(*args[:5], *args.options, 2)
    assert_same_bits("h h_n c_n c gates", found, (h, h_n, c_n, c, gates))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_functional_in_other_dtypes(dtype: torch.dtype) -> None:
    """On the CPU 16 bits are computed in float32, by the core, and float64 by the definition."""
    args = inputs(CASES["all_lengths"], dtype)
    c0 = args.c0.to(dtype)
    named = dict(zip(functional.RecurrenceOptions._fields, args.options, strict=True))
    named["c_start"] = args.options[4].to(dtype)
    found = functional.lstm_int8(args.x_gates, args.weight_hh, args.scale, (args.h0, c0), **named)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    options = tuple(v.to(wide) if isinstance(v, Tensor) and v.is_floating_point() else v for v in named.values())
    state = args.x_gates.to(wide), args.weight_hh, args.scale, args.h0.to(wide), c0.to(wide)
    backend = "cpu" if dtype == torch.bfloat16 else "reference"
    expected = forward(backend, Inputs(*state, options), 0)
    assert_same_bits("h h_n", *([v.to(dtype).double() for v in pair] for pair in ((found.h, found.h_n), expected[::3])))
    assert_same_bits("c_n", found.c_n, expected[4])


@cases.needs_compiled()
def test_the_core_is_for_float32() -> None:
    args = inputs(CASES["prime"], torch.float64)
    with pytest.raises(ValueError, match="lstm_int8_forward: x_gates must be float32, got float64"):
        torch.ops.fastseq.lstm_int8_forward(*args[:5], *args.options, 0)


@cases.needs_compiled()
@pytest.mark.parametrize("name", list(CASES))
def test_the_core_is_the_same_for_any_team(name: str) -> None:
    args = inputs(CASES[name])
    torch.set_num_threads(1)
    one = forward("cpu", args)
    torch.set_num_threads(3)
    assert_same_bits(cases.OUTPUTS, forward("cpu", args), one)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"weight_hh": torch.zeros(20, 5)}, "weight_hh must be torch.int8, got torch.float32"),
    "size": ({"weight_hh": torch.zeros(19, 5, dtype=torch.int8)}, r"weight_hh must be \[4\*H, H\] = \[20, 5\], got"),
    "scale": ({"scale": torch.ones(5)}, r"scale must be \[4\*H\] = \[20\], got \[5\]"),
    "scale_dtype": ({"scale": torch.ones(20).half()}, "scale must be torch.float32, got torch.float16"),
    "gradient": (
        {"x_gates": torch.zeros(4, 3, 20, requires_grad=True)},
        r"x_gates must be without a gradient \(torch.no_grad, or detach\), got one that requires it",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    weight, scale = torch.zeros(20, 5, dtype=torch.int8), torch.ones(20)
    given = {"x_gates": torch.zeros(4, 3, 20), "weight_hh": weight, "scale": scale} | change
    with pytest.raises(ValueError, match=f"lstm_int8: {message}"):
        functional.lstm_int8(**given)


def test_the_definition_on_the_cpu_is_announced(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """Once, with the reason; it stands in for dtypes that the core does not compute in."""
    monkeypatch.setattr(_select, "_told", set())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    args = [v.double() if v.is_floating_point() and v.dim() > 1 else v for v in inputs(CASES["prime"])[:3]]
    with caplog.at_level(logging.WARNING, "fastseq"):
        for _ in range(2):
            functional.lstm_int8(*args)
    reasons = "cpu: x_gates is torch.float64, it takes torch.float32; cuda: input is on cpu; triton: input is on cpu"
    assert [r.message for r in caplog.records] == [f"lstm_int8_forward: using reference, because {reasons}"]

"""The LSTM over packed weights: every step bit for bit by exact products and the cell of the core, in every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastseq import reference
from fastseq.reference import Gate, Matrix, Part
from tests.ops import lstm_cases as cases
from tests.ops import packed_cases as packed
from tests.ops.lstm_cases import Case, numpy_door
from tests.ops.packed_cases import FORMS
from tests.ops.steps import check_last, states_before
from tests.tolerance import assert_same_bits, assert_within_budget

core = numpy_door()
PLAIN = {name: c for name, c in cases.CASES.items() if c.noise is None}
WITHOUT_NOISE = {n: c._replace(noise=None, rows=False) for n, c in cases.CASES.items() if n.startswith("all_")}
CASES = {**PLAIN, **WITHOUT_NOISE}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_form = pytest.mark.parametrize("form", FORMS)
PROJECTION = {"int4_groups": "int4_groups", "int4": "int4", "bfloat16": "bfloat16", "float32": "float32"}


class Call:
    """Arguments of ``lstm_packed`` for a case, as tensors, matrices and arrays."""

    def __init__(self, case: Case, form: str, I: int = 0) -> None:  # noqa: E741
        args = cases.inputs(case)
        H, P = case.H, case.P or case.H
        self.case, self.form = case, form
        self.options = args.options
        self.x, self.h0, self.c0 = args.x_gates, args.h0, args.c0
        self.hh: Matrix = packed.matrix(4 * H, P, form, 4, 1)
        self.hr: Matrix | None = packed.matrix(P, H, PROJECTION.get(form, "int8"), 1, 2) if case.P else None
        self.ih: Matrix | None = None
        self.bias: Tensor | None = None
        if I:
            generator = torch.Generator().manual_seed(3)
            self.ih, self.bias = packed.matrix(4 * H, I, form, 4, 4), torch.randn(4 * H, generator=generator)
            self.x = torch.randn(*self.x.shape[:-1], I, generator=generator)

    def weights(self) -> dict[str, Any]:
        H, P = self.case.H, self.case.P
        found: dict[str, Any] = {"weight_hh": packed.pack(core, self.hh, P or H, self.hr is None)}
        if self.hr is not None:
            found["weight_hr"] = packed.pack(core, self.hr, H, True)
        if self.ih is not None:
            found["weight_ih"], found["bias"] = packed.pack(core, self.ih, self.x.shape[-1]), self.bias.numpy()  # type: ignore[union-attr]
        return found

    def named(self, **change: Any) -> dict[str, Any]:
        o = self.options
        tensors = {"x": self.x, "h0": self.h0, "c0": self.c0, "lengths": o.lengths, "batch_sizes": o.batch_sizes}
        tensors |= {"reset": o.reset, "h_start": o.h_start, "c_start": o.c_start} | change
        found = {n: v.numpy() if isinstance(v, Tensor) else v for n, v in tensors.items()}
        return {**found, **self.weights(), "tau": o.tau, "hard": o.hard, "reverse": o.reverse}

    def run(self, save: int = 2, threads: int = 1, **change: Any) -> list[np.ndarray]:
        return list(core.lstm_packed(**self.named(**change), save=save, threads=threads))

    def states(self, out: list[np.ndarray]) -> tuple[Tensor, list[Tensor], list[np.ndarray]]:
        """x, h and c before every valid step, [M, ...], and what came out of it."""
        o = self.options
        x, reset, lengths = self.x, o.reset, o.lengths
        dense = [torch.from_numpy(v) for v in out]
        if o.batch_sizes is not None:
            index, mask, lengths = reference.packed_index(o.batch_sizes, len(self.h0))
            x, reset, *dense[:3] = (
                None if v is None else reference.unpack(v, index, mask) for v in (x, reset, *dense[:3])
            )
        first = self.h0, self.c0
        before, valid = states_before(*dense[:2], first, lengths, reset, (o.h_start, o.c_start), o.reverse)
        check_last(dense, first, lengths, o.reverse)
        for got in dense[:3]:
            assert not got[~valid].any(), "not zero beyond a row's end"
        return x[valid], [v[valid] for v in before], [v[valid].numpy() for v in dense[:3]]


def one_step(call: Call, x: np.ndarray, h: np.ndarray, c: np.ndarray) -> list[np.ndarray]:
    """h, c and gates by exact products and the cell of ``lstm_forward``, whose weights are zeros."""
    M, H = c.shape
    x_gates = x if call.ih is None else packed.product(core, x, call.ih, call.bias.numpy())  # type: ignore[union-attr]
    pre = x_gates + packed.product(core, h, call.hh, bounded=call.hr is None)
    zeros = np.zeros((4 * H, H), np.float32)
    options = {"tau": call.options.tau, "hard": call.options.hard}
    inner, c, gates = core.lstm_forward(pre[None], zeros, np.zeros((M, H), np.float32), c, save=2, **options)[:3]
    h = inner[0] if call.hr is None else packed.product(core, inner[0], call.hr, bounded=True)
    return [h, c[0], gates[0]]


def check_steps(call: Call, out: list[np.ndarray]) -> None:
    x, before, after = call.states(out)
    if len(x):
        assert_same_bits("h c gates", after, one_step(call, x.numpy(), *(v.numpy() for v in before)))


@each_case
@pytest.mark.parametrize("form", ["int8", "int4_groups", "mixed_factors"])
def test_every_step(form: str, case: Case) -> None:
    call = Call(case, form)
    check_steps(call, call.run())


@pytest.mark.parametrize("case", [Case(4, 3, 33, P=20, reset=True, start=True), Case(3, 5, 48), Case(3, 1, 129)])
@each_form
def test_every_form(form: str, case: Case) -> None:
    """With and without the input product, in teams of every size."""
    for I in (0, 1, 37):  # noqa: E741
        call = Call(case, form, I)
        out = call.run()
        check_steps(call, out)
        for threads in (2, 3, 4):
            assert_same_bits(cases.OUTPUTS, call.run(threads=threads), out)


@pytest.mark.parametrize("form", ["int8", "mixed", "factors"])
@pytest.mark.parametrize("name", ["all_dense", "all_lengths_reverse", "all_packed", "lengths_no_rows", "no_steps"])
def test_the_input_product(name: str, form: str) -> None:
    """In one call, some steps at a time, as by ``linear_packed`` before it."""
    for case in (CASES[name], CASES[name]._replace(T=CASES[name].T and 70)):
        call = Call(case, form, 19)
        named = call.named()
        out = call.run()
        x = np.ascontiguousarray(named["x"].reshape(-1, 19))
        x_gates = core.linear_packed(x, named.pop("weight_ih"), named.pop("bias"))
        x_gates = x_gates.reshape(*named["x"].shape[:-1], 4 * case.H)
        assert_same_bits(cases.OUTPUTS, core.lstm_packed(**named | {"x": x_gates}, save=2), out)
        assert_same_bits(cases.OUTPUTS, call.run(threads=3), out)
        bare = {k: v for k, v in call.named().items() if k != "bias"}
        zero = {**call.named(), "bias": np.zeros(4 * case.H, np.float32)}
        assert_same_bits(cases.OUTPUTS, core.lstm_packed(**bare, save=2), core.lstm_packed(**zero, save=2))


@pytest.mark.parametrize("form", ["float32", "bfloat16", "factors"])
@pytest.mark.parametrize("case", [Case(7, 5, 13), Case(3, 14, 37, P=33, reset=True), Case(20, 2, 70)])
def test_floats_are_within_the_budget(case: Case, form: str) -> None:
    call = Call(case, form)
    o = call.options
    given = (call.x, call.hh, call.h0, call.c0, None, None, call.hr, *o.state[1:], *o.gate)
    out = [torch.from_numpy(v) for v in call.run()]
    assert_within_budget(cases.OUTPUTS, out, reference.lstm_packed, given)


@pytest.mark.parametrize("form", ["int8", "int4_groups", "int8_factors", "mixed"])
@pytest.mark.parametrize("P", [0, 12])
def test_every_step_is_the_definition(P: int, form: str) -> None:
    call = Call(Case(4, 5, 40, P=P, tau=0.9), form, 11)

    def definition(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        out = reference.lstm_packed(x[None], call.hh, h, c, call.ih, call.bias, call.hr, tau=0.9)
        return tuple(v[0] for v in out[:3])

    x, before, after = call.states(call.run())
    assert_within_budget("h c gates", [torch.from_numpy(v) for v in after], definition, (x, *before))


@each_form
def test_a_row_is_the_same_alone_and_in_a_batch(form: str) -> None:
    call = Call(Case(3, 37, 50, reset=True, start=True), form, 20)
    whole = call.run()
    for row in (0, 18, 36):
        own = slice(row, row + 1)
        part = {"x": call.x[:, own], "reset": call.options.reset[:, own]}  # type: ignore[index]
        part |= {"h0": call.h0[own], "c0": call.c0[own]}
        got = call.run(**{n: v.contiguous() for n, v in part.items()})
        assert_same_bits(cases.OUTPUTS, got, [*(v[:, own] for v in whole[:3]), *(v[own] for v in whole[3:])])


@pytest.mark.parametrize("P", [0, 9])
@pytest.mark.parametrize("form", ["int8", "mixed_factors", "bfloat16"])
def test_whole_and_in_pieces(form: str, P: int) -> None:
    call = Call(Case(40, 3, 21, P=P), form, 7)
    whole, state, pieces = call.run(), (call.h0.numpy(), call.c0.numpy()), []
    for begin, end in ((0, 1), (1, 18), (18, 18), (18, 39), (39, 40)):
        out = call.run(x=call.x[begin:end].contiguous(), h0=state[0], c0=state[1])
        state = out[3], out[4]
        pieces.append(out[:3])
    together = [np.concatenate(v) for v in zip(*pieces, strict=True)]
    assert_same_bits(cases.OUTPUTS, [*together, *state], whole)


@pytest.mark.parametrize("P", [0, 5])
def test_what_is_kept(P: int) -> None:
    call = Call(Case(4, 3, 11, P=P), "int8")
    full = call.run()
    for save in (0, 1):
        for name, keep, a, b in zip(
            cases.OUTPUTS.split(), (True, save >= 1, False, True, True), call.run(save), full, strict=True
        ):
            assert_same_bits(name, a, b if keep else b.ravel()[:0])


def test_states_that_are_not_numbers_or_large() -> None:
    """h counts as 0 where it is NaN and as 1 or -1 beyond; with a projection a row that is not finite makes c NaN."""
    call = Call(Case(1, 1, 5), "int8")
    wild = np.array([[np.nan, 0.3, np.inf, -np.inf, 5.0]], np.float32)
    tame = np.array([[0, 0.3, 1, -1, 1]], np.float32)
    assert_same_bits(cases.OUTPUTS, call.run(h0=wild), call.run(h0=tame))
    call = Call(Case(2, 2, 7, P=5), "int8")
    out = call.run(h0=np.concatenate((wild, tame)))
    assert np.isnan(out[1][:, 0]).all() and np.isfinite(out[1][:, 1]).all() and np.isfinite(out[0][:, 1]).all()


def one(N: int = 8, K: int = 2, gates: int = 4, bounded: bool = True, form: str = "int8") -> np.ndarray:
    return packed.pack(core, packed.matrix(N, K, form, gates), K, bounded)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


INPUT = {"x": zeros(3, 1, 5), "weight_ih": one(8, 5, bounded=False)}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"weight_hh": one(gates=1)}, "weight_hh must be packed as 4 gates, got 1"),
    ({"weight_hh": one(bounded=False)}, "weight_hh must be packed with bounded=True without weight_hr"),
    ({"weight_hr": one(2, 2, 1)}, "weight_hh must be packed with bounded=False beside weight_hr"),
    ({"weight_hr": one(2, 2, 1, False), "weight_hh": one(bounded=False)}, "weight_hr must be packed with bounded=True"),
    ({"weight_hr": one(2, 2, 1, form="factors")}, "weight_hr must be packed whole, got factors"),
    ({"weight_hr": one()}, "weight_hr must be packed as 1 gates, got 4"),
    ({"weight_hh": one(12)}, r"weight_hh must be \[4\*H, P\] = \[8, 2\], got \[12, 2\]"),
    ({"weight_hh": one(K=3)}, r"weight_hh must be \[4\*H, P\] = \[8, 2\], got \[8, 3\]"),
    ({"x": zeros(3, 1, 7)}, r"x_gates must be \[T, B, 4\*H\] = \[3, 1, 8\], got \[3, 1, 7\]"),
    (
        {"x": np.zeros((3, 1, 8)), "h0": np.zeros((1, 2)), "c0": np.zeros((1, 2))},
        "x_gates must be float32, got float64",
    ),
    ({"save": 3}, "save must be 0, 1 or 2, got 3"),
    ({"tau": 0.0}, "tau must be greater than 0, got 0"),
    ({"bias": zeros(8)}, "bias must be None without weight_ih"),
    ({"weight_ih": one(12, 5, bounded=False)}, "weight_ih must have the rows of weight_hh = 8, got 12"),
    ({"weight_ih": one(8, 5)}, "weight_ih must be packed with bounded=False"),
    (INPUT | {"x": zeros(3, 1, 4)}, r"x must be \[T, B, I\], or \[N, I\] with batch_sizes, I = 5, got \[3, 1, 4\]"),
    (INPUT | {"bias": zeros(7)}, r"bias must be \[4\*H\] = \[8\], got \[7\]"),
    (INPUT | {"x": zeros(5, 1, 3).T}, "x must be contiguous"),
    (INPUT | {"x": np.zeros((3, 1, 5))}, "x must be float32, got float64|h0 must be float64, got float32"),
    ({"threads": 0}, "threads must be at least 1, got 0"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_calls_that_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": zeros(3, 1, 8), "weight_hh": one(), "h0": zeros(1, 2), "c0": zeros(1, 2)} | change
    with pytest.raises(ValueError, match=f"lstm_packed: ({message})"):
        core.lstm_packed(**given)


def test_gates_of_another_kind_of_rank() -> None:
    """A gate of rank 0 beside gates with factors, and factors whose lower halves are integers."""
    low = packed.part(torch.randn(3, 20), "int8")
    m = [
        Gate(Part(torch.randn(20, 3)), low),
        Gate(Part(torch.randn(20, 20))),
        Gate(packed.part(torch.randn(20, 3), "int4"), low),
    ]
    m.append(Gate(packed.part(torch.randn(20, 20), "int4", 8)))
    call = Call(Case(3, 2, 20), "int8")
    call.hh = m
    check_steps(call, call.run())

"""The LSTM kernels, interpreted: each route on its own, 16 bits, both directions at once, lengths on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.ops._triton import interpreted, why_not_triton
from tests import tolerance
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import CASES, Case, Inputs
from tests.tolerance import assert_same_bits, assert_within_budget

reason = why_not_triton() or (None if interpreted() else "kernels are interpreted with TRITON_INTERPRET=1")
if reason is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)
from fastseq_kernels import _rows, _steps, lstm, lstm_graph, lstm_layer, lstm_resident, lstm_step  # noqa: E402

LOW = [torch.bfloat16, torch.float16]
ROUTES = {
    "all_dense": Case(3, 18, 19, **cases.ALL),
    "all_lengths_reverse": Case(4, 5, 19, layout="lengths", reverse=True, **cases.ALL),
    "all_packed": Case(4, 5, 19, layout="packed", **cases.ALL),
    "packed_reverse": Case(4, 5, 11, layout="packed", reverse=True),
    "lengths": Case(4, 5, 11, layout="lengths"),
    "hard": Case(4, 5, 11, hard=True, noise=1.0),
    "no_steps": CASES["no_steps"],
}
CELLS = {
    "cell": Case(1, 5, 19, tau=0.9, noise=1.0, start=True),
    "cell_projection": Case(1, 5, 19, P=10),
    "cell_hard_reverse": Case(1, 5, 19, hard=True, reverse=True),
    "one_step_lengths": Case(1, 5, 19, layout="lengths"),
}


def take(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lstm, "plan", lambda *args: lstm.Plan(route, "asked for"))


def check(args: Inputs, dtype: torch.dtype) -> None:
    """Outputs and gradients within the budget of ``dtype``; c and its gradients come in float32."""
    outputs = lstm.lstm_forward(*args[:4], *args.options, 2)
    low = [v.to(dtype) for v in outputs]
    assert_within_budget(cases.OUTPUTS, low, cases.definition, cases.exact(args))
    assert outputs[1].dtype == outputs[4].dtype == torch.float32
    grads = tuple(d.to(v.dtype) for d, v in zip(cases.upstream(outputs), outputs, strict=True))
    found = lstm.lstm_backward(*cases.backward_arguments(args, outputs, grads))
    given = cases.differentiable(args)
    names = [f"d{name}" for name in given]
    got = [d for name, d in zip(cases.GRADIENTS.split(), found, strict=True) if name in names]
    assert [d.dtype for d in got] == [t.dtype for t in given.values()]
    expected = (*cases.exact(args), grads)
    low = [d.to(dtype) for d in got]
    assert_within_budget(names, low, cases.definition_gradients, expected, tolerance.GRADIENTS)
    rebuilt = lstm.lstm_gates(args.x_gates, *outputs[:2], *args[1:4], *args.options)
    assert_within_budget("gates", rebuilt, cases.definition_gates, cases.exact(args))


def with_dtype(case: Case, dtype: torch.dtype) -> Inputs:
    """Inputs in ``dtype``, cells in float32."""
    args = cases.inputs(case, dtype)
    c_start = args.options.c_start
    options = args.options._replace(c_start=None if c_start is None else c_start.float())
    return args._replace(c0=args.c0.float(), options=options)


@pytest.mark.parametrize("case", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("route", ["step", "resident"])
def test_routes(route: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size can go either way where the other tests go one."""
    take(route, monkeypatch)
    check(cases.inputs(case), torch.float32)


@pytest.mark.parametrize("case", CELLS.values(), ids=CELLS.keys())
def test_one_step(case: Case) -> None:
    args = cases.inputs(case)
    call = lstm.recurrence(args.x_gates, *args[1:4], args.options.state, args.options.gate)
    assert (lstm.plan(call, args.x_gates).route == "cell") == (case.layout == "dense")
    check(args, torch.float32)


@pytest.mark.parametrize("case", ["all_lengths_reverse", "all_packed", "cell", "projection"])
@pytest.mark.parametrize("route", ["step", "resident"])
@pytest.mark.parametrize("dtype", LOW, ids=lambda d: str(d).removeprefix("torch."))
def test_16_bit(dtype: torch.dtype, route: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """x, weights, h and gates in 16 bit; c and what belongs to it in float32, as all arithmetic."""
    if case in ROUTES:
        take(route, monkeypatch)
    elif route == "resident":
        pytest.skip("one step and projections have one route")
    check(with_dtype({**CASES, **CELLS, **ROUTES}[case], dtype), dtype)


@pytest.mark.parametrize("layout", ["dense", "lengths", "packed"])
def test_both_directions(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for two directions gives the bits of two calls."""
    one, two = (cases.inputs(Case(4, 5, 19, layout=layout, reset=True, start=True, noise=1.0), seed=n) for n in (0, 1))
    options = [args.options._replace(lengths=one.options.lengths, reset=one.options.reset) for args in (one, two)]
    options = [o._replace(batch_sizes=one.options.batch_sizes, seed=one.options.seed) for o in options]
    options = [o._replace(stream=n, reverse=n == 1) for n, o in enumerate(options)]
    lead = one.x_gates.shape[:-1]
    x, weights, bias = torch.randn(*lead, 7), torch.randn(2, 76, 7), torch.randn(2, 76)
    product = [(weights[n], bias[n]) for n in (0, 1)]
    pair = [args[1:4] for args in (one, two)]
    apart = [lstm_layer.lstm_layer_forward(x, *product[n], *pair[n], *options[n], 2) for n in (0, 1)]
    launches: list[Any] = []
    real = lstm_resident.launch
    monkeypatch.setattr(lstm_resident, "launch", lambda *args, **kw: (launches.append(args[1]), real(*args, **kw)))
    lists = [list(v) for v in zip(*product, strict=True)] + [list(v) for v in zip(*pair, strict=True)]
    o, starts = options[0], [[v.h_start for v in options], [v.c_start for v in options]]
    shared = (o.lengths, o.batch_sizes, o.reset, *starts, o.seed, None, 0, 0, 1.0, o.tau, o.hard)
    found = lstm_layer.lstm_layer_both_forward(x, *lists, *shared, 2)
    assert launches == [(1, 2)]
    for n in (0, 1):
        assert_same_bits(cases.OUTPUTS, found[n::2], apart[n])
    grads: list[list[Tensor | None]] = [list(cases.upstream(apart[n], n)) for n in (0, 1)]
    grads[0][1] = grads[1][4] = None
    needs = (True,) * 4
    expected = []
    for n in (0, 1):
        kept = (apart[n][k] for k in (2, 0, 1))
        given = (*grads[n], x, *product[n], *kept, *pair[n], *options[n], *needs)
        expected.append(lstm_layer.lstm_layer_backward(*given))
    del launches[:]
    h, c, gates = (list(found[k : k + 2]) for k in (0, 2, 4))
    flat = [d for both in zip(*grads, strict=True) for d in both]
    got = lstm_layer.lstm_layer_both_backward(flat, x, *lists[:2], gates, h, c, *lists[2:], *shared, *needs)
    assert launches == [(1, 2)]
    assert_same_bits("dx", got[0], expected[0][0] + expected[1][0])
    places = (1, 2, 3, 4, 5, 7, 8)
    for n in (0, 1):
        assert_same_bits([str(k) for k in places], got[1 + n :: 2], [expected[n][k] for k in places])


WRONG = {
    "x_gates": (0, lambda t: t[..., 1:], r"data must be contiguous|x_gates must be \[T, B, 4\*H\] = \[4, 5, 20\]"),
    "weight_hh": (1, lambda t: t[1:], r"weight_hh must be \[4\*H, H\] without weight_hr|weight_hh must be"),
    "h0_size": (2, lambda t: t[1:], r"h0 must be \[B, P\] = \[5, 5\], got \[4, 5\]"),
    "h0_dtype": (2, lambda t: t.half(), "h0 must be float32, got float16"),
    "c0_stride": (3, lambda t: t.mT.contiguous().mT, "c0 must be contiguous"),
    "c0_dtype": (3, lambda t: t.half(), "c0 must be float32, got float16"),
}


@pytest.mark.parametrize("place, wrong, says", WRONG.values(), ids=WRONG.keys())
def test_wrong_argument(place: int, wrong: Any, says: str) -> None:
    args = cases.inputs(Case(4, 5, 5))
    call = [*args[:4], *args.options, 2]
    call[place] = wrong(call[place])
    with pytest.raises(ValueError, match=f"lstm: ({says})"):
        lstm.lstm_forward(*call)


@pytest.mark.parametrize("route", ["step", "resident"])
def test_lengths_on_the_device_are_held_within_bounds(route: str) -> None:
    """Values that nobody has read on the host cannot lead out of the tensors."""
    args = cases.inputs(Case(3, 4, 5))
    x, weight_hh, h0, c0 = args[:4]

    def run(lengths: list[int]) -> list[Tensor]:
        rows = _rows.Rows(3, 4, torch.tensor(lengths), None)
        call = _steps.Recurrence(rows, weight_hh, h0, c0, None, None, None, None, 1.0, False, False)
        h, c = torch.empty(3, 4, 5), torch.empty(3, 4, 5)
        if route == "step":
            return [h, c, *lstm_step.forward(call, x, h, c, None)]
        return [h, c, *lstm_resident.forward([lstm_resident.Direction(call, x, h, c, None)])[0]]

    assert_same_bits("h c h_n c_n", run([9, -2, 2, 3]), run([3, 0, 2, 3]))


@pytest.mark.parametrize("case", ["all_lengths_reverse", "all_packed", "lengths", "packed_reverse"])
def test_blocks_of_steps(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that read their tensors and their step from a table give the bits of those that are given them."""
    args = cases.inputs(ROUTES[case]._replace(T=7, P=0))
    take("step", monkeypatch)
    outputs = lstm.lstm_forward(*args[:4], *args.options, 2)
    grads = cases.upstream(outputs)
    expected = lstm.lstm_backward(*cases.backward_arguments(args, outputs, grads))
    take("graph", monkeypatch)
    monkeypatch.setattr(lstm_graph, "STEPS", 2)
    for _ in range(2):  # of a new kind, and of one that is known
        assert_same_bits(cases.OUTPUTS, lstm.lstm_forward(*args[:4], *args.options, 2), outputs)
        got = lstm.lstm_backward(*cases.backward_arguments(args, outputs, grads))
        assert_same_bits(cases.GRADIENTS, got, expected)

"""The LSTM operators against their definition: every backend, layout, option and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import reference
from fastseq.ops.lstm import Options
from fastseq.ops.lstm_autograd import lstm
from tests import tolerance
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import CASES, DTYPES, Case, Inputs
from tests.tolerance import assert_same_bits, assert_within_budget

each_backend = pytest.mark.parametrize("backend", cases.backends())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def gradient_names(args: Inputs) -> list[str]:
    return [f"d{name}" for name in cases.differentiable(args)]


@each_case
@each_dtype
@each_backend
def test_forward(backend: str, dtype: torch.dtype, case: Case) -> None:
    args = cases.inputs(case, dtype)
    got = cases.run("lstm_forward", backend, *args[:4], *args.options, 2)
    assert_within_budget(cases.OUTPUTS, got, cases.definition, cases.exact(args))


@each_case
@each_dtype
@each_backend
def test_backward(backend: str, dtype: torch.dtype, case: Case) -> None:
    args = cases.inputs(case, dtype)
    grads = cases.upstream(cases.definition(*args, None))
    got = cases.gradients(backend, args, grads)
    expected = (*cases.exact(args), grads)
    assert_within_budget(gradient_names(args), got, cases.definition_gradients, expected, tolerance.GRADIENTS)


@pytest.mark.parametrize("present", ["h", "c", "gates", "h_n", "c_n", "h c_n", "c gates h_n"])
@each_backend
def test_backward_of_some_outputs(backend: str, present: str) -> None:
    """A gradient that is not given counts as zeros, bit for bit."""
    args = cases.inputs(CASES["all_lengths"])
    outputs = cases.run("lstm_forward", backend, *args[:4], *args.options, 2)
    some = present.split()
    grads = [
        d if name in some else None for name, d in zip(cases.OUTPUTS.split(), cases.upstream(outputs), strict=True)
    ]
    zeros = [torch.zeros_like(v) if d is None else d for v, d in zip(outputs, grads, strict=True)]
    got = cases.run("lstm_backward", backend, *cases.backward_arguments(args, outputs, grads))
    expected = cases.run("lstm_backward", backend, *cases.backward_arguments(args, outputs, zeros))
    for name, a, b in zip(cases.GRADIENTS.split(), got, expected, strict=True):
        assert torch.equal(a, b), name  # equal, not the same bits: the sign of a zero may differ


@pytest.mark.parametrize("case", ["one", "prime", "over_tile", "all_dense", "all_packed_reverse"])
@each_backend
def test_backward_without_weights(backend: str, case: str) -> None:
    """``weights=False`` leaves out the weight gradients and changes nothing else."""
    args = cases.inputs(CASES[case])
    outputs = cases.run("lstm_forward", backend, *args[:4], *args.options, 2)
    grads = cases.upstream(outputs)
    full = cases.run("lstm_backward", backend, *cases.backward_arguments(args, outputs, grads, weights=True))
    part = cases.run("lstm_backward", backend, *cases.backward_arguments(args, outputs, grads, weights=False))
    names = cases.GRADIENTS.split()
    for n, name in enumerate(names):
        if name.startswith("dweight"):
            assert part[n].numel() == 0, name
        else:
            assert_same_bits(name, part[n], full[n])


@pytest.mark.parametrize("given", ["h_start", "c_start"])
@each_backend
def test_one_start_state(backend: str, given: str) -> None:
    """One of h_start and c_start alone: the other is zeros."""
    args = cases.inputs(CASES["start"])
    options = args.options._replace(**{"h_start" if given == "c_start" else "c_start": None})
    args = args._replace(options=options)
    grads = cases.upstream(cases.definition(*args, None))
    assert_within_budget(
        cases.OUTPUTS, cases.run("lstm_forward", backend, *args[:4], *options, 2), cases.definition, cases.exact(args)
    )
    got, expected = cases.gradients(backend, args, grads), (*cases.exact(args), grads)
    assert_within_budget(gradient_names(args), got, cases.definition_gradients, expected, tolerance.GRADIENTS)


@pytest.mark.parametrize("save", [0, 1, 2])
@pytest.mark.parametrize("case", ["prime", "over_tile", "all_lengths_reverse", "all_packed", "no_steps"])
@each_backend
def test_save(backend: str, case: str, save: int) -> None:
    """``save`` decides what comes back, not what it holds."""
    args = cases.inputs(CASES[case])
    full = cases.run("lstm_forward", backend, *args[:4], *args.options, 2)
    part = cases.run("lstm_forward", backend, *args[:4], *args.options, save)
    kept = [True, save >= 1, save >= 2, True, True]
    for name, keep, a, b in zip(cases.OUTPUTS.split(), kept, part, full, strict=True):
        assert_same_bits(name, a, b) if keep else assert_same_bits(name, a, b.new_empty(0))


@each_case
@each_dtype
@each_backend
def test_gates_rebuilt(backend: str, dtype: torch.dtype, case: Case) -> None:
    """``lstm_gates`` gives the gates of forward; the core bit for bit, kernels with a product of larger tiles."""
    args = cases.inputs(case, dtype)
    h, c, gates, _, _ = cases.run("lstm_forward", backend, *args[:4], *args.options, 2)
    got = cases.run("lstm_gates", backend, args.x_gates, h, c, *args[1:4], *args.options)
    if backend == "triton":
        assert_within_budget("gates", got, cases.definition_gates, cases.exact(args))
    else:
        assert_same_bits("gates", got, gates)


@pytest.mark.parametrize("case", ["lengths", "lengths_reverse", "all_lengths", "all_lengths_reverse"])
@each_backend
def test_padding_is_never_read(backend: str, case: str) -> None:
    """NaN beyond a row's length, in inputs and upstream gradients, changes no bit."""
    args = cases.inputs(CASES[case])
    dead = torch.arange(len(args.x_gates))[:, None] >= args.options.lengths
    assert dead.any()
    outputs = cases.run("lstm_forward", backend, *args[:4], *args.options, 2)
    grads = cases.upstream(outputs)
    expected = cases.run("lstm_backward", backend, *cases.backward_arguments(args, outputs, grads))

    def poisoned(tensor: Tensor) -> Tensor:
        return torch.where(dead[..., None], torch.nan, tensor)

    poison = args._replace(x_gates=poisoned(args.x_gates))
    assert_same_bits(cases.OUTPUTS, cases.run("lstm_forward", backend, *poison[:4], *poison.options, 2), outputs)
    clean, rebuilt = (
        cases.run("lstm_gates", backend, x_gates, *outputs[:2], *args[1:4], *args.options)
        for x_gates in (args.x_gates, poison.x_gates)
    )
    assert_same_bits("gates", rebuilt, clean)
    grads = (*(poisoned(d) for d in grads[:3]), *grads[3:])
    got = cases.run("lstm_backward", backend, *cases.backward_arguments(args, outputs, grads))
    assert_same_bits(cases.GRADIENTS, got, expected)


def leaves(args: Inputs, wanted: set[str]) -> Inputs:
    """``args`` as leaves, of which those named in ``wanted`` require grad."""

    def leaf(name: str, tensor: Any) -> Any:
        return tensor.detach().clone().requires_grad_(name in wanted) if isinstance(tensor, Tensor) else tensor

    options = args.options._replace(
        **{n: leaf(n, getattr(args.options, n)) for n in ("weight_hr", "h_start", "c_start")}
    )
    return Inputs(*(leaf(n, getattr(args, n)) for n in ("x_gates", "weight_hh", "h0", "c0")), options)


@pytest.mark.parametrize("wanted", ["x_gates", "weight_hh", "h0 c_start", "weight_hr", "x_gates c0 h_start", "all"])
@each_dtype
def test_autograd(dtype: torch.dtype, wanted: str) -> None:
    """The differentiable operator: every output's gradient, into those inputs that require it and no others."""
    plain = cases.inputs(CASES["all_lengths"], dtype)
    every = list(cases.differentiable(plain))
    names = every if wanted == "all" else wanted.split()
    args = leaves(plain, set(names))
    outputs = lstm(*args)
    assert_within_budget(cases.OUTPUTS, outputs, cases.definition, cases.exact(plain))
    grads = cases.upstream(outputs)
    torch.autograd.backward(outputs, grads)
    found = {name: tensor.grad for name, tensor in cases.differentiable(args).items()}
    assert {name for name, d in found.items() if d is not None} == set(names)

    def expected(*call: Any) -> tuple[Tensor, ...]:
        return tuple(d for name, d in zip(every, cases.definition_gradients(*call), strict=True) if name in names)

    got = [d for d in found.values() if d is not None]
    assert_within_budget(
        [f"d{n}" for n in found if n in names], got, expected, (*cases.exact(plain), grads), tolerance.GRADIENTS
    )


def test_autograd_of_nothing() -> None:
    """Without gradients c and gates come back only on request, and nothing requires grad."""
    args = cases.inputs(CASES["prime"], requires_grad=True)
    with torch.no_grad():
        h, c, gates, h_n, c_n = lstm(*args)
        assert c.numel() == gates.numel() == 0
        assert lstm(*args, save=1)[1].shape == h.shape
    assert not any(v.requires_grad for v in (h, h_n, c_n))
    assert all(v.requires_grad for v in lstm(*args))


@pytest.mark.parametrize("case", ["all_lengths_reverse", "all_packed", "no_steps"])
@pytest.mark.parametrize("op", ["lstm_forward", "lstm_gates", "lstm_backward", "lstm_noise"])
def test_opcheck(op: str, case: str) -> None:
    args = cases.inputs(CASES[case])
    outputs = torch.ops.fastseq.lstm_forward(*args[:4], *args.options, 2)
    calls = {
        "lstm_forward": (*args[:4], *args.options, 2),
        "lstm_gates": (args.x_gates, *outputs[:2], *args[1:4], *args.options),
        "lstm_backward": tuple(cases.backward_arguments(args, outputs, cases.upstream(outputs))),
        "lstm_noise": (torch.tensor([17]), CASES[case].T, CASES[case].B, CASES[case].H, args.options.rows, 1, 2, 0.5),
    }
    found = torch.library.opcheck(getattr(torch.ops.fastseq, op).default, calls[op])
    assert set(found.values()) == {"SUCCESS"}


SMALL = {
    "dense": Case(3, 2, 2, reset=True, start=True, tau=0.7),
    "projection": Case(3, 2, 3, P=2, noise=0.5, tau=0.9),
    "lengths_reverse": Case(3, 2, 2, layout="lengths", reset=True, start=True, reverse=True),
    "packed": Case(3, 2, 2, layout="packed", reset=True),
}


def of_leaves(function: Any, case: Case) -> tuple[Any, tuple[Tensor, ...]]:
    """``function`` (lstm or its definition) of its differentiable inputs alone, and those inputs in float64."""
    args = cases.inputs(case, torch.float64, requires_grad=True)
    names = list(cases.differentiable(args))

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        options = args.options._replace(**{n: given[n] for n in names if n in Options._fields})
        return function(*(given[n] for n in ("x_gates", "weight_hh", "h0", "c0")), options)

    return call, tuple(cases.differentiable(args).values())


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_gradcheck_of_the_definition(case: Case) -> None:
    noise = cases.exact(cases.inputs(case, torch.float64))[5]
    assert torch.autograd.gradcheck(*of_leaves(lambda *call: cases.definition(*call, noise), case))


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_gradgradcheck(case: Case) -> None:
    assert torch.autograd.gradgradcheck(*of_leaves(lstm, case))


def test_backward_definition_is_the_gradient() -> None:
    """``reference.lstm_backward`` is the derivative of ``reference.lstm``, for every option at once."""
    args = cases.inputs(CASES["all_lengths_reverse"], torch.float64)
    outputs = cases.definition(*cases.exact(args))
    grads = cases.upstream(outputs)
    h, c, gates = outputs[:3]
    got = reference.lstm_backward(grads, gates, h, c, *args[1:4], *args.options.state, *args.options.gate)
    assert_within_budget(
        gradient_names(args), got, cases.definition_gradients, (*cases.exact(args), grads), tolerance.GRADIENTS
    )

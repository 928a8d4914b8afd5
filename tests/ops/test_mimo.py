"""The operators on rows of several examples against their definition: values, gradients, bits, and the index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastseq import functional, reference
from fastseq.ops.mimo import BACKENDS
from tests import tolerance
from tests.ops import lstm_cases
from tests.ops import mimo_cases as cases
from tests.ops.mimo_cases import LARGE, SMALL, Case
from tests.tolerance import assert_same_bits, assert_within_budget

each_case = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
each_call = pytest.mark.parametrize(("backend", "dtype", "case"), cases.calls("mimo_project"))
each_backend = pytest.mark.parametrize("backend", lstm_cases.backends("mimo_gather", BACKENDS))
compiled = pytest.mark.parametrize("backend", lstm_cases.compiled("mimo_project", BACKENDS))
GRADIENTS = "dx dweight dbias"
COPIED = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool),
    *([] if lstm_cases.INTERPRETED else [torch.float64, torch.complex64, torch.complex128]),
]


@each_case
@each_backend
def test_gather(backend: str, case: Case) -> None:
    """A copy: the definition's bits, of rows and labels."""
    x, _, _, index, *_ = cases.inputs(case)
    labels = torch.arange(2 * case.B).view(case.B, 2)
    rows, taken = cases.run("mimo_gather", backend, x, index, labels)
    assert_same_bits("rows", rows, reference.mimo_gather(x, index))
    assert_same_bits("labels", taken, labels[index.long()].transpose(0, 1))
    rows, taken = cases.run("mimo_gather", backend, x, index, None)
    assert_same_bits("rows", rows, reference.mimo_gather(x, index))
    assert (taken.shape, taken.dtype) == ((0,), torch.int64)


@pytest.mark.parametrize("dtype", COPIED, ids=lambda d: str(d).removeprefix("torch."))
@each_backend
def test_gather_of_any_type(backend: str, dtype: torch.dtype) -> None:
    x, _, _, index, *_ = cases.inputs(SMALL["places"])
    x, labels = (x * 9).to(dtype), torch.arange(3 * x.shape[1]).view(-1, 3).to(dtype)
    rows, taken = cases.run("mimo_gather", backend, x, index, labels)
    for got, expected in (
        (rows, reference.mimo_gather(x, index)),
        (taken, labels[index.long()].transpose(0, 1).contiguous()),
    ):
        assert (got.shape, got.dtype) == (expected.shape, dtype)
        assert torch.equal(got.view(torch.uint8), expected.contiguous().view(torch.uint8))


@each_call
def test_sums(backend: str, dtype: torch.dtype, case: Case) -> None:
    _, _, bias, index, parts, d, drows = cases.inputs(case, dtype)
    out = cases.run("mimo_combine", backend, parts, index, bias)
    assert_within_budget("combined", out, reference.mimo_combine, (parts, index, bias))
    for op, grad in (("mimo_combine_backward", d), ("mimo_gather_backward", drows)):
        got = cases.run(op, backend, grad, index, case.B)
        assert_within_budget(op, got, getattr(reference, op), (grad, index, case.B), tolerance.GRADIENTS)


@each_call
def test_project(backend: str, dtype: torch.dtype, case: Case) -> None:
    """Values and gradients; what is not needed is not made, and changes nothing else."""
    x, weight, bias, index, _, d, _ = cases.inputs(case, dtype)
    out = cases.run("mimo_project", backend, x, weight, bias, index)
    assert_within_budget("out", out, reference.mimo_project, (x, weight, bias, index))
    grads = cases.run("mimo_project_backward", backend, d, x, weight, index, True, True, True)
    call = (d, x, weight, index)
    assert_within_budget(GRADIENTS, grads, reference.mimo_project_backward, call, tolerance.GRADIENTS)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        some = cases.run("mimo_project_backward", backend, *call, *needs)
        expected = [g if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True)]
        assert_same_bits(GRADIENTS, [s.float() for s in some], [e.float() for e in expected])


@pytest.mark.parametrize("name", ["prime", "places", "by_example", "same"])
def test_the_definition_is_a_linear_layer_of_rows(name: str) -> None:
    """And its gradients are those of autograd."""
    x, weight, bias, index, _, d, _ = cases.inputs(SMALL[name], torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = torch.nn.functional.linear(reference.mimo_gather(x, index), weight, bias)

    def project(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        return reference.mimo_project(x, weight, bias, index)

    assert_within_budget("out", out, project, (x, weight, bias, index))
    found = torch.autograd.grad(out, leaves, d)
    assert_within_budget(GRADIENTS, found, reference.mimo_project_backward, (d, x, weight, index), tolerance.GRADIENTS)


def test_both_ways_are_among_the_cases() -> None:
    for group in (SMALL, LARGE):
        assert {case.by_example for case in group.values() if case.A * case.N * case.S * case.G} == {False, True}


@pytest.mark.parametrize("name", ["prime", "places", "by_example", "no_rows", "no_channels", *LARGE])
@pytest.mark.parametrize("dtype", lstm_cases.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@compiled
def test_bits(backend: str, dtype: torch.dtype, name: str) -> None:
    """The same for 1, 2 and 3 threads, and through the numpy door."""
    case = {**SMALL, **LARGE}[name]
    x, weight, bias, index, parts, d, drows = cases.inputs(case, dtype)
    calls: dict[str, tuple[Any, ...]] = {
        "mimo_gather": (x, index, torch.arange(case.B).view(-1, 1)),
        "mimo_gather_backward": (drows, index, case.B),
        "mimo_combine": (parts, index, bias),
        "mimo_combine_backward": (d, index, case.B),
        "mimo_project": (x, weight, bias, index),
        "mimo_project_backward": (d, x, weight, index, True, True, True),
    }
    for op, args in calls.items():
        torch.set_num_threads(1)
        expected = cases.run(op, backend, *args)
        expected = expected if isinstance(expected, tuple) else (expected,)
        names = [f"{op} {n}" for n in range(len(expected))]
        for threads in (2, 3):
            torch.set_num_threads(threads)
            found = cases.run(op, backend, *args)
            assert_same_bits(names, found if isinstance(found, tuple) else (found,), expected)
        for threads in (1, 3):
            assert_same_bits(names, cases.by_numpy(op, *args, threads=threads), expected)


sizes = st.tuples(*(st.integers(*ends) for ends in ((0, 4), (1, 9), (0, 40), (0, 3), (1, 4), (0, 50), (0, 70))))


@settings(max_examples=50)
@given(size=sizes, bias=st.booleans(), dtype=st.sampled_from(lstm_cases.DTYPES), seed=st.integers(0, 2**20))
@compiled
def test_drawn(backend: str, size: tuple[int, ...], bias: bool, dtype: torch.dtype, seed: int) -> None:
    case = Case(*size, bias=bias)
    x, weight, given_bias, index, parts, d, drows = cases.inputs(case, dtype, seed)
    out = cases.run("mimo_project", backend, x, weight, given_bias, index)
    assert_within_budget("out", out, reference.mimo_project, (x, weight, given_bias, index))
    call = (d, x, weight, index)
    grads = cases.run("mimo_project_backward", backend, *call, True, True, True)
    assert_within_budget(GRADIENTS, grads, reference.mimo_project_backward, call, tolerance.GRADIENTS)
    combined = cases.run("mimo_combine", backend, parts, index, given_bias)
    assert_within_budget("combined", combined, reference.mimo_combine, (parts, index, given_bias))
    back = cases.run("mimo_gather_backward", backend, drows, index, case.B)
    assert_within_budget("back", back, reference.mimo_gather_backward, (drows, index, case.B), tolerance.GRADIENTS)
    assert_same_bits("rows", cases.run("mimo_gather", backend, x, index, None)[0], reference.mimo_gather(x, index))


# ---- the index, and the calls around the operators ----


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(("batch", "M", "R"), [(1, 2, 1), (7, 2, 3), (32, 3, 4), (5, 4, 1), (101, 3, 2)])
def test_index_holds_every_example_exactly_R_times(batch: int, M: int, R: int, rho: float) -> None:
    generator = torch.Generator().manual_seed(batch + M + R)
    index = functional.mimo_index(batch, M, R, rho, generator)
    assert (index.shape, index.dtype, index.is_contiguous()) == ((M, batch * R), torch.int32, True)
    for slot in index.long():
        assert torch.equal(torch.bincount(slot, minlength=batch), torch.full((batch,), R))
    apart = int(torch.tensor(float(batch * R)) * torch.tensor(1 - rho))
    assert (index[:, apart:] == index[0, apart:]).all()  # one example in all slots
    again = functional.mimo_index(batch, M, R, rho, torch.Generator().manual_seed(batch + M + R))
    assert torch.equal(index, again)
    if apart > 50:  # by chance a few rows of the others hold one example in all slots too
        assert not torch.equal(index[0, :apart], index[1, :apart])
        assert (index[:, :apart] == index[0, :apart]).all(0).float().mean() < 0.2
    if batch > 50:
        assert not torch.equal(index[0], torch.arange(batch).repeat(R).int())


def test_index_counts_the_rows_apart_in_float32() -> None:
    index = functional.mimo_index(10, 2, 1, 0.9, torch.Generator().manual_seed(1))
    assert int(torch.tensor(10.0) * torch.tensor(1 - 0.9)) == 1  # 10 * (1 - 0.9) is below 1 in float64
    assert (index[0] == index[1])[1:].all()
    index = functional.mimo_index(640, 2, 1, 0.8, torch.Generator().manual_seed(1))
    assert (index[0] != index[1]).nonzero().max() == 127


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gather_of_16_bits_has_a_gradient(dtype: torch.dtype) -> None:
    index = functional.mimo_index(4, 3, 2)
    x, d = torch.randn(4, 5).to(dtype), torch.randn(8, 15).to(dtype)
    leaf = x.clone().requires_grad_()
    y = functional.mimo_gather(leaf, index)
    assert_same_bits("y", y.float(), functional.mimo_gather(x, index).float())
    (got,) = torch.autograd.grad(y, leaf, d)

    def definition(d: Tensor) -> Tensor:
        return reference.mimo_gather_backward(d[None, :, None], index, 4)[0, :, 0]

    assert_within_budget("dx", got, definition, (d,), tolerance.GRADIENTS)


def test_index_draws_from_the_default_generator() -> None:
    torch.manual_seed(3)
    one = functional.mimo_index(20, 3, 2)
    assert not torch.equal(one, functional.mimo_index(20, 3, 2))
    torch.manual_seed(3)
    assert torch.equal(one, functional.mimo_index(20, 3, 2))


def by_hand(x: Tensor, index: Tensor, batch_dim: int, channel_dim: int) -> Tensor:
    """Slot by slot, by torch alone."""
    return torch.cat([x.index_select(batch_dim, slot.long()) for slot in index], channel_dim)


LAYOUTS = {
    "plain": ((5, 7), 0, -1),
    "batch_first": ((5, 3, 7), 0, -1),
    "time_first": ((3, 5, 7), 1, 2),
    "convolution": ((5, 7, 4, 3), 0, 1),
    "convolution_of_steps": ((2, 5, 7, 4, 3), 1, 2),
    "middle": ((2, 5, 3, 7, 4), 1, 3),
}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("shape", "batch", "channel"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(shape: tuple[int, ...], batch: int, channel: int, index_dtype: torch.dtype) -> None:
    """Any order of dimensions; strided tensors are copied."""
    x = torch.randn(shape)
    index = torch.randint(0, 5, (3, 9)).to(index_dtype)
    where = {"batch_dim": batch, "channel_dim": channel}
    expected = by_hand(x, index, batch, channel)
    assert_same_bits("rows", functional.mimo_gather(x, index, **where), expected)
    strided = x.mT.contiguous().mT
    assert_same_bits("strided", functional.mimo_gather(strided, index.mT.contiguous().mT, **where), expected)
    parts = torch.cat([torch.randn(shape) for _ in range(3)], channel)
    bias = torch.randn(7)

    def combined(parts: Tensor, bias: Tensor | None) -> Tensor:
        chunks = parts.chunk(3, channel)
        total = sum(c.index_select(batch, slot.long()) for c, slot in zip(chunks, index, strict=True))
        shaped = [7 if n == channel % len(shape) else 1 for n in range(len(shape))]
        return total if bias is None else total + bias.view(shaped)

    for given_bias in (bias, None):
        got = functional.mimo_combine(parts.mT.contiguous().mT, index, given_bias, **where)
        assert_within_budget("combined", got, combined, (parts, given_bias))
    if channel % len(shape) != len(shape) - 1:
        return
    weight, d = torch.randn(11, 21), torch.randn(*expected.shape[:-1], 11)

    def projected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.linear(by_hand(x, index, batch, channel), weight, bias)

    def gradients(run: Any, *values: Tensor) -> tuple[Tensor, ...]:
        leaves = [v.detach().requires_grad_() for v in values]
        return torch.autograd.grad(run(*leaves), leaves, d.to(leaves[0].dtype))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.mimo_project(x, weight, bias, index, batch_dim=batch)

    call = (strided, weight.mT.contiguous().mT, torch.randn(11))
    assert_within_budget("projected", ours(*call), projected, call)
    found = gradients(ours, *call)
    assert_within_budget(GRADIENTS, found, lambda *v: gradients(projected, *v), call, tolerance.GRADIENTS)


@pytest.mark.parametrize("dtype", cases.LOW_PRECISION)
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, weight, bias, index, parts, *_ = cases.inputs(SMALL["steps"], dtype)
    out = functional.mimo_project(x[:, :, 0], weight, bias, index, batch_dim=1)
    wide = functional.mimo_project(x[:, :, 0].float(), weight.float(), bias.float(), index, batch_dim=1)
    assert_same_bits("out", out.float(), wide.to(dtype).float())
    combined = functional.mimo_combine(parts, index, bias, batch_dim=1)
    wide = functional.mimo_combine(parts.float(), index, bias.float(), batch_dim=1)
    assert_same_bits("combined", combined.float(), wide.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
@pytest.mark.parametrize("rest", [(), (3,), (2, 4)])
def test_labels(rest: tuple[int, ...], dtype: torch.dtype) -> None:
    labels = torch.randint(0, 9, (6, *rest)).to(dtype)
    index = functional.mimo_index(6, 3, 2)
    got = functional.mimo_labels(labels, index)
    assert_same_bits("labels", got, labels[index.long()].transpose(0, 1).contiguous())

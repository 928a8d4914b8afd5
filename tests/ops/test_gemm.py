"""The matrix product with one order of summation, against its definition and against itself."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastseq import reference
from fastseq.ops.gemm import BACKENDS, gemm
from tests import tolerance
from tests.core.constants import BLOCK_K, BLOCK_M, PANEL_WIDTH, block_k
from tests.ops import lstm_cases as cases
from tests.tolerance import assert_same_bits, assert_within_budget

DTYPES = cases.DTYPES
LARGE_DRAWS = 40
each_backend = pytest.mark.parametrize("backend", cases.backends(table=BACKENDS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


class Case(NamedTuple):
    """One product [M, K] @ [K, N]."""

    M: int
    N: int
    K: int
    bias: bool = False
    transpose_a: bool = False
    transpose_b: bool = False


CASES = {
    "one": Case(1, 1, 1),
    "prime": Case(5, 13, 7),
    "below_vector": Case(3, 15, 15, True),
    "over_vector": Case(13, 33, 17, True),
    "tile": Case(12, 32, 16),
    "row": Case(1, 67, 300, True),
    "column": Case(67, 1, 300),
    "block": Case(BLOCK_M + 1, 33, BLOCK_K + 1, True),
    "long": Case(2, 3, 2000),
    "no_rows": Case(0, 3, 4, True),
    "no_columns": Case(3, 0, 4, True),
    "no_sum": Case(3, 4, 0),
    "no_sum_bias": Case(3, 40, 0, True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_layout = pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])


def inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + 3)
    M, N, K, bias, ta, tb = case
    a, b, add = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((K, M) if ta else (M, K), (N, K) if tb else (K, N), (N,))
    )
    return a, b, add if bias else None, ta, tb


def run(backend: str, *args: Any) -> Tensor:
    out: Tensor = cases.run("gemm", backend, *args, table={"gemm": BACKENDS})
    return out


def with_layout(case: Case, transposed: str) -> Case:
    return case._replace(transpose_a="a" in transposed, transpose_b="b" in transposed)


@each_case
@each_layout
@each_dtype
@each_backend
def test_product(backend: str, dtype: torch.dtype, transposed: str, case: Case) -> None:
    args = inputs(with_layout(case, transposed), dtype)
    assert_within_budget("out", run(backend, *args), reference.linear, args)


small = st.builds(Case, *(st.integers(0, 40),) * 2, st.integers(0, 70), st.booleans(), st.booleans(), st.booleans())
# Beyond a register tile, a panel, a block of either kind, and the work that pays for two threads.
large = st.builds(
    Case,
    st.integers(BLOCK_M + 1, BLOCK_M + 80),
    st.integers(PANEL_WIDTH + 1, 90),
    st.integers(BLOCK_K + 1, BLOCK_K + 200),
    *(st.booleans(),) * 3,
)


@each_backend
@given(case=small, dtype=st.sampled_from(DTYPES), threads=st.sampled_from([1, 2]), seed=st.integers(0, 2**20))
def test_small(backend: str, case: Case, dtype: torch.dtype, threads: int, seed: int) -> None:
    cases.assume_runs(backend, dtype)
    torch.set_num_threads(threads)
    args = inputs(case, dtype, seed)
    assert_within_budget("out", run(backend, *args), reference.linear, args)


@pytest.mark.parametrize("backend", cases.compiled(table=BACKENDS))
@settings(max_examples=LARGE_DRAWS)
@given(case=large, dtype=st.sampled_from(DTYPES), threads=st.sampled_from([1, 2]), seed=st.integers(0, 2**20))
def test_large(backend: str, case: Case, dtype: torch.dtype, threads: int, seed: int) -> None:
    torch.set_num_threads(threads)
    args = inputs(case, dtype, seed)
    assert_within_budget("out", run(backend, *args), reference.linear, args)


@each_dtype
@each_layout
@pytest.mark.parametrize("wanted", ["a", "b", "bias", "a b bias"])
def test_autograd(dtype: torch.dtype, transposed: str, wanted: str) -> None:
    case = with_layout(Case(9, 17, 13, True), transposed)
    a, b, bias, *flags = inputs(case, dtype)
    tensors = {"a": a, "b": b, "bias": bias}
    names = wanted.split()
    d = torch.randn(case.M, case.N, dtype=dtype)

    def gradients(product: Any, leaves: list[Tensor], d: Tensor) -> tuple[Tensor, ...]:
        given = tensors | dict(zip(names, leaves, strict=True))
        out = product(*(t.detach() if n not in names else t for n, t in given.items()), *flags)
        return torch.autograd.grad(out, leaves, d)

    def expected(d: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        given = {"a": a, "b": b, "bias": bias}
        leaves = [given[n].requires_grad_() for n in names]
        return torch.autograd.grad(reference.linear(a, b, bias, *flags), leaves, d)

    got = gradients(gemm, [tensors[n].clone().requires_grad_() for n in names], d)
    call = (d, a, b, bias)
    assert_within_budget([f"d{n}" for n in names], got, expected, call, tolerance.GRADIENTS)


@each_layout
def test_gradgradcheck(transposed: str) -> None:
    a, b, bias, *flags = inputs(with_layout(Case(2, 3, 4, True), transposed), torch.float64)
    leaves = tuple(t.requires_grad_() for t in (a, b, bias))
    assert torch.autograd.gradcheck(lambda *t: gemm(*t, *flags), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: gemm(*t, *flags), leaves)


@each_layout
@pytest.mark.parametrize("case", ["prime", "over_vector", "no_rows", "no_sum_bias"])
def test_opcheck(case: str, transposed: str) -> None:
    found = torch.library.opcheck(torch.ops.fastseq.gemm.default, inputs(with_layout(CASES[case], transposed)))
    assert set(found.values()) == {"SUCCESS"}


BITS = {"prime": CASES["prime"], "over_vector": CASES["over_vector"], "long": CASES["long"], "row": CASES["row"]}
BITS |= {
    "block": Case(BLOCK_M + 5, 70, BLOCK_K + 45, True),
    "tall": Case(1501, 5, 130),
    "wide": Case(3, 1501, BLOCK_K + 16, True),
}


@cases.needs_compiled()
@pytest.mark.parametrize("case", BITS.values(), ids=BITS.keys())
@each_layout
@each_dtype
def test_threads_runs_and_doors(case: Case, transposed: str, dtype: torch.dtype) -> None:
    core = cases.numpy_door()
    args = inputs(with_layout(case, transposed), dtype)
    torch.set_num_threads(1)
    expected = torch.ops.fastseq.gemm(*args)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert_same_bits(f"{threads}_threads", torch.ops.fastseq.gemm(*args), expected)
        assert_same_bits(f"numpy_{threads}_threads", core.gemm(*cases.arrays(args), threads=threads), expected)


@cases.needs_compiled()
@pytest.mark.parametrize("case", BITS.values(), ids=BITS.keys())
@each_layout
@each_dtype
def test_row_alone_and_in_a_batch(case: Case, transposed: str, dtype: torch.dtype) -> None:
    """A row of the result does not depend on the other rows, nor a column on the other columns."""
    case = with_layout(case, transposed)
    a, b, bias, ta, tb = inputs(case, dtype)
    out = torch.ops.fastseq.gemm(a, b, bias, ta, tb)
    for m in {0, 1, case.M // 2, case.M - 1} & set(range(case.M)):
        row = (a[:, m : m + 1] if ta else a[m : m + 1]).contiguous()
        assert_same_bits(f"row_{m}", torch.ops.fastseq.gemm(row, b, bias, ta, tb), out[m : m + 1])
    for n in {0, 1, case.N // 2, case.N - 1} & set(range(case.N)):
        column = (b[n : n + 1] if tb else b[:, n : n + 1]).contiguous()
        one = None if bias is None else bias[n : n + 1]
        assert_same_bits(f"column_{n}", torch.ops.fastseq.gemm(a, column, one, ta, tb), out[:, n : n + 1])


@cases.needs_compiled()
@pytest.mark.parametrize("case", [Case(3, 5, 17, True), Case(2, 3, 2 * BLOCK_K + 9, True)], ids=["short", "blocks"])
def test_order_of_the_sum(case: Case) -> None:
    """Blocks of K in ascending order, each a chain of fused multiply-adds from zero; the bias joins the first."""
    core = cases.numpy_door()
    if core.isa() == "scalar":
        pytest.skip("scalar: rounds the product and the sum apart")
    a, b, bias, *_ = inputs(case, torch.float64)
    expected = np.empty((case.M, case.N))
    for m in range(case.M):
        for n in range(case.N):
            total = float(bias[n])
            for first in range(0, case.K, block_k(case.K)):
                chain = 0.0
                for k in range(first, min(first + block_k(case.K), case.K)):
                    exact = Fraction(float(a[m, k])) * Fraction(float(b[k, n])) + Fraction(chain)
                    chain = float(exact)  # rounded once, to nearest
                total += chain
            expected[m, n] = total
    assert_same_bits("out", core.gemm(*cases.arrays((a, b, bias))), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@each_backend
def test_nan_and_inf_as_in_torch(backend: str, value: float) -> None:
    """What is not finite shows up where torch has it, and nowhere else."""
    a, b, bias, *flags = inputs(Case(13, 37, 300, True))
    a[2, 7], b[5, 3], bias[36] = value, value, value
    b[9, 3] = -value
    got, expected = run(backend, a, b, bias, *flags), torch.nn.functional.linear(a, b.mT, bias)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
    inf = expected.isinf()
    assert torch.equal(got[inf], expected[inf])

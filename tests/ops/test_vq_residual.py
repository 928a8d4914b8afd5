"""All levels of a residual quantizer in one pass, and the gradient of x, against their definitions."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastseq import functional, reference
from tests import tolerance
from tests.ops import vq_cases as cases
from tests.ops.vq_cases import BLOCK_ROWS, DTYPES, KINDS, ORDINARY, each_dtype
from tests.tolerance import assert_same_bits, assert_within_budget

each_backend = pytest.mark.parametrize("backend", cases.backends("vq_residual"))
compiled = pytest.mark.parametrize("backend", cases.compiled("vq_residual"))
each_gradient = pytest.mark.parametrize("gradient", cases.GRADIENTS[:2])
RESULTS = "quantized index distance counts sums codes"
LARGE_DRAWS = 40


class Case(NamedTuple):
    """One call; K of each level. Rows, and codes of the first level, are of a kind of ``vq_cases``."""

    N: int
    K: tuple[int, ...]
    D: int
    kind: str = "normal"
    masked: bool = False
    leveled: bool = False


CASES = {
    "one": Case(1, (1,), 1),
    "few_rows": Case(3, (40, 20), 17),
    "sizes": Case(53, (7, 33, 1, 16, 90), 9),
    "masked": Case(37, (29, 12, 5), 13, masked=True),
    "leveled": Case(37, (29, 12, 5), 13, leveled=True),
    "masked_leveled": Case(61, (29, 12, 5, 18), 13, masked=True, leveled=True),
    "deep": Case(20, (9,) * 12, 6, leveled=True),
    "ties": Case(60, (20, 20, 20), 5, kind="whole", masked=True),
    "mean": Case(50, (31, 17), 20, kind="mean"),
    "long": Case(9, (21, 30), 300, leveled=True),
    "no_rows": Case(0, (5, 3), 4, masked=True, leveled=True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Inputs(NamedTuple):
    """Arguments of ``vq_residual`` up to the levels of the rows."""

    x: Tensor
    codebooks: list[Tensor]
    mask: Tensor | None
    levels: Tensor | None


def inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Codes of each level are about as long as what the levels before it leave; some rows use no level or all."""
    plain = cases.Case(case.N, case.K[0], case.D, kind=case.kind, masked=case.masked)
    x, first, mask = cases.inputs(plain, dtype, seed)
    rest = [cases.normals(K, case.D, dtype=dtype, seed=seed + m) / 2**m for m, K in enumerate(case.K[1:], 1)]
    generator = torch.Generator().manual_seed(1000 * seed + 29)
    levels = torch.randint(-1, len(case.K) + 2, (case.N,), generator=generator) if case.leveled else None
    return Inputs(x[0], [first[0], *rest], None if mask is None else mask[0], levels)


def distances(x: Tensor, codebooks: list[Tensor], index: Tensor) -> Tensor:
    """[M, N] at a given index."""
    rest, found = x, []
    for m, codebook in enumerate(codebooks):
        codes = reference.vq_gather(codebook[None], index[None, :, m])[0]
        found.append(torch.where(index[:, m] >= 0, (rest - codes).square().sum(-1), 0.0))
        rest = rest - codes
    return torch.stack(found)


def quantized(codebooks: list[Tensor], index: Tensor) -> Tensor:
    """[N, D] at a given index, added in the order of the levels."""
    total = torch.zeros(len(index), codebooks[0].shape[1], dtype=codebooks[0].dtype)
    for m, codebook in enumerate(codebooks):
        total = total + reference.vq_gather(codebook[None], index[None, :, m])[0]
    return total


def sums(x: Tensor, codebooks: list[Tensor], index: Tensor) -> Tensor:
    """[K_1 + ... + K_M, D] at a given index."""
    rest, found = x, []
    for m, codebook in enumerate(codebooks):
        found.append(reference.vq_sums(rest[None], index[None, :, m], len(codebook))[1][0])
        rest = rest - reference.vq_gather(codebook[None], index[None, :, m])[0]
    return torch.cat(found)


def counts(codebooks: list[Tensor], index: Tensor) -> Tensor:
    found = [torch.bincount(i[i >= 0], minlength=len(c)) for i, c in zip(index.T, codebooks, strict=True)]
    return torch.cat(found).to(codebooks[0].dtype)


def check(backend: str, args: Inputs, judged: bool = True, threads: tuple[int, ...] = (1,)) -> None:
    """Everything that one call gives, by any number of threads; sums change nothing else. ``judged``: whether there
    are float64 results to come near to."""
    x, codebooks = args[:2]
    first = None
    for n in threads:
        torch.set_num_threads(n)
        got = cases.run("vq_residual", backend, *args, True, True)
        part = cases.run("vq_residual", backend, *args, False, False)
        first = first or got
        assert_same_bits(RESULTS, got, first)
        assert_same_bits(RESULTS, part, (*got[:3], *(v.new_empty(0) for v in got[3:])))
    expected = reference.vq_residual(*args)
    assert torch.equal(first[1], expected[1])
    assert_same_bits("counts codes", (first[3], first[5]), (counts(codebooks, first[1]), torch.cat(codebooks)))
    if judged:
        index = first[1]
        assert torch.equal(first[0], expected[0])  # the same additions in the same order
        assert_within_budget("distance", first[2], distances, (x, codebooks, index))
        assert_within_budget("sums", first[4], sums, (x, codebooks, index))


@each_case
@each_dtype
@each_backend
def test_residual(backend: str, dtype: torch.dtype, case: Case) -> None:
    check(backend, inputs(case, dtype))


@pytest.mark.parametrize("kind", KINDS)
@compiled
def test_index_of_every_kind(backend: str, kind: str) -> None:
    check(backend, inputs(Case(40, (33, 20, 7), 21, kind=kind, masked=True, leveled=True)), kind in ORDINARY)
    check(backend, inputs(Case(3, (33, 20, 7), 21, kind=kind)), kind in ORDINARY)


def drawn(N: Any, K: Any, D: Any, most: int, kinds: Any = tuple(KINDS)) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        N=N,
        K=st.lists(K, min_size=1, max_size=most).map(tuple),
        D=D,
        kind=st.sampled_from(kinds),
        masked=st.booleans(),
        leveled=st.booleans(),
    )


@given(
    case=drawn(st.integers(0, 40), st.integers(1, 40), st.integers(1, 20), 4),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**20),
)
@compiled
def test_small(backend: str, case: Case, threads: int, seed: int) -> None:
    check(backend, inputs(case, seed=seed), case.kind in ORDINARY, (threads,))


# Beyond a block of rows, and the work of three threads.
large = drawn(st.integers(BLOCK_ROWS + 1, BLOCK_ROWS + 60), st.integers(45, 48), st.just(17), 2)


@settings(max_examples=LARGE_DRAWS)
@given(case=large, seed=st.integers(0, 2**20))
@compiled
def test_large(backend: str, case: Case, seed: int) -> None:
    check(backend, inputs(case, seed=seed), case.kind in ORDINARY, (1, 2, 3))


@pytest.mark.parametrize("case", [Case(4500, (2, 2), 170), Case(9000, (7, 9, 5), 3, masked=True, leveled=True)])
@compiled
def test_many_rows(backend: str, case: Case) -> None:
    """Several blocks of rows for each thread, and sums beyond a block and a slice."""
    check(backend, inputs(case), threads=(1, 2, 3))


@compiled
def test_one_level_is_the_lookup(backend: str) -> None:
    x, codebook, mask = cases.inputs(cases.Case(90, 33, 12, masked=True))
    got = cases.run("vq_residual", backend, x[0], [codebook[0]], mask[0], None, True, False)
    codes, index, distance, found, total = cases.run("vq_quantize", backend, x, codebook, mask, False, True)
    expected = (codes[0], index[0, :, None], distance, found[0], total[0])
    assert_same_bits("quantized index distance counts sums", got[:5], expected)


@each_backend
def test_rows_without_a_level(backend: str) -> None:
    """Rows that the mask leaves out, or that use no level, give zeros and are nobody's business."""
    args = inputs(Case(40, (9, 5), 6, masked=True, leveled=True))
    dead = ~args.mask | (args.levels <= 0)
    assert dead.any() and not dead.all()
    got = cases.run("vq_residual", backend, *args, True, False)
    assert not got[0][dead].any()
    assert (got[1][dead] == -1).all()
    assert not got[2][:, dead].any()
    poisoned = torch.where(dead[:, None], torch.nan, args.x)
    assert_same_bits(RESULTS, cases.run("vq_residual", backend, poisoned, *args[1:], True, False), got)


@each_backend
def test_a_row_that_is_not_finite(backend: str) -> None:
    """Gets code 0 of each level; its neighbours are what they were."""
    args = inputs(Case(40, (9, 5), 6))
    clean = cases.run("vq_residual", backend, *args, False, False)
    args.x[7, 2], args.x[9, 0] = torch.nan, torch.inf
    got = cases.run("vq_residual", backend, *args, False, False)
    rest = [n for n in range(40) if n not in (7, 9)]
    assert torch.equal(got[1][[7, 9]], torch.zeros(2, 2, dtype=torch.int64))
    assert not got[2][:, [7, 9]].isfinite().any()
    expected = args.codebooks[0][0] + args.codebooks[1][0]
    assert backend == "reference" or torch.equal(got[0][[7, 9]], expected.expand(2, 6))
    assert_same_bits("quantized index", (got[0][rest], got[1][rest]), (clean[0][rest], clean[1][rest]))


# ---- gradients ----


def upstream(N: int, D: int, M: int, given_names: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor | None]:
    names = given_names.split()
    return [
        cases.normals(N, D, dtype=dtype, seed=seed + 1) if "quantized" in names else None,
        cases.normals(M, N, dtype=dtype, seed=seed + 2) if "commitment" in names else None,
    ]


def check_backward(
    backend: str, args: Inputs, gradient: str, given_names: str, threads: tuple[int, ...] = (1,), seed: int = 0
) -> None:
    x, codebooks = args[:2]
    used = [cases.places(1, len(x), len(c), args.levels is not None, seed + m) for m, c in enumerate(codebooks)]
    index = torch.cat(used).T.contiguous()
    grads = upstream(*x.shape, len(codebooks), given_names, x.dtype, seed)
    sizes, found = [len(c) for c in codebooks], []
    way = cases.GRADIENTS.index(gradient)
    for n in threads:
        torch.set_num_threads(n)
        call = (*grads, x, torch.cat(codebooks), sizes, index, way)
        found.append(cases.run("vq_residual_backward", backend, *call))
        assert_same_bits("dx", found[-1], found[0])
    call = (*grads, x, codebooks, index, gradient)
    assert_within_budget("dx", found[0], reference.vq_residual_backward, call, tolerance.GRADIENTS)


GIVEN = ["quantized", "commitment", "quantized commitment"]


@pytest.mark.parametrize("given_names", GIVEN)
@pytest.mark.parametrize("case", ["sizes", "masked_leveled", "deep", "long", "no_rows"])
@each_gradient
@each_dtype
@each_backend
def test_backward(backend: str, dtype: torch.dtype, gradient: str, case: str, given_names: str) -> None:
    check_backward(backend, inputs(CASES[case], dtype), gradient, given_names)


# From three dimensions on no drawn row is so nearly opposite to its code that a rotation is not defined.
@cases.needs_compiled()
@given(
    case=drawn(st.integers(0, 40), st.integers(1, 40), st.integers(3, 20), 4, ORDINARY[:2]),
    gradient=st.sampled_from(cases.GRADIENTS[:2]),
    names=st.sampled_from(GIVEN),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**20),
)
def test_small_backward(case: Case, gradient: str, names: str, dtype: torch.dtype, threads: int, seed: int) -> None:
    check_backward("cpu", inputs(case, dtype, seed), gradient, names, (threads,), seed)


large_backward = drawn(st.integers(4000, 4200), st.integers(1, 4), st.integers(60, 70), 2, ORDINARY[:1])


@cases.needs_compiled()
@settings(max_examples=LARGE_DRAWS)
@given(case=large_backward, gradient=st.sampled_from(cases.GRADIENTS[:2]), seed=st.integers(0, 2**20))
def test_large_backward(case: Case, gradient: str, seed: int) -> None:
    check_backward("cpu", inputs(case, seed=seed), gradient, GIVEN[2], (1, 2, 3), seed)


def by_autograd(x: Tensor, args: Inputs, grads: list[Tensor | None], gradient: str) -> Tensor:
    """dx by torch, of the definition; float64 finds the same index in these cases."""
    x = x.detach().requires_grad_()
    codebooks = [c.to(x.dtype) for c in args.codebooks]
    total, _, distance, _ = reference.vq_residual(x, codebooks, *args[2:], gradient)
    pairs = [(v, d.to(x.dtype)) for v, d in zip((total, distance), grads, strict=True) if d is not None]
    outputs, given = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, x, given)[0]


@pytest.mark.parametrize("given_names", GIVEN)
@pytest.mark.parametrize("case", ["sizes", "masked_leveled", "deep"])
@each_gradient
def test_backward_definition_is_the_gradient(gradient: str, case: str, given_names: str) -> None:
    args = inputs(CASES[case], torch.float64)
    grads = upstream(*args.x.shape, len(args.codebooks), given_names, torch.float64)
    index = reference.vq_residual(*args)[1]
    got = reference.vq_residual_backward(*grads, args.x, args.codebooks, index, gradient)
    call = (args.x, args, grads, gradient)
    assert_within_budget("dx", got, by_autograd, call, tolerance.GRADIENTS)


@pytest.mark.parametrize("given_names", GIVEN)
@each_gradient
def test_autograd(gradient: str, given_names: str) -> None:
    """Through functional: into x alone, of the outputs that got a gradient."""
    x, codebooks, mask, levels = inputs(CASES["masked_leveled"])
    leaf, books = x.clone().requires_grad_(), [c.clone().requires_grad_() for c in codebooks]
    out = functional.vq_residual(leaf, books, mask=mask, levels=levels, gradient=gradient, sums=True)
    assert not any(v.requires_grad for v in (out.index, *out.counts, *out.sums))
    assert [v.shape for v in out.sums] == [c.shape for c in codebooks]
    assert [len(v) for v in out.counts] == [len(c) for c in codebooks]
    grads = upstream(*x.shape, len(codebooks), given_names, torch.float32)
    pairs = [(v, d) for v, d in zip((out.quantized, out.commitment), grads, strict=True) if d is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))
    assert all(book.grad is None for book in books)
    call = (*grads, x, codebooks, out.index, gradient)
    assert_within_budget("dx", leaf.grad, reference.vq_residual_backward, call, tolerance.GRADIENTS)


def test_second_derivative_of_the_commitment() -> None:
    """A smooth function of x as long as the index stays."""
    x, codebooks, mask, levels = inputs(Case(7, (4, 3), 3, masked=True, leveled=True), torch.float64)

    def commitment(v: Tensor) -> Tensor:
        return functional.vq_residual(v, codebooks, mask=mask, levels=levels).commitment

    assert torch.autograd.gradcheck(commitment, (x.clone().requires_grad_(),))
    assert torch.autograd.gradgradcheck(commitment, (x.clone().requires_grad_(),))

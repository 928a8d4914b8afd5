"""Codes, distances and sums by code of one pass, their gradients, and the definitions of these."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastseq import functional, reference
from tests import tolerance
from tests.ops import vq_cases as cases
from tests.ops.vq_cases import DTYPES, ORDINARY, SUM_BLOCK, Case, each_dtype
from tests.tolerance import assert_same_bits, assert_within_budget

each_backend = pytest.mark.parametrize("backend", cases.backends("vq_quantize"))
compiled = pytest.mark.parametrize("backend", cases.compiled("vq_quantize"))
each_gradient = pytest.mark.parametrize("gradient", cases.GRADIENTS)
RESULTS = "codes index distance counts sums"
LARGE_DRAWS = 40

CASES = {
    "one": Case(1, 1, 1),
    "few_rows": Case(3, 40, 17, masked=True),
    "prime": Case(37, 29, 13, G=2),
    "masked": Case(53, 45, 20, G=2, masked=True),
    "one_code": Case(300, 1, 5, masked=True),
    "no_rows": Case(0, 5, 3, G=2),
    "ties": Case(60, 33, 8, kind="whole", masked=True),
    "mean": Case(60, 33, 40, kind="mean"),
    "dot": Case(40, 33, 16, G=2, masked=True, dot=True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def sums(x: Tensor, index: Tensor, K: int) -> Tensor:
    return reference.vq_sums(x, index, K)[1]


def definition(*args: Any) -> Tensor:
    return reference.vq_nearest(*args)[..., 0]


def lookup(*args: Any) -> Tensor:
    """The compiled lookup, which other tests hold to the definition at these sizes."""
    return cases.run("vq_nearest", "cpu", *args, 1, 64, False, False, 0)[0][..., 0]


def check(
    backend: str,
    case: Case,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    threads: Any = (1,),
    nearest: Any = definition,
) -> None:
    """Everything that one pass gives, with the same bits on any number of threads."""
    x, codebook, mask = cases.inputs(case, dtype, seed)
    found = []
    for n in threads:
        torch.set_num_threads(n)
        found.append(cases.run("vq_quantize", backend, x, codebook, mask, case.dot, True))
        assert_same_bits(RESULTS, found[-1], found[0])
    codes, index, apart, counts, total = found[0]
    assert torch.equal(index, nearest(x, codebook, mask, case.dot))
    assert_same_bits("codes", codes, reference.vq_gather(codebook, index))
    if case.kind not in ORDINARY:
        return
    assert_within_budget("distance", apart, cases.distance, (x, codebook, index))
    check_sums(counts, total, x, index, case.K)


def check_sums(counts: Tensor, total: Tensor, x: Tensor, index: Tensor, K: int) -> None:
    assert_same_bits("counts", counts, torch.stack([torch.bincount(i[i >= 0], minlength=K) for i in index]).to(x.dtype))
    assert_within_budget("sums", total, sums, (x, index, K))


@each_case
@each_dtype
@each_backend
def test_quantize(backend: str, dtype: torch.dtype, case: Case) -> None:
    check(backend, case, dtype)
    x, codebook, mask = cases.inputs(case, dtype)
    full = cases.run("vq_quantize", backend, x, codebook, mask, case.dot, True)
    part = cases.run("vq_quantize", backend, x, codebook, mask, case.dot, False)
    assert_same_bits(RESULTS, part, (*full[:3], full[3].new_empty(0), full[4].new_empty(0)))


@given(
    case=cases.cases(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 2)),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**20),
)
@compiled
def test_small(backend: str, case: Case, threads: int, seed: int) -> None:
    check(backend, case, seed=seed, threads=(threads,))


# Beyond a block of rows, a tile of codes, and the work of three threads.
large = st.one_of(
    cases.cases(st.integers(520, 540), st.integers(116, 120), st.just(13)),
    cases.cases(st.integers(2800, 2900), st.integers(2, 3), st.integers(140, 150)),
)


@settings(max_examples=LARGE_DRAWS)
@given(case=large, seed=st.integers(0, 2**20))
@compiled
def test_large(backend: str, case: Case, seed: int) -> None:
    check(backend, case, seed=seed, threads=(1, 2, 3), nearest=lookup)


shapes = st.tuples(st.integers(1, 3), st.integers(0, 60), st.integers(1, 30), st.integers(1, 40))


@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**20),
)
@pytest.mark.parametrize("backend", cases.backends("vq_sums"))
def test_sums(backend: str, shape: tuple[int, ...], dtype: torch.dtype, masked: bool, threads: int, seed: int) -> None:
    torch.set_num_threads(threads)
    G, N, K, D = shape
    x, index = cases.normals(G, N, D, dtype=dtype, seed=seed), cases.places(G, N, K, masked, seed)
    check_sums(*cases.run("vq_sums", backend, x, index, K), x, index, K)


# Beyond several blocks of the rows of one code, a slice of D, and the work of three threads.
large_shapes = st.tuples(st.just(1), st.integers(2800, 3000), st.integers(1, 6), st.integers(257, 280))


@settings(max_examples=LARGE_DRAWS)
@given(shape=large_shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**20))
@pytest.mark.parametrize("backend", cases.compiled("vq_sums"))
def test_large_sums(backend: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    G, N, K, D = shape
    x, index = cases.normals(G, N, D, dtype=dtype, seed=seed), cases.places(G, N, K, seed=seed)
    torch.set_num_threads(1)
    counts, total = cases.run("vq_sums", backend, x, index, K)
    check_sums(counts, total, x, index, K)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits("counts sums", cases.run("vq_sums", backend, x, index, K), (counts, total))


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("backend", cases.compiled("vq_sums"))
def test_order_of_the_sums(backend: str, K: int) -> None:
    """Rows in ascending order, in blocks; the first block goes on from zero, each later one is added as a whole."""
    x, index = cases.normals(1, 3 * K * SUM_BLOCK + 50, 3), cases.places(1, 3 * K * SUM_BLOCK + 50, K)
    expected = np.zeros((1, K, 3), np.float32)
    for k in range(K):
        rows = x[0, index[0] == k].numpy()
        for first in range(0, len(rows), SUM_BLOCK):
            block = np.zeros(3, np.float32)
            for row in rows[first : first + SUM_BLOCK]:
                block += row
            expected[0, k] += block
    assert_same_bits("sums", cases.run("vq_sums", backend, x, index, K)[1], torch.from_numpy(expected))


@pytest.mark.parametrize("backend", cases.backends("vq_sums"))
def test_rows_that_are_not_finite_spoil_their_own_code(backend: str) -> None:
    x, index = cases.normals(1, 40, 5), cases.places(1, 40, 7)
    at = int((index[0] == 3).nonzero()[0])
    skipped = int((index[0] == -1).nonzero()[0])
    x[0, at, 2], x[0, skipped] = torch.nan, torch.inf
    _, total = cases.run("vq_sums", backend, x, index, 7)
    spoilt = torch.zeros(1, 7, 5, dtype=torch.bool)
    spoilt[0, 3, 2] = True
    assert torch.equal(~total.isfinite(), spoilt)


# ---- gradients ----

GIVEN = ["quantized", "commitment", "codebook_error", "quantized codebook_error", "quantized commitment codebook_error"]
each_given = pytest.mark.parametrize("given_names", GIVEN)


def backward(backend: str, grads: Any, x: Tensor, codebook: Tensor, index: Tensor, gradient: str) -> Any:
    codes = reference.vq_gather(codebook, index)
    way = cases.GRADIENTS.index(gradient)
    return cases.run("vq_backward", backend, *grads, x, codes, index, codebook.shape[1], way, True, True)


@each_given
@each_gradient
@each_dtype
@each_backend
def test_backward(backend: str, dtype: torch.dtype, gradient: str, given_names: str) -> None:
    for G, N, K, D in ((1, 1, 1, 1), (2, 30, 17, 13), (1, 45, 5, 33)):
        x, codebook = cases.normals(G, N, D, dtype=dtype), cases.normals(G, K, D, dtype=dtype, seed=1)
        index, grads = cases.places(G, N, K), cases.upstream(G, N, D, given_names, dtype)
        got = backward(backend, grads, x, codebook, index, gradient)
        call = (x, codebook, index, grads, gradient)
        assert_within_budget("dx dcodebook", got, cases.by_autograd, call, tolerance.GRADIENTS)


def check_backward(shape: Any, masked: bool, gradient: str, names: str, dtype: Any, threads: Any, seed: int) -> None:
    G, N, K, D = shape
    x, codebook = cases.normals(G, N, D, dtype=dtype, seed=seed), cases.normals(G, K, D, dtype=dtype, seed=seed + 1)
    index, grads = cases.places(G, N, K, masked, seed), cases.upstream(G, N, D, names, dtype, seed)
    if gradient == "rotation":
        for t in (x, codebook):  # a row opposite to its code has no defined rotation
            t[..., 0] = t[..., 0].abs() + 1
    found, codes = [], reference.vq_gather(codebook, index)
    for n in threads:
        torch.set_num_threads(n)
        call = (*grads, x, codes, index, K, cases.GRADIENTS.index(gradient), True, True)
        found.append(cases.run("vq_backward", "cpu", *call))
        assert_same_bits("dx dcodebook", found[-1], found[0])
    call = (*grads, x, codes, index, K, gradient)
    assert_within_budget("dx dcodebook", found[0], reference.vq_backward, call, tolerance.GRADIENTS)


@cases.needs_compiled()
@given(
    shape=shapes,
    masked=st.booleans(),
    gradient=st.sampled_from(cases.GRADIENTS),
    names=st.sampled_from(GIVEN),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**20),
)
def test_small_backward(
    shape: tuple[int, ...], masked: bool, gradient: str, names: str, dtype: torch.dtype, threads: int, seed: int
) -> None:
    check_backward(shape, masked, gradient, names, dtype, (threads,), seed)


@cases.needs_compiled()
@settings(max_examples=LARGE_DRAWS)
@given(
    shape=large_shapes,
    gradient=st.sampled_from(cases.GRADIENTS),
    names=st.sampled_from(GIVEN[2:]),
    seed=st.integers(0, 2**20),
)
def test_large_backward(shape: tuple[int, ...], gradient: str, names: str, seed: int) -> None:
    check_backward(shape, True, gradient, names, torch.float32, (1, 2, 3), seed)


@pytest.mark.parametrize("need_x, need_codebook", [(True, False), (False, True), (False, False)])
@each_gradient
@each_backend
def test_only_what_is_needed(backend: str, gradient: str, need_x: bool, need_codebook: bool) -> None:
    x, codebook, index = cases.normals(2, 30, 7), cases.normals(2, 9, 7, seed=1), cases.places(2, 30, 9)
    grads = cases.upstream(2, 30, 7, GIVEN[-1], torch.float32)
    way = cases.GRADIENTS.index(gradient)
    call = (*grads, x, reference.vq_gather(codebook, index), index, 9, way)
    full = cases.run("vq_backward", backend, *call, True, True)
    part = cases.run("vq_backward", backend, *call, need_x, need_codebook)
    expected = [d if need else d.new_empty(0) for d, need in zip(full, (need_x, need_codebook), strict=True)]
    assert_same_bits("dx dcodebook", part, expected)


@each_backend
def test_the_rotation_of_rows_and_codes_of_no_length(backend: str) -> None:
    """Zeros and codes opposite to their row, where directions are not defined: finite, and within the budget."""
    x, codebook = cases.normals(1, 12, 6), cases.normals(1, 4, 6, seed=1)
    index = cases.places(1, 12, 4, masked=False)
    x[0, :3], codebook[0, 1] = 0, 0
    x[0, 3] = -2 * codebook[0, index[0, 3]]
    x[0, 4] *= 1e-30
    grads = cases.upstream(1, 12, 6, "quantized", torch.float32)
    dx, _ = backward(backend, grads, x, codebook, index, "rotation")
    assert dx.isfinite().all()
    plain = [n for n in range(12) if n not in (3, 4)]  # where the definition in float32 means what it means in float64
    call = (x[:, plain], codebook, index[:, plain], [grads[0][:, plain], None, None], "rotation")
    assert_within_budget("dx", dx[:, plain], lambda *a: cases.by_autograd(*a)[0], call, tolerance.GRADIENTS)


# ---- through functional, with autograd ----


@pytest.mark.parametrize("wanted", ["x", "codebook", "x codebook"])
@each_given
@each_gradient
def test_autograd(gradient: str, given_names: str, wanted: str) -> None:
    """Upstream gradients of some outputs, into those arguments that require them and no others."""
    x, codebook, mask = cases.inputs(Case(30, 11, 7, G=2, masked=True))
    leaves = {"x": x.clone(), "codebook": codebook.clone()}
    for name in wanted.split():
        leaves[name].requires_grad_()
    out = functional.vq_quantize(leaves["x"], leaves["codebook"], mask=mask, gradient=gradient, sums=True)
    assert not any(v.requires_grad for v in (out.index, out.counts, out.sums))
    grads = cases.upstream(2, 30, 7, given_names, torch.float32)
    outputs = (out.quantized, out.commitment, out.codebook_error)
    pairs = [(v, d) for v, d in zip(outputs, grads, strict=True) if d is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))
    expected = ["dx", "dcodebook"]
    names = [f"d{name}" for name in leaves if name in wanted.split()]
    assert [f"d{n}" for n, t in leaves.items() if t.grad is not None] == names
    kept = [expected.index(name) for name in names]
    call = (x, codebook, out.index, grads, gradient)
    got = [leaves[name.removeprefix("d")].grad for name in names]
    assert_within_budget(names, got, lambda *a: [cases.by_autograd(*a)[n] for n in kept], call, tolerance.GRADIENTS)


@each_gradient
def test_the_loss_of_the_vq_vae(gradient: str) -> None:
    """Commitment times beta plus codebook error, as means over N*D, and a decoder's gradient through the codes."""
    x, codebook, _ = cases.inputs(Case(50, 13, 7))
    x, codebook = x[0], codebook[0]

    def loss(x: Tensor, codebook: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        x, codebook = (t.detach().requires_grad_() for t in (x, codebook))
        codes = codebook[index]
        made = {"straight": reference.vq_straight_through, "rotation": reference.vq_rotation}
        out = codes if gradient == "codes" else made[gradient](x, codes, index)
        whole = 0.25 * (x - codes.detach()).square().mean() + (codes - x.detach()).square().mean() + out.sin().mean()
        return whole.detach(), *torch.autograd.grad(whole, (x, codebook))

    leaves = [t.clone().requires_grad_() for t in (x, codebook)]
    out = functional.vq_quantize(*leaves, gradient=gradient)
    whole = (0.25 * out.commitment.sum() + out.codebook_error.sum()) / x.numel() + out.quantized.sin().mean()
    got = (whole.detach(), *torch.autograd.grad(whole, leaves))
    assert_within_budget("loss dx dcodebook", got, loss, (x, codebook, out.index), tolerance.GRADIENTS)


def test_second_derivatives() -> None:
    """Distances and chosen codes are smooth in what they are differentiable in, as long as the index stays."""
    x, codebook, mask = cases.inputs(Case(9, 5, 3, kind="clusters", masked=True), torch.float64)
    calls = {
        "commitment": (lambda v: functional.vq_quantize(v, codebook, mask=mask).commitment, x),
        "codebook_error": (lambda v: functional.vq_quantize(x, v, mask=mask).codebook_error, codebook),
        "codes": (lambda v: functional.vq_quantize(x, v, mask=mask, gradient="codes").quantized, codebook),
        "definition": (lambda v: reference.vq_quantize(v, codebook, mask)[2], x),
        "definition of codes": (lambda v: reference.vq_quantize(x, v, mask)[0], codebook),
    }
    for function, at in calls.values():
        leaf = at.clone().requires_grad_()
        assert torch.autograd.gradcheck(function, (leaf,))
        if not function(leaf).requires_grad:
            raise AssertionError("no gradient")
        assert torch.autograd.gradgradcheck(function, (leaf,))


@each_gradient
def test_double_backward_in_the_upstream_gradient(gradient: str) -> None:
    """What x gets is linear in what comes from above, and differentiable in it."""
    x, codebook, _ = cases.inputs(Case(9, 5, 3), torch.float64)
    leaf, d = x.clone().requires_grad_(), cases.normals(1, 9, 3, dtype=torch.float64).requires_grad_()
    out = functional.vq_quantize(leaf, codebook.clone().requires_grad_(), gradient=gradient).quantized
    if gradient == "codes":
        assert torch.autograd.grad(out, leaf, d, create_graph=True, allow_unused=True)[0].count_nonzero() == 0
        return
    (dx,) = torch.autograd.grad(out, leaf, d, create_graph=True)
    v = cases.normals(1, 9, 3, dtype=torch.float64, seed=1)
    (got,) = torch.autograd.grad(dx, d, v)
    index = reference.vq_nearest(x, codebook)[..., 0]

    def turned(x: Tensor, codebook: Tensor, v: Tensor) -> Tensor:
        made = reference.vq_straight_through if gradient == "straight" else reference.vq_rotation
        codes = reference.vq_gather(codebook, index)
        return torch.autograd.functional.jvp(lambda t: made(t, codes, index), x, v, strict=False)[1]

    assert_within_budget("turned", got, turned, (x, codebook, v), tolerance.GRADIENTS)


def test_the_rotation_turns_a_row_into_its_code() -> None:
    """The Jacobian, an orthogonal matrix times the ratio of lengths, takes the row to the code."""
    x, codes = cases.normals(1, 5, 4, dtype=torch.float64), cases.normals(1, 5, 4, dtype=torch.float64, seed=1)
    index = torch.zeros(1, 5, dtype=torch.int64)
    whole = torch.autograd.functional.jacobian(lambda t: reference.vq_rotation(t, codes, index), x)
    for n in range(5):
        matrix, scale = whole[0, n, :, 0, n], codes[0, n].norm() / x[0, n].norm()
        assert torch.allclose(matrix @ x[0, n], codes[0, n], rtol=0, atol=1e-12)
        assert torch.allclose(matrix @ matrix.T, scale**2 * torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
        assert whole[0, n, :, 0, [m for m in range(5) if m != n]].count_nonzero() == 0


def test_the_straight_through_gradient_is_the_identity() -> None:
    x, codes = cases.normals(1, 4, 3), cases.normals(1, 4, 3, seed=1)
    index = torch.tensor([[0, 0, -1, 0]])
    whole = torch.autograd.functional.jacobian(lambda t: reference.vq_straight_through(t, codes, index), x)
    live = torch.diag((index[0] >= 0).float().repeat_interleave(3))
    assert torch.equal(whole.view(12, 12), live)

"""The lookup: its index is the definition's for any rows and codes, and the definition is what it says."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastseq import reference
from tests.ops import vq_cases as cases
from tests.ops.vq_cases import KINDS, ORDINARY, SCREENS, Case, each_dtype
from tests.tolerance import assert_same_bits, assert_within_budget

each_backend = pytest.mark.parametrize("backend", cases.backends("vq_nearest"))
compiled = pytest.mark.parametrize("backend", cases.compiled("vq_nearest"))
each_kind = pytest.mark.parametrize("kind", KINDS)
LARGE_DRAWS = 40
MOST = Fraction(2) ** 128  # what rounds to infinity in float32, less half a unit


def check(backend: str, case: Case, best: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """Index and score are the definition's, by any screen and number of threads."""
    x, codebook, mask = cases.inputs(case, dtype, seed)
    expected = reference.vq_nearest(x, codebook, mask, case.dot, best)
    scores = cases.expected_scores(x, codebook, mask, case.dot, expected)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for screen in SCREENS[:2] if threads > 1 else SCREENS:
            got, _, score = cases.run("vq_nearest", backend, x, codebook, mask, case.dot, best, 64, False, True, screen)
            assert torch.equal(got, expected), f"index, screen {screen}, {threads} threads"
            assert torch.equal(score, scores), f"score, screen {screen}, {threads} threads"


# one row; few rows; a panel and one more; several panels, and codes that fill none
SHAPES = [(1, 7, 3, 1), (3, 150, 37, 2), (17, 33, 32, 2), (53, 83, 45, 1)]


@each_kind
@pytest.mark.parametrize("dot", [False, True], ids=["l2", "dot"])
@compiled
def test_index(backend: str, dot: bool, kind: str) -> None:
    for n, (N, K, D, G) in enumerate(SHAPES):
        check(backend, Case(N, K, D, G, kind, masked=n % 2 == 1, dot=dot), seed=n)


@each_kind
@pytest.mark.parametrize("dot", [False, True], ids=["l2", "dot"])
@compiled
def test_best(backend: str, dot: bool, kind: str) -> None:
    """Several codes of each row, up to all of them, are in the definition's order."""
    for N, K, D, G, best in ((1, 6, 3, 1, 6), (21, 40, 9, 2, 40), (9, 200, 20, 1, 5)):
        check(backend, Case(N, K, D, G, kind, masked=N > 9, dot=dot), best)


@given(
    case=cases.cases(st.integers(0, 40), st.integers(1, 50), st.integers(1, 33), st.integers(1, 2)),
    best=st.integers(1, 50) | st.just(1),
    threads=st.sampled_from([1, 2, 3]),
    screen=st.sampled_from(SCREENS),
    seed=st.integers(0, 2**20),
)
@compiled
def test_small(backend: str, case: Case, best: int, threads: int, screen: int, seed: int) -> None:
    torch.set_num_threads(threads)
    x, codebook, mask = cases.inputs(case, torch.float32, seed)
    best = min(best, case.K)
    got, distance, score = cases.run("vq_nearest", backend, x, codebook, mask, case.dot, best, 64, True, True, screen)
    expected = reference.vq_nearest(x, codebook, mask, case.dot, best)
    assert torch.equal(got, expected)
    assert torch.equal(score, cases.expected_scores(x, codebook, mask, case.dot, expected))
    if case.kind in ORDINARY:
        assert_within_budget("distance", distance, cases.distances, (x, codebook, expected))


# Each beyond the work of three threads: more rows than a block and more codes than a tile of them; few rows, whose
# codes the threads share; more panels of codes than are transposed together.
large = st.one_of(
    cases.cases(st.integers(520, 560), st.integers(130, 145), st.integers(12, 13)),
    cases.cases(st.integers(17, 33), st.integers(390, 410), st.integers(114, 120)),
    cases.cases(st.integers(2, 4), st.integers(1540, 1600), st.integers(245, 260)),
)


@settings(max_examples=LARGE_DRAWS)
@given(case=large, best=st.sampled_from([1, 1, 3]), seed=st.integers(0, 2**20))
@compiled
def test_large(backend: str, case: Case, best: int, seed: int) -> None:
    check(backend, case, best, seed=seed)


@pytest.mark.parametrize("kind", ORDINARY)
@each_backend
def test_float64(backend: str, kind: str) -> None:
    """No two codes of these are so near that the roundings of float64 could decide."""
    for N, K, D, G, best in ((1, 7, 3, 1, 1), (3, 60, 17, 2, 1), (53, 45, 20, 1, 1), (53, 45, 20, 1, 4)):
        x, codebook, mask = cases.inputs(Case(N, K, D, G, kind, masked=N == 3), torch.float64)
        call = (x, codebook, mask, False, best, 64, True, True, 2)
        expected = reference.vq_nearest(x, codebook, mask, False, best)
        index, distance, score = cases.run("vq_nearest", backend, *call)
        assert torch.equal(index, expected)
        assert (score[index < 0] == torch.inf).all()
        assert_within_budget("distance", distance, cases.distances, (x, codebook, expected))
        assert_within_budget("score", score[index >= 0], scores_of, (x, codebook, expected))


def scores_of(x: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    """Scores of the codes that ``index`` names where it names one."""
    return reference.vq_scores(x, codebook).gather(2, index.clamp_min(0))[index >= 0]


@pytest.mark.parametrize("best", [1, 3])
@each_dtype
@each_backend
def test_distance(backend: str, dtype: torch.dtype, best: int) -> None:
    for kind in ORDINARY:
        x, codebook, mask = cases.inputs(Case(40, 30, 21, 2, kind, masked=True), dtype)
        index, distance, none = cases.run("vq_nearest", backend, x, codebook, mask, False, best, 64, True, False, 2)
        assert_within_budget("distance", distance, cases.distances, (x, codebook, index))
        assert none.numel() == 0


@pytest.mark.parametrize("bits, dtype", [(16, torch.int16), (32, torch.int32), (64, torch.int64)])
@compiled
def test_index_widths(backend: str, bits: int, dtype: torch.dtype) -> None:
    """Up to the largest code that a width can hold, by the lookup of many rows, of few, and of several codes each."""
    numbers = torch.arange(2**15)
    codebook = (numbers[:, None] >> torch.arange(15) & 1).float()[None]  # each number in binary
    right = torch.tensor([0, 32767, -1, 17, 32766, 16384]).repeat(5)
    mask = (right >= 0)[None]
    for rows, best in ((30, 1), (3, 1), (30, 2)):
        x, live = codebook[:, right[:rows].clamp_min(0)], mask[:, :rows].contiguous()
        index = cases.run("vq_nearest", backend, x, codebook, live, False, best, bits, False, False, 2)[0]
        assert (index.dtype, index.shape) == (dtype, (1, rows, best))
        assert torch.equal(index[0, :, 0].long(), right[:rows])


@pytest.mark.parametrize("best", [1, 4])
@compiled
def test_lowest_index_among_equals(backend: str, best: int) -> None:
    """Each code is there five times, in any order: the first ones win, in ascending order."""
    for N, D in ((1, 5), (40, 7), (300, 33)):
        x, few, _ = cases.inputs(Case(N, 29, D))
        order = torch.randperm(5 * 29, generator=torch.Generator().manual_seed(N)) % 29
        codebook = few[:, order].contiguous()
        nearest = reference.vq_nearest(x, few)[0, :, 0]
        first = torch.stack([(order == k).nonzero()[:best, 0] for k in range(29)])
        for screen in SCREENS:
            got = cases.run("vq_nearest", backend, x, codebook, None, False, best, 64, False, False, screen)[0]
            assert torch.equal(got[0], first[nearest])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@each_backend
def test_rows_and_codes_that_are_not_finite(backend: str, value: float) -> None:
    """Such a row gets 0, 1, 2 and score +inf; such a code comes after all others, the lower index first."""
    x, codebook, _ = cases.inputs(Case(40, 30, 21))
    x[0, ::7, 3], codebook[0, [0, 4, 29], 5] = value, value
    for rows in (40, 3):
        for best in (1, 30):
            call = (x[:, :rows].contiguous(), codebook, None, False, best, 64, True, True, 2)
            index, distance, score = cases.run("vq_nearest", backend, *call)
            assert torch.equal(index[0, ::7], torch.arange(best).expand(len(index[0, ::7]), best))
            assert (score[0, ::7] == torch.inf).all()
            assert not distance[0, ::7].isfinite().any()
            assert not torch.isin(index[0, 1:3, 0], torch.tensor([0, 4, 29])).any()
            if best == 30:
                assert torch.equal(index[0, 1, -3:], torch.tensor([0, 4, 29]))
                assert (score[0, 1, -3:] == torch.inf).all()


def rounded(exact: Fraction) -> np.float32:
    """``exact`` to the nearest float32, of two to the even one."""
    if abs(exact) >= MOST - Fraction(2) ** 103:
        return np.float32(np.inf if exact > 0 else -np.inf)
    near = np.float32(float(exact))  # at most one step from what is right
    steps = [near, *(np.nextafter(near, np.float32(end)) for end in (np.inf, -np.inf))]
    finite = [s for s in steps if np.isfinite(s)]
    return min(finite, key=lambda s: (abs(Fraction(float(s)) - exact), int(s.view(np.uint32)) % 2))


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(a=numbers, b=numbers, c=numbers, near=st.booleans(), seed=st.integers(0, 2**20))
def test_fused_is_rounded_once(a: float, b: float, c: float, near: bool, seed: int) -> None:
    """Also where the product nearly cancels c, or lies half way between two numbers."""
    random = np.random.default_rng(seed)
    drawn = [np.float32(v) for v in (a, b, c)]
    if near:  # products of 12-bit numbers are exact, and c is one unit of some scale beside them
        a, b = (float(random.integers(1, 4096)) for _ in range(2))
        c = -a * b + 2.0 ** random.integers(-30, 20) * random.integers(-3, 4)
        drawn = [np.float32(a + random.integers(0, 2) * 2.0**-11), np.float32(b), np.float32(c)]
    exact = Fraction(float(drawn[0])) * Fraction(float(drawn[1])) + Fraction(float(drawn[2]))
    got = reference.vq.fused(*(torch.tensor(v) for v in drawn))
    assert got.item() == rounded(exact)


@pytest.mark.parametrize("dot", [False, True], ids=["l2", "dot"])
@pytest.mark.parametrize("kind", ["normal", "mean", "magnitudes", "neighbours"])
def test_chain_of_the_score(kind: str, dot: bool) -> None:
    """From c*c/2 on, summed in float64 in ascending order, one fused multiply-add per dimension in ascending order."""
    x, codebook, _ = cases.inputs(Case(4, 5, 37, kind=kind))
    expected = np.empty((4, 5), np.float32)
    for k, code in enumerate(codebook[0].tolist()):
        start = 0.0
        for value in code:
            start += value * value
        first = np.float32(0.5 * start)
        for n, row in enumerate(x[0].tolist()):
            score = np.float32(0) if dot and np.isfinite(first) else first
            for d, value in enumerate(row):
                exact = Fraction(-value) * Fraction(code[d]) + Fraction(float(score))
                score = rounded(exact) if np.isfinite(score) else score
            expected[n, k] = score
    assert_same_bits("scores", reference.vq_scores(x, codebook, dot)[0], torch.from_numpy(expected))


def misses(x: Tensor, codebook: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the chosen code is further from the row than the best in float64, as half a squared distance; and
    what the roundings of two chains of D + 1 operations explain."""
    x, c = x.double(), codebook.double()
    half, D = c.square().sum(-1) / 2, x.shape[-1]
    scores = half[:, None] - x @ c.mT
    most = (D + 2) * 2.0**-24 * (half[:, None] + x.norm(dim=-1, keepdim=True) * c.norm(dim=-1)[:, None])
    best = scores.argmin(-1, keepdim=True)
    miss = scores.gather(-1, index) - scores.gather(-1, best)
    return miss[..., 0], (most.gather(-1, index) + most.gather(-1, best))[..., 0] * (1 + 1e-6)


BOUNDED = {
    "normal": Case(1000, 1024, 64),
    "mean": Case(1000, 1024, 64, kind="mean"),
    "mean_long": Case(300, 300, 256, kind="mean"),
    "mean_short": Case(1000, 1024, 8, kind="mean"),
    "far": Case(1000, 300, 64, kind="far"),
    "neighbours": Case(1000, 300, 64, kind="neighbours"),
    "sphere": Case(1000, 300, 64, kind="sphere"),
    "clusters": Case(1000, 300, 64, kind="clusters"),
}


@pytest.mark.parametrize("name", BOUNDED)
@compiled
def test_error_against_float64(backend: str, name: str, record_property: Callable[[str, object], None]) -> None:
    """No row gets a code that is worse, in float64, than the roundings of its score can explain."""
    x, codebook, _ = cases.inputs(BOUNDED[name])
    index = cases.run("vq_nearest", backend, x, codebook, None, False, 1, 64, False, False, 2)[0]
    miss, bound = misses(x, codebook, index)
    record_property("share of rows with another index than in float64", (miss > 0).double().mean().item())
    assert int((miss > bound).sum()) == 0


@compiled
def test_error_of_codes_one_ulp_apart(backend: str) -> None:
    """Two codes that differ in one place by one unit: the row between them gets either, any other row the right one."""
    D = 16
    first = cases.normals(1, 1, D)
    second = first.clone()
    second[..., 7] = torch.nextafter(first[..., 7], torch.tensor(torch.inf))
    codebook = torch.cat((first, second), 1)
    side = torch.linspace(-40, 40, 81)[:, None] * torch.eye(D)[7]
    x = (first + side).contiguous()
    index = cases.run("vq_nearest", backend, x, codebook, None, False, 1, 64, False, False, 1)[0]
    miss, bound = misses(x, codebook, index)
    assert int((miss > bound).sum()) == 0
    assert 0 < int(index.sum()) < 81

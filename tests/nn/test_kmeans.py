"""k-means: seeds, means and counts against plain torch; masks, duplicates, empty means, memory and messages."""

from __future__ import annotations

import importlib
import logging
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq import functional
from fastseq._check import ArgumentError
from fastseq.nn.kmeans import kmeans
from tests.tolerance import assert_same_bits, assert_within_budget

module = importlib.import_module("fastseq.nn.kmeans")  # fastseq.nn.kmeans is the function


def blobs(G: int, N: int, centres: int, D: int, spread: float) -> Tensor:
    """Rows around centres."""
    where = torch.randint(0, 2, (G, centres, D)) * 8.0 + torch.randn(G, centres, D)
    pick = torch.randint(centres, (G, N))
    return where.gather(1, pick[..., None].expand(G, N, D)) + spread * torch.randn(G, N, D)


def same_seed() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def lloyd(x: Tensor, means: Tensor, iterations: int, cosine: bool = False) -> Tensor:
    """The definition, with a matrix of rows by means."""
    x = F.normalize(x, dim=-1) if cosine else x
    for _ in range(iterations):
        owner = F.one_hot((x[:, :, None] - means[:, None]).square().sum(-1).argmin(-1), means.shape[1]).to(x.dtype)
        counts = owner.sum(1)[..., None]
        moved = (owner[..., None] * x[:, :, None]).sum(1) / counts.clamp_min(1)
        means = torch.where(counts > 0, F.normalize(moved, dim=-1) if cosine else moved, means)
    return means


def potential(x: Tensor, means: Tensor) -> Tensor:
    """Squared distances of rows to their nearest mean, summed: [G]."""
    distance = functional.vq_nearest(x, means, return_distance=True).distance
    assert distance is not None
    return distance.sum(-1)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("init", ["kmeans++", "random"])
@pytest.mark.parametrize(("G", "N", "K", "D"), [(1, 1, 1, 1), (1, 200, 7, 5), (3, 101, 16, 4), (2, 60, 60, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means(metric: str, init: str, G: int, N: int, K: int, D: int, dtype: torch.dtype) -> None:
    x = blobs(G, N, 8, D, spread=0.4).to(dtype)
    options: dict[str, Any] = {"metric": metric, "init": init}
    seeds, _ = kmeans(x, K, iterations=0, generator=same_seed(), **options)
    means, counts = kmeans(x, K, iterations=3, generator=same_seed(), **options)
    assert means.shape == (G, K, D) and means.dtype == dtype
    assert_within_budget("means", means, lambda x, s: lloyd(x, s, 3, metric == "cosine"), [x, seeds])
    rows = F.normalize(x, dim=-1) if metric == "cosine" else x
    index = functional.vq_nearest(rows, means).index
    assert_same_bits("counts", counts, torch.stack([i.bincount(minlength=K) for i in index]).to(dtype))


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_seeds_are_rows_and_differ(init: str) -> None:
    x = torch.randn(2, 90, 3)
    seeds, counts = kmeans(x, 60, iterations=0, init=init)
    for g in range(2):
        rows = {tuple(r.tolist()) for r in x[g]}
        assert len({tuple(s.tolist()) for s in seeds[g]} & rows) == 60
    assert counts.sum(-1).tolist() == [90, 90]


def test_random_seeds_are_even() -> None:
    runs, n, K = 600, 10, 3
    x = torch.arange(n, dtype=torch.float32).view(1, n, 1)
    generator = same_seed()
    seen = torch.zeros(n)
    for _ in range(runs):
        seen[kmeans(x, K, iterations=0, init="random", generator=generator)[0].long().flatten()] += 1
    p = K / n  # five standard deviations of a binomial count: 6e-6 for ten values
    assert (seen - runs * p).abs().max() < 5 * math.sqrt(runs * p * (1 - p))


def test_second_seed_has_odds_of_the_squared_distance() -> None:
    runs = 600
    x = torch.tensor([0.0, 1.0, 3.0, 7.0]).view(1, 4, 1)
    first, then = torch.zeros(4), torch.zeros(4, 4)
    generator = same_seed()
    for _ in range(runs):
        a, b = (int((x.flatten() == s).nonzero()) for s in kmeans(x, 2, iterations=0, generator=generator)[0].flatten())
        first[a] += 1
        then[a, b] += 1
    square = (x[0] - x[0].T).square()
    odds = square / square.sum(1, keepdim=True) / 4  # of each pair
    assert (first - runs / 4).abs().max() < 5 * math.sqrt(runs * 3 / 16)
    assert ((then - runs * odds).abs() <= 5 * (runs * odds * (1 - odds)).sqrt()).all()


def test_rejection_gives_the_odds_of_one_by_one() -> None:
    """Of candidates drawn with old odds, those kept have the odds that hold when their turn comes."""
    runs, m = 4000, 4
    x = torch.tensor([0.0, 1.0, 1.5, 4.0, 9.0])[:, None]
    old = torch.tensor([2.0, 1.0, 1.0, 3.0, 0.5], dtype=torch.float64)
    generator = same_seed()
    pairs = torch.zeros(5, 5, dtype=torch.float64)
    for _ in range(runs):
        drawn = torch.multinomial(old, m, replacement=True, generator=generator)
        luck = torch.rand(m, generator=generator, dtype=torch.float64)
        kept = drawn[module._kept(x[drawn], old[drawn], luck)]
        if len(kept) > 1:
            pairs[kept[0], kept[1]] += 1
    now = torch.minimum(old, (x - x.T).double().square())  # weights after the first, [first, second]
    odds = now / now.sum(1, keepdim=True)
    n = pairs.sum(1, keepdim=True)
    assert (n > 100).all()
    assert ((pairs - n * odds).abs() <= 5 * (n * odds * (1 - odds)).sqrt()).all()


def test_seeds_keep_the_promise_of_kmeans_plus_plus() -> None:
    """The expected potential is at most 8 (ln K + 2) times the best (Arthur and Vassilvitskii 2007, theorem 1.1)."""
    K, runs = 40, 20
    centres = 30 * torch.randn(1, K, 6)
    x = (centres[:, :, None] + torch.randn(1, K, 25, 6)).flatten(1, 2)
    best = potential(x, centres)  # no less than the best
    generator = same_seed()
    found = torch.cat([potential(x, kmeans(x, K, iterations=0, generator=generator)[0]) for _ in range(runs)])
    assert found.mean() < 8 * (math.log(K) + 2) * best
    spread = torch.cat([potential(x, kmeans(x, K, iterations=0, init="random")[0]) for _ in range(runs)])
    assert found.max() < spread.min() and spread.mean() > 8 * (math.log(K) + 2) * best  # chance does not keep it


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_rows_that_do_not_count(init: str) -> None:
    x = torch.randn(2, 50, 3)
    mask = torch.rand(2, 50) < 0.7
    poisoned = x.clone()
    poisoned[~mask] = torch.tensor([torch.nan, torch.inf, 1e30])[torch.randint(3, (int((~mask).sum()),))][:, None]
    want = kmeans(x, 6, mask=mask, init=init, generator=same_seed())
    assert_same_bits("means counts", kmeans(poisoned, 6, mask=mask, init=init, generator=same_seed()), want)
    poisoned[~mask] = torch.nan
    assert_same_bits("means counts", kmeans(poisoned, 6, init=init, generator=same_seed()), want)
    assert_same_bits("counted", want[1].sum(-1), mask.sum(-1).float())


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_fewer_rows_than_means(init: str, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(1, 5, 2)
    with caplog.at_level(logging.WARNING, logger="fastseq"):
        means, counts = kmeans(x, 9, init=init, generator=same_seed())
    assert "kmeans: 5 rows for 9 means, so some means are the same row" in caplog.text
    assert {tuple(m.tolist()) for m in means[0]} <= {tuple(r.tolist()) for r in x[0]} or init == "random"
    assert int(counts.sum()) == 5 and means.isfinite().all()
    if init == "kmeans++":
        assert_same_bits("potential", potential(x, means), torch.zeros(1))  # every row is a mean


def test_fewer_values_than_means() -> None:
    x = torch.tensor([1.0, 2.0]).repeat(20).view(1, 40, 1)
    means, counts = kmeans(x, 4)
    assert set(means.flatten().tolist()) == {1.0, 2.0}
    assert sorted(counts.flatten().tolist()) == [0, 0, 20, 20]


@pytest.mark.parametrize("reseed", [True, False])
def test_a_mean_without_rows(reseed: bool) -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 9.0, 30.0], [5.0, 5.0, 5.0, 5.0, 5.0]])[..., None]
    means = torch.tensor([[4.0, 300.0, 200.0], [7.0, 90.0, 5.0]])[..., None]
    rows = module._Rows(x, torch.ones(2, 5, dtype=torch.bool), None)
    moved = module._lloyd(rows, means, reseed, False)
    kept = [[8.4, 300, 200], [7, 90, 5]]
    filled = [[8.4, 30, 9], [7, 90, 5]]  # the farthest first; none where every row lies on its mean
    assert_same_bits("means", moved[..., 0], torch.tensor(filled if reseed else kept))


def test_same_generator_same_bits_and_groups_do_not_meet() -> None:
    x = torch.randn(3, 300, 4)
    want = kmeans(x, 20, generator=same_seed())
    assert_same_bits("means counts", kmeans(x, 20, generator=same_seed()), want)
    other = x.clone()
    other[1:] = torch.randn(2, 300, 4)
    assert_same_bits(
        "first",
        kmeans(other, 20, iterations=0, generator=same_seed())[0][0],
        kmeans(x, 20, iterations=0, generator=same_seed())[0][0],
    )
    torch.manual_seed(1)
    a = kmeans(x, 20)
    torch.manual_seed(1)
    assert_same_bits("means counts", kmeans(x, 20), a)


def test_short_dtypes_and_huge_values() -> None:
    x = torch.randn(1, 40, 3)
    for dtype in (torch.bfloat16, torch.float16):
        got = kmeans(x.to(dtype), 5, generator=same_seed())
        assert_same_bits("means counts", got, kmeans(x.to(dtype).float(), 5, generator=same_seed()))
    means, counts = kmeans(x * 1e25, 5)  # squares overflow
    assert means.isfinite().all() and int(counts.sum()) == 40


def test_it_ends_when_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rounds = blobs(1, 100, 4, 3, spread=0.01), []
    step = module._lloyd
    monkeypatch.setattr(module, "_lloyd", lambda *a: rounds.append(1) or step(*a))
    kmeans(x, 4, iterations=1000)
    assert len(rounds) < 20


class Largest(TorchDispatchMode):
    """The size of the largest tensor made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and not t.is_meta:
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_no_matrix_of_rows_by_means() -> None:
    N, K, D = 3000, 300, 3
    with Largest() as seen:
        kmeans(torch.randn(1, N, D), K, iterations=2)
    assert seen.numbers <= max(N * (D + 1), 256 * K)  # the second: blocks of the definition, where it computes


X = torch.zeros(2, 4, 3)
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "dimensions": ({"x": X[0]}, "kmeans: x must be [G, N, D] with D >= 1, got [4, 3]"),
    "D": ({"x": X[..., :0]}, "kmeans: x must be [G, N, D] with D >= 1, got [2, 4, 0]"),
    "dtype": ({"x": X.long()}, "kmeans: x must be float32, float64, bfloat16 or float16, got torch.int64"),
    "K": ({"K": 0}, "kmeans: K must be an integer >= 1, got 0"),
    "K float": ({"K": 2.0}, "kmeans: K must be an integer >= 1, got 2.0"),
    "iterations": ({"iterations": -1}, "kmeans: iterations must be an integer >= 0, got -1"),
    "metric": ({"metric": "dot"}, "kmeans: metric must be one of 'l2', 'cosine', got 'dot'"),
    "init": ({"init": "first"}, "kmeans: init must be one of 'kmeans++', 'random', got 'first'"),
    "mask": ({"mask": torch.ones(2, 3).bool()}, "kmeans: mask must be [G, N] = [2, 4], got [2, 3]"),
    "mask dtype": ({"mask": torch.ones(2, 4)}, "kmeans: mask must be torch.bool, got torch.float32"),
    "mask device": ({"mask": torch.ones(2, 4).bool().to("meta")}, "kmeans: mask must be on cpu, got one on meta"),
    "no rows": ({"x": X[:, :0]}, "kmeans: x must be rows that count (in the mask and finite), got none in group 0"),
    "one group without rows": (
        {"mask": torch.tensor([[True] * 4, [False] * 4])},
        "kmeans: x must be rows that count (in the mask and finite), got none in group 1",
    ),
    "nan": ({"x": X * torch.nan}, "kmeans: x must be rows that count (in the mask and finite), got none in group 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_messages(name: str) -> None:
    wrong, words = ERRORS[name]
    with pytest.raises(ArgumentError, match=re.escape(words)):
        kmeans(**{"x": X, "K": 2, **wrong})

"""Two processes of torch.distributed against each other, bit for bit, and against one process on all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fastseq import functional
from fastseq.nn.kmeans import kmeans
from fastseq.nn.sharded_codebook import ShardedCodebook
from tests.nn import two_ranks
from tests.tolerance import assert_same_bits, assert_within_budget

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no torch.distributed with gloo"
)


def assert_same_on_both(name: str, a: Any, b: Any) -> None:
    a, b = ([t for t in pytree.tree_leaves(v) if isinstance(t, Tensor)] for v in (a, b))
    assert a
    assert_same_bits([f"{name}, {i}" for i in range(len(a))], a, b)


@pytest.mark.parametrize("case", two_ranks.kmeans_cases(), ids=" ".join)
def test_kmeans(both: list[dict[str, Any]], case: tuple[str, str, str]) -> None:
    (means, counts), other = (r[case] for r in two_ranks.of(both, "kmeans"))
    assert_same_on_both("means and counts", (means, counts), other)
    _, init, metric = case

    def alone(x: Tensor) -> tuple[Tensor, Tensor]:
        return kmeans(x, 11, iterations=4, init=init, metric=metric, generator=two_ranks.generator())

    x = two_ranks.clusters(2, 120, 4)
    assert_within_budget("means", means, lambda x: alone(x)[0], [x])
    assert_same_bits("counts", counts, alone(x)[1])


def test_kmeans_with_few_rows(both: list[dict[str, Any]]) -> None:
    first, second = two_ranks.of(both, "kmeans")
    for name in ("masked", "fewer rows than means"):
        assert_same_on_both(name, first[name], second[name])
    assert set(first["fewer rows than means"][0].unique().tolist()) == {0.0, 1.0}  # a row of each rank
    words = "kmeans: x must be rows that count (in the mask and finite), got none in group"
    for result in (first, second):  # on every rank alike: nobody is waited for
        assert (result["nowhere"], result["one group"]) == (f"{words} 0", f"{words} 1")


def test_a_mean_without_rows_on_any_rank(both: list[dict[str, Any]]) -> None:
    for result in two_ranks.of(both, "empty_means"):
        assert_same_bits("means", result["means"].flatten(), torch.tensor([46 / 6, 30.0, 9.0]))


@pytest.mark.parametrize(("name", "rows"), [("room for all", 120), ("full", 30), ("one side", 30)])
def test_reservoirs(both: list[dict[str, Any]], name: str, rows: int) -> None:
    (sample, filled, keys), (*other, other_keys) = (r[name] for r in two_ranks.of(both, "reservoir"))
    assert_same_on_both("sample", (sample, filled), other)
    assert filled.sum(1).tolist() == [rows, rows]
    seen = two_ranks.clusters(2, 120, 4)
    for g in range(2):
        found = (sample[g, filled[g]][:, None] == seen[g]).all(-1)
        assert found.any(1).all() and int(found.any(0).sum()) == rows
        if name == "full":
            assert 0 < int(found[:, :60].sum()) < rows  # of both
    assert not torch.equal(keys, other_keys)


def test_reservoirs_from_one_checkpoint(both: list[dict[str, Any]]) -> None:
    first, second = two_ranks.of(both, "reservoir")
    assert_same_on_both("sample", first["loaded by both"], second["loaded by both"])
    sample, filled = first["loaded by both"]
    assert filled.all() and len(sample[0].unique(dim=0)) == 30


@pytest.mark.parametrize("case", two_ranks.average_cases(), ids=" ".join)
def test_moving_averages(both: list[dict[str, Any]], case: tuple[str, str]) -> None:
    first, second = two_ranks.of(both, "average")
    split, metric = case
    cases = [case, ("masked", metric)] if split == "none on one" else [case]

    def alone(x: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        return two_ranks.average(two_ranks.layer(use_cosine_sim=metric == "cosine"), x, codes)

    for name in cases:
        assert_same_on_both("averages", first[name], second[name])
        inputs = two_ranks.average_inputs(metric)
        assert_within_budget("codes cluster_size embed_avg", first[name], alone, inputs)


def test_dead_codes(both: list[dict[str, Any]]) -> None:
    first, second = two_ranks.of(both, "dead_codes")
    assert_same_on_both("codes", first["codes"], second["codes"])
    same = (first["codes"][:, None] == first["seen"].flatten(0, 1)).all(-1).any(1)
    assert same.any() and second["seen"].numel() == 0  # rank 1 got rows that it has not seen


def test_first_codes(both: list[dict[str, Any]]) -> None:
    first, second = two_ranks.of(both, "first_codes")
    assert_same_on_both("codes", first["codes"], second["codes"])
    assert (first["before"], first["after"]) == (second["before"], second["after"]) == (False, True)


@pytest.mark.parametrize("rows", ["all", "rank 0 alone"])
@pytest.mark.parametrize(("schedule", "times"), [("AfterWarmup", 3), ("Spaced", 6)])
def test_reinit(both: list[dict[str, Any]], rows: str, schedule: str, times: int) -> None:
    """Every re-initialization is the k-means of the merged sample, with the seed that rank 0 draws."""
    first, second = (r[rows, schedule] for r in two_ranks.of(both, "reinit"))
    for name in ("codes", "made", "weights"):
        assert_same_on_both(name, first[name], second[name])
    assert len(first["made"]) == times
    for made, (sample, filled, state, step) in zip(first["made"], first["samples"], strict=True):
        torch.set_rng_state(state)
        seed = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        assert_same_bits("codes", made, kmeans(sample, 16, iterations=20, mask=filled, generator=seed)[0][0])
        assert step == 0  # of Adam's state of the codes
    assert_same_on_both("samples", [s[:2] for s in first["samples"]], [s[:2] for s in second["samples"]])
    if schedule == "Spaced":  # DistributedDataParallel has left each rank its own
        assert not torch.equal(first["keys"], second["keys"])


def test_usage(both: list[dict[str, Any]]) -> None:
    first, second = two_ranks.of(both, "usage")
    for name in (("both", 24), ("one", 12)):
        for again in (name[0], (name[0], "again")):
            assert_same_on_both("usage", first[again], second[again])
            assert first[again].rows.tolist() == [name[1] // 2] * 2 == first[again].used.tolist()
    for result in (first, second):
        assert "indices must be given by update() before, got none" in result["never"]


@pytest.mark.parametrize(("K", "metric"), two_ranks.sharded_cases())
def test_sharded_lookup(both: list[dict[str, Any]], K: int, metric: str) -> None:
    first, second = (r[K, metric] for r in two_ranks.of(both, "sharded"))
    x, codes, mask = two_ranks.sharded_inputs(K)
    assert_same_on_both("codes", first["codes"], second["codes"])
    assert first["own"] + second["own"] == K and first["own"] - second["own"] in (0, 1)
    codes = F.normalize(codes, dim=-1) if metric == "cosine" else codes
    assert_same_bits("codes", first["codes"], codes)
    want = functional.vq_nearest(x, codes, metric=metric, mask=mask).index
    scaled = F.normalize(codes, dim=-1) if metric == "cosine" else codes  # as they are looked up
    for result in (first, second):
        quantized, index, commitment = result["found"]
        assert_same_bits("index", index, want)
        finite = x.isfinite().all(1)
        assert_same_bits("codes", quantized[mask & finite], scaled[want[mask & finite]])
        assert not quantized[~mask].any() and not commitment[~mask].any()
        short = functional.vq_nearest(x.bfloat16(), codes, metric=metric).index
        assert_same_bits("bfloat16", result["bfloat16"].flatten(), short)
        if metric == "l2":
            rows = x[8:].clone().requires_grad_()
            apart = torch.where(mask[8:, None], rows - codes[want[8:]], 0.0)
            (apart.square().sum() + torch.where(mask[8:, None], rows, 0.0).sum()).backward()
            assert_same_bits("gradient", result["gradient"][8:], rows.grad)
    joined = [torch.cat(t) for t in zip(first["gathered"], second["gathered"], strict=True)]
    assert_same_bits("quantized index commitment", joined, first["found"])
    whole = functional.vq_nearest(x, codes, metric=metric).index
    assert_same_bits("gathered", first["gathered from one"][1], whole)
    assert [t.numel() for r in (first, second) for t in r["from none"]] == [0] * 6
    assert second["gathered from one"][0].shape == (0, 5)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("gather", [False, True])
def test_sharded_learning(both: list[dict[str, Any]], metric: str, gather: bool) -> None:
    (codes, counts), (other, other_counts) = (r[metric, gather] for r in two_ranks.of(both, "sharded_learning"))
    assert_same_bits("codes", codes, other)
    got = codes, torch.cat([counts, other_counts])
    inputs = two_ranks.learn_inputs(metric)
    assert_within_budget("codes counts", got, lambda *a: two_ranks.learn_whole(*a, metric), inputs)


def test_sharded_state(both: list[dict[str, Any]]) -> None:
    parts = ([0, 7, 13], [7, 13, 13])
    for rank, result in enumerate(two_ranks.of(both, "sharded_learning")):
        words = f"must be {parts[rank]}, got {parts[1 - rank]}: saved by another rank or number of ranks"
        assert words in result["of the other rank"]
        assert_same_bits("codes", *result["reloaded"])
        torch.manual_seed(0)
        assert_same_bits("drawn", result["first codes"], ShardedCodebook(5, 13).all_codes())

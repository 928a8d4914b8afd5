"""Training on two ranks with torch's DDP and FSDP: the loss of one process, noise, LEGW, and a rank that is killed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseq import functional
from fastseq.functional import Weights
from tests.nn import training_ranks, two_ranks
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget


def assert_same(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
    assert_same_bits([f"{name} {n}" for n in range(len(expected))], got, expected)


@pytest.mark.parametrize("wrap", training_ranks.WRAPS)
@pytest.mark.parametrize("name", training_ranks.MODELS)
def test_the_loss_of_one_process(both: list[dict[str, Any]], name: str, wrap: str) -> None:
    got, other = (r[name, wrap] for r in two_ranks.of(both, "training"))
    assert_same(name, got, other)

    def alone(x: Tensor) -> list[Tensor]:
        return training_ranks.train(training_ranks.built(name).to(x.dtype), x)

    names = [f"{name} {n}" for n in range(len(got))]
    assert_within_budget(names, got, alone, [training_ranks.inputs()], GRADIENTS)
    assert float(got[0][-1]) < float(got[0][0])


@pytest.mark.parametrize("wrap", training_ranks.WRAPS)
def test_noise_is_of_each_rank_and_comes_again(both: list[dict[str, Any]], wrap: str) -> None:
    results = two_ranks.of(both, "noise")
    for result in results:
        assert_same("noise", result[wrap, 1], result[wrap, 0])
    first, second = (r[wrap, 0] for r in results)
    assert not torch.isclose(first[0], second[0]).any()  # of the same rows, with the same seed
    assert_same("trained", first[1:], second[1:])


def test_noise_of_rows_by_their_number(both: list[dict[str, Any]]) -> None:
    (first, seed), (second, _) = (r["joined"] for r in two_ranks.of(both, "noise"))
    weights = [Weights(*training_ranks.noisy().parameters())]
    whole = functional.lstm(training_ranks.inputs()[0], weights, seed=seed).output
    assert_same_bits("output", torch.cat([first, second], 1), whole)


def test_legw_sees_the_batch_of_all_ranks(both: list[dict[str, Any]]) -> None:
    parameters = nn.Linear(2, 2).parameters()
    alone = training_ranks.scheduler(torch.optim.SGD(parameters, lr=0.1), world_size=2)
    for result in two_ranks.of(both, "legw"):
        assert result["batch"] == alone.schedule.batch == training_ranks.B
        assert result["rates"] == [0.1 * alone.schedule.factor(t) for t in range(12)]


@pytest.mark.parametrize("name", ["kmeans", "dead codes"])
def test_codes_that_fsdp_would_undo_are_refused(both: list[dict[str, Any]], name: str) -> None:
    for result in two_ranks.of(both, "overwritten"):
        assert "VectorQuantize: learnable_codebook must be False within fully_shard" in result[name]


def test_a_rank_is_killed(both: list[dict[str, Any]], killed: list[dict[str, list[Tensor]]]) -> None:
    for rank, (going_on, through) in enumerate(zip(killed, two_ranks.of(both, "through"), strict=True)):
        assert [int(r["begin"][0]) for r in (going_on, through)] == [training_ranks.KILLED - 1, 0], rank
        for name in ("losses", "end"):
            assert_same(f"rank {rank}, {name}", going_on[name], through[name])
    assert not torch.equal(killed[0]["losses"][0], killed[1]["losses"][0])

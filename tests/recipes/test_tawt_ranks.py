"""``TaskWeights`` in two processes of torch.distributed: the same weights, from what both have observed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastseq.recipes import TaskWeights
from tests.recipes import tawt_ranks as cases
from tests.tolerance import assert_same_bits, assert_within_budget

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no torch.distributed with gloo"
)
SECONDS = 120


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", cases.__name__, str(folder)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options |= {"cwd": Path(__file__).parents[2], "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    processes = [subprocess.Popen([*command, str(rank)], **options) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # of one that has ended this does nothing
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    files = [folder / f"{rank}.pt" for rank in range(2)]
    return [torch.load(f) for f in files]


@pytest.mark.parametrize("kind", ["cosine", "dot", "none"])
def test_ranks_agree_on_the_mean_of_what_they_observe(kind: str, both: list[dict[str, Any]]) -> None:
    found = [[v for step in rank[kind] for v in step] for rank in both]
    assert_same_bits([f"step{k}" for k in range(len(found[0]))], *found)
    alone = []
    for rank, seen in cases.SEEN.items():
        weights = TaskWeights(cases.N, 0, signal=kind)
        cases.observe(weights, rank, 0)
        if 1 not in seen and kind != "none":
            weights.observe(1, gradients=[None, None])  # counts as a zero, left out below
        alone.append(weights.update())
    second = alone[0][1]  # of rank 0 alone
    plain = torch.stack([alone[0][0], second, (alone[0][2] + alone[1][2]) / 2])
    assert_within_budget("signals", found[0][0], lambda s: s * 1, [plain])


def test_a_source_that_no_rank_has_seen_is_named_on_all(both: list[dict[str, Any]]) -> None:
    expected = "TaskWeights.update: gradients of every source must be observed after the target and before an update"
    assert all(rank["refused"].startswith(expected) and rank["refused"].endswith("tasks [2]") for rank in both)

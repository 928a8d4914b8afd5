"""What two processes do together, for ``test_tawt_ranks.py``: python -m tests.recipes.tawt_ranks FOLDER RANK."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastseq.recipes import TaskWeights

N, STEPS = 3, 4
SEEN = {0: (0, 1, 2), 1: (0, 2)}  # rank -> tasks that it observes: together all of them


def gradients(rank: int, step: int, t: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(100 * rank + 10 * step + t)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((4, 3), (5,))]


def observe(weights: TaskWeights, rank: int, step: int) -> None:
    for t in SEEN[rank]:
        weights.observe(t, gradients=gradients(rank, step, t))


def run(signal: str, rank: int) -> list[Any]:
    weights, found = TaskWeights(N, 0, signal=signal), []
    for step in range(STEPS):
        observe(weights, rank, step)
        found.append((weights.update(), weights.weights))
    return found


def refused(rank: int) -> str:
    """What an update says where no process has seen a source."""
    weights = TaskWeights(N, 0)
    for t in (0, 1) if rank == 0 else (0,):
        weights.observe(t, gradients=gradients(rank, 0, t))
    try:
        weights.update()
    except ValueError as error:
        return str(error)
    return "nothing"


def main(folder: str, rank: int) -> None:
    """Run every signal and leave what it returned in FOLDER."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    found = {signal: run(signal, rank) for signal in ("cosine", "dot", "none")}
    torch.save({**found, "refused": refused(rank)}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

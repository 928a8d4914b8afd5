"""One process of two: run by tests/recipes/test_adt_generator.py, which reads what each rank leaves in FOLDER."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from fastseq.recipes import ADT
from tests.recipes.adt_models import Sequences, sequence_batch

VARIANTS = ("exp_am", "imp_am")


def amortized(variant: str, rank: int) -> dict[str, list[Tensor]]:
    """A generator that starts with other parameters on each process: two steps, then a gradient of each and of both."""
    model = Sequences().eval()
    x, labels = sequence_batch()
    mine = slice(3 * rank, 3 * rank + 3)
    torch.manual_seed(rank)
    adt = ADT(DistributedDataParallel(model), 0.3, 0.05, variant, channels=3)
    for p in adt.parameters():
        torch.nn.init.normal_(p, std=0.1)
    optimizer = torch.optim.Adam(adt.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        adt(x[mine], labels[mine]).backward()
        optimizer.step()
    learnt = [p.detach().clone() for p in adt.parameters()]
    alone = ADT(model, 0.3, 0.05, variant, channels=3)
    alone.load_state_dict(adt.state_dict())
    for each in (adt, alone):
        each.zero_grad()
        each(x[mine], labels[mine]).backward()
    return {
        "learnt": learnt,
        "averaged": [p.grad for p in adt.parameters()],
        "own": [p.grad for p in alone.parameters()],
    }


def main(folder: str, rank: int) -> None:
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, timeout=timedelta(seconds=40), world_size=2, rank=rank)
    torch.manual_seed(0)
    model = DistributedDataParallel(Sequences())
    x, labels = sequence_batch()
    adt = ADT(model, 0.3)
    perturbed = adt.perturb(x, labels)
    for _ in range(2):
        model.zero_grad()
        adt(x, labels).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    found = {"perturbed": perturbed, "gradients": gradients}
    found |= {variant: amortized(variant, rank) for variant in VARIANTS}
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

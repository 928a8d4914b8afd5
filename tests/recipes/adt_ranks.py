"""One process of two: run by tests/recipes/test_adt.py, which reads what each rank leaves in FOLDER."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from fastseq.recipes import ADT
from tests.recipes.adt_models import Sequences, sequence_batch


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
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

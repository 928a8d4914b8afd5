"""Two processes, and eight times the batch that the rate was tuned for: LEGW makes of it what it should be.

torchrun --nproc-per-node 2 examples/large_batch_ddp.py [--quick]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastseq
from fastseq.recipes import LEGW

BASE_RATE, BASE_BATCH, BASE_WARMUP = 0.05, 16, 0.25  # as tuned on one process


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = fastseq.nn.LSTM(8, 64, batch_first=True, gates="binary"), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    epochs = 12 if parser.parse_args().quick else 60
    dist.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)  # the same on every rank
    digits = load_digits()
    x, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    data = TensorDataset(x[:1400], labels[:1400])
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, batch_size=8 * BASE_BATCH // dist.get_world_size(), sampler=sampler, drop_last=True)

    model = DistributedDataParallel(Reader())
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE_RATE, momentum=0.9)
    legw = LEGW(optimizer, BASE_BATCH, loader.batch_size or 0, BASE_WARMUP, len(loader), epochs)  # counts the ranks in
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            legw.step()
    if dist.get_rank() == 0:
        s = legw.schedule
        with torch.no_grad():
            accuracy = (model.module.eval()(x[1400:]).argmax(-1) == labels[1400:]).float().mean()
        print(
            f"{dist.get_world_size()} processes, batches of {s.batch:g}, {s.k:g} times as large: rate {BASE_RATE} * "
            f"{s.scale:.2f}, warm-up of {s.warmup_epochs:g} epochs; accuracy {accuracy:.3f}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""``python -m benchmarks.scaling``: two processes of one thread beside one, on the same global batch of an LSTM and VQ.

Rounds of the one and of the two are interleaved, in the same processes: while one works alone, the other waits. What is
kept are medians of rounds, by the clock and of the processor, whose time others that use the machine change less. A row
also has the time of the step's all-reduces alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import harness
from fastseq.nn import LSTM, VectorQuantize

RESULTS = harness.RESULTS / "scaling.jsonl"
T, INPUTS, HIDDEN, CODES, STEPS = 64, 64, 256, 512, 3  # STEPS: of a round


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.vq = LSTM(INPUTS, HIDDEN, 2, gates="binary"), VectorQuantize(HIDDEN, CODES)

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, loss = self.vq(self.lstm(x)[0])
        return quantized.square().mean() + loss.sum()


def steps(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()


def seconds(work: Callable[[], object], ranks: int, rank: int) -> tuple[float, float]:
    """Of one step: by the clock, and of the processor, on all ranks together. Ranks that take no part wait."""
    dist.barrier()
    begin, used = time.perf_counter(), torch.tensor(-time.process_time(), dtype=torch.float64)
    if rank < ranks:
        work()
    used += time.process_time()
    dist.all_reduce(used)  # waits for all
    return (time.perf_counter() - begin) / STEPS, float(used) / STEPS


def worker(rank: int, store: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    alone, together = Model(), DistributedDataParallel(Model())
    alone.vq._codebook.use_ddp = False
    gradients, sums = (sum(p.numel() for p in alone.parameters()), CODES * (HIDDEN + 1))
    sent = [torch.zeros(gradients), torch.zeros(sums)]
    for batch in (16, 64):
        x = torch.randn(T, batch, INPUTS)
        mine = x.split(batch // 2, 1)[rank]
        works: dict[str, tuple[Callable[[], object], int]] = {
            "one": (lambda x=x: steps(alone, x), 1),  # type: ignore[misc]
            "two": (lambda x=mine: steps(together, x), 2),  # type: ignore[misc]
            "all_reduce": (lambda: [dist.all_reduce(t) for t in sent * STEPS], 2),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(rounds + 1):
            for name, (work, ranks) in works.items():
                found[name].append(seconds(work, ranks, rank))
        if rank:
            continue
        ms = {name: (1e3 * np.median(v[1:], axis=0)).tolist() for name, v in found.items()}  # but for the first round
        row: dict[str, Any] = {"op": "scaling", "case": f"T{T}_B{batch}_I{INPUTS}_H{HIDDEN}_L2_K{CODES}"}
        for name, (passed, used) in ms.items():
            row |= {f"ms_{name}": round(passed, 3), f"cpu_ms_{name}": round(used, 3)}
        by_clock, by_processor = (one / two for one, two in zip(ms["one"], ms["two"], strict=True))
        row |= {"efficiency": round(by_clock / 2, 3), "cpu_efficiency": round(by_processor, 3), "rounds": rounds}
        row |= {"gradient_bytes": 4 * gradients, "codebook_bytes": 4 * sums}
        print(row, flush=True)
        harness.append([{**row, **harness.provenance(1, [])}], RESULTS)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (f"{folder}/store", parser.parse_args().rounds), nprocs=2)


if __name__ == "__main__":
    main()

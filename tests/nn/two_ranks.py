"""What two processes do together, for the fixture ``both``: torchrun ... -m tests.nn.two_ranks FOLDER.

Each scenario returns, on each rank, what the test compares: with the other rank, and with one process alone.
"""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastseq import functional
from fastseq.nn._ranks import sum_
from fastseq.nn.codebook_optim import codebook_parameter_groups
from fastseq.nn.kmeans import _lloyd, _Rows, kmeans
from fastseq.nn.reinit import AfterWarmup, Reinit, Spaced, attach, next_epoch
from fastseq.nn.reservoir import Reservoir
from fastseq.nn.sharded_codebook import ShardedCodebook
from fastseq.nn.usage import CodebookUsage
from fastseq.nn.vector_quantize import VectorQuantize
from tests.nn import residual_ranks, training_ranks

SPLITS = {"halves": (60, 60), "uneven": (101, 19), "none on one": (120, 0)}
Result = dict[str, Any]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def clusters(*shape: int, centres: int = 8) -> Tensor:
    """Rows [*shape, D = last] around centres far apart: every rounding assigns them alike."""
    random = torch.Generator().manual_seed(5)
    where = 10 * torch.randn(centres, shape[-1], generator=random)
    pick = torch.randint(centres, shape[:-1], generator=random)
    return where[pick] + torch.randn(shape, generator=random)


def share(x: Tensor, split: str, rank: int, dim: int = 1) -> Tensor:
    return x.split(SPLITS[split], dim)[rank]


def kmeans_cases() -> list[tuple[str, str, str]]:
    return [(s, i, m) for s in SPLITS for i in ("kmeans++", "random") for m in ("l2", "cosine")]


def run_kmeans(rank: int) -> Result:
    x, out = clusters(2, 120, 4), {}
    for split, init, metric in kmeans_cases():
        options: Any = {"init": init, "metric": metric, "all_reduce": sum_, "iterations": 4}
        out[split, init, metric] = kmeans(share(x, split, rank), 11, generator=generator(), **options)
    torch.manual_seed(rank)  # the seed that counts is rank 0's
    mask = torch.rand(2, 120) < (0.0 if rank else 0.5)
    out["masked"] = kmeans(x, 11, mask=mask, all_reduce=sum_)
    out["fewer rows than means"] = kmeans(torch.full((1, 1, 2), float(rank)), 5, all_reduce=sum_)
    for name, group in (("nowhere", slice(None)), ("one group", slice(1, None))):
        mask = torch.ones(2, 120, dtype=torch.bool)
        mask[group] = False
        try:
            kmeans(x, 3, mask=mask, all_reduce=sum_)
        except ValueError as error:
            out[name] = str(error)
    return out


def run_empty_means(rank: int) -> Result:
    """A mean that loses its rows moves to the farthest row of any rank."""
    x = torch.tensor([[0.0, 1.0, 2.0], [9.0, 30.0, 4.0]])[rank][None, :, None]
    rows = _Rows(x, torch.ones(1, 3, dtype=torch.bool), sum_)
    return {"means": _lloyd(rows, torch.tensor([[[4.0], [300.0], [200.0]]]), True, False)}


def run_reservoir(rank: int) -> Result:
    torch.manual_seed(0)
    out: Result = {}
    for name, size, split in (("room for all", 200, "uneven"), ("full", 30, "halves"), ("one side", 30, "none on one")):
        reservoir = Reservoir(size, 4, 2)
        for part in share(clusters(2, 120, 4), split, rank).split(25, 1):
            reservoir.add(part)
        out[name] = (*reservoir.merge(), reservoir.keys.clone())
    state = [reservoir.state_dict()]
    dist.broadcast_object_list(state, 0)
    reservoir.load_state_dict(state[0])  # as when every rank loads rank 0's checkpoint
    out["loaded by both"] = reservoir.merge()
    return out


def layer(**options: Any) -> VectorQuantize:
    torch.manual_seed(1)
    return VectorQuantize(4, 16, decay=0.7, **options)


def average(model: VectorQuantize, x: Tensor, codes: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Codes and averages after a few steps on x [steps, B, N, D]."""
    model = model.to(x.dtype)
    model.codebook = codes
    for t, batch in enumerate(x):
        model(batch, mask=None if mask is None else mask[t])
    book = model._codebook
    return book.embed.detach().clone(), book.cluster_size.clone(), book.embed_avg.clone()


def average_cases() -> list[tuple[str, str]]:
    return [(s, m) for s in SPLITS for m in ("l2", "cosine")]


def average_inputs(metric: str) -> tuple[Tensor, Tensor]:
    codes = clusters(200, 4)[:16]
    codes = nn.functional.normalize(codes, dim=-1) if metric == "cosine" else codes
    return clusters(3, 2, 120, 4), codes


def run_average(rank: int) -> Result:
    out: Result = {}
    for split, metric in average_cases():
        x, codes = average_inputs(metric)
        model = layer(use_cosine_sim=metric == "cosine")
        out[split, metric] = average(model, share(x, split, rank, 2), codes)
        if split == "none on one":  # the other way to have none
            mask = torch.full((3, 2, 120), rank == 0)
            out["masked", metric] = average(layer(use_cosine_sim=metric == "cosine"), x, codes, mask)
    return out


def run_dead_codes(rank: int) -> Result:
    """Dead codes become the same rows on every rank, whichever rank has rows."""
    model = layer(threshold_ema_dead_code=2)
    x = share(average_inputs("l2")[0][0], "none on one", rank)
    torch.manual_seed(rank)
    model(x)
    return {"codes": model.codebook.clone(), "seen": x}


def run_first_codes(rank: int) -> Result:
    """k-means of the first batch, of all ranks; a batch without rows anywhere changes nothing."""
    model = layer(kmeans_init=True)
    model(torch.zeros(2, 5, 4), mask=torch.zeros(2, 5, dtype=torch.bool))
    before = bool(model._codebook.initted)
    torch.manual_seed(rank)
    model(share(average_inputs("l2")[0][0], "uneven", rank))
    return {"before": before, "after": bool(model._codebook.initted), "codes": model.codebook.clone()}


def run_reinit(rank: int) -> Result:
    """In DistributedDataParallel, which overwrites buffers, learned by gradient; rank 1 has rows, or never any."""
    out: Result = {}
    x = average_inputs("l2")[0]
    for name, rows in (("all", True), ("rank 0 alone", rank == 0)):
        for schedule in (AfterWarmup(2, 3), Spaced(every_iterations=2)):
            reinit = Reinit(schedule, reservoir_size=150)
            model = layer(batch_norm="codes", reinit=reinit, learnable_codebook=True, ema_update=False)
            parallel = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), Masked(model, rows)))
            optimizer = torch.optim.Adam(codebook_parameter_groups(parallel, 1e-3))
            attach(parallel, optimizer)
            torch.manual_seed(rank)
            samples, made = [], []
            for _ in range(4):
                for batch in x:
                    sample = None if reinit.reservoir is None else reinit.reservoir.merge()
                    before, state = model.codebook.detach().clone(), torch.get_rng_state()
                    optimizer.zero_grad()
                    parallel(batch[rank]).backward()
                    now = int(optimizer.state[model._codebook.embed].get("step", 0))
                    if sample is not None and not torch.equal(before, model.codebook):
                        samples.append((*sample, state, now))
                        made.append(model.codebook.detach().clone())
                    optimizer.step()
                next_epoch(parallel)
            assert reinit.reservoir is not None
            out[name, type(schedule).__name__] = {
                "codes": model.codebook.detach(),
                "made": made,
                "samples": samples,
                "keys": reinit.reservoir.keys,
                "weights": [p.detach() for p in parallel.parameters()],
            }
    return out


class Masked(nn.Module):
    """A layer whose rows count on some ranks only; returns a loss."""

    def __init__(self, layer: VectorQuantize, rows: bool) -> None:
        super().__init__()
        self.layer, self.rows = layer, rows

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full(x.shape[:1], self.rows)[None]
        quantized, _, loss = self.layer(x[None], mask=mask)
        return loss + quantized.square().mean() + 0.0 * sum(p.sum() for p in self.layer.parameters())


def run_usage(rank: int) -> Result:
    out: Result = {}
    for name, given in (("both", True), ("one", rank == 1)):
        metric = CodebookUsage((-1,))
        if given:
            metric.update(torch.arange(12).view(6, 2) + 12 * rank, 40)
        out[name] = metric.compute()
        out[name, "again"] = metric.compute()
    try:
        CodebookUsage().compute()
    except ValueError as error:
        out["never"] = str(error)
    return out


def sharded_cases() -> list[tuple[int, str]]:
    return [(K, metric) for K in (1, 2, 3, 13, 64) for metric in ("l2", "cosine")]


def sharded_inputs(K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, codes of which some are equal or not numbers, and a mask."""
    random = torch.Generator().manual_seed(K)
    codes = torch.randn(K, 5, generator=random)
    x = torch.randn(40, 5, generator=random)
    if K > 10:
        codes[K - 1], codes[K // 2] = codes[1], codes[2]  # ties between the parts
        codes[3] = torch.nan
        codes[4] = 0
        x[:3] = codes[[1, 2, K - 1]]
    if K == 2:  # a row whose score overflows has a tie of infinities with the code that is not a number
        codes[0], codes[1, 0], x[2, 0] = torch.nan, -10, 3e38
    x[5, 2], x[6, 0], x[7] = torch.nan, torch.inf, 0
    return x, codes, torch.arange(40) % 5 != 4


def run_sharded(rank: int) -> Result:
    out: Result = {}
    for K, metric in sharded_cases():
        x, codes, mask = sharded_inputs(K)
        book = ShardedCodebook(5, K, metric=metric).eval()
        book.load_codes(codes)
        rows = x.clone().requires_grad_()
        found = book(rows, mask)
        finite = found.commitment[torch.isfinite(found.commitment)].sum() + found.quantized[8:].sum()
        finite.backward()
        short = book(x.bfloat16().view(8, 5, 5))
        apart = ShardedCodebook(5, K, metric=metric, gather_rows=True).eval()
        apart.load_codes(codes)
        part, masks = x.split((33, 7))[rank], mask.split((33, 7))[rank]
        alone = x[: 40 * (1 - rank)]  # all rows, or none
        out[K, metric] = {
            "found": tuple(t.detach() for t in found),
            "gradient": rows.grad,
            "bfloat16": short.indices,
            "gathered": tuple(apart(part, masks)),
            "gathered from one": tuple(apart(alone)),
            "from none": tuple(apart(x[:0])),
            "codes": book.all_codes(),
            "own": book.embed.shape[0],
        }
    return out


def learn_whole(x: Tensor, codes: Tensor, counts: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The moving averages of a whole codebook."""
    averages = codes * counts[:, None]
    for batch in x:
        rows = nn.functional.normalize(batch, dim=-1) if metric == "cosine" else batch
        n, sums = functional.vq_sums(rows, functional.vq_nearest(batch, codes, metric=metric).index, len(codes))
        counts, averages = counts.lerp(n, 0.2), averages.lerp(sums, 0.2)
        total = counts.sum()
        codes = averages / ((counts + 1e-5) / (total + len(codes) * 1e-5) * total)[:, None]
        codes = nn.functional.normalize(codes, dim=-1) if metric == "cosine" else codes
    return codes, counts


def learn_inputs(metric: str) -> tuple[Tensor, Tensor, Tensor]:
    x, codes = clusters(3, 40, 5), clusters(200, 5)[:13]
    codes = nn.functional.normalize(codes, dim=-1) if metric == "cosine" else codes
    return x, codes, torch.linspace(1, 5, 13)


def run_sharded_learning(rank: int) -> Result:
    out: Result = {}
    for metric in ("l2", "cosine"):
        x, codes, counts = learn_inputs(metric)
        for gather in (False, True):
            book = ShardedCodebook(5, 13, metric=metric, gather_rows=gather)
            book.load_codes(codes, counts)
            for batch in x:
                book(batch.split((40, 0))[rank] if gather else batch)
            out[metric, gather] = book.all_codes(), book.cluster_size
    state = copy.deepcopy(book.state_dict())
    parts = [None, None]
    dist.all_gather_object(parts, state)
    other = ShardedCodebook(5, 13)
    try:
        other.load_state_dict(parts[1 - rank])
    except RuntimeError as error:
        out["of the other rank"] = str(error)
    other.load_state_dict(state)
    out["reloaded"] = other.all_codes(), book.all_codes()
    torch.manual_seed(0)
    out["first codes"] = ShardedCodebook(5, 13).all_codes()
    return out


SCENARIOS: dict[str, Callable[[int], Result]] = {
    name.removeprefix("run_"): function for name, function in list(globals().items()) if name.startswith("run_")
}
SCENARIOS["residual"] = residual_ranks.run
for name in ("training", "noise", "legw", "overwritten"):
    SCENARIOS[name] = getattr(training_ranks, f"run_{name}")


def of(both: list[dict[str, Any]], scenario: str) -> tuple[dict[Any, Any], dict[Any, Any]]:
    for rank, results in enumerate(both):
        assert "error" not in results[scenario], f"rank {rank}: {results[scenario]['error']}"
    return both[0][scenario], both[1][scenario]


def main(folder: str) -> None:
    """Run every scenario and leave what it returned, or its traceback, in FOLDER."""
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, results = dist.get_rank(), {}
    SCENARIOS["through"] = lambda rank: training_ranks.resumable(rank, Path(folder) / "through")
    for name, scenario in SCENARIOS.items():
        torch.manual_seed(0)
        try:
            results[name] = scenario(rank)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

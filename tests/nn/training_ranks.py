"""What two processes train together, for ``test_training_ranks.py``; of one that is killed in the middle, for the
fixture ``killed``: torchrun ... -m tests.nn.training_ranks FOLDER, twice.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastseq import functional
from fastseq.functional import Weights
from fastseq.nn import LSTM, ResidualVQ, SimVQ, VectorQuantize
from fastseq.recipes import LEGW

STEPS, T, B, I = 4, 5, 6, 3  # noqa: E741
KILLED, EVERY = 5, 2  # rank 1 dies in this step; a checkpoint is written after every second one
WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {"DDP": DistributedDataParallel, "FSDP": fully_shard}
Batch = dict[str, Tensor]


class Model(nn.Module):
    """An LSTM, then a quantizer or none; the call returns the loss."""

    def __init__(self, lstm: LSTM, quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.lstm, self.quantizer = lstm, quantizer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x)[0].transpose(0, 1)
        if self.quantizer is None:
            return (out - 1).square().mean()
        quantized, _, loss = self.quantizer(out)
        return (quantized - 1).square().mean() + loss.sum()


# odd sizes, so that FSDP's parts are uneven
MODELS: dict[str, Callable[[], Model]] = {
    "plain": lambda: Model(LSTM(I, 7, 2, bidirectional=True, forget_bias=1.0)),
    "projected": lambda: Model(LSTM(I, 7, 2, proj_size=3, bias=False)),
    "start states, recomputed": lambda: Model(LSTM(I, 7, learnable_state=True, recompute=True)),
    "low rank": lambda: Model(LSTM(I, 7, rank={"i": 2, "f": 3})),
    "VQ": lambda: Model(LSTM(I, 7), VectorQuantize(7, 9, decay=0.7)),
    "VQ, learnt": lambda: Model(LSTM(I, 7), VectorQuantize(7, 9, learnable_codebook=True, ema_update=False)),
    "residual VQ": lambda: Model(LSTM(I, 7), ResidualVQ(dim=7, codebook_dim=3, codebook_size=5, num_quantizers=2)),
    "SimVQ": lambda: Model(LSTM(I, 7), SimVQ(7, 9)),
}


def inputs() -> Tensor:
    """[steps, T, B, I] of both ranks."""
    return torch.randn(STEPS, T, B, I, generator=torch.Generator().manual_seed(2))


def built(name: str) -> Model:
    torch.manual_seed(1)
    return MODELS[name]()


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The losses over all ranks, and all floating-point tensors in the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for batch in x:
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    mean = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return [mean, *(whole(v) for v in model.state_dict().values() if v.is_floating_point())]


def run_training(rank: int) -> dict[Any, Any]:
    x = inputs().split(B // 2, 2)[rank]
    return {(name, wrap): train(WRAPS[wrap](built(name)), x) for name in MODELS for wrap in WRAPS}


def noisy() -> LSTM:
    torch.manual_seed(1)
    return LSTM(I, 7, gates="binary", noise_probability=1.0)


def run_noise(rank: int) -> dict[Any, Any]:
    """The same seed and input on both ranks, twice; and one seed for all, with the number of each rank's first row."""
    out: dict[Any, Any] = {}
    x = inputs()
    for wrap in WRAPS:
        for time in range(2):
            lstm, seen = noisy(), []
            lstm.register_forward_hook(lambda module, x, out, seen=seen: seen.append(out[0].detach()))
            torch.manual_seed(7)
            trained = train(WRAPS[wrap](Model(lstm)), x)
            out[wrap, time] = [seen[0], *trained]
    seed = functional.draw_seed()
    dist.broadcast(seed, 0)
    weights, part = [Weights(*noisy().parameters())], x[0].split(B // 2, 1)[rank]
    out["joined"] = functional.lstm(part, weights, seed=seed, row_offset=rank * (B // 2)).output.detach(), seed
    return out


def run_legw(rank: int) -> dict[Any, Any]:
    legw = scheduler(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    rates = []
    for _ in range(12):
        rates += legw.get_last_lr()
        legw.optimizer.step()
        legw.step()
    return {"rates": rates, "batch": legw.schedule.batch}


def run_overwritten(rank: int) -> dict[Any, Any]:
    """Codes that are parameters and made anew: in FSDP the next gather would bring the old ones back."""
    out: dict[Any, Any] = {}
    options: dict[str, Any] = {"learnable_codebook": True, "ema_update": False}
    for name, more in (("kmeans", {"kmeans_init": True}), ("dead codes", {"threshold_ema_dead_code": 2})):
        model = Model(LSTM(I, 7), VectorQuantize(7, 9, **options, **more))
        apart = Model(fully_shard(LSTM(I, 7)), VectorQuantize(7, 9, **options, **more))
        apart(inputs()[0])
        try:
            fully_shard(model)(inputs()[0])
        except ValueError as error:
            out[name] = str(error)
    return out


def scheduler(optimizer: torch.optim.Optimizer, **options: Any) -> LEGW:
    """For the batch of one process."""
    return LEGW(optimizer, B, B // 2, 0.5, 8, 2, "polynomial", **options)


def resumable(rank: int, folder: Path, killed: int | None = None) -> dict[str, list[Tensor]]:
    """Train from the last checkpoint in ``folder``, if there is one; rank 1 dies in the middle of step ``killed``."""
    models, optimizers, legws = {}, {}, {}
    for wrap, wrapped in WRAPS.items():
        torch.manual_seed(1)
        vq = VectorQuantize(7, 9, decay=0.7, threshold_ema_dead_code=2)
        models[wrap] = wrapped(Model(LSTM(I, 7, gates="binary", noise_probability=1.0), vq))
        optimizers[wrap] = torch.optim.Adam(models[wrap].parameters(), lr=0.05)
        legws[wrap] = scheduler(optimizers[wrap])
    torch.manual_seed(10 + rank)  # of the noise, and of the rows that dead codes become

    def state() -> dict[str, Any]:
        found: dict[str, Any] = {f"generator of rank {rank}": torch.get_rng_state()}
        for wrap in WRAPS:
            model, optimizer = get_state_dict(models[wrap], optimizers[wrap])
            found[wrap] = {"model": model, "optimizer": optimizer, "legw": legws[wrap].state_dict()}
        return found

    saved = sorted(folder.glob("step *"))
    begin = int(saved[-1].name.split()[1]) if saved else 0
    if saved:
        loaded = state()
        dcp.load(loaded, checkpoint_id=saved[-1])
        for wrap in WRAPS:
            parts = {"model_state_dict": loaded[wrap]["model"], "optim_state_dict": loaded[wrap]["optimizer"]}
            set_state_dict(models[wrap], optimizers[wrap], **parts)
            legws[wrap].load_state_dict(loaded[wrap]["legw"])
        torch.set_rng_state(loaded[f"generator of rank {rank}"])
    losses = []
    for step in range(begin, 8):
        for wrap, model in models.items():
            optimizers[wrap].zero_grad()
            loss = model(inputs()[step % STEPS].split(B // 2, 1)[rank])
            if step == killed and rank == 1 and not saved:
                os.kill(os.getpid(), signal.SIGKILL)
            loss.backward()
            optimizers[wrap].step()
            legws[wrap].step()
            losses.append(loss.detach())
        if (step + 1) % EVERY == 0:
            dcp.save(state(), checkpoint_id=folder / f"step {step + 1}")
    moments = [whole(v) for o in optimizers.values() for s in o.state.values() for v in s.values()]
    rates = [torch.tensor(legw.get_last_lr()) for legw in legws.values()]
    weights = [whole(v) for model in models.values() for v in model.state_dict().values()]
    return {"begin": [torch.tensor(begin)], "losses": losses[-4:], "end": [*weights, *moments, *rates]}


def main(folder: str) -> None:
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.save(resumable(rank, Path(folder), KILLED), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

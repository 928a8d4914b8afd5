"""What a model of the quality benchmark is: its gates, its task, its training, and where that is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import ROOT
from fastseq.compression import recurrent

KEPT = ROOT / "build" / "quality"
SAVE_SECONDS = 120.0  # between two states of an unfinished training
WARM_UP = 30  # steps


class Kind(NamedTuple):
    """How the gates of a model are trained; the fields are arguments of ``fastseq.nn.LSTM``.

    last_tau: what tau comes down to over the training, by equal factors; None: it stays.
    """

    name: str
    gates: str = "sigmoid"
    tau: float = 1.0
    noise_probability: float = 0.0
    last_tau: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        noise = {"noise_probability": self.noise_probability} if self.gates == "binary" else {}
        return {"gates": self.gates, "tau": self.tau, **noise}


KINDS = {
    kind.name: kind
    for kind in (
        Kind("stock"),
        Kind("sharpened", "sharpened", 0.2),
        Kind("binary", "binary", 0.9, 0.2),
        Kind("binary-all-noise", "binary", 0.9, 1.0),
        Kind("binary-cold", "binary", 0.3, 1.0),
        Kind("binary-cooling", "binary", 0.9, 1.0, 0.1),
        Kind("sharpened-cooling", "sharpened", 1.0, 0.0, 0.1),
    )
}


@dataclass(frozen=True)
class Task:
    """A text and a kind of model.

    Args:
        metric: what ``evaluate`` gives under "test"; smaller is better. kinds: names of the models. seeds: how many.
        peak: highest learning rate of Adam, after WARM_UP steps; it falls to a tenth linearly. clip: of the gradient's
            norm. ranks: of i and f. sizes: of model and text, for the rows. build: a fresh model. batch: that of a
            step and seed. loss: nats per symbol and the state for the next batch, from model, batch and state.
        evaluate: of a model in evaluation mode.
    """

    name: str
    metric: str
    kinds: tuple[str, ...]
    seeds: int
    steps: int
    peak: float
    clip: float
    ranks: tuple[int, ...]
    sizes: dict[str, Any]
    build: Callable[[Kind], nn.Module]
    batch: Callable[[int, int], Any]
    loss: Callable[[nn.Module, Any, Any], tuple[Tensor, Any]]
    evaluate: Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Trained:
    """A model, and the seconds of processor time that its training took."""

    model: nn.Module
    seconds: float


def learning_rate(peak: float, done: int, steps: int) -> float:
    """Of the step after ``done`` of ``steps``."""
    return peak * min(1.0, (done + 1) / WARM_UP) * (1 - 0.9 * done / steps)


def cool(model: nn.Module, kind: Kind, progress: float) -> None:
    """Set tau to that of ``progress``, in [0, 1], through the training."""
    if kind.last_tau is not None:
        for lstm in recurrent(model).values():
            lstm.tau = kind.tau * (kind.last_tau / kind.tau) ** progress


def kept(task: Task, kind: Kind, seed: int, steps: int) -> Path:
    """Where the training is kept."""
    return KEPT / f"{task.name}-{kind.name}-seed{seed}-steps{steps}.pt"


def train(task: Task, kind: Kind, seed: int, steps: int, say: Callable[[str], None]) -> Trained:
    """Go on where the kept training stopped, up to ``steps``.

    Equal seeds give equal first weights and an equal order of the text, whatever the gates.
    """
    torch.manual_seed(seed)
    model, path = task.build(kind), kept(task, kind, seed, steps)
    optimiser = torch.optim.Adam(model.parameters(), lr=task.peak)
    done, before, state = 0, 0.0, None
    if path.exists():
        found = torch.load(path, weights_only=True)
        model.load_state_dict(found["model"])
        optimiser.load_state_dict(found["optimiser"])
        torch.set_rng_state(found["random"])
        done, before, state = found["done"], found["seconds"], found["state"]
    begin, saved, total, count = time.process_time(), time.monotonic(), 0.0, 0
    while done < steps:
        cool(model, kind, done / steps)
        loss, state = _step(
            task, model, optimiser, task.batch(done, seed), state, learning_rate(task.peak, done, steps)
        )
        done, total, count = done + 1, total + loss, count + 1
        seconds = before + time.process_time() - begin
        if done == steps or time.monotonic() - saved > SAVE_SECONDS:
            _save(path, model=model, optimiser=optimiser, done=done, seconds=seconds, state=state)
            saved = time.monotonic()
        if count == max(1, steps // 20) or done == steps:
            say(f"{path.stem}: {done}/{steps} steps, {seconds / 60:.1f} min, loss {total / count:.3f} nats")
            total, count = 0.0, 0
    cool(model, kind, 1.0)
    return Trained(model.eval(), before + time.process_time() - begin)


def _step(task: Task, model: nn.Module, optimiser: Any, batch: Any, state: Any, rate: float) -> tuple[float, Any]:
    for group in optimiser.param_groups:
        group["lr"] = rate
    loss, state = task.loss(model, batch, state)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), task.clip)
    optimiser.step()
    return loss.item(), state


def _save(path: Path, model: nn.Module, optimiser: Any, **facts: Any) -> None:
    """Whole or not at all: a training may be stopped at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    states = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "random": torch.get_rng_state()}
    torch.save({**states, **facts}, part)
    part.replace(path)

"""Quantizers trained side by side, each on its own clock, for several seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq.nn
from fastseq.demo import vq_autoencoder
from fastseq.demo.vq_autoencoder import PatchAutoencoder
from fastseq.demo.vq_photographs import Patches, Photographs, patches

Kind = tuple[str, int]  # recipe and K
Report = Callable[[float, str], None]  # fraction done, remark

_LEAST_SECONDS = 0.02  # of a run


@dataclass(frozen=True)
class Setting:
    """Side of a patch, N patches per step, hidden units, D numbers per code, learning rate, rounds of a run.

    Each round ends with an evaluation, and is an epoch to the recipe.
    """

    side: int = 4
    N: int = 1024
    hidden: int = 64
    D: int = 16
    rate: float = 3e-3
    rounds: int = 8


@dataclass(frozen=True)
class Measured:
    """Of all patches of a photograph: root mean squared error in steps of 1/255, and the use of the codes."""

    error: float
    perplexity: float
    used: int


@dataclass
class Runner:
    """One autoencoder with its optimiser and its clock.

    Args:
        recipe, K, seed: what it is. model, optimiser, batches: what is trained on what.
    """

    recipe: str
    K: int
    seed: int
    model: PatchAutoencoder
    optimiser: torch.optim.Optimizer
    batches: Patches
    steps: list[float] = field(default_factory=list)  # seconds of each training step
    clocks: list[float] = field(default_factory=list)  # seconds trained after each round
    curve: list[Measured | None] = field(default_factory=list)  # then; None before it quantizes
    held_out: Measured = field(init=False)  # at the end

    def __post_init__(self) -> None:
        self.rates = [group["lr"] for group in self.optimiser.param_groups]

    @property
    def seconds(self) -> float:
        """Time spent in training steps so far."""
        return math.fsum(self.steps)

    def step(self, progress: float) -> None:
        """One training step, with its time kept.

        Args:
            progress: in [0, 1], takes the learning rates down to a tenth.
        """
        begin = time.perf_counter()
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - 0.9 * progress)
        train_step(self.model, self.optimiser, next(self.batches))
        self.steps.append(time.perf_counter() - begin)

    def round(self, until: float, seconds: float, least: int) -> None:
        """Train until the clock shows ``until`` of ``seconds``, but at least so many steps."""
        clock, first = self.seconds, len(self.steps)
        while clock < until or len(self.steps) - first < least:
            self.step(min(1.0, clock / seconds))
            clock += self.steps[-1]

    @property
    def end(self) -> Measured:
        """The last of the curve."""
        assert self.curve[-1] is not None
        return self.curve[-1]

    @property
    def quantizes(self) -> bool:
        """Whether codes are in use yet."""
        return all(m.quantizes for m in self.model.modules() if isinstance(m, fastseq.nn.Reinit))


def train_step(model: PatchAutoencoder, optimiser: torch.optim.Optimizer, x: Tensor) -> None:
    """Forward, backward and update on patches x."""
    y, _, loss = model(x)
    optimiser.zero_grad(set_to_none=True)
    (F.mse_loss(y, x) + loss).backward()
    optimiser.step()


def autoencoder(setting: Setting, seed: int, quantizer: Callable[[], nn.Module] | None = None) -> PatchAutoencoder:
    """Equal seeds give equal first weights of the network, whatever the quantizer, which is drawn after it."""
    torch.manual_seed(seed)
    model = PatchAutoencoder(3 * setting.side**2, setting.hidden, setting.D)
    model.quantizer = None if quantizer is None else quantizer()
    return model


def runner(recipe: str, K: int, seed: int, setting: Setting, image: Tensor) -> Runner:
    """One at its start; the order of the patches depends on the seed alone."""
    model = autoencoder(setting, seed, lambda: vq_autoencoder.quantizer(recipe, setting.D, K))
    adam = vq_autoencoder.optimiser(model, recipe, setting.rate)
    return Runner(recipe, K, seed, model, adam, Patches(image, setting.side, setting.N, seed))


@torch.no_grad()
def measure(model: PatchAutoencoder, rows: Tensor, K: int) -> Measured:
    """Evaluate on patches, in evaluation mode."""
    training = model.training
    y, index, _ = model.eval()(rows)
    model.train(training)
    usage = fastseq.nn.CodebookUsage()
    usage.update(index, K)
    found = usage.compute()
    return Measured(255 * F.mse_loss(y, rows).sqrt().item(), found.perplexity.item(), int(found.used))


@dataclass(frozen=True)
class Trained:
    """What ``train_all`` returns. seconds: that each run was given. out_of_time: some seeds had to be left out."""

    runners: list[Runner]
    seeds: list[int]
    seconds: float
    out_of_time: bool

    def of(self, recipe: str, K: int) -> list[Runner]:
        """The runs of one kind, seed by seed."""
        return [r for r in self.runners if (r.recipe, r.K) == (recipe, K)]


def train_all(
    kinds: Sequence[Kind], seeds: Sequence[int], setting: Setting, photographs: Photographs, wall: float, report: Report
) -> Trained:
    """Train every kind for every seed; each run for the same time on its own clock, but see ``least_rows``.

    Of one seed all take turns, and the first of a round is another one each time, so that whatever else the machine
    does falls on all of them. Seeds come one after the other; if time runs out, the last ones are left out.

    Args:
        wall: seconds for all runs and their evaluations, which are on no clock.
    """
    end = time.perf_counter() + wall
    rows, unseen = (patches(image, setting.side) for image in (photographs.training, photographs.held_out))
    evaluation = _seconds_of_evaluation(kinds, setting, photographs)
    per_run = (end - time.perf_counter()) / (len(seeds) * len(kinds))
    seconds = max(_LEAST_SECONDS, 0.4 * per_run, 0.95 * per_run - (setting.rounds + 2) * evaluation)
    done: list[Runner] = []
    begin = time.perf_counter()
    for k, seed in enumerate(seeds):
        now = time.perf_counter()
        if k and now + 0.8 * (now - begin) / k > end:
            report(1.0, "out of time")
            return Trained(done, list(seeds[:k]), seconds, True)
        runners = [runner(recipe, K, seed, setting, photographs.training) for recipe, K in kinds]
        _train(runners, rows, seconds, setting, lambda part, note, k=k: report((k + part) / len(seeds), note))  # type: ignore[misc]
        for r in runners:
            r.held_out = measure(r.model, unseen, r.K)
        done += runners
    report(1.0, "")
    return Trained(done, list(seeds), seconds, False)


def _train(runners: Sequence[Runner], rows: Tensor, seconds: float, setting: Setting, report: Report) -> None:
    for turn in range(setting.rounds):
        shift = turn % len(runners)
        for k, r in enumerate((*runners[shift:], *runners[:shift])):
            report((turn + k / len(runners)) / setting.rounds, f"seed {r.seed}, K {r.K}, {r.recipe}")
            least = vq_autoencoder.least_rows(r.recipe, r.K, epoch=turn + 1) // setting.N + 1
            r.round(seconds * (turn + 1) / setting.rounds, seconds, least)
            r.clocks.append(r.seconds)
            r.curve.append(measure(r.model, rows, r.K) if r.quantizes else None)
            fastseq.nn.next_epoch(r.model)


def _seconds_of_evaluation(kinds: Sequence[Kind], setting: Setting, photographs: Photographs) -> float:
    """Mean over the kinds, of the second evaluation: the first is slow for being the first."""
    rows, spent = patches(photographs.training, setting.side), []
    for recipe, K in kinds:
        first = runner(recipe, K, 0, setting, photographs.training)
        first.step(0.0)
        fastseq.nn.next_epoch(first.model)  # so that the recipe quantizes too
        measure(first.model, rows, K)
        begin = time.perf_counter()
        measure(first.model, rows, K)
        spent.append(time.perf_counter() - begin)
    return math.fsum(spent) / len(spent)

"""Models trained side by side on one machine: each has its own clock, and they take turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.demo.character_model import Batches, CharacterModel, State

Chunk = tuple[Tensor, Tensor]  # characters [T+1, B], begin flags [B]
Report = Callable[[float, str], None]  # fraction done, remark

_CLIP = 1.0


@dataclass
class Runner:
    """One model with its optimiser, its place in the text and its clock.

    Args:
        label, colour: in tables and charts. model, batches: what is trained on what. masked: the LSTM takes the begin
            flags as ``reset``; otherwise its state is set to zero between two calls. peak: highest learning rate.
    """

    label: str
    colour: str
    model: CharacterModel
    batches: Batches
    masked: bool
    peak: float = 6e-3
    state: State | None = None
    steps: list[float] = field(default_factory=list)  # seconds of each training step
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # seconds trained, steps, held-out bits

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=self.peak)

    @property
    def seconds(self) -> float:
        """Time spent in training steps so far."""
        return math.fsum(self.steps)

    @property
    def milliseconds(self) -> float:
        """Median time of a training step."""
        return 1e3 * statistics.median(self.steps)

    def step(self, progress: float) -> float:
        """One step of truncated backpropagation, with its time kept.

        Args:
            progress: in [0, 1], sets the learning rate: a short warm-up, then down to a tenth.

        Returns:
            Bits per character of the batch.
        """
        begin = time.perf_counter()
        for group in self.optimiser.param_groups:
            group["lr"] = self.peak * min(1.0, (len(self.steps) + 1) / 30) * (1 - 0.9 * progress)
        text, begins = next(self.batches)
        logits, self.state = forward(self.model, (text, begins), self.state, self.masked)
        self.state = (self.state[0].detach(), self.state[1].detach())
        loss = F.cross_entropy(logits.flatten(0, 1), text[1:].flatten())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimiser.step()
        self.steps.append(time.perf_counter() - begin)
        return loss.item() / math.log(2)


def forward(model: CharacterModel, chunk: Chunk, state: State | None, masked: bool) -> tuple[Tensor, State]:
    """Logits [T, B, K] of a chunk and the state after it, with the state restarted where a topic begins.

    Args:
        masked: say so with the ``reset`` mask; otherwise set rows of the state to zero before the call.
    """
    text, begins = chunk[0][:-1], chunk[1]
    if masked:
        reset = torch.zeros(text.shape, dtype=torch.bool)
        reset[0] = begins
        return model(text, state, reset=reset)  # type: ignore[no-any-return]
    if state is not None:
        keep = (~begins)[:, None].to(state[0].dtype)
        state = (state[0] * keep, state[1] * keep)
    return model(text, state)  # type: ignore[no-any-return]


@torch.no_grad()
def bits_per_character(model: CharacterModel, held_out: Sequence[Chunk], masked: bool) -> float:
    """Mean of -log2 p(next character), in evaluation mode, state carried from chunk to chunk."""
    training = model.training
    model.eval()
    total, count, state = 0.0, 0, None
    for chunk in held_out:
        logits, state = forward(model, chunk, state, masked)
        total += F.cross_entropy(logits.flatten(0, 1), chunk[0][1:].flatten(), reduction="sum").item()
        count += chunk[0][1:].numel()
    model.train(training)
    return total / count / math.log(2)


def race(
    runners: Sequence[Runner], held_out: Sequence[Chunk], seconds: float, wall: float, report: Report, most: int = 20
) -> None:
    """Train every runner until its own clock has reached ``seconds``; evaluation is on no clock.

    They take turns, and the first of a round is another one each time, so that whatever else the machine does falls
    on all of them.

    Args:
        held_out: chunks for the curve. wall: seconds for training and evaluation of all together: the slower an
            evaluation is, the fewer there are, and where even that does not suffice all stop after the same round.
        most: rounds, each one turn and one evaluation per runner.
    """
    begin = time.perf_counter()
    for runner in runners:
        runner.curve.append((0.0, 0, bits_per_character(runner.model, held_out, runner.masked)))
    spent = time.perf_counter() - begin
    rounds = max(2, min(most, int((wall - len(runners) * seconds) / spent)))
    for turn in range(rounds):
        if turn and time.perf_counter() - begin > wall:
            report(1.0, "out of time")
            break
        shift = turn % len(runners)
        for k, runner in enumerate((*runners[shift:], *runners[:shift])):
            report((turn + k / len(runners)) / rounds, _standing(runners))
            clock = runner.seconds
            while clock < seconds * (turn + 1) / rounds:
                runner.step(min(1.0, clock / seconds))
                clock += runner.steps[-1]
            bits = bits_per_character(runner.model, held_out, runner.masked)
            runner.curve.append((clock, len(runner.steps), bits))
    else:
        report(1.0, _standing(runners))


def _standing(runners: Sequence[Runner]) -> str:
    return "bits: " + ", ".join(f"{runner.label} {runner.curve[-1][2]:.2f}" for runner in runners)


def time_in_turns(
    functions: Mapping[str, Callable[[], object]], seconds: float, report: Report
) -> dict[str, list[float]]:
    """Milliseconds of every call, the functions called in turns until the time is spent, at least once each.

    The first call of each is not counted.
    """
    begin = time.perf_counter()
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    while (spent := time.perf_counter() - begin) < seconds or not all(times.values()):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
        report(min(1.0, spent / max(seconds, 1e-9)), "")
    report(1.0, "")
    return times

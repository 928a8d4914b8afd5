"""LEGW: linear-epoch gradual warm-up, so that what was tuned for one batch size serves the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastseq import _check

DECAYS = ("constant", "exponential", "polynomial", "multistep")


@dataclass(frozen=True)
class Schedule:
    """What LEGW makes of one batch size: all rates are multiples of the tuned one. Plain numbers, no optimizer.

    Args:
        base_batch: examples of an optimizer step that the rate was tuned with.
        batch: examples of an optimizer step, of all processes and accumulated backwards together.
        base_warmup_epochs: of the tuned training; 0 for none, and parts of an epoch are usual.
        steps_per_epoch: optimizer steps of an epoch at ``batch``.
        epochs: of the whole training, the same for every batch; may be a part of one.
        decay, gamma, power, milestones, decay_start: as in ``LEGW``.

    Raises:
        ArgumentError: for a value out of its range.
    """

    base_batch: float
    batch: float
    base_warmup_epochs: float
    steps_per_epoch: int
    epochs: float
    decay: str = "constant"
    gamma: float = 0.1
    power: float = 2.0
    milestones: tuple[float, ...] = ()
    decay_start: float | None = None

    def __post_init__(self) -> None:
        for name in ("base_batch", "batch", "epochs", "gamma", "power"):
            _check.positive("LEGW", name, getattr(self, name))
        _check.not_negative("LEGW", "base_warmup_epochs", self.base_warmup_epochs)
        _check.count("LEGW", "steps_per_epoch", self.steps_per_epoch)
        _check.one_of("LEGW", "decay", self.decay, DECAYS)
        if self.decay_start is not None:
            _check.not_negative("LEGW", "decay_start", self.decay_start)
            if self.decay == "polynomial" and self.decay_start >= self.epochs:
                _check.fail("LEGW", "decay_start", f"< epochs = {self.epochs:g}", self.decay_start)
        for milestone in self.milestones:
            _check.positive("LEGW", "milestones", milestone)
        if self.decay == "multistep" and not self.milestones:
            _check.fail("LEGW", "milestones", "the epochs after which the rate falls, with decay='multistep'", "none")

    @property
    def k(self) -> float:
        """How many times the base batch a batch is."""
        return self.batch / self.base_batch

    @property
    def scale(self) -> float:
        """The highest rate, sqrt(k)."""
        return math.sqrt(self.k)

    @property
    def warmup_epochs(self) -> float:
        """k times those of the base."""
        return self.base_warmup_epochs * self.k

    @property
    def warmup_steps(self) -> float:
        """The same for every batch, as far as ``steps_per_epoch`` is examples / batch; need not be whole."""
        return self.warmup_epochs * self.steps_per_epoch

    @property
    def steps(self) -> float:
        """Of the whole training."""
        return self.epochs * self.steps_per_epoch

    @property
    def complete(self) -> bool:
        """The warm-up ends before the training does."""
        return self.warmup_epochs < self.epochs

    def factor(self, step: int) -> float:
        """What step number ``step``, from 0, multiplies the tuned rate by."""
        warm = self.warmup_steps
        return self.scale * ((step + 1) / warm if step + 1 <= warm else self._decay(step / self.steps_per_epoch))

    def _decay(self, epoch: float) -> float:
        if self.decay == "multistep":
            return float(self.gamma ** sum(epoch >= milestone for milestone in self.milestones))
        start = self.warmup_epochs if self.decay_start is None else self.decay_start
        past = max(0.0, epoch - start)
        if self.decay == "exponential":
            return float(self.gamma**past)
        if self.decay == "polynomial":
            return float((1 - past / (self.epochs - start)) ** self.power) if epoch < self.epochs else 0.0
        return 1.0


class LEGW(LRScheduler):
    """Scales the learning rate and the warm-up from the batch that they were tuned with to another one.

    With k = batch / base batch, the rate is multiplied by sqrt(k) and the epochs of warm-up by k; nothing else is
    changed, the number of epochs neither. So the warm-up takes the same number of steps with every batch. It is linear,
    rate * sqrt(k) * e / W at epoch e of W; a step has the rate that the line has at its end, so that the first one is
    not lost on a rate of 0, and the last one of the warm-up has the highest rate. You et al. 2019, "Large-Batch
    Training for LSTM and Beyond" (arXiv 1901.08256).

    Call ``step()`` once after each optimizer step: in Lightning ``{"scheduler": legw, "interval": "step"}``, in the
    Trainer of transformers ``optimizers=(optimizer, legw)``.

    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # 0.1 was tuned with 128 examples
    >>> legw = LEGW(optimizer, base_batch=128, batch=4096, base_warmup_epochs=0.25, steps_per_epoch=15, epochs=25)

    Args:
        optimizer: its rates, of each group its own, are those tuned with ``base_batch``.
        base_batch: examples of one optimizer step of the tuned training, all together.
        batch: examples of one backward of this process, as the ``DataLoader`` has it; an optimizer step sees
            ``batch * accumulation * world_size`` of them, and k is that over ``base_batch``. k < 1 follows the same
            rule downwards.
        base_warmup_epochs: of the tuned training; 0 for none, and parts of an epoch are usual.
        steps_per_epoch: optimizer steps of one epoch, ``len(loader) // accumulation``.
        epochs: of the whole training; need not be whole. The warm-up must end before. Later steps have the rate that
            the decay gives them, with "polynomial" 0.
        decay: after the warm-up, "constant"; "exponential", by ``gamma`` an epoch; "polynomial", as (1 - progress) **
            power down to 0; "multistep", by ``gamma`` at each of the ``milestones``.
        gamma: a factor, > 0.
        power: of the polynomial, > 0.
        milestones: epochs, counted from the start of the training. Those within the warm-up count when it ends.
        decay_start: epoch from which "exponential" and "polynomial" count; None for the end of the warm-up. From 0, the
            rate jumps down to where the decay stands when the warm-up ends.
        accumulation: backwards per optimizer step.
        world_size: processes that average their gradients; None for that of ``torch.distributed`` where it is
            initialised, else 1. With model parallelism give the number of replicas.
        last_epoch: number of the last step made, as in torch's schedulers; -1 for none. To go on with another batch,
            give a new LEGW the steps that the epochs done make with it, less one; groups must have ``initial_lr``.

    Raises:
        ArgumentError: for a value out of its range, or a warm-up that lasts as long as the training.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        base_batch: float,
        batch: float,
        base_warmup_epochs: float,
        steps_per_epoch: int,
        epochs: float,
        decay: str = "constant",
        *,
        gamma: float = 0.1,
        power: float = 2.0,
        milestones: Sequence[float] = (),
        decay_start: float | None = None,
        accumulation: int = 1,
        world_size: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        _check.positive("LEGW", "batch", batch)
        world_size = _world_size() if world_size is None else world_size
        _check.count("LEGW", "accumulation", accumulation)
        _check.count("LEGW", "world_size", world_size)
        self.schedule = s = Schedule(
            base_batch,
            batch * accumulation * world_size,
            base_warmup_epochs,
            steps_per_epoch,
            epochs,
            decay,
            gamma,
            power,
            tuple(milestones),
            decay_start,
        )
        if not s.complete:
            expected = f"such that the warm-up ends before the training: k * base_warmup_epochs < epochs = {epochs:g}"
            got = f"{s.k:g} * {base_warmup_epochs:g} = {s.warmup_epochs:g}"
            _check.fail("LEGW", "base_warmup_epochs", expected, got)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Of each group, for the step that comes next."""
        factor = self.schedule.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer, as plain data."""
        return {**super().state_dict(), "schedule": asdict(self.schedule)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the saved one stood.

        Raises:
            ArgumentError: it was made with other arguments, so that the same step is not the same epoch.
        """
        saved, mine = state_dict.get("schedule"), asdict(self.schedule)
        if not isinstance(saved, dict) or saved.keys() != mine.keys():
            _check.fail("LEGW.load_state_dict", "state_dict", "that of a LEGW", f"one with {sorted(state_dict)}")
        for name, value in mine.items():
            if value != (tuple(saved[name]) if isinstance(value, tuple) else saved[name]):
                _check.fail("LEGW.load_state_dict", name, f"{saved[name]!r} as in the saved state", repr(value))
        super().load_state_dict({**state_dict, "schedule": self.schedule})


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1

"""``Reinit``: codes made anew from what the encoder puts out now, on a schedule (Lancucki et al. 2020)."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastseq import _check
from fastseq.nn._eager import eager
from fastseq.nn._ranks import broadcast_, ranks, sum_
from fastseq.nn.codebook_optim import reset_codebook_moments
from fastseq.nn.kmeans import METRICS, kmeans
from fastseq.nn.reservoir import Reservoir

_ONE_LAYER = "one of its own for each layer (Reinit.copy makes them)"
_logger = logging.getLogger("fastseq")


class Codes(Protocol):
    """A codebook that can be made anew, such as ``fastseq.nn.codebook.Codebook``."""

    embed: Any  # [G, K, D]

    def set_codes(self, means: Tensor, counts: Tensor | None = None) -> None: ...


@dataclass(frozen=True)
class AfterWarmup:
    """No quantization before ``from_epoch``; from then on new codes at the first step of each epoch.

    Each comes from the rows of the epoch before it. The first one in an epoch > ``max_epoch`` is the last.

    Args:
        from_epoch: >= 1; 3 leaves epochs 1 and 2 without quantization.
        max_epoch: >= 1, or None for no end.
    """

    from_epoch: int = 3
    max_epoch: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "from_epoch", "max_epoch")


@dataclass(frozen=True)
class Spaced:
    """New codes when epoch and iteration have both come to where the one before has put them; no warm-up.

    After one in epoch e and iteration i the next is due from epoch e + ``every_epochs`` on, and from iteration
    i + ``every_iterations`` or int(i * ``expansion`` + 1) on. The first one with an epoch > ``max_epoch`` or an
    iteration > ``max_iteration`` is the last.

    Args:
        every_epochs: >= 1, or None: whatever the epoch.
        every_iterations: >= 1, or None: whatever the iteration.
        expansion: instead of ``every_iterations``, by what the gaps grow, >= 1.
        max_epoch, max_iteration: >= 1, or None for no end.
    """

    every_epochs: int | None = None
    every_iterations: int | None = None
    expansion: float | None = None
    max_epoch: int | None = None
    max_iteration: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "every_epochs", "every_iterations", "max_epoch", "max_iteration")
        if self.expansion is not None:
            _check.positive("Spaced", "expansion", self.expansion)
            if self.expansion < 1:
                _check.fail("Spaced", "expansion", ">= 1", self.expansion)
            if self.every_iterations is not None:
                _check.fail("Spaced", "expansion", "None beside every_iterations", self.expansion)
        if self.every_epochs is None and self.every_iterations is None and self.expansion is None:
            _check.fail("Spaced", "every_epochs", "given where every_iterations and expansion are not", None)

    def next_iteration(self, iteration: int) -> int:
        """From which iteration on the next one is due after one at ``iteration``."""
        if self.expansion is not None:
            return int(iteration * self.expansion + 1)
        return iteration + (self.every_iterations or 0)


def _at_least_one(schedule: object, *names: str) -> None:
    for name in names:
        value = getattr(schedule, name)
        if value is None and name != "from_epoch":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            _check.fail(type(schedule).__name__, name, "an integer >= 1", repr(value))


class Reinit(nn.Module):
    """Data-dependent re-initialization: k-means of a sample of the vectors to be quantized overwrites the codebook.

    Epochs and iterations (forwards in training) count from 1. What it knows is in the state_dict, so training goes on
    as it would have. Under ``torch.distributed`` the samples of all ranks are merged and every rank gets the codes of
    rank 0; all ranks must run the same number of training forwards and epochs, whatever rows they have.

    Args:
        schedule: ``AfterWarmup`` or ``Spaced``.
        reservoir_size: rows in the sample, at least as many as codes.
        iterations: most rounds of Lloyd, >= 0.
        metric: "l2" or "cosine"; None takes that of the codebook.

    Raises:
        ArgumentError: naming the argument.
    """

    def __init__(
        self,
        schedule: AfterWarmup | Spaced,
        *,
        reservoir_size: int = 20480,
        iterations: int = 20,
        metric: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(schedule, (AfterWarmup, Spaced)):
            raise TypeError(f"Reinit: schedule must be AfterWarmup or Spaced, got {type(schedule).__name__}")
        for name, value, least in (("reservoir_size", reservoir_size, 1), ("iterations", iterations, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                _check.fail("Reinit", name, f"an integer >= {least}", repr(value))
        if metric is not None:
            _check.one_of("Reinit", "metric", metric, METRICS)
        self.schedule, self.reservoir_size = schedule, reservoir_size
        self.iterations, self.metric = iterations, metric
        self.reservoir: Reservoir | None = None
        self.epoch, self.iteration = 1, 0
        self.last_epoch = 0  # whose first step is done
        self.next_due = (1, 1)  # epoch and iteration
        if isinstance(schedule, Spaced):
            self.next_due = (schedule.every_epochs or 1, schedule.every_iterations or int(schedule.expansion or 1))
        self.active = True
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._codebook: weakref.ref[Codes] | None = None

    def build(self, groups: int, K: int, dim: int, *, device: Any = None) -> Reinit:
        """Make the reservoir for G codebooks of K codes of D dimensions; if nobody does, the first ``step`` will.

        Raises:
            ArgumentError: when there are more codes than rows in the reservoir, or when it has been built already.
        """
        if self.reservoir is not None:
            _check.fail("Reinit", "reinit", _ONE_LAYER, "one that has a layer")
        self._check_enough(K)
        self.reservoir = Reservoir(self.reservoir_size, dim, groups, device=device)
        if not self.active:
            self.reservoir.drop()
        return self

    def _check_enough(self, K: int) -> None:
        if K > self.reservoir_size:
            _check.fail("Reinit", "reservoir_size", f"at least the number of codes K = {K}", self.reservoir_size)

    def copy(self) -> Reinit:
        """The same settings and nothing learned, for another layer."""
        return Reinit(self.schedule, reservoir_size=self.reservoir_size, iterations=self.iterations, metric=self.metric)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """After each re-initialization reset what ``optimizer`` remembers of the codebook; it is held weakly."""
        self._optimizer = weakref.ref(optimizer)

    def next_epoch(self) -> None:
        """Tell that an epoch has ended; the first one, number 1, runs from the start."""
        self.epoch += 1

    @property
    def quantizes(self) -> bool:
        """False while the warm-up without quantization lasts, in evaluation as well."""
        return not isinstance(self.schedule, AfterWarmup) or self.epoch >= self.schedule.from_epoch

    @eager
    @torch.no_grad()
    def step(self, x: Tensor, mask: Tensor | None, codebook: Codes) -> bool:
        """One forward in training: make new codes if they are due, then add these rows to the sample.

        Args:
            x: [G, N, D], as they are quantized.
            mask: bool [G, N], the rows that count.
            codebook: G codebooks of K codes of D dimensions.

        Returns:
            ``quantizes``.

        Raises:
            ArgumentError: for a second codebook, or one with more codes than rows in the reservoir.
        """
        if self._codebook is None or self._codebook() is None:
            if self.reservoir is None:
                self.build(*codebook.embed.shape, device=x.device)
            self._check_enough(codebook.embed.shape[1])
            self._codebook = weakref.ref(codebook)
        elif self._codebook() is not codebook:
            _check.fail("Reinit", "reinit", _ONE_LAYER, "one that has a layer")
        self.iteration += 1
        assert self.reservoir is not None
        if self.active and self._due(self.reservoir):
            self._reinitialize(self.reservoir, x, mask, codebook)
        self.reservoir.add(x, mask)
        return self.quantizes

    def _due(self, reservoir: Reservoir) -> bool:
        schedule = self.schedule
        if isinstance(schedule, AfterWarmup):
            if self.last_epoch == self.epoch:
                return False
            self.last_epoch = self.epoch
            if self.quantizes:
                return True
            reservoir.empty()
            return False
        if self.epoch < self.next_due[0] or self.iteration < self.next_due[1]:
            return False
        self.next_due = (self.epoch + (schedule.every_epochs or 0), schedule.next_iteration(self.iteration))
        return True

    def _reinitialize(self, reservoir: Reservoir, x: Tensor, mask: Tensor | None, codebook: Codes) -> None:
        together = bool(getattr(codebook, "use_ddp", True))  # a codebook of one rank alone is made from its own rows
        rows, filled = reservoir.merge(together)
        K, n = codebook.embed.shape[1], int(filled.sum(-1).min())
        if n < K:
            if n or self.iteration > 1:
                _logger.warning("Reinit: skipped in epoch %d: %d rows for %d codes", self.epoch, n, K)
            return
        means, counts = self._means(rows, filled, codebook, together)
        if mask is None:
            batch = counts.new_full((len(x), 1), x.shape[1])
        else:
            batch = mask.sum(1, keepdim=True).to(counts.dtype)
        batch = (sum_(batch) if together else batch).clamp_min(1)
        counts = counts.clamp_min(1)
        codebook.set_codes(means, counts * (batch / counts.sum(1, keepdim=True)))  # counts as of one step
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None and isinstance(codebook, nn.Module):
            reset_codebook_moments(optimizer, codebook)
        reservoir.empty()
        ends = (self.schedule.max_epoch or math.inf, getattr(self.schedule, "max_iteration", None) or math.inf)
        if self.epoch > ends[0] or self.iteration > ends[1]:
            self.active = False
            reservoir.drop()

    def _means(self, rows: Tensor, filled: Tensor, codebook: Codes, together: bool) -> tuple[Tensor, Tensor]:
        """k-means on rank 0 alone: the ranks share one sample, and need the same bits."""
        G, K, D = codebook.embed.shape
        metric = self.metric or ("l2" if getattr(codebook, "metric", "l2") == "l2" else "cosine")
        seed = torch.Generator().manual_seed(int(torch.randint(2**62, ())))  # drawn on all: their generators stay equal
        means, counts = rows.new_empty(G, K, D), rows.new_empty(G, K)
        if not together or ranks()[0] == 0:
            means, counts = kmeans(rows, K, iterations=self.iterations, metric=metric, mask=filled, generator=seed)
        return (broadcast_(means), broadcast_(counts)) if together else (means, counts)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = [self.epoch, self.iteration, self.last_epoch, *self.next_due, int(self.active)]
        destination[prefix + "progress"] = torch.tensor(state)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name, rows = prefix + "progress", state_dict.get(prefix + "reservoir.rows")
        if self.reservoir is None and rows is not None:
            self.reservoir = Reservoir(self.reservoir_size, rows.shape[2], rows.shape[0], device=rows.device)
        rest = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if name not in state_dict:
            missing_keys.extend([name] if strict else [])
        elif state_dict[name].shape != (6,):
            error_msgs.append(f"Reinit: {name} must be [6], got {list(state_dict[name].shape)}")
        else:
            self.epoch, self.iteration, self.last_epoch, *due, active = state_dict[name].tolist()
            self.next_due, self.active = (due[0], due[1]), bool(active)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None, "_codebook": None}  # weak references cannot be pickled

    def extra_repr(self) -> str:
        """The settings, and how far it is."""
        text = f"{self.schedule}, reservoir_size={self.reservoir_size}, iterations={self.iterations}"
        return text + f", epoch={self.epoch}, iteration={self.iteration}" + ("" if self.active else ", ended")


def next_epoch(model: nn.Module) -> None:
    """Tell every ``Reinit`` in ``model`` that an epoch has ended."""
    for reinit in reinits(model):
        reinit.next_epoch()


def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """``Reinit.attach`` of every ``Reinit`` in ``model``."""
    for reinit in reinits(model):
        reinit.attach(optimizer)


def reinits(model: nn.Module) -> Iterator[Reinit]:
    """Every ``Reinit`` in ``model``."""
    return (module for module in model.modules() if isinstance(module, Reinit))

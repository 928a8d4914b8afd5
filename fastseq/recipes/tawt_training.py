"""The three ways of weighted training in the TAWT paper, as loops: pre-training, joint, joint normalised by size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastseq import _check
from fastseq.recipes.tawt import Shared, TaskWeights, parameters, probe

Loss = Callable[[int, Any], Tensor]  # of a task's number and a batch of it


class Batches(Sized, Iterable[Any], Protocol):
    """What a ``DataLoader`` is, or a list of batches."""


def joint(
    tasks: Sequence[Batches],
    target: int,
    loss: Loss,
    optimizer: Optimizer,
    shared: Shared,
    epochs: int,
    *,
    init: str | Sequence[float] = "uniform",
    eta: float = 1.0,
    c: float = 1.0,
    signal: str = "cosine",
    after_step: Callable[[], object] | None = None,
    after_epoch: Callable[[TaskWeights], object] | None = None,
) -> TaskWeights:
    """Train on all tasks, the target among them; weights move after each epoch, from the gradients of its steps.

    An epoch passes each task's batches once, in an order over all tasks that is drawn anew; in the first one a batch of
    the target comes first, where a source would come only before it otherwise. No other pass is made.

    Args:
        tasks: the batches of each, anew for each epoch. target: the number of that which counts.
        loss: of a task's number and one batch; what it calls is in training mode if the caller set it so.
        optimizer: of the representation and the heads. shared: the representation.
        init, eta, c, signal: as in ``TaskWeights``; eta = 0 leaves the weights as they begin.
        after_step: called after each step of the optimizer, for a scheduler. after_epoch: after each update.

    Returns:
        The weights.

    Raises:
        ArgumentError: for a value out of its range, or a task that has a weight and no batch.
    """
    weights = TaskWeights(_checked(tasks, epochs), target, init, eta, c, signal)
    own = parameters(shared)
    for _ in range(epochs):
        _pass(weights, tasks, loss, optimizer, own, after_step)
        if eta > 0:
            weights.update()
        if after_epoch is not None:
            after_epoch(weights)
    return weights


def normalized_joint(
    tasks: Sequence[Batches],
    target: int,
    loss: Loss,
    optimizer: Optimizer,
    shared: Shared,
    epochs: int,
    **options: Any,
) -> TaskWeights:
    """``joint`` from weights over which every task counts alike, however many batches it has.

    Args:
        options: all others of ``joint``, but for ``init``.
    """
    _checked(tasks, epochs)
    init = [1 / len(batches) for batches in tasks]
    return joint(tasks, target, loss, optimizer, shared, epochs, init=init, **options)


def pretraining(
    tasks: Sequence[Batches],
    target: int,
    loss: Loss,
    optimizer: Optimizer,
    shared: Shared,
    model: nn.Module,
    epochs: int,
    tuning: int,
    *,
    eta: float = 1.0,
    c: float = 1.0,
    signal: str = "cosine",
    after_step: Callable[[], object] | None = None,
    after_epoch: Callable[[TaskWeights], object] | None = None,
) -> TaskWeights:
    """Train on the sources, weighted, then on the target alone.

    After each epoch of the sources the head of the target learns for a pass, the representation held; then ``probe``
    takes one batch of every task, and the weights move.

    Args:
        tasks, target, loss, optimizer, shared, eta, c, signal, after_step, after_epoch: as in ``joint``.
        model: all that ``loss`` calls. epochs: of the sources. tuning: epochs of the target at the end, of all
            parameters.

    Returns:
        The weights, 0 for the target.

    Raises:
        ArgumentError: for a value out of its range, or a task without a batch.
    """
    weights = TaskWeights(_checked(tasks, epochs), target, "sources", eta, c, signal)
    own = parameters(shared)
    for _ in range(epochs):
        _pass(weights, tasks, loss, optimizer, own, after_step)
        if eta > 0:
            for batch in tasks[target]:
                _gradients(loss(target, batch), optimizer)
                for p in own:
                    p.grad = None  # the optimizer leaves out what has no gradient
                optimizer.step()
            if signal != "none":
                probe(weights, loss, [next(iter(batches)) for batches in tasks], model, own)
            weights.update()
        if after_epoch is not None:
            after_epoch(weights)
    for batch in itertools.chain.from_iterable(tasks[target] for _ in range(tuning)):
        _gradients(loss(target, batch), optimizer)
        _step(optimizer, after_step)
    return weights


def _checked(tasks: Sequence[Batches], epochs: int) -> int:
    """How many tasks there are."""
    _check.count("tawt", "epochs", epochs)
    empty = [t for t, batches in enumerate(tasks) if not len(batches)]
    if not tasks or empty:
        _check.fail("tawt", "tasks", "one or more, of one or more batches each", f"none of tasks {empty}")
    return len(tasks)


def _pass(
    weights: TaskWeights,
    tasks: Sequence[Batches],
    loss: Loss,
    optimizer: Optimizer,
    own: Sequence[Tensor],
    after_step: Callable[[], object] | None,
) -> None:
    """Every batch of each task that has a weight, in mixed order; what is observed are the steps' own gradients."""
    scales = [weights.scale(t) for t in range(weights.n_tasks)]
    order = torch.tensor([t for t, batches in enumerate(tasks) for _ in range(len(batches)) if scales[t] > 0])
    mixed = order[torch.randperm(len(order))].tolist()
    if weights.eta > 0 and weights.updates == 0 and weights.target in mixed:
        first = mixed.index(weights.target)  # its gradient is known from there on, in later epochs from the start
        if set(mixed[:first]) - set(mixed[first:]):
            mixed.insert(0, mixed.pop(first))
    iterators = [iter(batches) for batches in tasks]
    for t in mixed:
        _gradients(scales[t] * loss(t, next(iterators[t])), optimizer)
        weights.observe(t, own)
        _step(optimizer, after_step)


def _gradients(loss: Tensor, optimizer: Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()


def _step(optimizer: Optimizer, after_step: Callable[[], object] | None) -> None:
    optimizer.step()
    if after_step is not None:
        after_step()

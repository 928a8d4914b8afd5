"""TAWT: weights of source tasks that are learned while training, from what their gradients do for a target task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import _check

SIGNALS = ("cosine", "dot", "none")
INITS = ("uniform", "sources")

Shared = nn.Module | Iterable[Tensor]
Gradients = Sequence[Tensor | None]


class TaskWeights:
    """Weights of tasks that share a representation, on the simplex, learned by mirror descent for a target task.

    Losses are multiplied by ``scale(t)``. Between two updates ``observe`` compares the gradient of a task with the
    last one of the target, over the shared parameters alone, and ``update`` makes the step

        w_t <- w_t exp(eta * c * s_t) / sum_k w_k exp(eta * c * s_k),

    with s_t the mean of what was observed of task t, 1 for the target itself. Chen et al. 2022, "Weighted Training for
    Cross-Task Learning" (ICLR), with the inverse Hessian of the sources taken as a multiple c of the identity.

    >>> weights = TaskWeights(n_tasks=4, target=3)
    >>> for t, batch in batches:  # each of one task, in mixed order
    ...     optimizer.zero_grad()
    ...     (weights.scale(t) * loss(t, batch)).backward()
    ...     weights.observe(t, encoder)  # no pass of its own: these are the gradients of the step
    ...     optimizer.step()
    ... weights.update()  # after each epoch, say

    A weight of 0 stays 0, so with ``init="sources"`` the target takes no part in the sum (weighted pre-training).
    Where torch.distributed is initialised the means are those of all processes, which must all update; weights are then
    the same everywhere. Statistics stay on the device of the gradients until an update.

    Args:
        n_tasks: the target among them.
        target: its number, from 0.
        init: "uniform"; "sources", uniform without the target; or n_tasks numbers >= 0, which are divided by their sum.
            Joint training normalised by size starts from one over the number of examples of each task.
        eta, c: only their product matters. The paper has eta = 1 with one update an epoch; with k updates an epoch,
            eta = 1 / k makes weights move as far.
        signal: "cosine" of the gradients; "dot", their inner product over the square of the target's norm, so that long
            gradients count for more; "none", 0 for sources and still 1 for the target: the same schedule towards the
            target without anything learned, which is what learned weights must be held against.

    Raises:
        ArgumentError: for a value out of its range.
    """

    def __init__(
        self,
        n_tasks: int,
        target: int,
        init: str | Sequence[float] | Tensor = "uniform",
        eta: float = 1.0,
        c: float = 1.0,
        signal: str = "cosine",
    ) -> None:
        _check.count("TaskWeights", "n_tasks", n_tasks)
        self.n_tasks = n_tasks
        self.target = self._task("TaskWeights", "target", target)
        _check.not_negative("TaskWeights", "eta", eta)
        _check.not_negative("TaskWeights", "c", c)
        _check.one_of("TaskWeights", "signal", signal, SIGNALS)
        self.eta, self.c, self.signal = eta, c, signal
        self.updates = 0
        self._weights = self._initial(init)
        self._active = int((self._weights > 0).sum())  # how many have a weight at first
        self._found = torch.zeros(2, n_tasks, dtype=torch.float64)  # sums of signals, and how many
        self._gradients: list[Tensor | None] | None = None  # the target's last
        self._square = torch.zeros((), dtype=torch.float64)  # of their norm
        self._scale = 1.0  # of the loss that they are of

    def __repr__(self) -> str:
        return f"TaskWeights({[round(w, 4) for w in self._weights.tolist()]}, target={self.target})"

    @property
    def weights(self) -> Tensor:
        """On the simplex, [n_tasks], float64."""
        return self._weights.clone()

    def scale(self, t: int) -> float:
        """What to multiply a loss of task ``t`` by: its weight times the number of tasks that had one at first."""
        return float(self._weights[self._task("TaskWeights.scale", "t", t)]) * self._active

    def observe(self, t: int, shared: Shared | None = None, *, gradients: Gradients | None = None) -> None:
        """Take the gradient of task ``t``; that of the target is copied, to compare the others with until its next one.

        What comes before the first gradient of the target, and what is not finite, says nothing and is left out. A
        gradient of zeros is orthogonal to the target's.

        Args:
            shared: a module, or parameters, whose ``grad`` is that of a loss of this task alone, times ``scale(t)``;
                where processes average their gradients, all have the same task at a time.
            gradients: instead of that, as ``torch.autograd.grad`` gives them of a loss that was not scaled; None stands
                for zeros.

        Raises:
            ArgumentError: both or neither are given, or there are others than the target had.
        """
        t = self._task("TaskWeights.observe", "t", t)
        if (shared is None) == (gradients is None):
            _check.fail(
                "TaskWeights.observe", "shared or gradients", "one of the two", "none" if shared is None else "both"
            )
        if self.signal == "none":
            return
        found = [p.grad for p in parameters(shared)] if shared is not None else list(gradients or ())
        found = [None if g is None else g.detach() for g in found]
        scale = self.scale(t) if shared is not None else 1.0
        if t == self.target:
            self._square = square(found)
            self._gradients, self._scale = self._copied(found), scale
            return
        if self._gradients is None:
            return
        self._same(found)
        product, root = dot(found, self._gradients), self._square.sqrt()
        if self.signal == "cosine":
            s = product / (root * square(found).sqrt()).clamp_min(torch.finfo(torch.float64).tiny)
        else:
            s = product / self._square * (self._scale / scale if scale else 0.0)
        self._found = self._found.to(s.device)
        self._found[:, t] += torch.stack([s.nan_to_num(0.0, 0.0, 0.0), s.isfinite().double()])

    def update(self) -> Tensor:
        """One step of the weights, from what was observed since the last one.

        Returns:
            The signals s [n_tasks] that it was made from, float64; 0 of tasks without a weight.

        Raises:
            ArgumentError: nothing was observed of a source that has a weight.
        """
        signals = torch.zeros(self.n_tasks, dtype=torch.float64)
        if self.signal != "none":
            sums, counts = _reduced(self._found).cpu()
            unseen = [t for t in self._sources() if not counts[t]]
            if unseen:
                expected = "observed after the target and before an update, and finite"
                _check.fail("TaskWeights.update", "gradients of every source", expected, f"none of tasks {unseen}")
            signals = torch.where(self._weights > 0, sums / counts.clamp_min(1), 0.0)
            self._found = torch.zeros_like(self._found)
        signals[self.target] = float(self._weights[self.target] > 0)
        self._weights = mirror_step(self._weights, signals, self.eta * self.c)
        self.updates += 1
        return signals

    def state_dict(self) -> dict[str, Any]:
        """All that a training that goes on needs, the target's last gradients too: tensors, numbers and lists."""
        return {
            "weights": self._weights.clone(),
            "active": self._active,
            "found": self._found.clone(),
            "updates": self.updates,
            "gradients": None if self._gradients is None else self._copied(self._gradients),
            "square": self._square.clone(),
            "scale": self._scale,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the saved one stood.

        Raises:
            ArgumentError: it is not that of a TaskWeights of as many tasks.
        """
        name, mine = "TaskWeights.load_state_dict", self.state_dict()
        if state_dict.keys() != mine.keys():
            _check.fail(name, "state_dict", f"with {sorted(mine)}", f"one with {sorted(state_dict)}")
        _check.shape(name, "weights", state_dict["weights"], "n_tasks", self.n_tasks)
        self._weights, self._active = state_dict["weights"].clone(), state_dict["active"]
        self._found, self.updates = state_dict["found"].clone(), state_dict["updates"]
        gradients = state_dict["gradients"]
        self._gradients = None if gradients is None else self._copied(gradients)
        self._square, self._scale = state_dict["square"].clone(), state_dict["scale"]

    def _initial(self, init: str | Sequence[float] | Tensor) -> Tensor:
        if isinstance(init, str):
            _check.one_of("TaskWeights", "init", init, INITS)
            values = torch.ones(self.n_tasks, dtype=torch.float64)
            if init == "sources":
                values[self.target] = 0.0
        else:
            values = torch.as_tensor(init, dtype=torch.float64).detach().cpu().clone()
            _check.shape("TaskWeights", "init", values, "n_tasks", self.n_tasks)
        if not (values.isfinite().all() and (values >= 0).all() and values.sum() > 0):
            expected = "finite numbers >= 0, of tasks that take part > 0"
            _check.fail("TaskWeights", "init", expected, values.tolist())
        return values / values.sum()

    def _task(self, function: str, name: str, t: int) -> int:
        if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < self.n_tasks:
            _check.fail(function, name, f"the number of a task, 0 to {self.n_tasks - 1}", repr(t))
        return t

    def _sources(self) -> list[int]:
        return [t for t in range(self.n_tasks) if t != self.target and self._weights[t] > 0]

    def _copied(self, gradients: Gradients) -> list[Tensor | None]:
        return [None if g is None else g.clone(memory_format=torch.contiguous_format) for g in gradients]

    def _same(self, found: Gradients) -> None:
        mine = self._gradients or []
        pairs = zip(found, mine, strict=False)
        if len(found) != len(mine) or any(a is not None and b is not None and a.shape != b.shape for a, b in pairs):
            sizes = [[None if g is None else list(g.shape) for g in some] for some in (mine, found)]
            _check.fail("TaskWeights.observe", "gradients", f"of the target's shapes {sizes[0]}", sizes[1])


def mirror_step(weights: Tensor, signals: Tensor, rate: float) -> Tensor:
    """Weights on the simplex after a step of exponentiated gradient: w exp(rate * signals), over their sum.

    In logarithms, so no signal is too large; a weight of 0 stays 0.
    """
    return (weights.log() + rate * signals).softmax(0)


def parameters(shared: Shared) -> list[Tensor]:
    """Those of a module, or of an iterable, that are trained."""
    found = shared.parameters() if isinstance(shared, nn.Module) else shared
    return [p for p in found if p.requires_grad]


def dot(left: Gradients, right: Gradients) -> Tensor:
    """Inner product over all tensors, each streamed where it lies and rounded in its own dtype, but 16-bit ones in
    float32; sums over tensors in float64. A scalar on their device."""
    pairs = [(_row(a), _row(b)) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([torch.dot(a, b).double() for a, b in pairs]).sum()


def square(gradients: Gradients) -> Tensor:
    """``dot`` of gradients with themselves."""
    return dot(gradients, gradients)


def probe(
    weights: TaskWeights, loss: Callable[[int, Any], Tensor], batches: Sequence[Any], model: nn.Module, shared: Shared
) -> None:
    """Observe every task once, with a pass of its own over one batch of each, the target first.

    The model is in evaluation meanwhile, so dropout draws nothing and running statistics stay; each of its modules is
    left in the mode that it had, and ``grad`` of the parameters is not touched.

    Args:
        loss: of a task's number and a batch, not scaled.
        batches: one of each task, n_tasks of them; None for a source without a weight.
        model: all that ``loss`` calls. shared: the representation, a part of it.

    Raises:
        ArgumentError: for another number of batches.
    """
    if len(batches) != weights.n_tasks:
        _check.fail("probe", "batches", f"one of each of {weights.n_tasks} tasks", len(batches))
    own = parameters(shared)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for t in (weights.target, *weights._sources()):
            with torch.enable_grad():
                found = torch.autograd.grad(loss(t, batches[t]), own, allow_unused=True)
            weights.observe(t, gradients=found)
    finally:
        for module, training in modes:
            module.training = training


def sample_signals(losses: Tensor, shared: Shared, gradients: Gradients) -> Tensor:
    """What each example does for the target: inner product of its own gradient with the target's, over the square of
    the latter's norm.

    All at once, from one backward and a backward through it: the inner product of a weighted sum's gradient is
    differentiated by the weights. With ``mirror_step`` it weighs examples as ``TaskWeights`` does tasks, which is the
    paper's extension to samples.

    Args:
        losses: [N], one of each example, with their graph.
        shared: parameters of the representation. gradients: of the target's mean loss, one of each.

    Returns:
        [N]; 1 on average for the target's own examples.

    Raises:
        ArgumentError: losses have another number of dimensions.
    """
    if losses.dim() != 1:
        _check.fail("sample_signals", "losses", "[N], one of each example", list(losses.shape))
    ones = torch.ones_like(losses, requires_grad=True)
    found = torch.autograd.grad(losses, parameters(shared), ones, create_graph=True, allow_unused=True)
    pairs = [(a, b) for a, b in zip(found, gradients, strict=True) if a is not None and b is not None]
    total = torch.stack([(a * b).sum() for a, b in pairs]).sum()
    (signals,) = torch.autograd.grad(total, ones)
    return signals / square(gradients).to(signals)


def _row(gradient: Tensor) -> Tensor:
    if gradient.layout is not torch.strided:
        _check.fail("TaskWeights", f"the gradient of {list(gradient.shape)}", "dense", f"one of {gradient.layout}")
    return (gradient.float() if gradient.dtype.itemsize < 4 else gradient).reshape(-1)


def _reduced(found: Tensor) -> Tensor:
    """Summed over the processes of torch.distributed, on a device that its backend takes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return found
    nccl = distributed.get_backend() == "nccl"
    found = found.to("cuda" if nccl else "cpu", copy=True)
    distributed.all_reduce(found)
    return found

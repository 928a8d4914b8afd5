"""How far tasks are from a target: what their representations lack for it, as a number, a matrix and a heat map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import _check

Encoder = Callable[[Any], Tensor]
Examples = tuple[Any, Tensor]

_STEPS = 200  # of L-BFGS, at most


def task_distance(
    sources: Sequence[Encoder], target: Encoder, examples: Examples, *, ridge: float = 1e-3
) -> list[float]:
    """Of each source, the loss of the target's best head on the source's representation, less that on its own.

    Chen et al. 2022, "Weighted Training for Cross-Task Learning": the distance of a task is the excess risk for the
    target of the representation that is best for the task. Here the representations are the caller's, trained before,
    and the heads are linear: each is the optimum of a convex loss, so it depends on no seed.

    Args:
        sources: encoders, each from x to features [N, D] and trained on its task; D may differ.
        target: one trained on the target itself.
        examples: x of the target, and its labels [N], integers from 0. Examples that no encoder has seen judge best.
        ridge: times half the squared norm of a head is added to its loss, so that an optimum is reached.

    Returns:
        A number of each source; below 0 where it serves the target better than the target's own.

    Raises:
        ArgumentError: labels or features have other shapes.
    """
    own = best_head_loss(target, examples, ridge)
    return [best_head_loss(source, examples, ridge) - own for source in sources]


def task_distances(encoders: Sequence[Encoder], examples: Sequence[Examples], *, ridge: float = 1e-3) -> Tensor:
    """``task_distance`` of every task to every other.

    Args:
        encoders: one of each task, trained on it. examples: of each task.

    Returns:
        [tasks, tasks], float64: of the task of the row for that of the column as the target; zeros on the diagonal.

    Raises:
        ArgumentError: their numbers differ.
    """
    if len(encoders) != len(examples):
        _check.fail("task_distances", "examples", f"one of each of {len(encoders)} encoders", len(examples))
    risks = torch.tensor(
        [[best_head_loss(encoder, one, ridge) for one in examples] for encoder in encoders], dtype=torch.float64
    )
    return risks - risks.diag()


def distances_figure(distances: Tensor, names: Sequence[str]) -> Any:
    """A heat map of ``task_distances``, with its numbers.

    Args:
        names: of the tasks.

    Returns:
        A matplotlib figure.

    Raises:
        ArgumentError: the matrix is not square, or has another number of tasks.
    """
    from matplotlib.figure import Figure

    n = len(names)
    _check.shape("distances_figure", "distances", distances, "tasks, tasks", n, n)
    figure = Figure(figsize=(1.9 + 0.9 * n, 1.2 + 0.7 * n), layout="constrained")
    axes = figure.subplots()
    values = distances.tolist()
    image = axes.imshow(values, cmap="viridis")
    axes.set(xlabel="target", ylabel="trained on", xticks=range(n), yticks=range(n))
    axes.set_xticklabels(names, rotation=30, ha="right")
    axes.set_yticklabels(names)
    middle = (distances.max().item() + distances.min().item()) / 2
    for s in range(n):
        for t in range(n):
            ink = "black" if values[s][t] > middle else "white"
            axes.text(t, s, f"{values[s][t]:.2f}", ha="center", va="center", color=ink)
    figure.colorbar(image, label="excess loss, nats")
    return figure


@torch.no_grad()
def best_head_loss(encoder: Encoder, examples: Examples, ridge: float) -> float:
    """The least mean cross-entropy, with its ridge, that a linear head on fixed features has; in float64."""
    x, labels = examples
    features = encoder(x).double()
    _check.positive("task_distance", "ridge", ridge)
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        expected = f"[N, D] and [N], N = {labels.numel()}"
        _check.fail("task_distance", "features and labels", expected, f"{list(features.shape)}, {list(labels.shape)}")
    K = int(labels.max()) + 1
    head = torch.zeros(K, features.shape[1] + 1, dtype=torch.float64, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=_STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = F.cross_entropy(F.linear(features, head[:, :-1], head[:, -1]), labels)
            loss = loss + ridge / 2 * head[:, :-1].square().sum()
            (head.grad,) = torch.autograd.grad(loss, [head])
        return loss.detach()

    optimizer.step(closure)
    return float(closure())

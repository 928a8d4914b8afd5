"""The loops of TAWT: how often they call what, which source the weights find, and a loop written out."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import fastseq.nn
from fastseq import _check
from fastseq.recipes import TaskWeights, joint, normalized_joint, pretraining
from tests.tolerance import assert_same_bits

HELPS, HARMS, TARGET = range(3)


class Tasks(nn.Module):
    """Signs of projections of x: of one direction for the target and what helps, of its opposite for what harms."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.direction = torch.randn(6)
        self.shared = nn.Linear(6, 1, bias=False)
        self.calls = [0, 0, 0]

    def loss(self, t, x):
        self.calls[t] += 1
        labels = ((x @ self.direction > 0) ^ (t == HARMS)).float()
        return nn.functional.binary_cross_entropy_with_logits(self.shared(x)[:, 0], labels)

    def batches(self, *counts):
        return [torch.randn(n, 16, 6).unbind() for n in counts]

    def optimizer(self, rate=0.05):
        return torch.optim.SGD(self.parameters(), rate)


@pytest.mark.parametrize("signal", ["cosine", "dot"])
def test_joint_weights_find_the_source_that_helps(signal):
    model = Tasks()
    weights = joint(
        model.batches(8, 8, 2), TARGET, model.loss, model.optimizer(), model.shared, 6, signal=signal
    ).weights
    assert weights[HELPS] > 10 * weights[HARMS]
    with torch.no_grad():
        learned = float(model.loss(TARGET, torch.cat(model.batches(40)[0])))
    model = Tasks()
    weights = joint(
        model.batches(8, 8, 2), TARGET, model.loss, model.optimizer(), model.shared, 6, signal="none"
    ).weights
    assert weights[HELPS] == weights[HARMS] < weights[TARGET]
    with torch.no_grad():
        assert learned < float(model.loss(TARGET, torch.cat(model.batches(40)[0])))


def test_pretraining_weights_find_the_source_that_helps():
    class Headed(Tasks):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(3))
            with torch.no_grad():
                for head in self.heads:
                    head.weight.fill_(1.0)

        def loss(self, t, x):
            self.calls[t] += 1
            labels = ((x @ self.direction > 0) ^ (t == HARMS)).float()
            return nn.functional.binary_cross_entropy_with_logits(self.heads[t](self.shared(x))[:, 0], labels)

    model, seen = Headed(), []
    tasks = model.batches(4, 4, 2)
    weights = pretraining(
        tasks,
        TARGET,
        model.loss,
        model.optimizer(),
        model.shared,
        model,
        5,
        3,
        after_epoch=lambda w: seen.append(w.weights),
        after_step=lambda: seen.append(model.heads[TARGET].weight.item()),
    )
    assert weights.weights[TARGET] == 0 and weights.weights[HELPS] > 0.9
    assert len(seen) == 5 * (8 + 1) + 3 * 2
    # an epoch: 4 batches of each source, 2 of the target for its head, 1 of each for the weights; then 3 epochs of 2
    assert model.calls == [5 * (4 + 1), 5 * (4 + 1), 5 * (2 + 1) + 3 * 2]
    heads = seen[:8], seen[9:17]
    assert all(len(set(of_epoch)) == 1 for of_epoch in heads) and heads[0][0] != heads[1][0]


def test_the_head_of_the_target_learns_while_the_representation_is_held():
    torch.manual_seed(0)
    shared, head, found = nn.Linear(2, 2), nn.Linear(2, 1), []

    def loss(t, x):
        found.append((t, shared.weight.detach().clone(), head.weight.detach().clone()))
        return head(shared(x)).square().mean() if t == 1 else (shared(x) - 1).square().mean()

    optimizer = torch.optim.SGD([*shared.parameters(), *head.parameters()], 0.1, momentum=0.9)
    tasks = [[torch.randn(4, 2) for _ in range(n)] for n in (2, 3)]
    pretraining(tasks, 1, loss, optimizer, shared, nn.ModuleList([shared, head]), 1, 1)
    assert [t for t, _, _ in found] == [0, 0, 1, 1, 1, 1, 0, 1, 1, 1]
    held = found[2:8]
    assert all(torch.equal(weight, held[0][1]) for _, weight, _ in held)
    heads = [head for _, _, head in held]
    assert not torch.equal(heads[0], heads[1]) and torch.equal(heads[-1], heads[-2])
    assert not torch.equal(found[9][1], held[0][1])  # the last stage trains all


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = fastseq.nn.LSTM(3, 4, batch_first=True)
        self.norm, self.heads = nn.BatchNorm1d(4), nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.forwards = self.backwards = 0
        self.norm.register_full_backward_hook(self._count)

    def _count(self, *_):
        self.backwards += 1

    def loss(self, t, x):
        self.forwards += 1
        return (self.heads[t](self.norm(self.encoder(x)[0][:, -1])) - t).square().mean()


@pytest.mark.parametrize("signal", ["cosine", "none"])
def test_joint_training_makes_no_pass_but_that_of_its_steps(signal):
    torch.manual_seed(0)
    model = Counted().train()
    tasks = [list(torch.randn(n, 4, 5, 3)) for n in (3, 2, 2)]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    weights = joint(tasks, TARGET, model.loss, optimizer, model.encoder, 4, signal=signal)
    assert model.forwards == model.backwards == model.norm.num_batches_tracked == 4 * 7
    assert weights.updates == 4 and model.training
    assert (weights.weights[0] != weights.weights[1]) == (signal == "cosine")


def test_fixed_weights_train_as_a_loop_written_out():
    tasks, found = Tasks().batches(5, 3, 2), []
    for written in (False, True):
        model = Tasks()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        torch.manual_seed(3)
        if not written:
            weights = normalized_joint(tasks, TARGET, model.loss, optimizer, model.shared, 3, eta=0)
            assert weights.updates == 0
        else:
            for _ in range(3):
                order = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)[torch.randperm(10)].tolist()
                for n, t in enumerate(order):
                    optimizer.zero_grad()
                    (weights.scale(t) * model.loss(t, tasks[t][order[:n].count(t)])).backward()
                    optimizer.step()
        found.append(model.shared.weight)
    assert_same_bits("weight", *found)
    first = TaskWeights(3, TARGET, (1 / 5, 1 / 3, 1 / 2)).weights
    assert_same_bits("weights", weights.weights, first)


def test_an_epoch_has_every_batch_once_in_an_order_of_its_own():
    seen, model = [], Tasks()
    tasks = [[torch.full((1, 6), 10.0 * t + n) for n in range(count)] for t, count in enumerate((4, 3, 2))]

    def loss(t, x):
        seen.append(int(x[0, 0]))
        return model.loss(t, x)

    joint(tasks, TARGET, loss, model.optimizer(), model.shared, 2, eta=0)
    epochs = seen[:9], seen[9:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [0, 1, 2, 3, 10, 11, 12, 20, 21]
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("seed", range(6))
def test_every_source_is_compared_in_the_first_epoch(seed):
    """Whatever order is drawn: with one batch of each, most orders have a source before the target."""
    model = Tasks()
    tasks = model.batches(1, 1, 1)
    torch.manual_seed(seed)
    weights = joint(tasks, TARGET, model.loss, model.optimizer(), model.shared, 2)
    assert weights.updates == 2 and model.calls == [2, 2, 2]


def test_what_is_refused():
    model = Tasks()
    arguments = model.loss, model.optimizer(), model.shared
    for call, message in (
        (
            lambda: joint([[1], []], 0, *arguments, 1),
            "tawt: tasks must be one or more, of one or more batches each, got",
        ),
        (lambda: normalized_joint([[1], []], 0, *arguments, 1), "batches each, got none of tasks [1]"),
        (lambda: pretraining([], 0, *arguments, model, 1, 1), "tawt: tasks must be one or more"),
        (lambda: joint([[1]], 0, *arguments, 0), "tawt: epochs must be an integer >= 1, got 0"),
        (lambda: joint([[1]], 1, *arguments, 1), "TaskWeights: target must be the number of a task, 0 to 0, got 1"),
    ):
        with pytest.raises(_check.ArgumentError, match=re.escape(message)):
            call()

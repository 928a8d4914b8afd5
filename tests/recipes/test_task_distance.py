"""Distances between tasks: heads against their optimum, and what is known of them without training any."""

from __future__ import annotations

import re

import pytest
import torch

from fastseq import _check
from fastseq.recipes import distances_figure, task_distance, task_distances
from tests.tolerance import assert_within_budget


@pytest.fixture
def examples():
    x = torch.linspace(-1, 1, 40).view(20, 2).roll(7, 0)
    return x, (x[:, 0] > 0.2).long()


def whole(x):
    return x


def nothing(x):
    return x[:, :1] * 0


def test_a_representation_without_the_target_lacks_its_entropy(examples):
    own, constant = task_distance([whole, nothing], whole, examples)
    assert own == 0
    share = examples[1].double().mean()
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())
    alone = task_distance([nothing], nothing, examples)
    assert alone == [0.0] and 0 < constant < entropy


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_head_is_the_optimum(examples, ridge):
    """Of two tags of the same features: its loss, with its ridge, is that of Newton's method on the difference."""
    x, labels = examples
    found = task_distance([nothing], whole, examples, ridge=ridge)[0]

    def newton(x, labels):
        rows, y = torch.cat([x, torch.ones_like(x[:, :1])], 1), labels.to(x)
        pull = torch.tensor([ridge / 2, ridge / 2, 0]).to(x)  # half of it: the squares of two equal and opposite rows
        w = torch.zeros_like(rows[0])
        for _ in range(30):
            p = (rows @ w).sigmoid()
            slope = rows.T @ (p - y) / len(y) + pull * w
            curve = rows.T @ (rows * (p * (1 - p))[:, None]) / len(y) + torch.diag(pull)
            w = w - torch.linalg.solve(curve, slope)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(rows @ w, y) + (pull * w * w).sum() / 2
        share = y.mean()
        return -(share * share.log() + (1 - share) * (1 - share).log()) - loss

    assert_within_budget("distance", torch.tensor(found).float(), newton, [x, labels])


def test_a_matrix_of_distances(examples):
    x, labels = examples
    other = (x[:, 1] > -0.4).long() + (x[:, 1] > 0.5)
    found = task_distances([whole, nothing], [(x, labels), (x, other)])
    assert found.dtype == torch.float64 and found.diag().tolist() == [0, 0]
    assert found[1, 0] > 0 > found[0, 1]
    assert found[1, 0].item() == task_distance([nothing], whole, (x, labels))[0]
    assert found[0, 1].item() == task_distance([whole], nothing, (x, other))[0]


def test_the_heat_map():
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    figure = distances_figure(torch.tensor([[0.0, 0.125], [2.5, 0.0]]), ["words", "names"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.00", "0.12", "2.50", "0.00"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["words", "names"]
    assert axes.images[0].get_array().tolist() == [[0.0, 0.125], [2.5, 0.0]]


def test_what_is_refused(examples):
    x, labels = examples
    for call, message in (
        (lambda: task_distance([whole], whole, (x, labels[1:])), "features and labels must be [N, D] and [N], N = 19"),
        (lambda: task_distance([whole], lambda x: x[None], examples), "[N, D] and [N], N = 20, got [1, 20, 2], [20]"),
        (
            lambda: task_distance([], whole, examples, ridge=0),
            "task_distance: ridge must be a finite number > 0, got 0",
        ),
        (lambda: task_distances([whole], []), "task_distances: examples must be one of each of 1 encoders, got 0"),
        (lambda: distances_figure(torch.zeros(2, 3), "ab"), "distances must be [tasks, tasks] = [2, 2], got [2, 3]"),
    ):
        with pytest.raises(_check.ArgumentError, match=re.escape(message)):
            call()

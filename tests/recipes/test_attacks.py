"""Attacks: they raise the loss, stay within the threat, and leave the model as it was."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fastseq import _check
from fastseq.recipes import Threat, attacks
from fastseq.recipes.threat import cross_entropy, margin
from tests.recipes.adt_models import MASK, STEPS, Sequences, image_batch, images, sequence_batch
from tests.tolerance import assert_same_bits

ATTACKS = {
    "fgsm": (attacks.fgsm, {}),
    "pgd": (attacks.pgd, {"steps": 10}),
    "mim": (attacks.mim, {"steps": 10}),
    "cw": (attacks.cw, {"steps": 10}),
    "spsa": (attacks.spsa, {"steps": 5, "samples": 24, "rate": 0.3}),
}


@pytest.fixture(autouse=True)
def one_thread():
    """All is too small to be shared among threads."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_raise_the_loss_and_stay_within_the_threat(name):
    attack, options = ATTACKS[name]
    model = Sequences()
    x, labels = sequence_batch()
    threat = Threat(0.5, clamp=(-1.0, 1.0), normalise=torch.tensor([1.0, 0.5, 0.0]))
    x = x.clamp(-1, 1)
    got = attack(model, x, labels, threat, STEPS, mask=MASK, **options)
    assert bool(((got - x).abs() <= 0.5 * torch.tensor([1.0, 0.5, 0.0]) + 1e-6).all()) and bool((got.abs() <= 1).all())
    assert_same_bits("padding", got[~MASK], x[~MASK])
    objective = margin if name in ("cw", "spsa") else cross_entropy
    with torch.no_grad():
        before, after = (objective(model(v, STEPS), labels) for v in (x, got))
    assert float(after.mean()) > float(before.mean()) + 0.02
    assert not got.requires_grad


@pytest.mark.parametrize("name", ATTACKS)
def test_the_model_is_left_as_it_was(name):
    attack, options = ATTACKS[name]
    model = images()
    x, labels = image_batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attack(model, x, labels, Threat(0.1, clamp=(0.0, 1.0)), **options)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert_same_bits(list(before), list(model.state_dict().values()), list(before.values()))


def test_fgsm_is_one_step_by_the_sign():
    x, labels = sequence_batch()
    model = Sequences()
    leaf = x.clone().requires_grad_()
    cross_entropy(model(leaf), labels).sum().backward()
    got = attacks.fgsm(model, x, labels, Threat(0.25))
    assert_same_bits("x", got, torch.minimum(torch.maximum(x + 0.25 * leaf.grad.sign(), x - 0.25), x + 0.25))


def test_starts_by_seed():
    x, labels = sequence_batch()
    model, threat = Sequences(), Threat(0.2)
    first, same, other = (attacks.pgd(model, x, labels, threat, steps=1, step=0.1, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, same) and bool((first != other).any())


def test_a_linear_model_has_a_known_worst_case():
    """All attacks go to the corner of the box that the margin's gradient shows."""
    model = nn.Linear(4, 2)
    x, labels = torch.zeros(3, 4), torch.tensor([0, 1, 0])
    way = (model.weight[1] - model.weight[0]).sign()
    corner = 0.5 * torch.stack([way, -way, way]).detach()
    for name, (attack, options) in ATTACKS.items():
        if name != "spsa":
            assert_same_bits(name, attack(model, x, labels, Threat(0.5), **options), corner)
    found = attacks.spsa(model, x, labels, Threat(0.5), steps=20, samples=32, rate=0.3)
    assert torch.equal(found.sign(), corner.sign())


def test_features_move_to_those_of_another_class():
    x, _ = sequence_batch()
    labels = torch.tensor([0, 0, 1, 1, 2, 0])  # aims: 2, 2, 4, 4, 5, 2
    model = Sequences()

    def features(v):
        return model.lstm(v)[0][:, -1]

    got = attacks.feature(features, x, labels, Threat(0.5), module=model, steps=15)
    aim = features(x[[2, 2, 4, 4, 5, 2]])
    before, after = (nn.functional.cosine_similarity(features(v), aim) for v in (x, got))
    assert bool((after > before).all())
    assert float((got - x).abs().max()) <= 0.5 + 1e-6


def test_what_is_withstood():
    model = nn.Identity()
    labels = torch.tensor([0, 1, 0])
    right = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    wrong = torch.tensor([[2.0, 1.0], [1.0, 0.0], [3.0, 0.0]])
    assert attacks.withstood(model, labels, [right]).tolist() == [True] * 3
    assert attacks.withstood(model, labels, [right, wrong]).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        (attacks.pgd, {"steps": 0}, "pgd: steps must be an integer >= 1, got 0"),
        (attacks.pgd, {"step": -1}, "pgd: step must be a finite number > 0, got -1"),
        (attacks.mim, {"decay": -1}, "pgd: decay must be a finite number >= 0, got -1"),
        (attacks.spsa, {"samples": 0}, "spsa: samples must be an integer >= 1, got 0"),
        (attacks.spsa, {"steps": 0}, "spsa: steps must be an integer >= 1, got 0"),
        (attacks.spsa, {"rate": 0}, "spsa: rate must be a finite number > 0, got 0"),
        (attacks.spsa, {"sigma": 0}, "spsa: sigma must be a finite number > 0, got 0"),
    ],
)
def test_what_is_refused(attack, options, message):
    x, labels = sequence_batch()
    with pytest.raises(_check.ArgumentError, match=re.escape(message)):
        attack(Sequences(), x, labels, Threat(0.1), **options)

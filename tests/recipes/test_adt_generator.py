"""ADT's generators: what they climb and learn, and that two processes share them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from fastseq import reference
from fastseq.recipes import ADT
from tests.recipes import adt_ranks
from tests.recipes.adt_models import MASK, STEPS, Sequences, sequence_batch
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget


@pytest.fixture(autouse=True)
def one_thread():
    """All is too small to be shared among threads."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["exp_am", "imp_am"])
def test_the_generator_climbs(name):
    """With the model fixed, its own steps from the same backward make the model's loss larger."""
    x, labels = sequence_batch()
    torch.manual_seed(0)
    model = Sequences().eval().requires_grad_(False)
    adt = ADT(model, 1.0, 0.01, name, channels=3)
    optimizer = torch.optim.Adam(adt.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = adt(x, labels, STEPS, mask=MASK)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) > sum(losses[:5]) + 0.5


def test_gradients_of_the_generator():
    """Those of minus the loss minus the entropy, by autograd."""
    x, labels = sequence_batch(torch.float64)
    torch.manual_seed(0)
    model = Sequences().double().eval()
    adt = ADT(model, 0.3, 0.05, "exp_am", channels=3).double()
    for p in adt.generator.last.parameters():
        nn.init.normal_(p, std=0.1)
    twin = copy.deepcopy(adt)
    adt(x, labels, mask=MASK).backward()
    got = [p.grad for p in adt.parameters()]
    radius = twin.threat.radius(x, MASK)
    mu, rho = twin.generator(twin._features(x, labels, (), radius)).chunk(2, 2)
    r = reference.adt_noise(twin._seed(x.device), 1, len(x), x[0].numel(), 0, x.dtype).view(1, *x.shape)
    entropy = reference.adt_entropy(mu, rho, r, torch.ones_like(x))[0] * MASK[..., None]
    share = entropy.flatten(1).sum(1) / (3 * MASK.sum(1))
    loss = F.cross_entropy(model(reference.adt_sample(x, mu, rho, r, radius)[0]), labels)
    expected = torch.autograd.grad(-loss - 0.05 * share.mean(), list(twin.parameters()))
    for one, e in zip(got, expected, strict=True):
        assert float((one - e).abs().max()) <= 1e-10 * float(e.abs().max())


def test_the_encoder_learns_what_the_noise_was():
    """With a threshold out of reach, the surprise falls below that of an encoder that looks at nothing, 0.87."""
    x, labels = sequence_batch()
    torch.manual_seed(0)
    x, labels = x.repeat(2, 1, 1), labels.repeat(2)
    adt = ADT(Sequences(), 1.0, 1.0, "imp_am", channels=3, threshold=-10.0)
    optimizer = torch.optim.Adam(adt.parameters(), 1e-2)
    found = []
    for _ in range(100):
        radius = adt.threat.radius(x, None)
        penalty = adt._generated(x, labels, (), radius, adt._weight(x, None, x.dtype), adt._seed(x.device))[1]
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        found.append(float(penalty.detach()) - 10)
    assert found[-1] < 0.869 < found[0]


# --- two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes leaves."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", adt_ranks.__name__, str(folder)]
    options = {"cwd": Path(__file__).parents[2], "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    running = [subprocess.Popen([*command, rank], stderr=subprocess.PIPE, text=True, **options) for rank in "01"]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in running]
    finally:
        for rank in running:
            rank.kill()
    assert [rank.returncode for rank in running] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_draw_different_noise(ranks):
    """Each learns on another sample of the same rows, and DistributedDataParallel gives both the same gradients."""
    first, second = ranks
    assert bool((first["perturbed"] != second["perturbed"]).any())
    names = list(first["gradients"])
    assert_same_bits(names, [second["gradients"][n] for n in names], [first["gradients"][n] for n in names])
    x, labels = sequence_batch()
    torch.manual_seed(0)
    assert_same_bits("rank0", first["perturbed"], ADT(Sequences(), 0.3).perturb(x, labels))


@pytest.mark.parametrize("name", adt_ranks.VARIANTS)
def test_two_processes_share_a_generator(name, ranks):
    """It starts as that of the first process, and each gradient is the mean of what they would have alone."""
    first, second = (rank[name] for rank in ranks)
    names = [f"p{n}" for n in range(len(first["own"]))]
    for result in ("learnt", "averaged"):
        assert_same_bits(names, second[result], first[result])
    own = list(zip(first["own"], second["own"], strict=True))
    assert any(not torch.equal(*pair) for pair in own)
    assert_within_budget(names, first["averaged"], lambda p: [(a + b) / 2 for a, b in p], (own,), GRADIENTS)

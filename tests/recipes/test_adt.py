"""ADT: what it ascends, in both modes and all variants, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from torch.nn import functional as F

from fastseq import _check, reference
from fastseq.recipes import ADT, LatentEncoder, PerturbationGenerator
from fastseq.recipes.threat import cross_entropy
from tests.recipes.adt_models import MASK, STEPS, Sequences, image_batch, images, sequence_batch
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

VARIANTS = {"exp": {}, "exp_am": {"channels": 3, "dims": 1}, "imp_am": {"channels": 3, "dims": 1, "lam": 1.0}}


@pytest.fixture(autouse=True)
def one_thread():
    """All is too small to be shared among threads."""
    torch.set_num_threads(1)


def state(model):
    return [p.detach().clone() for p in model.parameters()], [b.clone() for b in model.buffers()]


@pytest.fixture(params=VARIANTS)
def variant(request):
    return {"variant": request.param, **VARIANTS[request.param]}


# --- the ascent


SEED = torch.tensor([5])


def search(adt, x, labels, mask=None):
    """mu and rho that the recipe finds."""
    return adt._ascended(x, labels, (), adt.threat.radius(x, mask), adt._weight(x, mask, x.dtype), SEED)


def drawn(adt, x):
    """The noise of each step."""
    sizes = (adt.samples, len(x), x[0].numel())
    return [reference.adt_noise(SEED, *sizes, step, x.dtype).view(-1, *x.shape) for step in range(adt.steps)]


def ascended(adt, x, labels, noise, mask=None):
    """mu and rho by the definition, with autograd through all of it."""
    model, eps = adt._model[1], adt.threat.radius(x, mask)
    valid = torch.ones_like(x) if mask is None else mask[..., None].expand_as(x).to(x)
    mu, rho = torch.zeros_like(x), torch.zeros_like(x)
    totals = [torch.zeros_like(x), torch.zeros_like(x)]
    low, high = adt.threat.limits
    for r in noise:
        mu, rho = mu.requires_grad_(), rho.requires_grad_()
        x_adv = reference.adt_sample(x, mu, rho, r, eps, low, high)
        entropy = reference.adt_entropy(mu, rho, r, torch.ones_like(x)) * valid
        if adt.mode == "compat":  # one backward for each sample, of means over the batch; gradients are never zeroed
            gained = sum(
                F.cross_entropy(model(one), labels) + adt.lam * h.sum() / valid.sum()
                for one, h in zip(x_adv, entropy, strict=True)
            )
        else:
            share = valid.flatten(1).sum(1) if adt.entropy == "mean" else torch.ones(len(x), dtype=x.dtype)
            gained = sum(
                (F.cross_entropy(model(one), labels, reduction="none") + adt.lam * h.flatten(1).sum(1) / share).sum()
                for one, h in zip(x_adv, entropy, strict=True)
            )
        found = torch.autograd.grad(gained, (mu, rho))
        if adt.mode == "compat":
            totals = [total + d for total, d in zip(totals, found, strict=True)]
            found = [total / (total.square().sqrt() + 1e-8) for total in totals]
        else:
            found = [d.sign() for d in found]
        mu, rho = (v.detach() + adt.rate * d for v, d in zip((mu, rho), found, strict=True))
    return mu, rho


@pytest.mark.parametrize("clamp", [None, (-0.5, 0.5)])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("options", [{"mode": "fixed"}, {"mode": "fixed", "entropy": "sum"}, {"mode": "compat"}])
def test_the_ascent_is_the_definition(options, mask, clamp):
    """In float64, where a sign that rounding decides is out of reach."""
    model = Sequences().double().eval()
    x, labels = sequence_batch(torch.float64)
    if clamp is not None:
        x = x.clamp(*clamp)
    adt = ADT(model, 0.3, 0.02, steps=3, samples=2, clamp=clamp, **options)
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask[..., None].expand_as(x)
    got = search(adt, x, labels, mask)
    for one, expected in zip(got, ascended(adt, x, labels, drawn(adt, x), mask), strict=True):
        assert float((one - expected).abs().max()) < 1e-6  # of steps of 0.3; compat's are not quite whole
    if mask is not None:
        assert bool((got[0][~mask] == 0).all())
    assert bool((got[0][valid] != 0).all())


def test_compat_is_adam_that_never_forgets():
    """The authors' optimizer: Adam with betas of 0 on gradients that nothing zeroes."""
    adt = ADT(Sequences().double().eval(), 0.3, 0.02, steps=5, samples=2, mode="compat")
    x, labels = sequence_batch(torch.float64)
    got = search(adt, x, labels)
    mu, rho = (torch.zeros_like(x, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([mu, rho], lr=0.3, betas=(0.0, 0.0))
    for noise in drawn(adt, x):
        for r in noise:
            sigma = F.softplus(rho)
            a = torch.tanh(mu + sigma * r)
            entropy = (r.square() / 2 + sigma.log() + (1 - a.square()).log()).mean()
            (-F.cross_entropy(adt._model[0](x + 0.3 * a), labels) - 0.02 * entropy).backward()
        optimizer.step()
    for one, expected in zip(got, (mu, rho), strict=True):
        assert float((one - expected.detach()).abs().max()) < 1e-6
    other = ADT(adt._model[0], 0.3, 0.02, steps=5, samples=2)
    fixed = search(other, x, labels)
    assert float((fixed[0] - mu.detach()).abs().max()) > 0.29


@pytest.mark.parametrize("fold", [None, 1, 4, 7])
def test_samples_fold_into_the_batch(fold):
    x, labels = sequence_batch()
    model = Sequences().double()
    got = ADT(model, 0.3, samples=5, fold=fold).perturb(x.double(), labels, STEPS, mask=MASK)
    assert_within_budget(
        "x", got, lambda v: v, (ADT(model, 0.3, samples=5, fold=5).perturb(x.double(), labels, STEPS, mask=MASK),)
    )


def test_more_steps_and_no_entropy_go_up():
    x, labels = sequence_batch()
    model = Sequences().eval()

    def loss(**options):
        found = ADT(model, 1.0, steps=12, samples=8, **options).perturb(x, labels)
        return float(cross_entropy(model(found), labels).mean().detach())

    sought = loss(lam=0.0)
    assert sought > float(cross_entropy(model(x), labels).mean().detach()) + 0.1
    assert sought > loss(lam=1e3)


def test_an_example_does_not_depend_on_the_others():
    """In the fixed mode; with the same noise."""
    x, labels = sequence_batch(torch.float64)
    model = Sequences().double()
    both = []
    for other in (1.0, 50.0):
        changed = torch.cat([x[:1], other * x[1:]])
        both.append(ADT(model, 0.3).perturb(changed, labels)[0])
    assert_same_bits("first", *both)


# --- all variants


def test_perturbations_are_possible(variant):
    x, labels = sequence_batch()
    x = x.clamp(-1, 1)
    adt = ADT(Sequences(), 0.2, clamp=(-1.0, 1.0), normalise=torch.tensor([1.0, 2.0, 0.0]), **variant)
    got = adt.perturb(x, labels, STEPS, mask=MASK)
    far = (got - x).abs()
    bound = 0.2 * torch.tensor([1.0, 2.0, 0.0])
    assert bool((far <= bound + 1e-6).all()) and bool((got.abs() <= 1).all())
    assert_same_bits("padding", got[~MASK], x[~MASK])
    assert_same_bits("fixed", got[..., 2], x[..., 2])
    assert variant["variant"] != "exp" or bool((far[..., :2][MASK] > 0).any(1).all())


def test_the_model_is_left_as_it_was(variant):
    model = images()
    model[1].eval()  # a mode of its own
    model[5].bias.requires_grad_(False)
    x, labels = image_batch()
    model(x).sum().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    before, draws = state(model), torch.get_rng_state()
    adt = ADT(
        model, 0.1, clamp=(0.0, 1.0), **variant | ({} if variant["variant"] == "exp" else {"channels": 2, "dims": 2})
    )
    assert not {id(p) for p in adt.parameters()} & {id(p) for p in model.parameters()}
    draws = torch.get_rng_state()
    adt.perturb(x, labels)
    assert torch.equal(draws, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
    after = state(model)
    for k in range(2):
        assert_same_bits(["t"] * len(before[k]), after[k], before[k])
    for grad, p in zip(grads, model.parameters(), strict=True):
        assert (grad is None) == (p.grad is None)
        assert grad is None or torch.equal(grad, p.grad)


def test_a_model_that_fails_is_left_as_it_was():
    model = Sequences()
    with pytest.raises(RuntimeError):
        ADT(model, 0.1).perturb(torch.zeros(2, 3, 9), torch.zeros(2, dtype=torch.long))
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_the_loss_is_the_models_own_on_that_sample(variant):
    """Its value, and its gradients in the model; with batch norm in training mode."""
    x, labels = image_batch()
    torch.manual_seed(0)
    model = images()
    del model[3]  # dropout, whose draws differ
    options = variant | ({} if variant["variant"] == "exp" else {"channels": 2, "dims": 2})
    adt = ADT(model, 0.1, clamp=(0.0, 1.0), **options)
    twin, adt_twin = copy.deepcopy(model), copy.deepcopy(adt)
    loss = adt(x, labels)
    loss.backward()
    expected = F.cross_entropy(twin(adt_twin.perturb(x, labels)), labels)
    expected.backward()
    assert_within_budget("loss", loss.detach(), lambda v: v, (expected.detach(),))
    got, truth = ([p.grad for p in m.parameters()] for m in (model, twin))
    assert_within_budget(["grad"] * len(got), got, lambda *v: v, truth, GRADIENTS)
    assert_same_bits("mean", model[1].running_mean, twin[1].running_mean)


def test_the_same_again_with_the_same_seed(variant):
    x, labels = sequence_batch()
    torch.manual_seed(0)
    first = ADT(Sequences(), 0.3, seed=4, **variant)
    second = copy.deepcopy(first)
    found = [first.perturb(x, labels) for _ in range(3)]
    assert_same_bits("a b c", [second.perturb(x, labels) for _ in range(3)], found)
    if variant["variant"] != "exp_am":
        assert not torch.equal(found[0], found[1])
    third = copy.deepcopy(first)
    third.seed = 5
    if variant["variant"] == "exp":
        assert not torch.equal(third.perturb(x, labels), first.perturb(x, labels))


def test_going_on_from_a_saved_state():
    x, labels = sequence_batch()
    model = Sequences()
    adt = ADT(model, 0.3)
    adt.perturb(x, labels)
    file = io.BytesIO()
    torch.save(adt.state_dict(), file)
    file.seek(0)
    again = ADT(model, 0.3)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits("second", again.perturb(x, labels), adt.perturb(x, labels))


def test_under_no_grad_and_as_a_function_of_the_input():
    x, labels = sequence_batch()
    model = Sequences()
    expected = ADT(model, 0.3).perturb(x, labels)
    adt = ADT(lambda v: model(v), 0.3, module=model)
    with torch.no_grad():
        got = adt.perturb(x.requires_grad_(), labels)
    assert not got.requires_grad and x.grad is None
    assert_same_bits("x", got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_sixteen_bits(dtype, variant):
    x, labels = sequence_batch(dtype)
    model = Sequences()
    adt = ADT(lambda v: model(v.float()), 0.2, module=model, **variant)
    got = adt.perturb(x, labels)
    assert got.dtype == dtype and bool(got.isfinite().all())
    assert float((got - x).abs().max()) < 0.22


@pytest.mark.parametrize(("dims", "shape"), [(0, (2, 3)), (1, (2, 5, 3)), (2, (2, 3, 5, 7))])
def test_layouts(dims, shape):
    x = torch.randn(shape)
    channel = 1 if dims == 2 else -1
    features = torch.cat([x, x, x], channel)
    out = PerturbationGenerator(3, dims)(features)
    assert bool((out == 0).all()) and out.shape == torch.cat([x, x], channel).shape
    made = PerturbationGenerator(3, dims, 1, latent=4)(features, torch.randn(2, 4))
    assert made.shape == x.shape and bool((made != 0).any())
    assert [v.shape for v in LatentEncoder(3, dims, 4)(x)] == [(2, 4), (2, 4)]


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "Threat: eps must be a finite number > 0, got 0"),
        ({"clamp": (1, 0)}, "Threat: clamp must be (low, high) with low < high, or None, got (1, 0)"),
        ({"normalise": "rows"}, "Threat: normalise must be one of 'batch', got 'rows'"),
        ({"lam": -1}, "ADT: lam must be a finite number >= 0, got -1"),
        ({"variant": "imp"}, "ADT: variant must be one of 'exp', 'exp_am', 'imp_am', got 'imp'"),
        ({"mode": "paper"}, "ADT: mode must be one of 'fixed', 'compat', got 'paper'"),
        ({"entropy": "sum", "mode": "compat"}, "ADT: entropy must be one of 'mean', got 'sum'"),
        ({"steps": 0}, "ADT: steps must be an integer >= 1, got 0"),
        ({"samples": 1.5}, "ADT: samples must be an integer >= 1, got 1.5"),
        ({"rate": 0}, "ADT: rate must be a finite number > 0, got 0"),
        ({"fold": 0}, "ADT: fold must be an integer >= 1, got 0"),
        ({"variant": "exp_am"}, "ADT: channels must be given, of the input, with variant='exp_am', got None"),
        ({"variant": "exp_am", "channels": 3, "dims": 3}, "PerturbationGenerator: dims must be 0, 1 or 2, got 3"),
        ({"variant": "exp_am", "channels": 0}, "ADT: channels must be an integer >= 1, got 0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(_check.ArgumentError, match=re.escape(message)):
        ADT(Sequences(), **{"eps": 0.1} | options)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (
            torch.zeros(6, 5, 3, dtype=torch.long),
            {},
            "Threat: x must be of floating point (perturb embeddings",
        ),
        (torch.zeros(5, 5, 3), {}, "ADT: x must be [B, ...] with B = 6, that of labels, got [5, 5, 3]"),
        (torch.zeros(6, 5, 3), {"mask": MASK.float()}, "Threat: mask must be torch.bool, got torch.float32"),
        (
            torch.zeros(6, 5, 3),
            {"mask": MASK[:, :4]},
            "Threat: mask must be [B, T] of or broadcast to the input, [6",
        ),
    ],
)
def test_inputs_that_are_refused(x, options, message):
    _, labels = sequence_batch()
    with pytest.raises(_check.ArgumentError, match=re.escape(message)):
        ADT(Sequences(), 0.1)(x, labels, **options)


def test_spreads_and_losses_of_another_size_are_refused():
    x, labels = sequence_batch()
    with pytest.raises(_check.ArgumentError, match=r"Threat: normalise must be broadcast to the input, \[6, 5, 3\]"):
        ADT(Sequences(), 0.1, normalise=torch.ones(4))(x, labels)
    with pytest.raises(_check.ArgumentError, match=r"objective: result must be a number of each row, \[30\], got \[\]"):
        ADT(Sequences(), 0.1, objective=F.cross_entropy)(x, labels)

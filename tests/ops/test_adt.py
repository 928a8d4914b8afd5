"""``adt_*``: the definition against autograd, quadrature and what is known; the functions against the definition."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.nn import functional as F

from fastseq import _check, functional, reference
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

CASES = {"one": (1, 1, 1), "odd": (3, 5, 7), "images": (2, 3, 1, 4, 5), "wide": (5, 2, 1031), "no rows": (2, 0, 3)}
CLAMPS = [None, (0.0, 1.0)]


def inputs(case, dtype=torch.float32, far=1.0):
    """x, mu, rho, noise, eps, weight and an upstream gradient."""
    S, *shape = CASES[case]
    generator = torch.Generator().manual_seed(3)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    x = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    eps = 0.1 + torch.rand(shape[-1], generator=generator, dtype=torch.float64).to(dtype)
    return x, far * normal(*shape), normal(*shape), normal(S, *shape), eps, normal(*shape).abs(), normal(S, *shape)


def limits(clamp):
    return clamp or (-math.inf, math.inf)


def by_autograd(g, x, mu, rho, noise, eps, weight, low, high):
    mu, rho = (v.detach().requires_grad_() for v in (mu, rho))
    gained = (g * reference.adt_sample(x, mu, rho, noise, eps, low, high)).sum()
    gained = gained + (weight * reference.adt_entropy(mu, rho, noise, eps)).sum()
    return torch.autograd.grad(gained, (mu, rho))


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_is_the_gradient(case, clamp):
    x, mu, rho, noise, eps, weight, g = inputs(case, torch.float64)
    got = reference.adt_backward(g, x, mu, rho, noise, eps, weight, *limits(clamp))
    for one, expected in zip(got, by_autograd(g, x, mu, rho, noise, eps, weight, *limits(clamp)), strict=True):
        assert one.shape == mu.shape
        assert not len(one) or float((one - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


def test_gradcheck():
    x, mu, rho, noise, eps, _, _ = inputs("odd", torch.float64)
    mu, rho = mu.requires_grad_(), rho.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, r: functional.adt_sample(x, m, r, noise, eps), (mu, rho))
    assert torch.autograd.gradcheck(lambda m, r: functional.adt_entropy(m, r, noise, eps), (mu, rho))


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_are_the_definition(case, clamp, dtype):
    x, mu, rho, noise, eps, weight, g = inputs(case, dtype)
    direction = functional.adt_direction(mu, rho, noise)
    got = functional.adt_moved(x, direction, eps, clamp)
    args = (x, mu, rho, noise, eps)
    assert_within_budget("moved", got, lambda *a: reference.adt_sample(*a, *limits(clamp)), args)
    assert_same_bits("sample", functional.adt_sample(*args, clamp), got)
    assert_within_budget("entropy", functional.adt_entropy(*args[1:]), reference.adt_entropy, args[1:])
    got = functional.adt_backward(g, x, direction, rho, noise, eps, weight, clamp)
    truth = (g, *args, weight)
    assert_within_budget("dmu drho", got, lambda *a: reference.adt_backward(*a, *limits(clamp)), truth, GRADIENTS)


def test_gradients_of_a_sample_and_strided_inputs():
    x, mu, rho, noise, eps, weight, g = inputs("odd", torch.float64)
    strided = [v.mT.contiguous().mT for v in (x, mu, rho)]
    mu_, rho_ = (v.requires_grad_() for v in strided[1:])
    functional.adt_sample(strided[0], mu_, rho_, noise, eps, (0.0, 1.0)).backward(g)
    zero = torch.zeros_like(mu)
    args = (g, x, mu, rho, noise, eps, zero)
    got = (mu_.grad, rho_.grad)
    assert_within_budget("dmu drho", got, lambda *a: reference.adt_backward(*a, 0.0, 1.0), args, GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("far", [20.0, -20.0])
def test_sixteen_bits_far_out(dtype, far):
    """At |u| = 20 the slope of tanh rounds to 0 in every width, and 1 - tanh ** 2 would have log -inf."""
    x, mu, rho, noise, eps, weight, g = inputs("odd", dtype)
    mu, rho = torch.full_like(mu, far), torch.full_like(rho, -3.0)
    entropy = reference.adt_entropy(mu, rho, noise, eps)
    assert entropy.dtype == dtype and bool(entropy.isfinite().all())
    assert_within_budget("entropy", entropy, reference.adt_entropy, (mu, rho, noise, eps))
    args = (g, x, mu, rho, noise, eps, weight)
    assert_within_budget("dmu drho", reference.adt_backward(*args), reference.adt_backward, args, GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_sixteen_bits_are_rounded_once(dtype):
    x, mu, rho, noise, eps, _, _ = inputs("odd")
    got = functional.adt_sample(x.to(dtype), mu, rho, noise, eps)
    assert got.dtype == dtype
    wide = functional.adt_sample(x.to(dtype).float(), mu, rho, noise, eps)
    assert_same_bits("moved", got.float(), wide.to(dtype).float())


@pytest.mark.parametrize("rho", [-200.0, -90.0, -79.0, 50.0])
def test_spreads_of_every_size(rho):
    x, mu, _, noise, eps, weight, g = inputs("odd")
    rho = torch.full_like(mu, rho)
    direction = functional.adt_direction(mu, rho, noise)
    got = functional.adt_backward(g, x, direction, rho, noise, eps, weight)
    assert all(bool(v.isfinite().all()) for v in got)
    args = (g, x, mu, rho, noise, eps, weight)
    assert_within_budget("dmu drho", got, reference.adt_backward, args, GRADIENTS)


def test_the_entropy_by_quadrature():
    """-log density is that of the change of variables, and the mean that of the distribution, 0.648 at the start."""
    mu, rho = (torch.zeros(1, dtype=torch.float64) for _ in range(2))
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    sigma = F.softplus(rho)
    of_u = torch.distributions.Normal(mu, sigma).log_prob(u).exp()
    delta = 0.3 * u.tanh()
    density = of_u / (0.3 * (1 - u.tanh() ** 2))
    got = reference.adt_entropy(mu, rho, (u / sigma)[:, None], torch.tensor([0.3], dtype=torch.float64))[:, 0]
    core = u.abs() < 4  # further out 1 - tanh ** 2 loses its digits
    assert float((got + density.log())[core].abs().max()) < 1e-10
    mean = float(torch.trapezoid(of_u * got, u))
    assert mean == pytest.approx(math.log(0.3) + 0.648, abs=1e-3)
    assert mean < math.log(0.6)  # that of the uniform one
    assert float(torch.trapezoid(density, delta)) == pytest.approx(1, abs=1e-4)


def test_where_nothing_moves_there_is_no_entropy():
    x, mu, rho, noise, eps, _, _ = inputs("odd")
    eps = eps * (torch.arange(7) != 2)
    got = functional.adt_entropy(mu, rho, noise, eps)
    assert bool((got[..., 2] == 0).all()) and bool((got[..., 1] != 0).any())
    assert_same_bits("moved", functional.adt_sample(x, mu, rho, noise, eps)[..., 2], x[..., 2].expand(3, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": torch.zeros(5, 7, dtype=torch.float16)}, "mu must be of float32 or float64, got torch.float16"),
        ({"rho": torch.zeros(5, 6)}, "rho must be [B, ...] = [5, 7], got [5, 6]"),
        ({"rho": torch.zeros(5, 7, dtype=torch.float64)}, "rho must be torch.float32, got torch.float64"),
        ({"noise": torch.zeros(5, 7)}, "noise must be [S, B, ...] = [S, 5, 7], got [5, 7]"),
        ({"noise": torch.zeros(3, 5, 7, dtype=torch.float64)}, "noise must be torch.float32, got torch.float64"),
        ({"x": torch.zeros(5, 8)}, "x must be [B, ...] = [5, 7], got [5, 8]"),
    ],
)
def test_what_is_refused(change, message):
    x, mu, rho, noise, eps, _, _ = inputs("odd")
    args = {"x": x, "mu": mu, "rho": rho, "noise": noise, "eps": eps} | change
    with pytest.raises(_check.ArgumentError, match=re.escape(f"adt_sample: {message}")):
        functional.adt_sample(**args)


def test_gradients_of_another_size_are_refused():
    x, mu, rho, noise, eps, weight, g = inputs("odd")
    with pytest.raises(ValueError, match=re.escape("adt_backward: g must be [S, B, ...] = [3, 5, 7], got [2, 5, 7]")):
        functional.adt_backward(g[:2], x, noise, rho, noise, eps, weight)

"""``adt_*``: the definition against autograd, quadrature and what is known; every backend against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fastseq import reference
from fastseq.ops.adt import BACKENDS
from tests.ops import lstm_cases
from tests.ops import mimo_rows as rows
from tests.ops.adt_cases import CASES, LIMITS, STEP, Case, inputs
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

OPS = torch.ops.fastseq
# the interpreter's, of quotients that are not taken
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_limit = pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())


def each_backend(op, *sizes):
    """With the dtypes of x whose numbers have so many bytes; with all of them where none is named."""
    found = [p for p in rows.backends(op, BACKENDS) if not sizes or p.values[1].itemsize in sizes]
    return pytest.mark.parametrize("backend, dtype", found)


def run(op, backend, *args):
    return lstm_cases.run(op, backend, *args, table=BACKENDS)


def definition(op):
    return next(b.run for b in BACKENDS[op] if b.name == "reference")


def noise_of(given, S):
    """Of the step of these tests, in float64."""
    return reference.adt_noise(given.seed, S, *given.mu.shape, STEP, torch.float64)


# --- the definition


def by_autograd(given, limits):
    """Gradients of mu and rho, through all that forward does; eps stays above zero."""
    mu, rho = (v.detach().requires_grad_() for v in (given.mu, given.rho))
    noise, eps = noise_of(given, len(given.g)), given.eps
    gained = (given.g * reference.adt_sample(given.x, mu, rho, noise, eps, *limits)).sum()
    moves = (eps > 0).expand(mu.shape)
    entropy = reference.adt_entropy(mu, rho, noise, torch.where(eps > 0, eps, 1.0))
    gained = gained + (given.weight[:, None] * entropy * moves).sum()
    return torch.stack(torch.autograd.grad(gained, (mu, rho)))


@each_limit
@each_case
@pytest.mark.parametrize("backend", ["reference", *lstm_cases.compiled("adt_backward", BACKENDS)])
def test_the_closed_form_is_the_gradient(backend, case, limits):
    given = inputs(case, torch.float64)
    got = run("adt_backward", backend, *given.gradient, STEP, *limits)
    expected = by_autograd(given, limits)
    assert got.shape == expected.shape
    assert not got.numel() or float((got - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


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


# --- noise


@each_case
@each_backend("adt_noise", 4, 8)
def test_noise(backend, dtype, case):
    given = inputs(case, dtype)
    got = run("adt_noise", backend, given.mu, given.seed, case.S, STEP)
    args = (given.seed, *case[:3], STEP, dtype)
    assert_within_budget("noise", got, reference.adt_noise, args)


@pytest.mark.parametrize("backend", lstm_cases.compiled("adt_noise", BACKENDS))
def test_the_law_of_the_noise(backend):
    """Moments of N(0, 1), no correlation of neighbours, pairs, samples, rows or steps, and tails."""
    like, seed = torch.empty(40, 5000, dtype=torch.float64), torch.tensor([9])
    noise = torch.cat([run("adt_noise", backend, like, seed, 5, step) for step in (0, 1)])
    n = noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((noise**power).mean()) - moment) < 5 * math.sqrt(variance / n)
    for gap in (1, 32, 64, 96, 128):
        assert abs(float((noise[..., gap:] * noise[..., :-gap]).mean())) < 5 / math.sqrt(n / 2)
    for dim, gap in ((0, 1), (0, 5), (1, 1)):
        one, other = noise.narrow(dim, gap, noise.shape[dim] - gap), noise.narrow(dim, 0, noise.shape[dim] - gap)
        assert abs(float((one * other).mean())) < 5 / math.sqrt(n / 2)
    for level in (1.0, 2.0, 3.0, 4.0):
        p = math.erfc(level / math.sqrt(2))
        assert abs(float((noise.abs() > level).double().mean()) - p) < 5 * math.sqrt(p / n)


@each_backend("adt_noise", 4, 8)
def test_noise_depends_on_its_counter_alone(backend, dtype):
    """Not on the number of rows, numbers of a row or samples."""
    seed = torch.tensor([77])
    whole = run("adt_noise", backend, torch.empty(3, 300, dtype=dtype), seed, 3, 0)
    assert_same_bits(
        "part", run("adt_noise", backend, torch.empty(2, 133, dtype=dtype), seed, 2, 0), whole[:2, :2, :133]
    )
    assert not torch.equal(run("adt_noise", backend, torch.empty(3, 300, dtype=dtype), seed, 3, 1), whole)


# --- samples and steps


@each_limit
@each_case
@each_backend("adt_sample")
def test_sample(backend, dtype, case, limits):
    given = inputs(case, dtype)
    got = run("adt_sample", backend, *given.state, case.S, STEP, *limits)
    assert got.dtype == dtype
    args = (*given.state, case.S, STEP, *limits)
    assert_within_budget("moved", got, definition("adt_sample"), args)
    fixed = (given.eps == 0).expand(case.S, case.B, case.N)
    expected = given.x.clamp(*limits).expand(case.S, case.B, case.N)
    assert torch.equal(got[fixed], expected[fixed])


@each_limit
@each_case
@each_backend("adt_backward")
def test_backward(backend, dtype, case, limits):
    given = inputs(case, dtype)
    got = run("adt_backward", backend, *given.gradient, STEP, *limits)
    assert got.dtype == given.mu.dtype
    args = (*given.gradient, STEP, *limits)
    assert_within_budget("d", got, definition("adt_backward"), args, GRADIENTS)
    assert not got[:, (given.eps == 0).expand(case.B, case.N)].any()


@each_limit
@each_case
@each_backend("adt_ascend")
def test_ascend(backend, dtype, case, limits):
    """A step of the rate along the sign of that gradient; with totals along what Adam without memory makes of them."""
    given = inputs(case, dtype)
    d = run("adt_backward", backend, *given.gradient, STEP, *limits)
    *up, none = run("adt_ascend", backend, *given.gradient, None, STEP, 0.3, *limits)
    assert none.shape == (0,) and none.dtype == d.dtype
    before = torch.stack((given.mu, given.rho))
    assert_within_budget("up", torch.stack(up), lambda v, d: v + 0.3 * d.sign(), (before, d))
    totals = given.totals * (torch.arange(case.N) % 2) * 1e-8  # small, none
    *up, total = run("adt_ascend", backend, *given.gradient, totals, STEP, 0.3, *limits)
    assert_within_budget("totals", total, lambda t, d: t + d, (totals, d))
    assert_within_budget("up", torch.stack(up), lambda v, t: v + 0.3 * t / (t.abs() + 1e-8), (before, total))


@each_backend("adt_sample", 2)
def test_sixteen_bits_are_rounded_once(backend, dtype):
    case = CASES["few"]
    given, args = inputs(case, dtype), (case.S, STEP, *LIMITS["clamped"])
    wide = run("adt_sample", backend, given.x.float(), *given.state[1:], *args)
    assert torch.equal(run("adt_sample", backend, *given.state, *args), wide.to(dtype))
    args = (STEP, *LIMITS["clamped"])
    wide = run("adt_backward", backend, given.g.float(), given.x.float(), *given.gradient[2:], *args)
    assert_same_bits("d", run("adt_backward", backend, *given.gradient, *args), wide)


@pytest.mark.parametrize("mean", [20.0, -20.0])
@each_backend("adt_backward")
def test_far_out(backend, dtype, mean):
    """At |u| = 20 the slope of tanh rounds to 0 beside 1, in float32 too, and 1 - tanh ** 2 would have log -inf."""
    case = CASES["few"]
    given = inputs(case, dtype, mean, -3.0)
    moved = run("adt_sample", backend, *given.state, case.S, STEP, *LIMITS["free"])
    assert bool(moved.isfinite().all())
    for weight in (given.weight, torch.zeros_like(given.weight)):  # without entropy only the slope is left
        args = (*given.gradient[:6], weight, STEP, *LIMITS["free"])
        got = run("adt_backward", backend, *args)
        assert bool((got[0].abs().amax(1) > 0).all())
        assert_within_budget("d", got, definition("adt_backward"), args, GRADIENTS)
    noise = noise_of(given, case.S).to(dtype)
    entropy = reference.adt_entropy(given.mu.to(dtype), given.rho.to(dtype), noise, torch.ones(7, dtype=dtype))
    assert bool(entropy.isfinite().all())


@pytest.mark.parametrize("rho", [-200.0, -90.0, -79.0, 50.0])
@each_backend("adt_backward")
def test_spreads_of_every_size(backend, dtype, rho):
    given = inputs(CASES["few"], dtype, rho=rho)
    args = (*given.gradient, STEP, *LIMITS["free"])
    assert_within_budget("d", run("adt_backward", backend, *args), definition("adt_backward"), args, GRADIENTS)


@each_backend("adt_ascend")
def test_what_is_not_a_number(backend, dtype):
    """It stays where it is: in samples of that number alone; and where a gradient is not one, no step is made."""
    case = Case(2, 3, 40)
    given = inputs(case, dtype)
    good = run("adt_sample", backend, *given.state, case.S, STEP, *LIMITS["clamped"])
    given.x[0, 1], given.mu[1, 2], given.rho[2, 36] = (torch.nan,) * 3
    got = run("adt_sample", backend, *given.state, case.S, STEP, *LIMITS["clamped"])
    wrong = got.isnan()
    assert wrong.nonzero().tolist() == [[s, b, n] for s in (0, 1) for b, n in ((0, 1), (1, 2), (2, 36))]
    assert torch.equal(got[~wrong], good[~wrong])
    given = inputs(case, dtype)
    given.g[1, 2, 4] = torch.nan
    mu, rho, _ = run("adt_ascend", backend, *given.gradient, None, STEP, 0.3, *LIMITS["free"])
    assert mu[2, 4] == given.mu[2, 4] and rho[2, 4] == given.rho[2, 4]
    assert bool(mu.isfinite().all()) and bool(rho.isfinite().all())

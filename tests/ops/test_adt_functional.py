"""``functional.adt_*``: layouts, gradients and transforms; equal bits; what is refused, here and at both doors."""

from __future__ import annotations

import re

import pytest
import torch

from fastseq import _check, functional, reference
from fastseq.ops.adt import BACKENDS
from tests.ops import mimo_rows as rows
from tests.ops.adt_cases import STEP, Case, inputs
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

OPS = torch.ops.fastseq
SHAPE, S, CLAMP = (4, 5, 7), 3, (0.0, 1.0)
WHY_NOT = BACKENDS["adt_sample"][0].why_not(torch.zeros(1))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"cpu: {WHY_NOT}")


def shaped(dtype=torch.float32):
    """The inputs of rows [4, 35], in three dimensions."""
    given = inputs(Case(S, SHAPE[0], 35, True), dtype)
    return given._replace(
        g=given.g.view(S, *SHAPE),
        totals=given.totals.view(2, *SHAPE),
        **{name: getattr(given, name).view(SHAPE) for name in ("x", "mu", "rho", "eps")},
    )


def test_dimensions_and_strides():
    """As the operator on rows; broadcast eps and weights; what is strided or expanded."""
    given = shaped()
    flat = inputs(Case(S, SHAPE[0], 35, True))
    options = {"samples": S, "step": STEP}
    got = functional.adt_sample(*given.state, CLAMP, **options)
    assert_same_bits("sample", got.flatten(2), OPS.adt_sample(*flat.state, S, STEP, *CLAMP))
    strided = [v.mT.contiguous().mT if v.dim() == 3 else v for v in given.state]
    assert_same_bits("strided", functional.adt_sample(*strided, CLAMP, **options), got)
    g, *state, weight = given.gradient
    for totals in (None, given.totals):
        found = functional.adt_ascend(g, *state, weight, 0.3, CLAMP, step=STEP, totals=totals)
        flat_totals = None if totals is None else flat.totals
        expected = OPS.adt_ascend(*flat.gradient, flat_totals, STEP, 0.3, *CLAMP)
        assert_same_bits("mu rho", [v.flatten(1) for v in found[:2]], expected[:2])
        assert (found[2] is None) == (totals is None)
        if found[2] is not None:
            assert_same_bits("totals", found[2].flatten(2), expected[2])
    for eps in (torch.tensor(0.2), torch.rand(7), torch.rand(5, 1), torch.rand(4, 1, 1), torch.rand(1, 5, 7)):
        whole = eps.expand(SHAPE).contiguous()
        for kind in (eps, eps.expand(SHAPE)):
            one, other = (functional.adt_sample(*given.state[:4], e, **options) for e in (kind, whole))
            assert_same_bits("eps", one, other)
            one, other = (functional.adt_ascend(g, *state[:4], e, weight[0], 0.3, step=STEP)[:2] for e in (kind, whole))
            assert_same_bits("mu rho", one, other)
    vector = functional.adt_sample(
        given.x[:, 0, 0], given.mu[:, 0, 0], given.rho[:, 0, 0], given.seed, given.eps[0, 0, 0]
    )
    assert vector.shape == (1, 4)
    assert_same_bits(
        "noise", functional.adt_noise(given.mu, given.seed, S), OPS.adt_noise(flat.mu, given.seed, S, 0).view(S, *SHAPE)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    given = shaped(dtype)
    got = functional.adt_sample(*given.state, CLAMP, samples=S, step=STEP)
    wide = functional.adt_sample(given.x.float(), *given.state[1:], CLAMP, samples=S, step=STEP)
    assert got.dtype == dtype and torch.equal(got, wide.to(dtype))
    g, x, *rest = given.gradient
    both = [functional.adt_ascend(*pair, *rest, 0.3, CLAMP, step=STEP)[:2] for pair in ((g, x), (g.float(), x.float()))]
    assert_same_bits("mu rho", *both)


def test_gradients():
    given = shaped(torch.float64)
    mu, rho = (v.requires_grad_() for v in (given.mu, given.rho))
    options = {"samples": S, "step": STEP}
    noise = functional.adt_noise(mu.detach(), given.seed, S, step=STEP)

    def sample(mu, rho):
        return functional.adt_sample(given.x, mu, rho, given.seed, given.eps, CLAMP, **options)

    assert torch.autograd.gradcheck(sample, (mu, rho))
    assert torch.autograd.gradcheck(
        lambda m, r: functional.adt_entropy(m, r, given.seed, given.eps, **options), (mu, rho)
    )
    got = torch.autograd.grad(sample(mu, rho), (mu, rho), given.g)
    args = (given.g, given.x, mu.detach(), rho.detach(), noise, given.eps, torch.zeros(()))
    assert_within_budget("dmu drho", got, lambda *a: reference.adt_backward(*a, *CLAMP), args, GRADIENTS)
    assert torch.autograd.gradgradcheck(sample, (mu, rho))
    assert not functional.adt_sample(
        given.x.requires_grad_(), mu.detach(), rho.detach(), given.seed, given.eps
    ).requires_grad
    assert not functional.adt_ascend(*given.gradient, 0.3)[0].requires_grad


def test_where_nothing_moves_there_is_no_entropy():
    given = shaped()
    got = functional.adt_entropy(*given.state[1:], samples=S)
    off = (given.eps == 0).expand(S, *SHAPE)
    assert bool(off.any()) and bool((got[off] == 0).all()) and bool((got[~off] != 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [Case(5, 30, 701, True), Case(2, 7, 9000)], ids=str)
def test_bits(case, dtype):
    """The same for any number of threads, for the first rows alone, again, and through numpy."""
    given, limits = inputs(case, dtype), (STEP, *CLAMP)
    calls = {
        "adt_noise": (given.mu, given.seed, case.S, STEP),
        "adt_sample": (*given.state, case.S, *limits),
        "adt_backward": (*given.gradient, *limits),
        "adt_ascend": (*given.gradient, given.totals, STEP, 0.3, *CLAMP),
    }
    core = rows.numpy_door()
    for op, args in calls.items():
        found = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            out = getattr(OPS, op)(*args)
            found.append(out if isinstance(out, tuple) else (out,))
        names = [f"{op} {n}" for n in range(len(found[0]))]
        numpy = [int(a) if a is given.seed else a.numpy() if isinstance(a, torch.Tensor) else a for a in args]
        out = getattr(core, op)(*numpy, threads=2)
        for other in (*found[1:], out if isinstance(out, tuple) else (out,)):
            assert_same_bits(names, other, found[0])
    few = given._replace(**{n: getattr(given, n)[:3] for n in ("x", "mu", "rho", "weight")}, g=given.g[:, :3])
    few = few._replace(eps=given.eps[:3] if case.own else given.eps)
    assert_same_bits("sample", OPS.adt_sample(*few.state, case.S, *limits), OPS.adt_sample(*calls["adt_sample"])[:, :3])
    whole = OPS.adt_backward(*calls["adt_backward"])
    few = few._replace(g=few.g.contiguous())
    assert_same_bits("d", OPS.adt_backward(*few.gradient, *limits), whole[:, :3])


GIVEN = inputs(Case(2, 3, 5))
CALLS = {
    "adt_noise": (GIVEN.mu, GIVEN.seed, 2, 0),
    "adt_sample": (*GIVEN.state, 2, 0, *CLAMP),
    "adt_backward": (*GIVEN.gradient, 0, *CLAMP),
    "adt_ascend": (*GIVEN.gradient, None, 0, 0.3, *CLAMP),
    "adt_ascend totals": (*GIVEN.gradient, GIVEN.totals, 0, 0.3, *CLAMP),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    found = torch.library.opcheck(getattr(OPS, name.split()[0]).default, CALLS[name])
    assert set(found.values()) == {"SUCCESS"}


def test_compile():
    given = shaped()
    mu, rho = (v.requires_grad_() for v in (given.mu, given.rho))

    def run(mu, rho):
        return functional.adt_sample(given.x, mu, rho, given.seed, given.eps, CLAMP, samples=S, step=STEP)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    both = [(y := f(mu, rho), *torch.autograd.grad(y, (mu, rho), given.g)) for f in (compiled, run)]
    assert_same_bits("moved dmu drho", *both)


def test_func():
    """grad, vmap and vmap over grad; forward mode is refused."""
    given = shaped()

    def loss(mu):
        y = functional.adt_sample(given.x, mu, given.rho, given.seed, given.eps, CLAMP, samples=S, step=STEP)
        return (y * given.g).sum()

    many = torch.stack([given.mu, given.mu + 1])
    assert_same_bits("loss", torch.func.vmap(loss)(many), torch.stack([loss(m) for m in many]))
    expected = torch.stack([torch.autograd.grad(loss(m), m)[0] for m in many.clone().requires_grad_()])
    got = torch.func.vmap(torch.func.grad(loss))(many)  # through the definition
    assert_within_budget("dmu", got, lambda d: d, (expected,), GRADIENTS)
    with pytest.raises(NotImplementedError, match="adt_sample: forward-mode differentiation"):
        torch.func.jvp(loss, (given.mu,), (given.mu,))


X = torch.zeros(5, 7)
SEED = torch.tensor([1])
GOOD = {"x": X, "mu": X, "rho": X, "seed": SEED, "eps": torch.tensor(0.1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.long()}, "x must be of floating point, got torch.int64"),
        ({"mu": X.half()}, "mu must be torch.float32, got torch.float16"),
        ({"mu": X[:, :6]}, "mu must be [B, ...] = [5, 7], got [5, 6]"),
        ({"rho": X[:, :6]}, "rho must be [B, ...] = [5, 7], got [5, 6]"),
        ({"rho": X.double()}, "rho must be torch.float32, got torch.float64"),
        ({"seed": SEED.int()}, "seed must be int64, one element, got torch.int32 [1]"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be int64, one element, got torch.int64 [2]"),
        ({"eps": torch.ones(6)}, "eps must be broadcast to x, [5, 7], got [6]"),
        ({"clamp": (1.0, 0.0)}, "clamp must be (low, high) with low <= high, or None, got (1.0, 0.0)"),
        ({"samples": 0}, "samples must be an integer >= 1, got 0"),
        ({"step": -1}, "step must be an integer in 0 .. 2**32 - 1, got -1"),
        ({"step": 1.0}, "step must be an integer in 0 .. 2**32 - 1, got 1.0"),
        ({name: torch.zeros(()) for name in ("x", "mu", "rho")}, "x must be [B, ...], got []"),
    ],
)
def test_a_wrong_argument_of_a_sample(change, message):
    with pytest.raises(_check.ArgumentError, match=re.escape(f"adt_sample: {message}")):
        functional.adt_sample(**GOOD | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": X[None, :, :6]}, "g must be [S, B, ...] = [1, 5, 7], got [1, 5, 6]"),
        ({"g": X[None].double()}, "g must be torch.float32, got torch.float64"),
        ({"weight": torch.zeros(4)}, "weight must be [B] = [5] or [], got [4]"),
        ({"rate": 0}, "rate must be a finite number > 0, got 0"),
        ({"totals": X}, "totals must be [2, B, ...] = [2, 5, 7], got [5, 7]"),
        ({"totals": torch.stack((X, X)).double()}, "totals must be torch.float32, got torch.float64"),
        ({"rho": X.double()}, "rho must be torch.float32, got torch.float64"),
    ],
)
def test_a_wrong_argument_of_a_step(change, message):
    with pytest.raises(_check.ArgumentError, match=re.escape(f"adt_ascend: {message}")):
        functional.adt_ascend(**GOOD | {"g": X[None], "weight": torch.zeros(()), "rate": 0.3} | change)


def test_wrong_arguments_of_noise_and_entropy():
    with pytest.raises(_check.ArgumentError, match="adt_noise: like must be of float32 or float64, got torch.int64"):
        functional.adt_noise(X.long(), SEED)
    with pytest.raises(_check.ArgumentError, match=re.escape("adt_entropy: rho must be [B, ...] = [5, 7], got [5, 6]")):
        functional.adt_entropy(X, X[:, :6], SEED, torch.ones(7))


E, W = torch.zeros(1, 7), torch.zeros(5)
STATE = (X, X, X, SEED, E)
RAW = {
    "rank": ("adt_sample", (X[0], *STATE[1:], 1, 0, 0.0, 1.0), r"x must be \[B, N\], got \[7\]"),
    "dtype": ("adt_sample", (X.int(), *STATE[1:], 1, 0, 0.0, 1.0), "x must be float32 or float64, got int32"),
    "stride": ("adt_sample", (torch.zeros(7, 5).T, *STATE[1:], 1, 0, 0.0, 1.0), "x must be contiguous"),
    "mu": ("adt_sample", (X, X[:4], *STATE[2:], 1, 0, 0.0, 1.0), r"mu must be \[B, N\] = \[5, 7\], got \[4, 7\]"),
    "rho": ("adt_sample", (X, X, X.double(), SEED, E, 1, 0, 0.0, 1.0), "rho must be float32, got float64"),
    "eps": ("adt_sample", (*STATE[:4], X[:4], 1, 0, 0.0, 1.0), r"eps must be \[B, N\] = \[5, 7\], got \[4, 7\]"),
    "eps_row": ("adt_sample", (*STATE[:4], E[:, :6], 1, 0, 0.0, 1.0), r"eps must be \[1, N\] = \[1, 7\], got \[1, 6\]"),
    "limits": ("adt_sample", (*STATE, 1, 0, 1.0, 0.0), "low must be at most high, got 1 and 0"),
    "samples": ("adt_sample", (*STATE, -1, 0, 0.0, 1.0), r"samples must lie in 0 .. 2\^32, got -1"),
    "step": ("adt_noise", (X, SEED, 1, 2**32), r"step must lie in 0 .. 2\^32 - 1, got 4294967296"),
    "like": ("adt_noise", (X[0], SEED, 1, 0), r"like must be \[B, N\], got \[7\]"),
    "g": ("adt_backward", (X, *STATE, W, 0, 0.0, 1.0), r"g must be \[S, B, N\], got \[5, 7\]"),
    "weight": ("adt_backward", (X[None], *STATE, W[:4], 0, 0.0, 1.0), r"weight must be \[B\] = \[5\], got \[4\]"),
    "totals": (
        "adt_ascend",
        (X[None], *STATE, W, X[None], 0, 0.3, 0.0, 1.0),
        r"totals must be \[2, B, N\] = \[2, 5, 7\], got \[1, 5, 7\]",
    ),
}


@pytest.mark.parametrize("door", ["torch", "numpy"])
@pytest.mark.parametrize("op, call, says", RAW.values(), ids=RAW.keys())
def test_wrong_argument_of_the_operator(op, call, says, door):
    given = call
    if door == "numpy":
        given = [int(v) if v is SEED else v.numpy() if isinstance(v, torch.Tensor) else v for v in call]
    with pytest.raises(ValueError, match=f"{op}: {says}"):
        getattr(OPS if door == "torch" else rows.numpy_door(), op)(*given)


def test_a_wrong_seed_of_the_operator():
    with pytest.raises(ValueError, match="adt_noise: seed must be one int64"):
        OPS.adt_noise(X, SEED.int(), 1, 0)

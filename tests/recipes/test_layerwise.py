"""LARS and LAMB against their definitions over several steps, and against SGD and AdamW where nothing is adapted."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseq import reference
from fastseq.recipes import LAMB, LARS, LEGW, layerwise_groups
from tests.tolerance import assert_same_bits, assert_within_budget

SHAPES = [(5, 7), (3, 2, 3, 3), (13,), (1,), (4, 6), (0, 3)]
STEPS = 6
RATES = [0.5, 1.0, 1.5, 1.0, 0.25, 0.125]
OPTIMIZERS = {"lars": (LARS, reference.lars, "momentum_buffer"), "lamb": (LAMB, reference.lamb, "exp_avg exp_avg_sq")}
OPTIONS: dict[str, dict[str, Any]] = {
    "lars": {},
    "lars-decay": {"weight_decay": 0.1},
    "lars-nesterov": {"weight_decay": 0.1, "nesterov": True, "momentum": 0.5},
    "lars-plain": {"weight_decay": 0.1, "adapt": False},
    "lars-clipped": {"max_ratio": 2e-3, "trust_coefficient": 1e-2, "eps": 1e-3},
    "lamb": {},
    "lamb-no-decay": {"weight_decay": 0.0, "betas": (0.5, 0.75)},
    "lamb-plain": {"adapt": False},
    "lamb-clipped": {"max_ratio": 0.5, "eps": 1e-3},
    "lamb-no-memory": {"betas": (0.0, 0.0), "weight_decay": 0.1},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def problem(device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights, one of them 0, and the gradients of each step, one of them 0 at first; strided where it can be."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES] for _ in RATES]
    weights[2].zero_()
    gradients[0][4].zero_()
    weights[0] = weights[0].T.contiguous().T
    for found in gradients:
        found[1] = found[1].to(memory_format=torch.channels_last)
    move = {"device": device, "dtype": dtype}
    return [w.to(**move) for w in weights], [[g.to(**move) for g in found] for found in gradients]


def stepped(optimizer: torch.optim.Optimizer, gradients: Sequence[Sequence[Tensor]], rates: Sequence[float]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for found, rate in zip(gradients, rates, strict=True):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        for p, g in zip(parameters, found, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for p, g in zip(parameters, found, strict=True):
            assert torch.equal(p.grad, g)


def made(kind: str, device: str, dtype: torch.dtype, **options: Any) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """The optimizer after all steps, and what it holds: of each parameter itself and its state."""
    make, _, names = OPTIMIZERS[kind.split("-")[0]]
    weights, gradients = problem(device, dtype)
    parameters = [nn.Parameter(w) for w in weights]
    optimizer = make(parameters, **{"lr": 1.0} | OPTIONS[kind] | options)
    stepped(optimizer, gradients, RATES)
    return optimizer, [t.detach() for p in parameters for t in (p, *(optimizer.state[p][n] for n in names.split()))]


def defined(kind: str) -> Any:
    """The definition of all parameters, as ``assert_within_budget`` calls it: weights, then gradients by step."""
    _, define, _ = OPTIMIZERS[kind.split("-")[0]]

    def run(weights: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
        by_weight = zip(weights, *gradients, strict=True)
        return [t for w, *found in by_weight for t in define(w, found, RATES, **OPTIONS[kind])]

    return run


def names(kind: str) -> list[str]:
    return [f"{n} of {s}" for s in SHAPES for n in ("weight", *OPTIMIZERS[kind.split("-")[0]][2].split())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OPTIONS)
def test_against_the_definition(kind, dtype, device):
    _, found = made(kind, device, dtype)
    assert_within_budget(names(kind), found, defined(kind), problem(device, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_captured_step_is_a_step(dtype, device):
    rate = torch.ones((), device=device)
    optimizer, found = made("lamb", device, dtype, lr=rate, capturable=True)
    assert_within_budget(names("lamb"), found, defined("lamb"), problem(device, dtype))
    assert {(s["step"].device.type, float(s["step"])) for s in optimizer.state.values()} == {(device, STEPS)}
    _, found = made("lars-decay", device, dtype, lr=rate)
    assert_within_budget(names("lars"), found, defined("lars-decay"), problem(device, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [LARS, LAMB])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a graph, which needs a GPU")
def test_a_graph_sees_the_rate_change(make):
    def run(captured: bool) -> list[Tensor]:
        parameters = [nn.Parameter(w) for w in problem("cuda", torch.float32)[0]]
        gradients = problem("cuda", torch.float32)[1]
        optimizer = make(parameters, lr=torch.ones((), device="cuda"), **({"capturable": True} if make is LAMB else {}))
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            stepped(optimizer, gradients[:1], RATES[:1])
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for found, rate in zip(gradients[1:], RATES[1:], strict=True):
            optimizer.param_groups[0]["lr"].fill_(rate)
            torch._foreach_copy_([p.grad for p in parameters], found)
            graph.replay() if captured else optimizer.step()
        return [p.detach().cpu() for p in parameters]

    assert_same_bits([str(s) for s in SHAPES], run(True), run(False))


# --- where nothing is adapted


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_without_adaptation_is_sgd(nesterov, device):
    weights, gradients = problem(device, torch.float32)
    options = {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    mine, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    stepped(LARS(mine, **options, adapt=False), gradients, RATES)
    stepped(torch.optim.SGD(theirs, **options), gradients, RATES)
    assert_same_bits([str(s) for s in SHAPES], [p.cpu() for p in mine], [p.cpu() for p in theirs])


def test_lamb_without_adaptation_is_adamw(device):
    options = {"betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.1}

    def run(make: Any, weights: list[Tensor], gradients: list[list[Tensor]], **more: Any) -> list[Tensor]:
        parameters = [nn.Parameter(w.clone()) for w in weights]
        stepped(make(parameters, lr=1.0, **options, **more), gradients, RATES)
        return [p.detach() for p in parameters]

    inputs = problem(device, torch.float32)
    found = run(LAMB, *inputs, adapt=False)
    assert_within_budget([str(s) for s in SHAPES], found, lambda *a: run(torch.optim.AdamW, *a), inputs)


# --- what every optimizer of torch can do


@pytest.mark.parametrize("make", [LARS, LAMB])
def test_upwards_is_downwards_of_the_opposite(make):
    weights, gradients = problem("cpu", torch.float32)
    found = []
    for sign in (1, -1):
        parameters = [nn.Parameter(w.clone()) for w in weights]
        opposite = [[sign * g for g in step] for step in gradients]
        stepped(make(parameters, lr=1.0, maximize=sign < 0), opposite, RATES)
        found.append(parameters)
    assert_same_bits([str(s) for s in SHAPES], *found)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("make", [LARS, LAMB])
def test_saved_and_loaded_in_the_middle(make, capturable):
    options = {"capturable": True} if capturable and make is LAMB else {}
    weights, gradients = problem("cpu", torch.float32)
    whole, halves = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    stepped(make(whole, lr=1.0, **options), gradients, RATES)
    first = make(halves, lr=1.0, **options)
    stepped(first, gradients[:3], RATES[:3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(halves, lr=1.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second = pickle.loads(pickle.dumps(second))
    for p, q in zip(halves, second.param_groups[0]["params"], strict=True):
        q.data = p.data
    stepped(second, gradients[3:], RATES[3:])
    assert_same_bits([str(s) for s in SHAPES], second.param_groups[0]["params"], whole)


def test_the_state_of_sgd_goes_on_in_lars():
    weights, gradients = problem("cpu", torch.float32)
    mine, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    sgd = torch.optim.SGD(mine, lr=1.0, momentum=0.9)
    stepped(sgd, gradients[:3], RATES[:3])
    lars = LARS(mine, lr=1.0, adapt=False)
    lars.load_state_dict(copy.deepcopy(sgd.state_dict()))
    assert lars.param_groups[0]["adapt"] is False and lars.param_groups[0]["momentum"] == 0.9
    stepped(lars, gradients[3:], RATES[3:])
    stepped(torch.optim.SGD(theirs, lr=1.0, momentum=0.9), gradients, RATES)
    assert_same_bits([str(s) for s in SHAPES], mine, theirs)


@pytest.mark.parametrize("make", [LARS, LAMB])
def test_a_closure_has_its_gradients(make):
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = make([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 6.0
    assert float(optimizer.step(closure)) < 6.0


@pytest.mark.parametrize("make", [LARS, LAMB])
def test_parameters_of_several_dtypes_and_without_gradients(make):
    weights = [torch.ones(3, 2), torch.ones(2, 2, dtype=torch.float64), torch.ones(4, dtype=torch.bfloat16)]
    parameters = [nn.Parameter(w) for w in weights]
    optimizer = make(parameters, lr=64.0)
    for p in parameters[:2]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [bool((p != 1).all()) for p in parameters] == [True, True, False]
    assert set(optimizer.state) == set(parameters[:2])
    parameters[2].grad = torch.ones_like(parameters[2])
    optimizer.step()
    assert bool((parameters[2] != 1).all())


def test_groups_of_a_model():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model[3].bias.requires_grad_(False)
    adapted, plain = layerwise_groups(model, lr=2.0, weight_decay=0.1)
    assert adapted == {"params": [model[0].weight, model[3].weight], "lr": 2.0, "weight_decay": 0.1}
    rest = [model[0].bias, model[1].weight, model[1].bias]
    assert plain == {"params": rest, "lr": 2.0, "weight_decay": 0.0, "adapt": False}
    optimizer = LARS([adapted, plain], lr=1.0)
    scheduler = LEGW(optimizer, 8, 32, base_warmup_epochs=0.5, steps_per_epoch=4, epochs=3)
    assert scheduler.get_last_lr() == [0.5, 0.5]
    before = [p.detach().clone() for p in rest]
    model(torch.randn(8, 1, 4, 4)).square().mean().backward()
    optimizer.step()
    for p, b in zip(rest, before, strict=True):
        assert_within_budget("plain", p.detach(), lambda b, g: b - 0.5 * g, [b, p.grad])


# --- what is refused


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (LARS, {"lr": -1.0}, "LARS: lr must be a finite number >= 0, got -1.0"),
        (LAMB, {"lr": torch.tensor(-1.0)}, "LAMB: lr must be a finite number >= 0, got -1.0"),
        (LARS, {"momentum": 1.5}, "LARS: momentum must be a number in [0, 1], got 1.5"),
        (LARS, {"trust_coefficient": 0}, "LARS: trust_coefficient must be a finite number > 0, got 0"),
        (LARS, {"max_ratio": 0}, "LARS: max_ratio must be a finite number > 0, got 0"),
        (LARS, {"eps": -1e-8}, "LARS: eps must be a finite number >= 0, got -1e-08"),
        (LAMB, {"weight_decay": float("nan")}, "LAMB: weight_decay must be a finite number >= 0, got nan"),
        (LAMB, {"betas": (0.9, 1.0)}, "LAMB: betas must be two numbers in [0, 1), got (0.9, 1.0)"),
        (LAMB, {"betas": (-0.1, 0.9)}, "LAMB: betas must be a finite number >= 0, got -0.1"),
    ],
)
def test_options_that_are_refused(make, options, message):
    p = nn.Parameter(torch.ones(2))
    for wrong in ([p], [{"params": [p], **options}]):
        with pytest.raises(ValueError, match=re.escape(message)):
            make(wrong, **{"lr": 1.0} | (options if wrong == [p] else {}))


@pytest.mark.parametrize("make", [LARS, LAMB])
def test_gradients_that_are_refused(make):
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    message = "the gradient of [4, 2] must be dense and real, got one of layout torch.sparse_coo and dtype torch.float"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(table.parameters(), lr=1.0).step()
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"\[2\] must be dense and real, got .* and dtype torch.complex64"):
        make([p], lr=1.0).step()

"""MIMO layers under torch.compile, torch.export, autocast, transforms, and with all parameters in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseq.nn import MIMO, MIMOLSTM, MIMOEmbedding, MIMOHead
from tests.nn.mimo_cases import CASES, B, M, assert_agrees, compare, draw, first
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget


def _wrapped() -> nn.Module:
    return MIMO(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)), M)


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    **{name: (CASES[name].layer, CASES[name].shape) for name in ("linear", "conv1d", "conv2d")},
    "embedding": (lambda: MIMOEmbedding(9, 4, M, 2), (B, 5)),
    "lstm": (lambda: MIMOLSTM(3, 5, bidirectional=True, M=M), (4, B, 3)),
    "wrapped": (_wrapped, (B, 5)),
}


def given(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 9, shape) if name == "embedding" else torch.randn(shape)


@pytest.mark.parametrize("mode", ["train", "ensemble", "folded"])
@pytest.mark.parametrize("name", MODELS)
def test_compile(name: str, mode: str) -> None:
    make, shape = MODELS[name]
    model, x, index = make(), given(name, shape), (draw(),) if mode == "train" else ()
    if mode == "folded":
        model.eval().fold()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if mode == "folded":
        assert_agrees("out", first(compiled(x)), model, x)
        return

    def plain(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return first(torch.func.functional_call(model, parameters, (x, *index)))

    compare(model, lambda x: first(compiled(x, *index)), x, plain)


@pytest.mark.parametrize("mode", ["train", "ensemble", "folded"])
@pytest.mark.parametrize("name", MODELS)
def test_export(name: str, mode: str) -> None:
    make, shape = MODELS[name]
    model, x, index = make().eval(), given(name, shape), (draw(),) if mode == "train" else ()
    if mode == "folded":
        model.fold()
    program = torch.export.export(model, (x, *index))
    x = given(name, shape)
    assert_agrees("out", first(program.module()(x, *index)), model, x, *index)


def test_export_of_any_number_of_rows() -> None:
    """An index of another batch, and one that does not divide: a graph promises nothing about it."""
    model = MODELS["wrapped"][0]().eval()
    batch, rows = torch.export.Dim("batch", min=2), torch.export.Dim("rows", min=2)
    shapes = {"x": {0: batch}, "index": {1: rows}}
    program = torch.export.export(model, (torch.randn(B, 5), draw()), dynamic_shapes=shapes)
    x, index = torch.randn(9, 5), draw(9, 2)
    assert_agrees("out", program.module()(x, index), model, x, index)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["train", "ensemble"])
def test_every_parameter_is_used(name: str, mode: str) -> None:
    """Which DistributedDataParallel asks for."""
    make, shape = MODELS[name]
    model = make()
    out = first(model(given(name, shape), *((draw(),) if mode == "train" else ())))
    out.square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("mode", ["train", "ensemble", "multiplex"])
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str, mode: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), given(name, shape)
    options: dict[str, Any] = {"index": draw()} if mode == "train" else {"mode": mode}
    if mode == "multiplex":
        at = {"conv1d": 1, "conv2d": 1, "embedding": 2, "wrapped": 1}.get(name, x.dim() - 1)
        x = x.unsqueeze(at).repeat_interleave(M, at)
    with torch.autocast("cpu", torch.bfloat16):
        out = first(model(x, **options))
        if name != "embedding":
            assert first(model(x.bfloat16(), **options)).dtype == torch.bfloat16
    assert out.dtype == (torch.float32 if name == "embedding" else torch.bfloat16)
    names = [n for n, _ in model.named_parameters()]

    def reference(x: Tensor, *parameters: Tensor) -> Tensor:
        return first(torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,), options))

    assert_within_budget("out", out, reference, [x, *model.parameters()])
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_head_under_autocast() -> None:
    head, x = MIMOHead(5, 4, M), torch.randn(2, M, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x, per_slot=True).dtype == head(x).dtype == torch.bfloat16


def test_float64_is_left_alone_by_autocast() -> None:
    model, x = CASES["linear"].layer(dtype=torch.float64), torch.randn(B, 5, dtype=torch.float64)
    want = model(x, draw())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits("out", model(x, draw()), want)


@pytest.mark.parametrize("mode", ["train", "ensemble"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "lstm"])
def test_functional_call_and_grad(name: str, mode: str) -> None:
    make, shape = MODELS[name]
    model, x, index = make().double(), given(name, shape).double(), (draw(),) if mode == "train" else ()
    upstream = torch.randn_like(first(model(x, *index)))

    def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return first(torch.func.functional_call(model, parameters, (x, *index)))

    parameters = {n: p.detach() for n, p in model.named_parameters()}
    got = torch.func.grad(lambda parameters: (run(parameters, x) * upstream).sum())(parameters)

    def reference(x: Tensor, upstream: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        out = run(dict(zip(parameters, values, strict=True)), x)
        return torch.autograd.grad(out, values, upstream)

    assert_within_budget(list(parameters), list(got.values()), reference, [x, upstream, *model.parameters()], GRADIENTS)

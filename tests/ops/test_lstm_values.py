"""Values at the edge: NaN, infinities, saturated gates, numbers too small to be normal, strided inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastseq.ops.gemm import BACKENDS as GEMM
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import CASES, DTYPES, Options

each_backend = pytest.mark.parametrize("backend", cases.backends())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def assert_same_kind(names: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """NaN where NaN is expected, the same infinities, and finite numbers elsewhere."""
    for name, g, e in zip(names.split(), got, expected, strict=True):
        assert torch.equal(g.isnan(), e.isnan()), f"{name}: NaN elsewhere"
        assert torch.equal(torch.where(g.isinf(), g, 0), torch.where(e.isinf(), e, 0)), f"{name}: infinity elsewhere"


def by_stock(x: Tensor, state: tuple[Tensor, Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
    """h, h_n and c_n of ``torch.nn.LSTM``."""
    stock = torch.nn.LSTM(x.shape[-1], weights[1].shape[1], dtype=x.dtype)
    for parameter, value in zip(stock.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    out, (h_n, c_n) = stock(x, tuple(s[None] for s in state))
    return out, h_n[0], c_n[0]


def by_backend(backend: str, x: Tensor, state: tuple[Tensor, Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
    product = next(b for b in GEMM if b.name == backend).run
    x_gates = product(x.flatten(0, 1), weights[0], weights[2] + weights[3], False, True).unflatten(0, x.shape[:2])
    h, _, _, h_n, c_n = cases.run("lstm_forward", backend, x_gates, weights[1], *state, *Options(), 2)
    return h, h_n, c_n


@pytest.mark.parametrize("where", ["x", "h0", "c0", "weight_ih", "weight_hh", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@each_dtype
@each_backend
def test_as_in_stock_torch(backend: str, dtype: torch.dtype, value: float, where: str) -> None:
    T, B, H = 5, 13, 21
    x, h0, c0 = (torch.randn(*shape, dtype=dtype) for shape in ((T, B, 9), (B, H), (B, H)))
    weights = [torch.randn(*shape, dtype=dtype) / 4 for shape in ((4 * H, 9), (4 * H, H), (4 * H,), (4 * H,))]
    target = {"x": x[2], "h0": h0, "c0": c0, "weight_ih": weights[0], "weight_hh": weights[1], "bias": weights[2]}[
        where
    ]
    target.view(-1)[[3, 25, 40]] = value
    expected = by_stock(x, (h0, c0), weights)
    assert_same_kind("h h_n c_n", by_backend(backend, x, (h0, c0), weights), expected)


@pytest.mark.parametrize("size", [50.0, 88.0, 89.0, 104.0, 710.0, 1e4, 1e30, torch.inf])
@each_dtype
@each_backend
def test_saturated_gates(backend: str, dtype: torch.dtype, size: float) -> None:
    """Gates far out are 0, 1 and -1 to the budget, whatever the temperature, and nothing overflows."""
    T, B, H = 2, 13, 17
    signs = torch.randn(T, B, 4 * H, dtype=dtype).sign()
    for tau in (1.0, 0.2):
        zeros = [torch.zeros(*shape, dtype=dtype) for shape in ((4 * H, H), (B, H), (B, H))]
        got = cases.run("lstm_forward", backend, signs * size, *zeros, *Options(tau=tau), 2)
        i, f, g, o = signs.chunk(4, -1)
        expected = torch.cat(((i + 1) / 2, (f + 1) / 2, g, (o + 1) / 2), -1)
        assert float((got[2] - expected).abs().max()) <= 4 * torch.finfo(dtype).eps
        assert all(v.isfinite().all() for v in got)


@each_backend
def test_denormal_numbers_survive_a_call(backend: str) -> None:
    """The core may count denormal numbers as zeros, but only inside a call, on each thread that took part."""
    args = cases.inputs(cases.Case(3, 45, 130))
    torch.set_num_threads(2)
    cases.run("lstm_forward", backend, *args[:4], *args.options, 2)
    small = torch.full((1 << 18,), 1e-40)
    assert (small * 1.0 != 0).all()
    assert (small.numpy() * np.float32(1.0) != 0).all()


@pytest.mark.parametrize("case", ["prime", "all_dense", "all_lengths_reverse", "all_packed"])
@each_backend
def test_inputs_stay_as_they_are(backend: str, case: str) -> None:
    args = cases.inputs(CASES[case])
    grads = cases.upstream(cases.definition(*args, None))
    before = [t.clone() for t in (*cases.differentiable(args).values(), *grads)]
    outputs = cases.run("lstm_forward", backend, *args[:4], *args.options, 2)
    saved = [v.clone() for v in outputs]
    cases.run("lstm_backward", backend, *cases.backward_arguments(args, outputs, grads))
    for was, now in zip((*before, *saved), (*cases.differentiable(args).values(), *grads, *outputs), strict=True):
        assert torch.equal(was, now)

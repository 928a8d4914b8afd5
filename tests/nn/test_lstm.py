"""fastseq.nn.LSTM against torch.nn.LSTM: construction, parameters, results, gradients, final states."""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastseq.nn import LSTM
from fastseq.ops._select import allowed
from tests.nn.stock import LENGTHS, assert_like, inputs
from tests.tolerance import assert_same_bits

T, B, I, H = 5, 3, 3, 6  # noqa: E741
SHAPES = [
    {"num_layers": L, "bias": bias, "batch_first": first, "bidirectional": both, "proj_size": proj}
    for L, bias, first, both, proj in itertools.product((1, 2), (True, False), (False, True), (False, True), (0, 2))
]


def name(config: dict[str, Any]) -> str:
    return "-".join(f"{k[:4]}{int(v)}" for k, v in config.items())


@pytest.mark.parametrize("config", SHAPES, ids=name)
def test_same_parameters(config: dict[str, Any]) -> None:
    torch.manual_seed(3)
    stock = nn.LSTM(I, H, **config)
    after = torch.rand(1)
    torch.manual_seed(3)
    ours = LSTM(I, H, **config)
    assert torch.rand(1) == after  # as many draws
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert_same_bits([n for n, _ in stock.named_parameters()], list(ours.parameters()), list(stock.parameters()))
    assert repr(ours) == repr(stock)
    assert [[w.shape for w in layer] for layer in ours.all_weights] == [
        [w.shape for w in layer] for layer in stock.all_weights
    ]
    ours.reset_parameters()
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight_hh_l0, stock.weight_hh_l0)
    ours.flatten_parameters()


# half of the shapes, in which any four of the five options still have all their combinations
HALF = [s for s in SHAPES if (s["num_layers"] + sum(map(bool, list(s.values())[1:]))) % 2]


@pytest.mark.parametrize("kind", ["padded", "packed", "sorted", "unbatched"])
@pytest.mark.parametrize("config", HALF, ids=name)
def test_results(config: dict[str, Any], kind: str) -> None:
    for dtype, with_state in ((torch.float32, True), (torch.float64, False)):
        stock = functools.partial(nn.LSTM, I, H, **config)
        module = stock(dtype=dtype)
        rows = () if kind == "unbatched" else (B,)
        lead = (T,) if kind == "unbatched" else (B, T) if config["batch_first"] else (T, B)
        n = config["num_layers"] * (1 + config["bidirectional"])
        state = [(n, *rows, config["proj_size"] or H), (n, *rows, H)] if with_state else []
        given = inputs(module, *lead, I, state=state)
        kind_given = kind if kind in ("packed", "sorted") else "padded"
        assert_like(functools.partial(LSTM, I, H, **config), stock, given, 3, kind=kind_given)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_dropout_draws_as_stock_does(kind: str, training: bool) -> None:
    config = {"num_layers": 3, "dropout": 0.4, "bidirectional": True}
    stock = functools.partial(nn.LSTM, I, H, **config)
    given = inputs(stock(), T, B, I)
    assert_like(functools.partial(LSTM, I, H, **config), stock, given, 3, kind=kind, training=training)


def test_layout_is_that_of_stock() -> None:
    x = torch.randn(B, T, I)
    ours, stock = LSTM(I, H, batch_first=True), nn.LSTM(I, H, batch_first=True)
    assert ours(x)[0].stride() == stock(x)[0].stride()
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), True, enforce_sorted=False)
    out = ours(packed)[0]
    assert isinstance(out, PackedSequence)
    for got, want in zip(out[1:], packed[1:], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_empty_batch_and_long_strides(rows: int) -> None:
    module = LSTM(I, H, 2, bidirectional=True)
    out, (h_n, c_n) = module(torch.randn(T, rows, I))
    assert out.shape == (T, rows, 2 * H) and h_n.shape == c_n.shape == (4, rows, H)
    wide = torch.randn(T, rows, 2 * I)[..., ::2]
    assert_same_bits("out", module(wide)[0], module(wide.contiguous())[0])


@pytest.mark.skipif(allowed() == "reference", reason="torch's own product gives a row other bits alone")
def test_a_row_alone_has_the_bits_of_a_row_in_a_batch() -> None:
    module = LSTM(33, 17, 2)
    x = torch.randn(9, 7, 33)
    with torch.no_grad():
        assert_same_bits("row", module(x)[0][:, 4:5], module(x[:, 4:5])[0])


def test_meta_device() -> None:
    out, (h_n, _) = LSTM(I, H, 2, device="meta")(torch.empty(T, B, I, device="meta"))
    assert out.device.type == "meta" and out.shape == (T, B, H) and h_n.shape == (2, B, H)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_has_float32_arithmetic(dtype: torch.dtype) -> None:
    low = LSTM(I, H, 2, bidirectional=True, dtype=dtype)
    full = LSTM(I, H, 2, bidirectional=True)
    full.load_state_dict(low.state_dict())
    x = torch.randn(T, B, I, dtype=dtype)
    got, (h_n, c_n) = low(x)
    want, (h_want, c_want) = full(x.float())
    for v, w in ((got, want), (h_n, h_want), (c_n, c_want)):
        assert v.dtype == dtype and torch.equal(v, w.to(dtype))
    upstream = torch.randn(got.shape).to(dtype)
    got.backward(upstream)
    want.backward(upstream.float())
    for p, q in zip(low.parameters(), full.parameters(), strict=True):
        assert p.grad.dtype == dtype and torch.equal(p.grad, q.grad.to(dtype))


def test_autocast() -> None:
    module = LSTM(I, H, 2)
    x = torch.randn(T, B, I)
    plain = module(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out, (h_n, c_n) = module(x)
        mixed = module(x.bfloat16(), (torch.zeros(2, B, H), torch.zeros(2, B, H)))[0]
    assert out.dtype == h_n.dtype == c_n.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(out, plain.bfloat16())  # only the results are rounded
    out.sum().backward()
    assert module.weight_hh_l0.grad.dtype == torch.float32


def test_construction_warns_and_fails_as_stock_does() -> None:
    wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((I, H, 1, 0.5), {}),
        ((I, H), {"batch_first": 1}),
        ((I, H), {"dropout": 1.5}),
        ((I, H), {"dropout": True}),
        ((I, H), {"dropout": "half"}),
        ((I, 2.0), {}),
        ((0, H), {}),
        ((I, 0), {}),
        ((I, H, 0), {}),
        ((I, H), {"proj_size": -1}),
        ((I, H), {"proj_size": H}),
    ]
    for args, kwargs in wrong:
        raised = []
        for module in (nn.LSTM, LSTM):
            with pytest.raises((ValueError, TypeError)) as caught:
                module(*args, **kwargs)
            raised.append((caught.type, str(caught.value)))
        assert raised[0] == raised[1]
    with pytest.warns(UserWarning, match="non-zero dropout expects num_layers greater than 1"):
        LSTM(I, H, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LSTM(I, H, 2, dropout=0.5)

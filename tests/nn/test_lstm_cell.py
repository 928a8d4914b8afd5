"""fastseq.nn.LSTMCell against torch.nn.LSTMCell, and against the layer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from fastseq.nn import LSTM, LSTMCell
from tests.nn.stock import assert_like, assert_same_rows, inputs
from tests.tolerance import assert_same_bits

B, I, H = 3, 4, 6  # noqa: E741


@pytest.mark.parametrize("bias", [True, False])
def test_same_parameters(bias: bool) -> None:
    torch.manual_seed(3)
    stock = nn.LSTMCell(I, H, bias)
    torch.manual_seed(3)
    ours = LSTMCell(I, H, bias)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(p, q)
    assert repr(ours) == repr(stock) and ours.bias_ih is None if not bias else True
    stock.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("rows", [None, 0, 1, B])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_results(state: bool, bias: bool, rows: int | None) -> None:
    lead = () if rows is None else (rows,)
    for dtype in (torch.float32, torch.float64):
        given = inputs(LSTMCell(I, H, bias, dtype=dtype), *lead, I, state=[(*lead, H)] * 2 if state else [])
        assert_like(functools.partial(LSTMCell, I, H, bias), functools.partial(nn.LSTMCell, I, H, bias), given, 2)


def test_a_loop_of_cells_is_the_layer() -> None:
    layer = LSTM(I, H)
    cell = LSTMCell(I, H)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(7, B, I)
    state: Any = None
    for step in x:
        state = cell(step, state)
    out, (h_n, c_n) = layer(x)
    assert_same_rows("h c out", [*state, state[0]], [h_n[0], c_n[0], out[-1]])


def test_one_tensor_for_both_states() -> None:
    cell, same = LSTMCell(I, H), torch.randn(B, H, requires_grad=True)
    x = torch.randn(B, I)
    (grad,) = torch.autograd.grad(cell(x, (same, same))[0].sum(), same)
    apart = same.detach().clone().requires_grad_(), same.detach().clone().requires_grad_()
    assert_same_bits("grad", grad, sum(torch.autograd.grad(cell(x, apart)[0].sum(), apart)))


def test_no_hidden_units() -> None:
    h, c = LSTMCell(I, 0)(torch.randn(B, I))
    assert h.shape == c.shape == (B, 0)


def test_no_proj_size() -> None:
    with pytest.raises(TypeError, match="proj_size"):
        LSTMCell(I, H, proj_size=2)

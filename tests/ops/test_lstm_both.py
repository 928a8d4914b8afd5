"""Both directions of a layer as one operator: the results of two calls, in every layout, and all derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.ops.lstm_autograd import layer
from fastseq.ops.lstm_both import Both, both_directions
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import Case

I = 4  # noqa: E741
LAYOUTS = {
    "dense": Case(4, 3, 5),
    "lengths": Case(4, 3, 5, layout="lengths", reset=True, start=True, noise=0.5, tau=0.8),
    "packed": Case(4, 3, 5, layout="packed", reset=True, rows=True, noise=1.0),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


class Call:
    """Arguments of ``both_directions``, and of ``layer`` for each direction."""

    def __init__(self, layout: str, bias: bool = True) -> None:
        one, two = (cases.inputs(LAYOUTS[layout], torch.float64, seed) for seed in (0, 1))
        o, other = one.options, two.options
        H = one.c0.shape[1]
        self.x = torch.randn(*one.x_gates.shape[:-1], I, dtype=torch.float64, requires_grad=True)

        def pair(*values: Any) -> list[Tensor]:
            return [v.detach().requires_grad_() for v in values if v is not None]

        weight_ih = pair(*torch.randn(2, 4 * H, I, dtype=torch.float64))
        biases = pair(*torch.randn(2, 4 * H, dtype=torch.float64)) if bias else []
        states = (pair(*v) for v in zip(one[1:4], two[1:4], strict=True))
        self.both = Both(weight_ih, biases, *states, pair(o.h_start, other.h_start), pair(o.c_start, other.c_start))
        self.sizes = (o.lengths, o.batch_sizes, o.reset)
        self.rest = (o.seed, o.rows, o.row_offset, 6, o.noise_probability, o.tau, o.hard)
        self.leaves = [self.x, *(t for values in self.both for t in values)]

    def together(self, save: int = 0, recompute: bool = False) -> list[Tensor]:
        found = both_directions(self.x, self.both, self.sizes, self.rest, save, recompute)
        return [v for direction in found for v in direction]

    def apart(self) -> list[Tensor]:
        b, (seed, rows, row_offset, stream, *gate) = self.both, self.rest
        found = []
        for n in (0, 1):
            bias, h_start, c_start = (v[n] if v else None for v in (b.bias, b.h_start, b.c_start))
            options = (None, *self.sizes, h_start, c_start, seed, rows, row_offset, stream + n, *gate, n == 1)
            found += layer(self.x, b.weight_ih[n], bias, b.weight_hh[n], b.h0[n], b.c0[n], options, save=2)
        return found


def equal(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.numel():
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@each_layout
def test_results_and_gradients(layout: str) -> None:
    call = Call(layout, bias=layout != "packed")
    got, expected = call.together(), call.apart()
    equal(got, expected)
    upstream = cases.upstream(tuple(expected))
    grads = [torch.autograd.grad(v, call.leaves, upstream, allow_unused=True) for v in (got, expected)]
    equal(*grads)


@each_layout
def test_recomputed_gates(layout: str) -> None:
    call = Call(layout)
    outs = [0, 1, 3, 4, 5, 6, 8, 9]  # the gates are not there
    expected = call.apart()
    upstream = cases.upstream(tuple(expected))
    got = call.together(recompute=True)
    assert got[2].numel() == got[7].numel() == 0
    grads = [
        torch.autograd.grad([v[n] for n in outs], call.leaves, [upstream[n] for n in outs], allow_unused=True)
        for v in (got, expected)
    ]
    equal(*grads)


def test_some_gradients() -> None:
    call = Call("lengths")
    for t in call.leaves:
        t.requires_grad_(False)
    call.both.weight_hh[1].requires_grad_()
    (got,), (expected,) = (
        torch.autograd.grad(v[5].sum(), call.both.weight_hh[1]) for v in (call.together(), call.apart())
    )
    equal([got], [expected])
    assert not call.together()[0].grad_fn.needs_input_grad[0]


@each_layout
def test_second_derivatives(layout: str) -> None:
    call = Call(layout)

    def second(outs: list[Tensor]) -> Any:
        first = torch.autograd.grad(
            outs[0].pow(2).sum() + outs[9].sum(), call.leaves, create_graph=True, allow_unused=True
        )
        total = sum(d.pow(2).sum() for d in first if d is not None)
        return torch.autograd.grad(total, call.leaves, allow_unused=True)

    equal(second(call.together()), second(call.apart()))


@each_layout
def test_opcheck(layout: str) -> None:
    call = Call(layout)
    b = [[t.detach() for t in values] for values in call.both]
    x, (seed, *noise) = call.x.detach(), call.rest
    given = (x, *b[:5], *call.sizes, *b[5:], seed, *noise)
    found = torch.library.opcheck(torch.ops.fastseq.lstm_layer_both_forward.default, (*given, 2))
    assert set(found.values()) == {"SUCCESS"}
    outs = torch.ops.fastseq.lstm_layer_both_forward(*given, 2)
    grads = [None if n in (1, 4) else d for n, d in enumerate(cases.upstream(tuple(outs)))]
    for gates in (outs[4:6], []):
        backward = (grads, x, *b[:2], gates, outs[:2], outs[2:4], *b[2:5], *call.sizes, *b[5:], seed, *noise)
        found = torch.library.opcheck(
            torch.ops.fastseq.lstm_layer_both_backward.default, (*backward, True, True, True, True)
        )
        assert set(found.values()) == {"SUCCESS"}

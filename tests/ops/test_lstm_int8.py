"""The int8 LSTM against its definition: exact integer sums, every step from the state that it was given, equal bits."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fastseq import functional, reference
from fastseq.ops.lstm_int8 import BACKENDS
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import ALL, Case, Options
from tests.tolerance import assert_same_bits, assert_within_budget

each_backend = pytest.mark.parametrize("backend", cases.backends("lstm_int8_forward", BACKENDS))
CASES = {
    "one": Case(1, 1, 1),
    "prime": Case(7, 5, 13),
    "over_tile": Case(2, 18, 33),
    "no_steps": Case(0, 3, 5),
    "no_rows": Case(4, 0, 5),
    "reverse": Case(5, 3, 11, reverse=True),
    "hard": Case(4, 3, 7, hard=True),
    "all_dense": Case(4, 3, 19, **ALL),
    "all_lengths": Case(5, 4, 19, layout="lengths", **ALL),
    "all_lengths_reverse": Case(5, 4, 19, layout="lengths", reverse=True, **ALL),
    "all_packed": Case(5, 4, 19, layout="packed", **ALL),
    "all_packed_reverse": Case(5, 4, 19, layout="packed", reverse=True, **ALL),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Inputs(NamedTuple):
    """Tensors of one call, in the order of ``lstm_int8_forward``."""

    x_gates: Tensor
    weight_hh: Tensor
    scale: Tensor
    h0: Tensor
    c0: Tensor
    options: tuple[Any, ...]


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    base = cases.inputs(case)
    H = case.H
    generator = torch.Generator().manual_seed(17)
    weight = torch.randint(-128, 128, (4 * H, H), generator=generator, dtype=torch.int8)
    scale = (0.5 + torch.rand(4 * H, generator=generator)) / (64 * max(H, 1) ** 0.5)
    start = None if base.options.h_start is None else base.options.h_start.to(dtype)
    options = (*base.options[1:4], start, *base.options[5:])
    return Inputs(base.x_gates.to(dtype), weight, scale, base.h0.to(dtype), base.c0, options)


def forward(backend: str, args: Inputs, save: int = 2) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = cases.run("lstm_int8_forward", backend, *args[:5], *args.options, save, table=BACKENDS)
    return out


def one_step(backend: str, x: Tensor, weight: Tensor, scale: Tensor, h0: Tensor, **options: Any) -> Tensor:
    """The gates of one step from h0 and c0 = 0."""
    c0 = torch.zeros(h0.shape, dtype=torch.float32)
    args = Inputs(x[None], weight, scale, h0, c0, Options(**options)[1:])
    return forward(backend, args)[2][0]


def integer_sums(h: Tensor, weight: Tensor) -> np.ndarray:
    """By numpy, in 64 bits."""
    q = np.clip(np.rint(h.numpy().astype(np.float32) * np.float32(127)), -127, 127).astype(np.int64)
    return q @ weight.numpy().astype(np.int64).T


def with_ties(B: int, H: int) -> Tensor:
    """h of which many lie halfway between two steps of 1/127, and some beyond one."""
    h = torch.randint(-300, 301, (B, H)).to(torch.float32) / (2 * 127)
    return torch.where(torch.rand(B, H) < 0.5, h, torch.randn(B, H))


@pytest.mark.parametrize(("B", "H"), [(1, 1), (3, 31), (17, 33), (2, 130), (2, 300)])
@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
@each_backend
def test_integer_sums_are_exact(backend: str, B: int, H: int, extreme: bool) -> None:
    """A hard gate opens where x = -sum + 1/2 and stays shut where x = -sum - 1/2; each gate's weights in turn."""
    weight = torch.randint(-128, 128, (4 * H, H), dtype=torch.int8)
    h = with_ties(B, H)
    if extreme:
        weight, h = torch.full_like(weight, -128), torch.full_like(h, -2.0)
    scale = torch.full((4 * H,), 127.0)
    for turned in (weight, weight.roll(2 * H, 0)):
        sums = torch.from_numpy(integer_sums(h, turned)).to(torch.float32)
        for offset, expected in ((0.5, 1.0), (-0.5, 0.0)):
            gates = one_step(backend, offset - sums, turned, scale, h, hard=True)
            assert (gates[:, : 2 * H] == expected).all()


def states_before(args: Inputs, h: Tensor, c: Tensor) -> tuple[list[Tensor], Any]:
    """h and c before every valid element of a dense call, and where these are, [T, B]."""
    lengths, reset, h_start, c_start, reverse = args.options[0], *args.options[2:5], args.options[-1]
    T, B, H = h.shape
    lengths = torch.full((B,), T) if lengths is None else lengths
    h_in, c_in = torch.empty_like(h), torch.empty_like(c)
    for b in range(B):
        for t in range(int(lengths[b])):
            before, later = (t + 1, t + 1) if reverse else (t - 1, t)
            inside = 0 <= before < int(lengths[b])
            h_in[t, b], c_in[t, b] = (h[before, b], c[before, b]) if inside else (args.h0[b], args.c0[b])
            if reset is not None and later < int(lengths[b]) and reset[later, b]:
                h_in[t, b], c_in[t, b] = (torch.zeros(H) if v is None else v for v in (h_start, c_start))
    return [h_in, c_in], torch.arange(T)[:, None] < lengths


def check_steps(backend: str, args: Inputs) -> None:
    """Each step, from the state before it as the backend left it, is the definition's to the budget.

    Over several steps a rounding of h may turn one way in float32 and another in float64, so whole sequences are not
    compared with float64.
    """
    h, c, gates, h_n, c_n = forward(backend, args)
    noise = cases.exact(cases.Inputs(args.x_gates, args.weight_hh, args.h0, args.c0, Options(None, *args.options)))[5]
    sizes, dense = args.options[1], args
    if sizes is not None:
        index, mask, lengths = reference.packed_index(sizes, len(args.h0))
        h, c, gates, x, reset, noise = (
            None if v is None else reference.unpack(v, index, mask)
            for v in (h, c, gates, args.x_gates, args.options[2], noise)
        )
        dense = args._replace(x_gates=x, options=(lengths, None, reset, *args.options[3:]))
    (h_in, c_in), valid = states_before(dense, h, c)
    for got in (h, c, gates):
        assert not got[~valid].any(), "not zero beyond a row's end"

    def definition(x: Tensor, scale: Tensor, h: Tensor, c: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        step = (None if noise is None else noise[None], *args.options[10:])
        out = reference.lstm_int8(x[None], args.weight_hh, scale, h, c, None, None, None, None, None, *step)
        return out[0][0], out[1][0].to(x.dtype), out[2][0]

    dtype = args.x_gates.dtype
    inputs = (dense.x_gates[valid], args.scale, h_in[valid], c_in[valid], None if noise is None else noise[valid])
    if valid.any():
        assert_within_budget("h c gates", (h[valid], c[valid].to(dtype), gates[valid]), definition, inputs)
    check_last(dense, h, c, h_n, c_n)


def check_last(args: Inputs, h: Tensor, c: Tensor, h_n: Tensor, c_n: Tensor) -> None:
    T, reverse = len(h), args.options[-1]
    for b in range(len(h_n)):
        length = T if args.options[0] is None else int(args.options[0][b])
        last = (
            (args.h0[b], args.c0[b])
            if length == 0
            else ((h[0, b], c[0, b]) if reverse else (h[length - 1, b], c[length - 1, b]))
        )
        assert torch.equal(h_n[b], last[0]) and torch.equal(c_n[b], last[1])


@each_case
@each_backend
def test_every_step(backend: str, case: Case) -> None:
    check_steps(backend, inputs(case))

"""The LSTM with int8 weights, judged one step at a time from the states that a kernel itself has had.

A rounding of h to 8 bits can go either way, and after that two right answers have little in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import reference
from tests.tolerance import assert_within_budget

OUTPUTS = ("h", "c", "gates", "h_n", "c_n")


class Given(NamedTuple):
    """Of one direction; beside tensors of 16 bits weight_hh is int8, c0 and scale are float32."""

    x_gates: Tensor
    weight_hh: Tensor
    h0: Tensor
    c0: Tensor
    scale: Tensor


def drawn(T: int, B: int, H: int, dtype: torch.dtype, seed: int = 0) -> Given:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    weight_hh = torch.randint(-127, 128, (4 * H, H), generator=generator, dtype=torch.int8)
    scale = torch.rand(4 * H, generator=generator) / (64 * H**0.5)
    h0 = normal(B, H).to(dtype)  # beyond 1 too
    return Given(normal(T, B, 4 * H).to(dtype), weight_hh, h0, normal(B, H), scale)


def step(x: Tensor, weight_hh: Tensor, scale: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """h, c and gates after one step of every row, by the definition."""
    return tuple(v[0] for v in reference.lstm_int8(x[None], weight_hh, scale, h, c)[:3])


def check(given: Given, lengths: Tensor, reverse: bool, out: tuple[Tensor, ...]) -> None:
    """All rows at all steps, each from the state before it; beyond a row's end zeros."""
    h, c, gates, h_n, c_n = out
    alive = torch.arange(len(h))[:, None] < lengths
    n = 1 if reverse else -1  # from a step to the one before it
    first = torch.zeros_like(alive)
    first[(lengths - 1).clamp_min(0) if reverse else 0, torch.arange(len(lengths))] = True
    before = [torch.where(first[..., None], start, v.roll(-n, 0))[alive] for start, v in ((given.h0, h), (given.c0, c))]
    args = (given.x_gates[alive], given.weight_hh, given.scale, *before)
    dtype = given.h0.dtype
    assert_within_budget("h c gates", [v[alive].to(dtype) for v in (h, c, gates)], step, args)
    assert not any(v[~alive].any() for v in (h, c, gates))
    for b, steps in enumerate(lengths.tolist()):
        at = (0 if reverse else steps - 1, b)
        expected = (h[at], c[at]) if steps else (given.h0[b], given.c0[b])
        assert torch.equal(h_n[b], expected[0]) and torch.equal(c_n[b], expected[1])

"""Inputs of ADT's operators, for the tests of all backends and for the parity on a GPU."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.ops import lstm_cases


class Case(NamedTuple):
    """Samples, rows, numbers of a row, and whether each row has its own eps."""

    S: int
    B: int
    N: int
    own: bool = False


CASES = {
    "one": Case(1, 1, 1),
    "few": Case(3, 5, 7, True),
    "under_vector": Case(2, 3, 31),
    "vector": Case(2, 2, 32, True),
    "over_vector": Case(1, 2, 33),
    "under_block": Case(2, 2, 127, True),
    "block": Case(5, 1, 128),
    "over_block": Case(2, 3, 129, True),
    "wide": Case(5, 2, 1031),
    "no_rows": Case(2, 0, 3, True),
    "no_numbers": Case(2, 3, 0),
}
if lstm_cases.INTERPRETED:  # a program for each row; and one row of two programs
    CASES = {"few": Case(2, 2, 7, True), "wide": Case(1, 1, 600), "no_rows": CASES["no_rows"]}
LIMITS = {"free": (-math.inf, math.inf), "clamped": (0.0, 1.0)}
STEP = 3


class Inputs(NamedTuple):
    """Of the operators, rows [B, N]; mu and the rest are as wide as sums are."""

    g: Tensor
    x: Tensor
    mu: Tensor
    rho: Tensor
    seed: Tensor
    eps: Tensor
    weight: Tensor
    totals: Tensor

    @property
    def state(self) -> tuple[Tensor, ...]:
        return self[1:6]

    @property
    def gradient(self) -> tuple[Tensor, ...]:
        return self[:7]


def inputs(case: Case, dtype: torch.dtype = torch.float32, mean: float | None = None, rho: float = 0.0) -> Inputs:
    """Means about 0, or all near ``mean``; every seventh number may not move."""
    S, B, N, own = case
    generator = torch.Generator().manual_seed(3)
    wide = torch.float32 if dtype.itemsize == 2 else dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    eps = 0.1 + normal(B if own else 1, N).abs() * (torch.arange(N) % 7 != 3)
    eps[:, 3::7] = 0
    mu = normal(B, N) if mean is None else torch.full((B, N), mean, dtype=torch.float64)
    values: Any = (mu, rho + normal(B, N), torch.tensor([-(2**40) + 7]), eps, normal(B).abs(), normal(2, B, N))
    return Inputs(
        normal(S, B, N).to(dtype),
        (0.5 + 0.3 * normal(B, N)).to(dtype),
        *(v.to(wide) if v.is_floating_point() else v for v in values),
    )

"""Inputs of the kernels of MIMO and of ensembles, and what results have to agree with beside the definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import reference

IGNORE = -100
LOSSES = "loss nll top logsum"
FIGURES = "probability confidence disagreement nll brier"
PLACES = (0, 2, 4, 5, 6)  # of these among the results of ``ensemble_stats``


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(limit: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, max(1, limit), shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    A, B, S, C, M, N, G = sizes
    x, weight = normal(A, B, S, C, dtype=dtype), normal(G, M * C, seed=1, dtype=dtype)
    return x, weight, normal(G, seed=2, dtype=dtype), whole(B, M, N, seed=3, dtype=torch.int32)


def loss_inputs(sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    N, M, K = sizes
    labels = whole(K, N, M, seed=1)
    labels[:, -1:][::3] = IGNORE
    return (3 * normal(N, M, K)).to(dtype), labels


def ensemble(sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    B, M, K = sizes
    labels = whole(K, B, seed=1)
    labels[1::4] = IGNORE
    return (2 * normal(B, M, K) + normal(B, 1, K, seed=2)).to(dtype), labels


def over_rows(found: Sequence[Tensor], labels: Tensor | None, K: int, bins: int, ignore: int) -> list[Tensor]:
    """Histogram and totals by definition, of results of rows as they were found."""
    _, prediction, confidence, members, disagreement, nll, brier = found[:7]
    given = torch.zeros_like(prediction, dtype=torch.bool)
    right, of_members = given, torch.zeros_like(members, dtype=torch.bool)
    if labels is not None:
        given = (labels != ignore) & (labels >= 0) & (labels < K)
        right, of_members = given & (prediction == labels), given[:, None] & (members == labels[:, None])
    place = (confidence * bins).long().clamp(0, bins - 1)
    each = torch.stack([torch.ones_like(confidence), confidence, right.float()]).double()
    histogram = torch.zeros(3, bins, dtype=torch.float64).index_add(1, place[given], each[:, given])
    counted = given if labels is not None else torch.ones_like(given)
    sums = [v.double().sum() for v in (counted, nll, brier, right, disagreement[counted])]
    return [histogram, torch.cat((torch.stack(sums), of_members.double().sum(0)))]


def figures(*args: Any) -> list[Tensor]:
    """FIGURES by definition."""
    return [reference.ensemble_stats(*args)[n] for n in PLACES]

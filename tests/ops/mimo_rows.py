"""Logits, labels and backends of the operators that read rows of logits: ``mimo_nll`` and ``ensemble_stats``."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastseq.ops.ensemble_stats import BACKENDS as STATS
from fastseq.ops.mimo_nll import BACKENDS as NLL
from tests.ops import lstm_cases

BACKENDS = {**NLL, **STATS}
INTERPRETED = lstm_cases.INTERPRETED
IGNORE = -7
LOW = (torch.bfloat16, torch.float16)
numpy_door = lstm_cases.numpy_door


class Case(NamedTuple):
    """Rows, slots or members, classes, and the share of labels that are ignored."""

    N: int
    M: int
    K: int
    ignored: float = 0.0


CASES = {
    "one": Case(1, 1, 1),
    "one_class": Case(4, 3, 1),
    "one_slot": Case(6, 1, 10, 0.3),
    "prime": Case(7, 5, 13, 0.3),
    "under_vector": Case(3, 2, 7),
    "vector": Case(5, 2, 16),
    "over_vector": Case(5, 2, 17, 0.5),
    "under_lanes": Case(5, 3, 31),
    "lanes": Case(5, 2, 32),
    "over_lanes": Case(2, 2, 65, 0.2),
    "block_of_rows": Case(33, 1, 9, 0.2),
    "many_rows": Case(71, 3, 100, 0.2),
    "all_ignored": Case(5, 2, 6, 1.0),
    "wide": Case(1, 2, 4099),
    "no_rows": Case(0, 3, 4),
}
if INTERPRETED:
    CASES.update(many_rows=Case(9, 3, 100, 0.2), block_of_rows=Case(9, 1, 9, 0.2), wide=Case(1, 2, 1500))
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def logits(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + 37)
    return (3 * torch.randn(case[:3], generator=generator, dtype=torch.float64)).to(dtype)


def labels(case: Case, seed: int = 0) -> Tensor:
    """[N, M], some of them IGNORE."""
    generator = torch.Generator().manual_seed(1000 * seed + 41)
    drawn = torch.randint(0, case.K, case[:2], generator=generator)
    return torch.where(torch.rand(case[:2], generator=generator) < case.ignored, IGNORE, drawn)


def strange(dtype: torch.dtype, K: int = 40) -> Tensor:
    """Rows [8, 2, K] with one slot that is ordinary and one with what is not finite."""
    x = logits(Case(8, 2, K), dtype, 3)
    odd = x[:, 1]
    odd[0, 3:] = -torch.inf  # masked classes
    odd[1, :-1] = -torch.inf  # all but the last
    odd[2] = -torch.inf
    odd[3, K // 2] = torch.nan
    odd[4, 5] = torch.inf
    odd[5, K - 1], odd[5, 2] = torch.nan, torch.inf
    odd[6, 1::2] = torch.finfo(dtype).min  # finite, far below
    odd[7] = torch.nan
    return x


def run(op: str, backend: str, *args: Any) -> Any:
    return lstm_cases.run(op, backend, *args, table=BACKENDS)


def backends(op: str, table: Any = BACKENDS) -> list[Any]:
    """Every backend with every dtype that it takes."""
    found = []
    for param in lstm_cases.backends(op, table, dims=3):
        name = param.values[0]
        dtypes = {"cpu": (torch.float32, torch.float64), "triton": (torch.float32, *LOW)}.get(name)
        for dtype in dtypes or (torch.float32, torch.bfloat16):
            label = f"{name}-{str(dtype).removeprefix('torch.')}"
            found.append(pytest.param(name, dtype, marks=param.marks, id=label))
    return found


def each_backend(op: str) -> Any:
    return pytest.mark.parametrize("backend, dtype", backends(op))


def needs_compiled(op: str) -> Any:
    """Mark for what only the compiled core promises: a skip with the reason where it does not run."""
    reason = BACKENDS[op][0].why_not(torch.zeros(1))
    return pytest.mark.skipif(reason is not None, reason=f"cpu: {reason}")


def finite_where_finite(names: str, got: Any, expected: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Fail unless NaN and infinities lie where they should; both with zeros in their places."""
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, g, e in zip(names.split(), got, expected, strict=True):
        assert torch.equal(g.isnan(), e.isnan()), f"{name}: NaN at {g.isnan().nonzero()}, not {e.isnan().nonzero()}"
        for end in (torch.inf, -torch.inf):
            assert torch.equal(g == end, e == end), f"{name}: {end} at {(g == end).nonzero()}"
        kept[0].append(torch.where(e.isfinite(), g, 0))
        kept[1].append(torch.where(e.isfinite(), e, 0))
    return kept

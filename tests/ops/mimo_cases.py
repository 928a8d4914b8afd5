"""Inputs of the operators on rows of several examples, and the sizes that take each way of the compiled core."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastseq.ops.mimo import BACKENDS
from tests.core.constants import BLOCK_K, BLOCK_M, PANEL_WIDTH, constant
from tests.ops import lstm_cases

GATHERED_ADD = constant("mimo.h", "kGatheredAdd")
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """One call: steps, examples, rows, places, slots, channels and columns. ``kind`` of index: random, which repeats
    some examples and leaves out others; repeated, all examples equally often; same, one example everywhere."""

    A: int
    B: int
    N: int
    S: int
    M: int
    C: int
    G: int
    bias: bool = True
    kind: str = "random"

    @property
    def by_example(self) -> bool:
        """Whether the core makes each product once for each example."""
        return self.B * self.C + self.N * GATHERED_ADD < self.N * self.C


SMALL = {
    "one": Case(1, 1, 1, 1, 1, 1, 1),
    "prime": Case(3, 5, 7, 1, 3, 7, 13),
    "one_row": Case(2, 5, 1, 1, 2, 3, 4, bias=False),
    "one_slot": Case(2, 5, 7, 1, 1, 3, 4),
    "places": Case(2, 3, 5, 4, 2, 6, 9),
    "steps": Case(9, 4, 8, 1, 3, 33, 17, kind="repeated"),
    "by_example": Case(3, 5, 20, 2, 3, 40, 35, kind="repeated"),
    "by_example_no_bias": Case(2, 3, 12, 1, 2, 41, PANEL_WIDTH + 1, bias=False),
    "same": Case(2, 4, 12, 1, 3, 30, 5, kind="same"),
    "no_rows": Case(2, 3, 0, 2, 2, 4, 5),
    "no_steps": Case(0, 3, 4, 1, 2, 5, 3),
    "no_places": Case(2, 3, 4, 0, 2, 5, 3),
    "no_columns": Case(2, 3, 4, 2, 2, 5, 0),
    "no_channels": Case(2, 3, 4, 2, 2, 0, 5),
    "no_examples": Case(2, 0, 0, 1, 2, 4, 5),
}
LARGE = {  # beyond the blocks of rows, of sums over channels, and of columns; enough work for two threads
    "rows": Case(5, 60, 70, 1, 2, 30, 40),
    "rows_long": Case(1, 40, 50, 3, 2, BLOCK_K + 5, 3 * PANEL_WIDTH + 3),
    "examples": Case(13, 20, 80, 1, 3, 60, 150, kind="repeated"),
    "examples_long": Case(2, 13, 50, 2, 2, BLOCK_K + 5, 5 * PANEL_WIDTH + 3),
    "examples_many": Case(1, BLOCK_M + 21, 3 * BLOCK_M, 1, 2, 40, 35),
    "wide": Case(1, 40, 300, 1, 2, 3, 3000),
}


class Inputs(NamedTuple):
    """Tensors of all operators."""

    x: Tensor  # [A, B, S, C]
    weight: Tensor  # [G, M*C]
    bias: Tensor | None  # [G]
    index: Tensor  # [M, N]
    parts: Tensor  # [A, B, S, M*G]
    d: Tensor  # [A, N, S, G]
    drows: Tensor  # [A, N, S, M*C]


def inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(1000 * seed + 29)
    A, B, N, S, M, C, G, bias, kind = case

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    index = torch.randint(0, max(1, B), (M, N), generator=generator)
    if kind == "repeated":
        index = torch.stack([torch.arange(N)[torch.randperm(N, generator=generator)] % B for _ in range(M)])
    elif kind == "same":
        index = torch.full((M, N), B - 1)
    tensors = normal(A, B, S, C), normal(G, M * C), normal(G) if bias else None, index.to(torch.int32)
    return Inputs(*tensors, normal(A, B, S, M * G), normal(A, N, S, G), normal(A, N, S, M * C))


def run(op: str, backend: str, *args: Any) -> Any:
    """One operator by the backend of that name."""
    return lstm_cases.run(op, backend, *args, table=BACKENDS)


def calls(op: str) -> list[Any]:
    """Every backend with every dtype that it may take and every small case; large ones for the core, which has blocks
    and threads."""
    found = []
    for parameter in lstm_cases.backends(op, BACKENDS):
        core = parameter.values[0] == "cpu"
        for dtype in lstm_cases.DTYPES if core else [*lstm_cases.DTYPES, *LOW_PRECISION]:
            for name, case in {**SMALL, **LARGE}.items() if core else SMALL.items():
                label = f"{parameter.values[0]}-{str(dtype).removeprefix('torch.')}-{name}"
                found.append(pytest.param(parameter.values[0], dtype, case, marks=parameter.marks, id=label))
    return found


def by_numpy(op: str, *args: Any, threads: int = 1) -> list[Tensor]:
    """The operator of that name through the numpy door."""
    values = [a.numpy() if isinstance(a, Tensor) else a for a in args]
    out = getattr(lstm_cases.numpy_door(), op)(*values, threads=threads)
    return [torch.from_numpy(v) for v in (out if isinstance(out, tuple) else (out,))]

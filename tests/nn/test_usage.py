"""Usage over an epoch against numbers worked out by hand, and its messages."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastseq._check import ArgumentError
from fastseq.nn.usage import CodebookUsage, Usage, bits_per_dimension
from tests.tolerance import assert_same_bits


def numbers(usage: Usage) -> list[Any]:
    return [t.tolist() for t in usage]


def test_by_hand() -> None:
    metric = CodebookUsage()
    metric.update(torch.tensor([0, 0, 1]), 8)
    metric.update(torch.tensor([[1, 2], [3, -1]]), 8)  # frequencies 2, 2, 1, 1 of 6; -1 does not count
    bits = 2 * (1 / 3) * math.log2(3) + 2 * (1 / 6) * math.log2(6)
    usage, perplexity, used, dead, rows = numbers(metric.compute())
    assert usage == pytest.approx(bits / 3, rel=1e-12) and perplexity == pytest.approx(2**bits, rel=1e-12)
    assert (used, dead, rows) == (4, 4, 6)
    metric.reset()
    metric.update(torch.arange(8), 8)
    assert numbers(metric.compute()) == [pytest.approx(1), pytest.approx(8), 8, 0, 8]


@pytest.mark.parametrize(
    ("indices", "K", "want"),
    [
        ([5, 5, 5], 8, [0, 1, 1, 7, 3]),  # collapsed
        ([-1, -1], 8, [0, 1, 0, 8, 0]),  # nothing counted
        ([], 8, [0, 1, 0, 8, 0]),
        ([0, 0], 1, [1, 1, 1, 0, 2]),  # one code is used fully
        ([], 1, [0, 1, 0, 1, 0]),
    ],
)
def test_edges(indices: list[int], K: int, want: list[float]) -> None:
    metric = CodebookUsage()
    metric.update(torch.tensor(indices, dtype=torch.int64), K)
    assert numbers(metric.compute()) == want
    assert math.copysign(1, metric.compute().usage.item()) == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize(
    ("shape", "dims", "sizes"),
    [((2, 5), (), ()), ((2, 5, 3), (-1,), (3,)), ((4, 2, 5, 3), (0, -1), (4, 3)), ((3, 6, 6), (0,), (3,))],
)
def test_shapes(dtype: torch.dtype, shape: tuple[int, ...], dims: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Heads, levels and groups are counted apart, each as if it were alone."""
    indices = torch.randint(-1, 7, shape).to(dtype)
    metric = CodebookUsage(dims)
    for _ in range(2):
        metric.update(indices, 7)
    got = metric.compute()
    assert got.usage.shape == sizes
    alone = [
        t.reshape(-1) for t in indices.movedim(dims, tuple(range(len(dims)))).reshape(max(math.prod(sizes), 1), -1)
    ]
    for one, place in zip(alone, range(len(alone)), strict=True):
        single = CodebookUsage()
        single.update(torch.cat([one, one]), 7)
        assert_same_bits("usage perplexity used dead rows", [t.flatten()[place] for t in got], single.compute())


def test_an_epoch_is_not_its_batches() -> None:
    """Small batches alone show little use of a codebook that is used evenly."""
    epoch, batch = CodebookUsage(), CodebookUsage()
    indices = torch.randperm(256)
    for part in indices.split(8):
        batch.reset()
        batch.update(part, 256)
        epoch.update(part, 256)
        assert batch.compute().perplexity.item() == pytest.approx(8)
    assert epoch.compute().perplexity.item() == pytest.approx(256)


def test_bits_per_dimension() -> None:
    """The rate alone of the CIFAR-10 model of Lancucki et al.: 8 books of 128 codes at 8x8 places, 3*32*32 numbers."""
    assert bits_per_dimension(0.0, 8 * 8 * 8, 128, 3 * 32 * 32) == pytest.approx(3584 / 3072)
    nats = torch.tensor([-100.0, -50.0], dtype=torch.float64)
    want = (4 * 3 + torch.tensor([100.0, 50.0], dtype=torch.float64) / math.log(2)) / 10
    assert bits_per_dimension(nats, 4, 8, 10).tolist() == pytest.approx(want.tolist())


def updated(dims: tuple[int, ...] = (), *indices: list[Any], K: int = 4) -> CodebookUsage:
    metric = CodebookUsage(dims)
    for one in indices:
        metric.update(torch.tensor(one), K)
    return metric


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "floats": (lambda: updated((), [0.5]), "CodebookUsage.update: indices must be integers, got torch.float32"),
    "K": (lambda: updated((), [1], K=0), "CodebookUsage.update: K must be an integer >= 1, got 0"),
    "another K": (lambda: updated((), [1]).update(torch.tensor([1]), 5), "K must be 4 as before, got 5"),
    "few dimensions": (
        lambda: updated((0, -1), [1]),
        "CodebookUsage.update: indices must be of 2 dimensions at least, got [1]",
    ),
    "sizes": (
        lambda: updated((-1,), [[1, 2]], [[1, 2, 3]]),
        "indices must be sized [2] in dimensions (-1,) as before, got (3,)",
    ),
    "out of range": (lambda: updated((), [4, -2, 3]).compute(), "indices must be in -1..K-1 = -1..3, got 2 others"),
    "never": (lambda: CodebookUsage().compute(), "CodebookUsage.compute: indices must be given by update() before"),
    "codes": (lambda: bits_per_dimension(0.0, -1, 2, 2), "bits_per_dimension: codes must be an integer >= 0, got -1"),
    "bits K": (lambda: bits_per_dimension(0.0, 1, 0, 2), "bits_per_dimension: K must be an integer >= 1, got 0"),
    "dimensions": (lambda: bits_per_dimension(0.0, 1, 2, 0), "dimensions must be an integer >= 1, got 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_messages(name: str) -> None:
    call, words = ERRORS[name]
    with pytest.raises(ArgumentError, match=re.escape(words)):
        call()

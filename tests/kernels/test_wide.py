"""Tensors of more than 2^31 elements: the last rows get what they get in a small tensor, bit for bit."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerance import assert_same_bits

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs through the interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from tests.kernels.sparse import at_end, some_programs  # noqa: E402

FEW = 5
Make = Callable[[int], tuple[Any, ...]]
WIDE: dict[str, tuple[str, str, int, Make, tuple[int | None, ...]]] = {}


def wide(module: str, op: str, n: int, *dims: int | None, name: str = "") -> Callable[[Make], Make]:
    """A case: the decorated function makes the arguments for n rows, of which the last FEW are the same for every n.

    dims: along which dimension of each result the rows lie; None where a result is not compared.
    """

    def add(make: Make) -> Make:
        WIDE[name or op] = (module, op, n, make, dims)
        return make

    return add


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@wide("lstm_noise", "lstm_noise", (1 << 24) + FEW, 1)
def noise(n: int) -> tuple[Any, ...]:
    """The last program takes the last row alone."""
    return (torch.tensor([77]), 1, n, 128, at_end(torch.arange(FEW) + 3, n), 0, 0, 0.7)


@wide("gemm", "gemm", (1 << 27) + FEW, 0)
def gemm(n: int) -> tuple[Any, ...]:
    return (at_end(normal(FEW, 16), n), normal(16, 16, seed=2), normal(16, seed=3), False, True)


def recurrence(n: int, H: int = 16) -> tuple[Any, ...]:
    return normal(4 * H, H, seed=2) / 4, at_end(normal(FEW, H, seed=3), n), at_end(normal(FEW, H, seed=4), n)


PLAIN = (None,) * 6
NOISE = (None, None, 0, 0, 1.0)


@wide("lstm", "lstm_forward", (1 << 24) + FEW, 1, 1, 1, 0, 0)
def forward(n: int) -> tuple[Any, ...]:
    return (at_end(normal(2, FEW, 64), n, 1), *recurrence(n), *PLAIN, *NOISE, 1.0, False, False, 2)


@wide("lstm", "lstm_gates", (1 << 24) + FEW, 1)
def gates(n: int) -> tuple[Any, ...]:
    kept = (at_end(normal(2, FEW, 16, seed=5), n, 1), at_end(normal(2, FEW, 16, seed=6), n, 1))
    return (at_end(normal(2, FEW, 64), n, 1), *kept, *recurrence(n), *PLAIN, *NOISE, 1.0, False, False)


@wide("lstm", "lstm_backward", (1 << 24) + FEW, 1, None, 0, 0, None, None, None)
def backward(n: int) -> tuple[Any, ...]:
    kept = [at_end(normal(2, FEW, width, seed=width).sigmoid(), n, 1) for width in (64, 16, 17)]
    kept[2] = at_end(normal(2, FEW, 16, seed=9), n, 1)
    dh = at_end(normal(2, FEW, 16, seed=8), n, 1)
    return (dh, None, None, None, None, *kept, *recurrence(n), *PLAIN, 1.0, False, False, False)


@wide("lstm", "lstm_forward", (1 << 24) + FEW, 1, 1, 1, 0, 0, name="projected")
def projected(n: int) -> tuple[Any, ...]:
    """By the kernel of one step."""
    return (*forward(n)[:4], normal(16, 16, seed=7) / 4, *PLAIN[1:], *forward(n)[10:])


@wide("lstm", "lstm_backward", (1 << 24) + FEW, 1, None, 0, 0, None, None, None, name="projected backward")
def projected_backward(n: int) -> tuple[Any, ...]:
    return (*backward(n)[:11], normal(16, 16, seed=7) / 4, *backward(n)[12:])


def lengths(n: int) -> Tensor:
    return at_end(torch.tensor([2, 1, 2, 0, 2]), n)


@wide("lstm", "lstm_forward", (1 << 24) + FEW, 1, 1, 1, 0, 0, name="lengths")
def forward_lengths(n: int) -> tuple[Any, ...]:
    return (*forward(n)[:5], lengths(n), *forward(n)[6:])


@wide("lstm_lowrank", "lstm_lowrank_forward", (1 << 24) + FEW, 1, 1, 1, 0, 0)
def lowrank(n: int) -> tuple[Any, ...]:
    factors = (normal(4, 16, 8, seed=20) / 4, normal(1, 8, 16, seed=21))
    return (at_end(normal(2, FEW, 64), n, 1), *factors, *recurrence(n)[1:], *PLAIN[1:], *NOISE, 1.0, False, False, 2)


@wide("lstm_int8", "lstm_int8_forward", (1 << 24) + FEW, 1, 1, 1, 0, 0)
def int8(n: int) -> tuple[Any, ...]:
    weight = (normal(64, 16, seed=22) * 40).to(torch.int8), normal(64, seed=23).abs() / 100
    return (at_end(normal(2, FEW, 64), n, 1), *weight, *recurrence(n)[1:], *PLAIN[1:], *NOISE, 1.0, False, False, 2)


def rows(n: int, D: int = 16) -> Tensor:
    return at_end(normal(1, FEW, D, seed=11), n, 1)


CODES = normal(1, 8, 16, seed=12)
N = (1 << 27) + FEW


@wide("vq_nearest", "vq_nearest", N, 1, 1, 1)
def nearest(n: int) -> tuple[Any, ...]:
    return (rows(n), CODES, None, False, 1, 64, True, True, 0)


@wide("vq_quantize", "vq_quantize", N, 1, 1, 1, None, None)
def quantize(n: int) -> tuple[Any, ...]:
    return (rows(n), CODES, None, False, False)


@wide("vq_backward", "vq_backward", N, 1, None)
def vq_backward(n: int) -> tuple[Any, ...]:
    index = at_end(torch.arange(FEW)[None], n, 1)
    grads = (at_end(normal(1, FEW, 16, seed=13), n, 1), at_end(normal(1, FEW, seed=14), n, 1), None)
    return (*grads, rows(n), at_end(CODES[:, :FEW].contiguous(), n, 1), index, 8, 1, True, False)


@wide("vq_codes", "vq_pack", (1 << 28) + FEW, 0)
def pack(n: int) -> tuple[Any, ...]:
    return (at_end(torch.arange(FEW * 8).view(FEW, 8) * 7 % 1024, n), 10)


@wide("vq_codes", "vq_unpack", (1 << 28) + FEW, 0)
def unpack(n: int) -> tuple[Any, ...]:
    return (at_end((torch.arange(FEW * 10).view(FEW, 10) * 37).to(torch.uint8), n), 10, 8)


@wide("vq_residual", "vq_residual_backward", N, 0)
def residual_backward(n: int) -> tuple[Any, ...]:
    grads = (at_end(normal(FEW, 16, seed=15), n), at_end(normal(2, FEW, seed=16), n, 1))
    codes = torch.cat((CODES[0], -CODES[0]))
    index = at_end(torch.arange(2 * FEW).view(FEW, 2) % 8, n)
    return (*grads, at_end(normal(FEW, 16, seed=11), n), codes, [8, 8], index, 0)


@wide("vq_residual", "vq_residual", N, 0, 0, 1, None, None, None)
def residual(n: int) -> tuple[Any, ...]:
    return (at_end(normal(FEW, 16, seed=11), n), [CODES[0], -CODES[0]], None, None, False, False)


def index(n: int) -> Tensor:
    """int32 [2, n]: the last rows hold the last examples, in another order in each slot."""
    places = torch.stack([torch.arange(FEW), torch.arange(FEW).flip(0)]).to(torch.int32)
    return at_end(places + (n - FEW), n, 1)


HALF = (1 << 27) + FEW  # of two slots of 16 numbers


@wide("mimo", "mimo_gather", HALF, 1, None)
def mimo_gather(n: int) -> tuple[Any, ...]:
    return (at_end(normal(1, FEW, 1, 16, seed=30), n, 1), index(n), None)


@wide("mimo", "mimo_combine", HALF, 1)
def mimo_combine(n: int) -> tuple[Any, ...]:
    return (at_end(normal(1, FEW, 1, 32, seed=31), n, 1), index(n), normal(16, seed=32))


@wide("mimo", "mimo_gather_backward", HALF, 2)
def mimo_gather_backward(n: int) -> tuple[Any, ...]:
    """Of steps between rows and channels."""
    return (at_end(normal(1, 3, FEW, 32, seed=37), n, 2), torch.zeros(2, 3, dtype=torch.int32), 1)


@wide("mimo", "mimo_combine_backward", HALF, 2)
def mimo_combine_backward(n: int) -> tuple[Any, ...]:
    return (at_end(normal(1, 3, FEW, 16, seed=38), n, 2), torch.zeros(2, 3, dtype=torch.int32), 1)


@wide("mimo_nll", "mimo_nll", N, None, 0, 0, 0)
def mimo_nll(n: int) -> tuple[Any, ...]:
    labels = at_end(torch.arange(2 * FEW).view(FEW, 2) % 9, n)
    return (at_end(normal(FEW, 2, 9, seed=33), n), labels, 0.1, -100)


@wide("mimo_nll", "mimo_nll_backward", N, 0)
def mimo_nll_backward(n: int) -> tuple[Any, ...]:
    labels = at_end(torch.arange(2 * FEW).view(FEW, 2) % 9, n)
    grads = (None, at_end(normal(FEW, 2, seed=34), n))
    sums = (at_end(normal(FEW, 2, seed=seed) + 2, n) for seed in (35, 36))
    return (*grads, at_end(normal(FEW, 2, 9, seed=33), n), labels, *sums, 0.1, -100)


@wide("ensemble_stats", "ensemble_stats", N, 0, 0, 0, 0, 0, 0, 0, None, None)
def ensemble_stats(n: int) -> tuple[Any, ...]:
    return (at_end(normal(FEW, 2, 9, seed=36), n), at_end(torch.arange(FEW), n), 15, -100, True)


def adt_state(n: int) -> tuple[Any, ...]:
    """Rows whose noise is that of their numbers, which differ: the spread is nearly 0, so that it does not count."""
    x, mu = (at_end(normal(FEW, 16, seed=seed), n) for seed in (40, 41))
    return (x, mu, at_end(torch.full((FEW, 16), -200.0), n), torch.tensor([7]), torch.full((1, 16), 0.3))


@wide("adt", "adt_sample", HALF, 1)
def adt_sample(n: int) -> tuple[Any, ...]:
    return (*adt_state(n), 2, 0, -1.0, 1.0)


@wide("adt", "adt_ascend", HALF, 0, 0, None)
def adt_ascend(n: int) -> tuple[Any, ...]:
    g = at_end(normal(2, FEW, 16, seed=42), n, 1)
    return (g, *adt_state(n), at_end(normal(FEW, seed=43), n), None, 0, 0.3, -1.0, 1.0)


@pytest.mark.parametrize("name", WIDE)
def test_the_last_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, op, n, make, dims = WIDE[name]
    kernels = importlib.import_module(f"fastseq_kernels.{module}")
    run = getattr(kernels, op, None)
    if run is None:
        pytest.skip(f"fastseq_kernels.{module} has no {op}")
    monkeypatch.setattr(kernels, "_MOST_CHUNKS", 1 << 40, raising=False)  # sums of all rows: only the last chunk
    with some_programs():
        got = run(*make(n))
    expected = run(*make(FEW))
    got, expected = ((v,) if isinstance(v, Tensor) else v for v in (got, expected))
    few = 1 if module in ("lstm_noise", "adt") else FEW  # the last program has the last row alone
    for place, (dim, g, e) in enumerate(zip(dims, got, expected, strict=True)):
        if dim is not None:
            assert_same_bits(f"result_{place}", *(v.narrow(dim, v.shape[dim] - few, few) for v in (g, e)))


def test_the_last_screened_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are screened some after others; here only the last ones are."""
    screen = importlib.import_module("fastseq_kernels.vq_screen")
    nearest, screen_rows = importlib.import_module("fastseq_kernels.vq_nearest").vq_nearest, screen._screen_rows
    x, codes, N = normal(1, FEW, 1024, seed=24), normal(1, 40, 1024, seed=25), (1 << 21) + FEW

    def skipped(call: Any, given: Any, tiles: Any, first: int, rows: int) -> Any:
        if first + rows < call.x.shape[1]:
            return screen.Screened(first, rows, torch.zeros(1, rows, dtype=torch.int32), torch.zeros(1).int())
        return screen_rows(call, given, tiles, first, rows)

    monkeypatch.setattr(screen, "_screen_rows", skipped)
    rest = (codes, None, False, 1, 64, False, False, 1)
    with some_programs():
        got = nearest(at_end(x, N, 1), *rest)[0]
    assert_same_bits("index", got[:, -FEW:], nearest(x, *rest)[0])


def test_the_cases_are_wide() -> None:
    """More than 2^31 elements in an argument or a result of every case."""
    for name, (module, op, n, make, _) in WIDE.items():
        with some_programs(lambda grid: []):
            tensors = [t for t in make(n) if isinstance(t, Tensor)]
            if not any(t.numel() > 2**31 for t in tensors):
                found = getattr(importlib.import_module(f"fastseq_kernels.{module}"), op)(*make(n))
                tensors = [found] if isinstance(found, Tensor) else list(found)
        assert any(t.numel() > 2**31 for t in tensors), name


def test_the_last_columns_of_sums() -> None:
    """Few rows that count among many long ones."""
    sums = importlib.import_module("fastseq_kernels.vq_sums").vq_sums
    N, D, K = (1 << 16) + FEW, 1 << 15, 3
    x, index = at_end(normal(1, FEW, D), N, 1), torch.full((1, N), -1)
    index[0, -FEW:] = torch.tensor([0, 2, 2, 0, 2])
    with some_programs(lambda grid: itertools.product(range(min(grid[0], 80)), [grid[1] - 1], [0])):
        counts, got = sums(x, index, K)
    assert counts.tolist() == [[2, 0, 3]]
    expected = torch.stack([x[0, -FEW:][index[0, -FEW:] == k].sum(0) for k in range(K)])
    torch.testing.assert_close(got[0, :, -100:], expected[:, -100:])

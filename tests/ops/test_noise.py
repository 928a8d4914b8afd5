"""Philox, the noise of the binary gates, and the gates that it makes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastseq import reference
from tests.ops import lstm_cases as cases
from tests.tolerance import assert_same_bits, assert_within_budget

each_backend = pytest.mark.parametrize("backend", cases.backends("lstm_noise"))


def many(op: str) -> list[Any]:
    """The backends that draw a million numbers in no time; the words of the others are tested to be the same."""
    return [p for p in cases.backends(op) if p.values[0] != "triton"]


ONES = 0xFFFFFFFF
PUBLISHED = [  # counter, key, words: the known-answer vectors of Random123 for philox4x32-10
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, words", PUBLISHED)
def test_published_words(counter: list[int], key: list[int], words: list[int]) -> None:
    seed = key[0] | key[1] << 32
    assert reference.philox(torch.tensor(counter), seed).tolist() == words
    assert cases.numpy_door().philox(np.array(counter, dtype=np.uint32), seed).tolist() == words


@given(
    counter=st.lists(st.tuples(*(st.integers(0, ONES),) * 4), min_size=1, max_size=40), seed=st.integers(0, 2**64 - 1)
)
def test_words(counter: list[tuple[int, ...]], seed: int) -> None:
    """The words of the kernel are those of the reference for any counter and key."""
    expected = reference.philox(torch.tensor(counter), seed).tolist()
    assert cases.numpy_door().philox(np.array(counter, dtype=np.uint32), seed).tolist() == expected


class Draw(NamedTuple):
    """One call of ``lstm_noise``."""

    seed: int
    T: int
    B: int
    H: int
    rows: int | None  # seed of the numbers of rows; None for 0..B-1
    row_offset: int
    stream: int
    probability: float


def arguments(draw: Draw) -> tuple[Any, ...]:
    rows = None
    if draw.rows is not None:
        rows = torch.randint(2**31, (draw.B,), generator=torch.Generator().manual_seed(draw.rows))
    return (torch.tensor([draw.seed]), draw.T, draw.B, draw.H, rows, draw.row_offset, draw.stream, draw.probability)


def draws(T: Any, B: Any, H: Any) -> st.SearchStrategy[Draw]:
    numbers = st.integers(0, 2**31)
    return st.builds(
        Draw,
        seed=st.integers(-(2**63), 2**63 - 1),
        T=T,
        B=B,
        H=H,
        rows=st.none() | numbers,
        row_offset=numbers,
        stream=st.integers(0, 2**16),
        probability=st.sampled_from([0.0, 0.2, 0.5, 1.0]) | st.floats(0, 1),
    )


def check(backend: str, draw: Draw, threads: int) -> None:
    """Values within the budget; the mask, which is a matter of words alone, exactly."""
    args = arguments(draw)
    torch.set_num_threads(threads)
    got = cases.run("lstm_noise", backend, *args)
    assert_within_budget("noise", got, reference.gate_noise, (*args, torch.float32))
    assert torch.equal(got == 0, reference.gate_noise(*args) == 0)


@each_backend
@given(draw=draws(st.integers(0, 6), st.integers(0, 12), st.integers(1, 50)), threads=st.sampled_from([1, 2]))
def test_small(backend: str, draw: Draw, threads: int) -> None:
    check(backend, draw, threads)


@pytest.mark.parametrize("backend", cases.compiled("lstm_noise"))
@settings(max_examples=40)
@given(draw=draws(st.integers(4, 6), st.integers(30, 40), st.integers(110, 150)), threads=st.sampled_from([1, 2]))
def test_large(backend: str, draw: Draw, threads: int) -> None:
    check(backend, draw, threads)


@each_backend
def test_words_behind_the_gates(backend: str) -> None:
    """A float64 gate without other input is U itself, and U gives back the upper 24 bits of its word."""
    T, B, H = 3, 14, 37
    gates = gates_of_noise(backend, T, B, H, torch.float64)
    row, step, unit = torch.arange(B) + 9, torch.arange(T), torch.arange(H)
    grid = torch.meshgrid(step, row, unit, indexing="ij")
    words = reference.philox(torch.stack((grid[2], grid[0], grid[1], torch.full_like(grid[0], 5)), -1), 1 << 40 | 77)
    got = (gates[..., : 2 * H] * 2.0**24 - 0.5).round().long()
    assert torch.equal(got, torch.cat((words[..., 0] >> 8, words[..., 2] >> 8), -1))


def gates_of_noise(backend: str, T: int, B: int, H: int, dtype: torch.dtype, x_gates: Tensor | None = None) -> Tensor:
    """Activated gates of a call in which noise is the only input (unless x_gates is given)."""
    x_gates = torch.zeros(T, B, 4 * H, dtype=dtype) if x_gates is None else x_gates
    options = cases.Options(
        seed=torch.tensor([1 << 40 | 77]) if x_gates.abs().sum() == 0 else None, row_offset=9, stream=5
    )
    zeros = [torch.zeros(*shape, dtype=dtype) for shape in ((4 * H, H), (B, H), (B, H))]
    return cases.run("lstm_forward", backend, x_gates, *zeros, *options, 2)[2]


@pytest.mark.parametrize("backend", cases.backends("lstm_forward"))
@pytest.mark.parametrize("T, B, H", [(3, 5, 7), (2, 13, 33), (4, 40, 150)])
def test_forward_adds_what_lstm_noise_returns(backend: str, T: int, B: int, H: int) -> None:
    """Noise drawn inside the recurrence is that of ``lstm_noise``, bit for bit."""
    noise = cases.run("lstm_noise", backend, torch.tensor([1 << 40 | 77]), T, B, H, None, 9, 5, 1.0)
    x_gates = torch.cat((noise, torch.zeros_like(noise)), -1)
    drawn = gates_of_noise(backend, T, B, H, torch.float32)
    assert_same_bits("gates", gates_of_noise(backend, T, B, H, torch.float32, x_gates), drawn)


@each_backend
def test_noise_depends_on_its_counter_alone(backend: str) -> None:
    """Not on threads, sizes (so not on tiling), the order of rows, or how rows are split by row_offset."""

    def noise(T: int, B: int, H: int, rows: Tensor | None = None, offset: int = 3, stream: int = 2) -> Tensor:
        return cases.run("lstm_noise", backend, torch.tensor([12345]), T, B, H, rows, offset, stream, 0.5)

    T, B, H = (4, 21, 150) if backend == "triton" else (9, 61, 150)
    torch.set_num_threads(1)
    whole = noise(T, B, H)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same_bits(f"{threads}_threads", noise(T, B, H), whole)
    units = torch.cat((torch.arange(33), H + torch.arange(33)))
    assert_same_bits("smaller", noise(3, 13, 33), whole[:3, :13][..., units])
    order = torch.randperm(B)
    assert_same_bits("sorted", noise(T, B, H, order), whole[:, order])
    assert_same_bits("split", noise(T, B - 20, H, offset=23), whole[:, 20:])
    assert not torch.equal(noise(T, B, H, stream=3), whole)


@each_backend
def test_noise_differs_by_step_row_unit_and_gate(backend: str) -> None:
    values = cases.run("lstm_noise", backend, torch.tensor([1]), 8, 8, 64, None, 0, 0, 1.0)
    assert len(values.unique()) > 0.99 * values.numel()  # 8192 draws out of 2**24 values, but float32 rounds them


@pytest.mark.parametrize("backend", many("lstm_noise"))
@pytest.mark.parametrize("probability", [0.0, 0.2, 0.7, 1.0])
def test_share_of_noise(backend: str, probability: float) -> None:
    noise = cases.run("lstm_noise", backend, torch.tensor([8]), 50, 50, 200, None, 0, 0, probability)
    share, count = float((noise != 0).double().mean()), noise.numel()
    assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / count)


@pytest.mark.parametrize("backend", many("lstm_forward"))
def test_law_of_the_binary_gates(backend: str) -> None:
    """P(G >= 1 - e) = sigmoid(a - tau * log(1/e - 1)), and the same mirrored (Li et al. 2018, proof of theorem 1)."""
    T, B, tau, levels = 100, 100, 0.9, [-3.0, -1.0, -0.25, 0.0, 0.5, 2.0, 4.0]
    H = 16 * len(levels)
    a = torch.tensor(levels).repeat_interleave(16)
    x_gates = torch.cat((a, a, torch.zeros(2 * H))).expand(T, B, 4 * H).contiguous()
    options = cases.Options(seed=torch.tensor([99]), noise_probability=1.0, tau=tau)
    zeros = [torch.zeros(*shape) for shape in ((4 * H, H), (B, H), (B, H))]
    gates = cases.run("lstm_forward", backend, x_gates, *zeros, *options, 2)[2]
    assert gates[..., : 2 * H].numel() > 10**6
    for gate in gates[..., : 2 * H].split(H, -1):
        for level, values in zip(levels, gate.reshape(-1, len(levels), 16).unbind(1), strict=True):
            for e in (0.01, 0.1, 0.3):
                cut = tau * math.log(1 / e - 1)
                for share, law in (((values >= 1 - e), level - cut), ((values <= e), -level - cut)):
                    p = 1 / (1 + math.exp(-law))
                    sigma = math.sqrt(p * (1 - p) / values.numel())
                    assert abs(float(share.double().mean()) - p) <= 5 * sigma


@pytest.mark.parametrize("backend", cases.compiled("lstm_noise"))
def test_numpy_noise(backend: str) -> None:
    """The numpy door gives the operator's noise bit for bit, for any team."""
    core, rows = cases.numpy_door(), torch.randperm(61)
    expected = cases.run("lstm_noise", backend, torch.tensor([-5]), 9, 61, 150, rows, 7, 2, 0.3)
    for threads in (1, 2, 3, 4):
        got = core.lstm_noise(-5, 9, 61, 150, rows.numpy(), 7, 2, 0.3, threads=threads)
        assert_same_bits(f"{threads}_threads", got, expected)

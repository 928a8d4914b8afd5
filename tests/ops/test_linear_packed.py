"""Products with packed matrices: integers bit for bit as numpy has them, floats to the budget; and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastseq import reference
from tests.ops import packed_cases as packed
from tests.ops.lstm_cases import numpy_door
from tests.ops.packed_cases import FORMS, INTEGER, NONE
from tests.tolerance import assert_same_bits, assert_within_budget

core = numpy_door()
# rows of x, rows and columns of the weights
SIZES = [(1, 1, 1), (1, 16, 4), (2, 17, 7), (5, 33, 37), (3, 50, 65), (7, 40, 100), (33, 48, 64), (13, 70, 129)]
SIZES += [(70, 20, 31), (2, 300, 257), (40, 36, 520), (0, 5, 3)]
each_form = pytest.mark.parametrize("form", FORMS)
each_size = pytest.mark.parametrize("size", SIZES, ids="_".join("%d" for _ in range(3)).__mod__)


def rows(M: int, K: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((M, K)).astype(np.float32)


@each_size
@each_form
def test_products(form: str, size: tuple[int, int, int]) -> None:
    M, N, K = size
    x, m = rows(M, K), packed.matrix(N, K, form)
    w, bias = packed.pack(core, m, K), rows(1, N, 1)[0]
    got = core.linear_packed(x, w, bias)
    assert_same_bits("y", got, packed.product(core, x, m, bias))
    assert_same_bits("plain", core.linear_packed(x, w), packed.product(core, x, m))
    given = torch.from_numpy(x), m, torch.from_numpy(bias)
    if form in INTEGER:
        assert_same_bits("definition", got, reference.linear_packed(*given))
    elif M:
        # as leaves of a list, so that all parts are cast
        assert_within_budget("y", torch.from_numpy(got), reference.linear_packed, given)


@pytest.mark.parametrize("form", ["int8", "int4", "int8_factors", "mixed", "mixed_factors", "bfloat16"])
def test_four_gates(form: str) -> None:
    """Rows of four gates come in their order, whether their panels lie side by side or not."""
    for H, K in ((1, 3), (5, 40), (16, 16), (33, 70)):
        x, m = rows(9, K), packed.matrix(4 * H, K, form, 4)
        assert_same_bits("y", core.linear_packed(x, packed.pack(core, m, K)), packed.product(core, x, m))


@each_form
def test_a_row_is_the_same_alone_and_in_any_team(form: str) -> None:
    for M, N, K in ((37, 100, 130), (5, 21, 64)):
        x, w = rows(M, K), packed.pack(core, packed.matrix(N, K, form), K)
        whole = core.linear_packed(x, w)
        for threads in (2, 3, 5):
            assert_same_bits("team", core.linear_packed(x, w, threads=threads), whole)
        for row in (0, 3, M - 1):
            assert_same_bits("alone", core.linear_packed(x[row : row + 1], w), whole[row : row + 1])
        assert_same_bits("some", core.linear_packed(x[:4], w), whole[:4])


@pytest.mark.parametrize("form", INTEGER)
def test_rows_that_are_not_numbers_tiny_or_zero(form: str) -> None:
    K = 70
    x = rows(12, K)
    x[0, 3], x[1, 69], x[2, 0] = np.nan, np.inf, -np.inf
    x[3], x[4] = 0, -0.0
    x[5] *= np.float32(2.0**-122)
    x[6] *= np.float32(2.0**-110)
    x[7] *= np.float32(2.0**120)
    x[8] = 1  # every product a tie of the largest
    x[9, 1:] *= np.float32(1e-6)
    w = packed.pack(core, packed.matrix(40, K, form), K)
    got = core.linear_packed(x, w)
    assert np.isnan(got[:3]).all() and np.isfinite(got[3:]).all()
    assert not got[3:6].any() and got[6:].any(1).all()
    assert_same_bits("y", got[3:], packed.product(core, x, packed.matrix(40, K, form))[3:])


def test_weights_at_the_ends_of_their_range() -> None:
    """-128 too, and the longest sums."""
    K = 1000
    for values, x in ((-128, 1.0), (-128, -1.0), (127, 1.0)):
        q = np.full((20, K), values, np.int8)
        w = core.pack_matrix([q], [np.ones((20, 1), np.float32)], [0], [NONE], [NONE], [0], K, False)
        for M in (1, 5):
            got = core.linear_packed(np.full((M, K), x, np.float32), w)
            one = np.float32(1) / np.float32(127)
            assert (got == np.float32(values * 127 * x * K) * one).all()


def test_ties_round_to_even() -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]], np.float32)  # m / 127 is 1
    w = core.pack_matrix([np.eye(7, dtype=np.int8)], [np.ones((7, 1), np.float32)], [0], [NONE], [NONE], [0], 7, False)
    assert core.linear_packed(x, w).tolist() == [[127, 0, 2, 2, 0, -2, 126]]


def test_nibbles_there_and_back() -> None:
    for K in (1, 2, 5, 8):
        q = torch.randint(-7, 8, (3, K), dtype=torch.int8)
        assert torch.equal(reference.from_nibbles(reference.nibbles(q), K), q)
    assert reference.nibbles(torch.tensor([[1, -7, 7]])).tolist() == [[9 + 16 * 1, 15 + 16 * 8]]


def test_a_part_that_is_damaged_is_refused() -> None:
    w = packed.pack(core, packed.matrix(36, 40, "mixed_factors", 4), 40)
    for change in (lambda b: b[:-64], lambda b: np.r_[b, b[:64]], lambda b: b[:8], np.zeros_like):
        with pytest.raises(ValueError, match="weight must be what pack_matrix returned, got"):
            core.linear_packed(rows(1, 40), np.ascontiguousarray(change(w)))
    for place in range(0, 160, 8):  # the head: any number replaced
        broken = w.copy()
        broken[place : place + 8] = 0xEE
        with pytest.raises(ValueError, match="weight must be what pack_matrix returned, got"):
            core.linear_packed(rows(1, 40), broken)


def source(change: dict[str, Any]) -> list[Any]:
    q, s = np.ones((6, 24), np.int8), np.ones((6, 3), np.float32)
    given = {"rows": [q], "scale": [s], "group": [8], "down": [NONE], "down_scale": [NONE], "down_group": [0]}
    return list((given | {"K": 24, "bounded": False} | change).values())


TWO = {"rows": [np.ones((6, 2), np.float32)], "scale": [NONE], "group": [0]}
WRONG_PARTS: list[tuple[dict[str, Any], str]] = [
    ({"rows": [np.ones(6, np.int8)]}, r"rows must be \[N, K\], got \[6\]"),
    ({"rows": []}, "rows must be of 1 or 4 gates, got 0"),
    ({"group": [8, 8]}, "rows, scales, down and groups must be lists of one length, got 1 and 2"),
    (
        {"rows": [np.ones((6, 24))]},
        r"rows must be float32, bfloat16, int8 or uint8 \(4 bits\), got float64",
    ),
    ({"K": 25}, r"rows must be \[N, K\] = \[6, 25\], got \[6, 24\]"),
    ({"rows": [np.ones((6, 24), np.uint8)]}, r"rows must be \[N, \(K \+ 1\) / 2\] = \[6, 12\], got \[6, 24\]"),
    ({"rows": [np.ones((24, 6), np.int8).T]}, "rows must be contiguous"),
    ({"group": [12]}, "group must be 0, or a multiple of 8 up to the columns = 24, got 12"),
    ({"group": [-8]}, "group must be 0, or a multiple of 8 up to the columns = 24, got -8"),
    ({"group": [32]}, "group must be 0, or a multiple of 8 up to the columns = 24, got 32"),
    ({"scale": [np.ones((6, 1), np.float32)]}, r"rows_scale must be \[N, groups\] = \[6, 3\], got \[6, 1\]"),
    ({"scale": [np.ones((6, 3))]}, "rows_scale must be float32, got float64"),
    ({"scale": [NONE]}, r"rows_scale must be \[N, groups\] = \[6, 3\], got \[0\]"),
    (TWO | {"down": [np.ones((2, 23), np.float32)]}, r"down must be \[N, K\] = \[2, 24\], got \[2, 23\]"),
    (TWO | {"down": [np.ones((2, 24), np.int8)]}, r"down_scale must be \[N, groups\] = \[2, 1\], got \[0\]"),
    (
        {"rows": [np.ones((1, 65537), np.float32)], "scale": [NONE], "group": [0], "K": 65537},
        r"sizes must be 1 .. 65536 a gate, and a group a multiple of 8",
    ),
    ({"rows": [np.ones((0, 24), np.int8)], "scale": [np.ones((0, 3), np.float32)]}, "sizes must be 1 .. 65536 a gate"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_PARTS)
def test_parts_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"pack_matrix: {message}"):
        core.pack_matrix(*source(change))


def test_lower_factors_are_kept_in_one_way() -> None:
    one = np.ones((3, 2), np.float32)
    downs = [np.ones((2, 16), np.float32), *[np.ones((2, 16), np.int8)] * 3]
    scales = [NONE, *[np.ones((2, 1), np.float32)] * 3]
    with pytest.raises(ValueError, match="the lower factors of all gates must be kept in the same way"):
        core.pack_matrix([one] * 4, [NONE] * 4, [0] * 4, downs, scales, [0] * 4, 16, False)


WEIGHT = packed.pack(core, packed.matrix(6, 24, "int8"), 24)
BOUNDED = packed.pack(core, packed.matrix(6, 24, "int8"), 24, True)
WRONG_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"x": rows(2, 23)}, r"x must be \[M, K\] = \[2, 24\], got \[2, 23\]"),
    ({"x": rows(2, 24)[0]}, r"x must be \[M, K\], got \[24\]"),
    ({"x": np.ones((2, 24))}, "x must be float32, got float64"),
    ({"x": rows(24, 2).T}, "x must be contiguous"),
    ({"bias": rows(1, 5)[0]}, r"bias must be \[N\] = \[6\], got \[5\]"),
    ({"bias": np.ones(6)}, "bias must be float32, got float64"),
    ({"weight": WEIGHT[None]}, r"weight must be what pack_matrix returned, got \[1, \d+\]"),
    ({"weight": WEIGHT.astype(np.int8)}, "weight must be uint8, got int8"),
    (
        {"weight": np.r_[[0], WEIGHT].astype(np.uint8)[1:]},
        r"weight must be what pack_matrix returned, got \d+ misaligned",
    ),
    ({"weight": BOUNDED}, "weight must be packed with bounded=False"),
    ({"threads": 0}, "threads must be at least 1, got 0"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_CALLS)
def test_calls_that_are_refused(change: dict[str, Any], message: str) -> None:
    given = {"x": rows(2, 24), "weight": WEIGHT} | change
    with pytest.raises(ValueError, match=f"linear_packed: {message}"):
        core.linear_packed(**given)

"""The lookup of few rows, its kernel emulated: indices are those of the definition, whatever the parts and the order in
which threads run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import reference
from tests.cuda import vq_lookup as emulated
from tests.ops import vq_cases
from tests.ops.vq_cases import Case
from tests.tolerance import assert_same_bits, assert_within_budget

NAMES = "index distance score quantized"


def found(
    x: Tensor,
    codebooks: list[Tensor],
    mask: Tensor | None = None,
    levels: Tensor | None = None,
    dot: bool = False,
    parts: int = 1,
    seed: int = 0,
    index: torch.dtype = torch.int64,
) -> list[Tensor]:
    """What the kernel writes, full of NaN before: ``NAMES``."""
    (G, rows, _), M = x.shape, len(codebooks)
    apart = torch.full((G, M, rows), torch.nan)
    out = [torch.full((G, rows, M), 99, dtype=index), apart, apart.clone(), torch.full_like(x, torch.nan)]
    emulated.run(x, codebooks, mask, levels, dot, parts, *out, seed)
    return out


def check(case: Case, parts: int, seed: int, row: Any = torch.float32, code: Any = torch.float32) -> None:
    """One level against the definition."""
    x, codebook, mask = vq_cases.inputs(case)
    x, codebook = x.to(row), codebook.to(code)
    index, distance, score, quantized = found(x, [codebook], mask, None, case.dot, parts, seed)
    wide = x.float(), codebook.float()
    expected = reference.vq_nearest(*wide, mask, case.dot)
    assert_same_bits("index", index, expected)
    assert_same_bits(
        "score", score[:, 0] + 0.0, vq_cases.expected_scores(*wide, mask, case.dot, expected)[..., 0] + 0.0
    )
    codes = reference.vq_gather(codebook, expected[..., 0]).to(row)
    assert torch.equal(quantized.nan_to_num(7.0), codes.nan_to_num(7.0))
    if all(t.isfinite().all() and t.abs().max() < 1e15 for t in wide):
        assert_within_budget("distance", distance[:, 0], vq_cases.distance, (*wide, index[..., 0]))


@pytest.mark.parametrize("kind", vq_cases.KINDS)
def test_every_kind_of_numbers(kind: str) -> None:
    """Ties, near-ties, and what is not finite: two codebooks, three tiles in two parts."""
    check(Case(6, 70, 9, G=2, kind=kind, masked=True, dot=kind == "whole"), 2, 3)


SIZES = {
    "one": Case(1, 1, 1),
    "few codes": Case(3, 5, 4),
    "full tile": Case(16, 32, 8),
    "one more": Case(17, 33, 5, masked=True),
    "short": Case(2, 300, 2, dot=True),
    "deep": Case(2, 40, 512),
    "wide": Case(1, 131, 33, G=3),
}


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES.keys())
def test_sizes(case: Case) -> None:
    check(case, max(1, (case.K + 31) // 32), 5)


TYPES = list(emulated.NUMBERS)


@pytest.mark.parametrize("code", TYPES, ids=str)
@pytest.mark.parametrize("row", TYPES, ids=str)
def test_types_of_rows_and_codes(row: torch.dtype, code: torch.dtype) -> None:
    check(Case(3, 40, 35, masked=True), 2, 2, row, code)


@pytest.mark.parametrize("bits", emulated.BITS)
def test_types_of_an_index(bits: torch.dtype) -> None:
    x, codebook, mask = vq_cases.inputs(Case(5, 40, 3, masked=True))
    index = found(x, [codebook], mask, index=bits)[0]
    assert_same_bits("index", index, reference.vq_nearest(x, codebook, mask).to(bits))


def stack(rows: int, D: int, sizes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Rows, and codebooks of ever shorter codes."""
    books = [vq_cases.normals(K, D, seed=n) / 2**n for n, K in enumerate(sizes)]
    return vq_cases.normals(rows, D, seed=9), books


def check_stack(x: Tensor, books: list[Tensor], levels: Tensor | None, mask: Tensor | None, parts: int) -> None:
    own = None if mask is None else mask[None]
    index, distance, score, quantized = found(x[None], [b[None] for b in books], own, levels, parts=parts, seed=4)
    total, expected, apart, left = reference.vq_residual(x, books, mask, levels)
    assert_same_bits("index quantized", [index[0], quantized[0] + 0.0], [expected, total + 0.0])

    def distances(x: Tensor, books: list[Tensor]) -> Tensor:
        rest, made = x, []
        for m, book in enumerate(books):
            codes = reference.vq_gather(book[None], expected[None, :, m])[0]
            rest = rest - codes
            made.append(torch.where(expected[:, m] >= 0, rest.square().sum(-1), 0.0))
        return torch.stack(made)

    assert_within_budget("distance", distance[0], distances, (x, books))
    for m, book in enumerate(books):
        scores = vq_cases.expected_scores(left[m][None], book[None], None, False, expected[None, :, m, None])
        assert_same_bits("score", score[0, m] + 0.0, scores[0, :, 0] + 0.0)


def test_levels() -> None:
    """Of several sizes, the last of fewer codes than there are parts; rows use different numbers of them."""
    x, books = stack(18, 11, (70, 33, 5))
    check_stack(x, books, torch.arange(18) % 5 - 1, torch.arange(18) % 7 != 2, 3)


def test_as_many_levels_as_there_may_be() -> None:
    x, books = stack(1, 3, (2,) * emulated.MOST_LEVELS)
    check_stack(x, [b * 2**n for n, b in enumerate(books)], None, None, 1)


def test_a_row_that_becomes_infinite() -> None:
    """What the first level leaves is not finite, and takes code 0, although the second has a score of -inf."""
    first, second = torch.tensor([[-3e38, 0.0], [3e38, 9e9]]), torch.tensor([[-5.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    x = torch.tensor([[3e38, 1.0], [torch.nan, 0.0]])
    index, _, score, _ = found(x[None], [first[None], second[None]], dot=True)
    assert index[0].tolist() == [[0, 0], [0, 0]] and score[0, :, 0].tolist() == [torch.inf] * 2
    x, first = x[:1], first[:1]
    assert reference.vq_residual(x, [first, second])[1].tolist() == index[0, :1].tolist()


def test_equal_bits_for_any_parts_and_any_order_of_threads() -> None:
    x, books = stack(3, 10, (200, 90))
    given = (x[None], [b[None] for b in books])
    first = found(*given)
    for parts, seed in ((1, 8), (2, 1), (4, 2), (7, 3), (7, 4)):
        assert_same_bits(NAMES, found(*given, parts=parts, seed=seed), first)

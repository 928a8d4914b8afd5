"""The screen of many rows, its kernel emulated: rows that it decides have the definition's index and score, and those
that it leaves open are few."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastseq import reference
from tests.cuda import vq_screen as emulated
from tests.ops import vq_cases
from tests.ops.vq_cases import Case
from tests.tolerance import assert_same_bits


class Found(NamedTuple):
    """open: bool [G, N]."""

    index: Tensor  # type: ignore[assignment]
    score: Tensor
    open: Tensor


def found(x: Tensor, codebook: Tensor, mask: Tensor | None = None, dot: bool = False, *, slack: float = 1.0,
          score: bool = True, bits: torch.dtype = torch.int64, seed: int = 0) -> Found:  # fmt: skip
    """What the kernel writes over 99 and NaN."""
    G, N, _ = x.shape
    codes = emulated.split(x, codebook, dot)
    index, scores = torch.full((G, N), 99, dtype=bits), torch.full((G, N), torch.nan)
    listed, count = torch.full((G, N), -7, dtype=torch.int32), torch.full((G,), -7, dtype=torch.int32)
    outs = (index, scores if score else None, listed, count)
    emulated.run(x, codebook, *codes[1:], mask, codes.products, dot, slack, *outs, seed)
    opened = torch.zeros(G, N, dtype=torch.bool)
    for g in range(G):
        rows = listed[g, : count[g]].long()
        assert len(rows.unique()) == count[g] and (listed[g, count[g] :] == -7).all()
        opened[g, rows] = True
    assert (index[opened] == 99).all() and scores[opened].isnan().all(), "what is left open is not written"
    return Found(index, scores, opened)


def check(case: Case, row: torch.dtype, code: torch.dtype, most_open: float, seed: int = 1) -> None:
    x, codebook, mask = vq_cases.inputs(case)
    x, codebook = x.to(row), codebook.to(code)
    got = found(x, codebook, mask, case.dot, seed=seed)
    wide = x.float(), codebook.float()
    expected = reference.vq_nearest(*wide, mask, case.dot)
    scores = vq_cases.expected_scores(*wide, mask, case.dot, expected)[..., 0]
    assert_same_bits("index", got.index[~got.open], expected[..., 0][~got.open])
    assert_same_bits("score", got.score[~got.open] + 0.0, scores[~got.open] + 0.0)
    assert got.open.double().mean() <= most_open, f"{got.open.double().mean():.3f} of the rows are open"
    if mask is not None:
        assert not got.open[~mask].any()


ALL = 1.0
HALF, FULL, SHORT = torch.float16, torch.float32, torch.bfloat16
TYPES = [(row, code) for row in (FULL, SHORT, HALF) for code in (FULL, SHORT, HALF)]


@pytest.mark.parametrize(("row", "code"), TYPES, ids=str)
def test_types_of_rows_and_codes(row: torch.dtype, code: torch.dtype) -> None:
    """Every number of products, at both depths: the second tile of the codes is not full, nor are rows and columns."""
    check(Case(35, 150, 40, masked=True), row, code, 0.05)
    check(Case(35, 70, 100, masked=True), row, code, 0.05)


SIZES = {
    "one": Case(1, 1, 2),
    "full": Case(256, 128, 64),
    "one more": Case(257, 129, 34, masked=True),
    "odd": Case(33, 131, 34, G=3),
    "deep": Case(17, 260, 256, dot=True),
    "three tiles": Case(20, 300, 20, dot=True, masked=True),
}


@pytest.mark.parametrize("dtype", [FULL, SHORT], ids=str)
@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES.keys())
def test_sizes(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, dtype, 0.1)


@pytest.mark.parametrize(
    ("D", "row", "code"), [(1, FULL, FULL), (33, FULL, SHORT), (65, HALF, FULL), (129, FULL, FULL)]
)
def test_rows_of_odd_length(D: int, row: torch.dtype, code: torch.dtype) -> None:
    check(Case(19, 40, D), row, code, 0.2 if D == 1 else 0.1)


@pytest.mark.parametrize("dtype", [FULL, SHORT, HALF], ids=str)
@pytest.mark.parametrize("kind", vq_cases.KINDS)
def test_every_kind_of_numbers(kind: str, dtype: torch.dtype) -> None:
    """Ties, near-ties, and what is not finite: any row may stay open, none may be wrong."""
    case = Case(40, 130, 24, G=2, kind=kind, masked=True, dot=kind == "whole")
    check(case, dtype, dtype, ALL)


def test_a_smaller_bound_is_wrong() -> None:
    """Near-ties of float32, which two pieces of 16 bits do not tell apart."""
    x, codebook, _ = vq_cases.inputs(Case(64, 128, 60))
    codebook = codebook[:, :1] + 1e-5 * codebook
    got, expected = found(x, codebook, slack=1e-9), reference.vq_nearest(x, codebook)[..., 0]
    assert not got.open.all() and (got.index != expected)[~got.open].any()


@pytest.mark.parametrize("bits", [torch.int16, torch.int32, torch.int64], ids=str)
def test_types_of_an_index_without_scores(bits: torch.dtype) -> None:
    x, codebook, mask = vq_cases.inputs(Case(40, 40, 17, masked=True))
    got = found(x, codebook, mask, bits=bits, score=False)
    assert_same_bits("index", got.index[~got.open], reference.vq_nearest(x, codebook, mask)[..., 0].to(bits)[~got.open])
    assert got.score.isnan().all()


def test_equal_bits_in_any_order_of_threads() -> None:
    x, codebook, _ = vq_cases.inputs(Case(300, 260, 30))
    first = found(x, codebook)
    for seed in (1, 2):
        assert_same_bits("index score open", list(found(x, codebook, seed=seed)), list(first))

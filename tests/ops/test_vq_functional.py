"""``functional.vq_*`` with every type, layout and metric, with rows that are not finite, and without rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastseq import functional as F
from fastseq import reference
from tests.ops import vq_cases as cases
from tests.ops.vq_cases import Case

pytestmark = cases.needs_compiled()
ROWS, CODES = (t[0] for t in cases.inputs(Case(6, 5, 4))[:2])


def strided(tensor: Tensor) -> Tensor:
    """The same values with a stride of two."""
    return torch.stack((tensor, tensor), -1)[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype) -> None:
    """Short numbers are looked up as the float32 numbers they are; codes come back in x's type."""
    x, codes = (t.to(dtype) for t in (ROWS, CODES))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = F.vq_quantize(x.to(wide), codes.to(wide), sums=True)
    got = F.vq_quantize(x, codes, sums=True)
    assert (got.quantized.dtype, got.commitment.dtype, got.sums.dtype) == (dtype, wide, wide)
    assert torch.equal(got.quantized, codes[got.index])
    assert torch.equal(got.sums, expected.sums)
    assert torch.equal(F.vq_sums(x, got.index.int(), 5)[1], expected.sums)
    near = F.vq_nearest(x, codes, return_distance=True, return_score=True)
    assert (near.distance.dtype, near.score.dtype) == (dtype, wide)
    assert torch.equal(near.index, expected.index)
    deep = F.vq_residual(x, [codes, codes], sums=True)
    assert (deep.quantized.dtype, deep.commitment.dtype) == (dtype, wide)
    assert torch.equal(deep.index[:, 0], expected.index)
    mixed = F.vq_nearest(x, CODES.double())  # computed in the wider of the two
    assert torch.equal(mixed.index, F.vq_nearest(x.double(), CODES.double()).index)


@pytest.mark.parametrize("lead", [(), (1,), (7,), (0,), (2, 5), (3, 0, 2), (2, 3, 4)])
@pytest.mark.parametrize("G", [None, 3])
def test_every_layout(G: int | None, lead: tuple[int, ...]) -> None:
    """Any leading dimensions, rows that lie apart in memory, one mask for all groups or one for each."""
    groups = () if G is None else (G,)
    x, codes = cases.normals(*groups, *lead, 4), cases.normals(*groups, 5, 4, seed=1)
    rows = x.reshape(G or 1, math.prod(lead), 4)
    mask = cases.normals(*groups, *lead, seed=2) > -0.5
    expected = torch.ops.fastseq.vq_quantize(rows, codes.view(G or 1, 5, 4), mask.reshape(rows.shape[:2]), False, True)
    apart = [strided(t) for t in (x, codes, mask)]
    for a, b, m in ((x, codes, mask), apart):
        got = F.vq_quantize(a, b, mask=m, sums=True)
        near = F.vq_nearest(a, b, mask=m, best=2, return_distance=True)
        shapes = [got.quantized.shape, got.index.shape, got.commitment.shape, got.counts.shape, got.sums.shape]
        assert shapes == [x.shape, x.shape[:-1], x.shape[:-1], (*groups, 5), (*groups, 5, 4)]
        for value, right in zip((*got[:3], *got[4:]), (*expected[:3], *expected[3:]), strict=True):
            assert torch.equal(value.flatten(), right.flatten())
        assert near.index.shape == near.distance.shape == (*x.shape[:-1], 2)
        assert torch.equal(near.index[..., 0], got.index)
    if G and lead:
        one = F.vq_nearest(x, codes, mask=mask[0])
        assert torch.equal(one.index, F.vq_nearest(x, codes, mask=mask[:1].expand(mask.shape)).index)


@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
def test_every_metric(metric: str) -> None:
    """By their plain definitions, where no two codes are near."""
    x, codes, _ = (t[0] for t in cases.inputs(Case(50, 9, 6, masked=True), torch.float64))
    unit_x, unit = (torch.nn.functional.normalize(t, dim=-1) for t in (x, codes))
    best = {
        "l2": torch.cdist(x, codes).argmin(-1),
        "dot": (x @ codes.mT).argmax(-1),
        "cosine": (unit_x @ unit.mT).argmax(-1),
    }[metric]
    near = F.vq_nearest(x, codes, metric=metric, return_distance=True)
    out = F.vq_quantize(x, codes, metric=metric)
    assert torch.equal(near.index, best) and torch.equal(out.index, best)
    chosen, rows = (unit[best], unit_x) if metric == "cosine" else (codes[best], x)
    assert torch.equal(out.quantized, chosen)
    apart = (rows - chosen).square().sum(-1)
    assert torch.allclose(near.distance, apart, rtol=1e-12) and torch.allclose(out.commitment, apart, rtol=1e-12)


def test_rows_that_are_not_finite() -> None:
    """As documented: index 0, NaN or infinity in the distance and in nothing else."""
    x = ROWS.clone()
    x[1, 2], x[4, 0] = torch.nan, torch.inf
    clean, out = F.vq_quantize(ROWS, CODES), F.vq_quantize(x, CODES)
    rest = [0, 2, 3, 5]
    assert out.index[[1, 4]].tolist() == [0, 0]
    assert torch.equal(out.quantized[[1, 4]], CODES[:1].expand(2, 4))
    assert not out.commitment[[1, 4]].isfinite().any()
    assert torch.equal(out.index[rest], clean.index[rest])
    assert torch.equal(out.commitment[rest], clean.commitment[rest])


def test_levels_of_any_integers() -> None:
    """How many levels a row uses, also none, fewer than none, and more than there are."""
    levels = torch.tensor([0, 1, 2, 3, -1, 127])
    books = [CODES, CODES / 2, CODES / 4]
    used = torch.arange(3) < levels[:, None]
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        out = F.vq_residual(ROWS, books, levels=levels.to(dtype))
        assert torch.equal(out.index >= 0, used)
        assert torch.equal(out.index, reference.vq_residual(ROWS, books, None, levels)[1])


def test_no_rows() -> None:
    """Empty results of the right shapes, zeros in sums, and gradients of zeros."""
    x, codes = torch.zeros(0, 4, requires_grad=True), CODES.clone().requires_grad_()
    near = F.vq_nearest(x, codes, best=3, return_distance=True, return_score=True)
    assert near.index.shape == near.distance.shape == near.score.shape == (0, 3)
    for gradient in cases.GRADIENTS:
        out = F.vq_quantize(x, codes, gradient=gradient, sums=True)
        assert (out.quantized.shape, out.index.shape, out.commitment.shape) == ((0, 4), (0,), (0,))
        assert not out.counts.any() and not out.sums.any()
        dx, dcodes = torch.autograd.grad(out.quantized.sum() + out.codebook_error.sum(), (x, codes), allow_unused=True)
        assert dx.shape == (0, 4) and not dcodes.any()
    deep = F.vq_residual(x, [codes, codes], sums=True)
    assert (deep.quantized.shape, deep.index.shape, deep.commitment.shape) == ((0, 4), (0, 2), (2, 0))
    assert not any(v.any() for v in (*deep.counts, *deep.sums))
    counts, sums = F.vq_sums(x, torch.zeros(0, dtype=torch.int64), 5)
    assert (counts.shape, sums.shape) == ((5,), (5, 4)) and not counts.any() and not sums.any()


def test_rows_that_all_do_not_count() -> None:
    mask = torch.zeros(6, dtype=torch.bool)
    for rows in (ROWS, ROWS[:2], ROWS.new_full((6, 4), torch.nan)):
        out = F.vq_quantize(rows, CODES, mask=mask[: len(rows)], sums=True)
        assert (out.index == -1).all()
        assert not any(v.any() for v in (out.quantized, out.commitment, out.counts, out.sums))
        near = F.vq_nearest(rows, CODES, mask=mask[: len(rows)], best=3, return_distance=True, return_score=True)
        assert (near.index == -1).all() and not near.distance.any() and (near.score == torch.inf).all()


def test_without_a_gradient_nothing_requires_one() -> None:
    x, codes = ROWS.clone().requires_grad_(), CODES.clone().requires_grad_()
    near = F.vq_nearest(x, codes, return_distance=True, return_score=True)
    with torch.no_grad():
        out, deep = F.vq_quantize(x, codes), F.vq_residual(x, [codes])
    frozen = F.vq_residual(ROWS, [codes])
    for value in (*near, *out[:4], *deep[:3], *frozen[:3]):
        assert not value.requires_grad

"""The kernels of vector quantization but for the lookup, interpreted: many chunks and tiles, 16 bits, equal bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import reference
from fastseq.ops._triton import interpreted, why_not_triton
from tests import tolerance
from tests.ops import vq_cases as cases
from tests.ops.test_vq_residual import GIVEN, RESULTS, Case, check, inputs, upstream
from tests.tolerance import assert_same_bits, assert_within_budget

reason = why_not_triton() or (None if interpreted() else "kernels are interpreted with TRITON_INTERPRET=1")
if reason is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)
from fastseq_kernels import _launch, vq_backward, vq_codes, vq_nearest, vq_residual, vq_sums  # noqa: E402

LOW = [torch.bfloat16, torch.float16]
each_low = pytest.mark.parametrize("dtype", LOW, ids=lambda d: str(d).removeprefix("torch."))
each_gradient = pytest.mark.parametrize("gradient", cases.GRADIENTS[:2])


# ---- sums ----


def hot(G: int, N: int, K: int) -> Tensor:
    """Places of which half are the same one, and some lie outside 0..K-1."""
    index = cases.places(G, N, K + 2) - 1
    return torch.where(cases.normals(G, N) > 0, K // 2, index)


@pytest.mark.parametrize("chunk", [16, 128])
@pytest.mark.parametrize("shape", [(2, 300, 3, 5), (1, 700, 1, 7), (1, 129, 40, 140), (1, 0, 4, 3)])
def test_sums_of_many_chunks(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of no chunk, one and several; what lies outside 0..K-1 does not count."""
    monkeypatch.setattr(vq_sums, "CHUNK", chunk)
    G, N, K, D = shape
    x, index = cases.normals(G, N, D), hot(G, N, K)
    valid = torch.where((index >= 0) & (index < K), index, -1)
    x[valid == -1] = torch.nan
    counts, sums = vq_sums.vq_sums(x, index, K)
    expected = reference.vq_sums(x, valid, K)
    assert_same_bits("counts", counts, expected[0])
    assert_within_budget("sums", sums, lambda *a: reference.vq_sums(*a)[1], (x, valid, K))
    assert_same_bits("counts sums", vq_sums.vq_sums(x, index, K), (counts, sums))


def test_the_sum_of_a_code_depends_on_its_rows_alone() -> None:
    """Not on where the sort puts them, nor on how many codes there are."""
    x, index = cases.normals(1, 500, 6), hot(1, 500, 5)
    mine = index == 2
    alone = vq_sums.vq_sums(x[mine][None], index[mine][None], 5)[1][:, 2]
    assert_same_bits("sum", vq_sums.vq_sums(x, index, 5)[1][:, 2], alone)
    shifted = torch.where(mine, 70, index)
    assert_same_bits("sum", vq_sums.vq_sums(x, shifted, 90)[1][:, 70], alone)


@each_low
def test_sums_of_16_bits_are_float32(dtype: torch.dtype) -> None:
    x, index = cases.normals(2, 60, 9).to(dtype), cases.places(2, 60, 4)
    counts, sums = vq_sums.vq_sums(x, index, 4)
    assert counts.dtype == sums.dtype == torch.float32
    assert_within_budget("sums", sums, lambda *a: reference.vq_sums(*a)[1], (x.float(), index, 4))


# ---- gradients ----


@pytest.mark.parametrize("D", [600, 1100])
@each_gradient
def test_backward_of_wide_rows(gradient: str, D: int) -> None:
    """Beyond one tile of columns, and rows that take more than a thousand places of registers."""
    x, codes, index = cases.normals(1, 5, D), cases.normals(1, 5, D, seed=1), cases.places(1, 5, 2)
    grads = cases.upstream(1, 5, D, "quantized commitment codebook_error", torch.float32)
    way = cases.GRADIENTS.index(gradient)
    got = vq_backward.vq_backward(*grads, x, codes, index, 2, way, True, True)
    call = (*grads, x, codes, index, 2, gradient)
    assert_within_budget("dx dcodebook", got, reference.vq_backward, call, tolerance.GRADIENTS)


def test_a_rotation_too_wide_for_registers() -> None:
    x = torch.zeros(1, 1, vq_backward.MOST_D + 1)
    args = (x, None, None, x, x, torch.zeros(1, 1, dtype=torch.int64), 1)
    why_not = cases.BACKENDS["vq_backward"][-2].why_not
    assert why_not(*args, 1, True, True) == "a rotation of 8193 dimensions, more than 8192"
    assert why_not(*args, 0, True, True) is None
    args = (x[0], None, x[0], x[0], [1], torch.zeros(1, 1, dtype=torch.int64))
    why_not = cases.BACKENDS["vq_residual_backward"][-2].why_not
    assert why_not(*args, 1) == "a rotation of 8193 dimensions, more than 8192"
    assert why_not(*args, 0) is None


@each_gradient
@each_low
def test_backward_of_16_bits(dtype: torch.dtype, gradient: str) -> None:
    """Computed in float32, rounded once: dx to the dtype of x, dcodebook not at all."""
    x, codes = (cases.normals(1, 20, 9, seed=s).to(dtype) for s in (0, 1))
    index = cases.places(1, 20, 3)
    grads = cases.upstream(1, 20, 9, "quantized commitment codebook_error", torch.float32)
    call = (grads[0].to(dtype), *grads[1:], x, codes, index, 3)
    dx, dcodebook = vq_backward.vq_backward(*call, cases.GRADIENTS.index(gradient), True, True)
    exact = [v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for v in call]
    assert_within_budget("dx", dx, lambda *a: reference.vq_backward(*a, gradient)[0], exact, tolerance.GRADIENTS)
    assert_within_budget(
        "dcodebook", dcodebook, lambda *a: reference.vq_backward(*a, gradient)[1], exact, tolerance.GRADIENTS
    )


# ---- residual ----


@pytest.mark.parametrize("kind", ["strange", "huge", "neighbours", "duplicates", "no_code", "tiny_rows"])
def test_residual_of_hard_inputs(kind: str) -> None:
    """The index is the definition's, whatever rows and codes are like."""
    check("triton", inputs(Case(9, (17, 9, 5), 7, kind=kind)), judged=False)


def test_residual_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of rows for each program, several tiles of codes, and the last of each not full."""
    few = _launch.TARGETS[80]._replace(multiprocessors=1)
    with _launch.targeting(few):
        check("triton", inputs(Case(270, (70, 130), 3, masked=True, leveled=True)))


@pytest.mark.parametrize("screened", [False, True])
def test_residual_level_by_level(screened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a lookup for each level, as of much work: the same bits as all levels in one kernel."""
    args = inputs(Case(70, (20, 9), 17, masked=True, leveled=True))
    args.x[~args.mask] = torch.nan
    whole = cases.run("vq_residual", "triton", *args, True, True)
    monkeypatch.setattr(vq_residual, "_LEAST_WORK", 0)
    monkeypatch.setattr(vq_nearest, "_LEAST_WORK", 0 if screened else 1 << 62)
    assert_same_bits(RESULTS, cases.run("vq_residual", "triton", *args, True, True), whole)
    part = cases.run("vq_residual", "triton", *args, False, False)
    assert_same_bits("quantized index distance", part[:3], whole[:3])


def bits(tensors: Any) -> list[Tensor]:
    """Those of bfloat16 as integers: numpy has no such type."""
    return [t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in tensors]


@each_low
@pytest.mark.parametrize("codes_too", [False, True])
def test_residual_of_16_bits(codes_too: bool, dtype: torch.dtype) -> None:
    """As of the same numbers in float32; only what has x's dtype is rounded, once."""
    x, codebooks, *rest = inputs(Case(30, (20, 11), 6, masked=True, leveled=True))
    x = x.to(dtype)
    codebooks = [c.to(dtype) if codes_too else c for c in codebooks]
    got = cases.run("vq_residual", "triton", x, codebooks, *rest, True, True)
    wide = cases.run("vq_residual", "triton", x.float(), [c.float() for c in codebooks], *rest, True, True)
    expected = (wide[0].to(dtype), *wide[1:5], torch.cat(codebooks))
    assert_same_bits(RESULTS, bits(got), bits(expected))
    by_definition = cases.run("vq_residual", "reference", x, codebooks, *rest, True, True)
    assert [(v.shape, v.dtype) for v in got] == [(v.shape, v.dtype) for v in by_definition]
    found, wanted = bits(got), bits(by_definition)
    assert_same_bits("quantized index codes", (*found[:2], found[5]), (*wanted[:2], wanted[5]))


def part(args: Any, rows: slice) -> Any:
    return args._replace(x=args.x[rows], mask=args.mask[rows], levels=args.levels[rows])


def test_rows_of_a_residual_depend_on_themselves_alone() -> None:
    args = inputs(Case(80, (20, 11), 6, masked=True, leveled=True))
    whole = cases.run("vq_residual", "triton", *args, False, False)
    for rows in (slice(0, 1), slice(37, 80)):
        found = cases.run("vq_residual", "triton", *part(args, rows), False, False)
        expected = (whole[0][rows], whole[1][rows], whole[2][:, rows])
        assert_same_bits("quantized index distance", found[:3], expected)


@each_low
@each_gradient
def test_residual_backward_of_16_bits(gradient: str, dtype: torch.dtype) -> None:
    x, codebooks, *_ = inputs(Case(20, (9, 5), 7))
    x, index = x.to(dtype), torch.stack([cases.places(1, 20, K)[0] for K in (9, 5)], dim=-1)
    d, dd = upstream(20, 7, 2, GIVEN[2], torch.float32)
    way, sizes = cases.GRADIENTS.index(gradient), [len(c) for c in codebooks]
    call = (d.to(dtype), dd, x, torch.cat(codebooks), sizes, index, way)
    got = cases.run("vq_residual_backward", "triton", *call)
    exact = (d.to(dtype).float(), dd, x.float(), codebooks, index, gradient)
    assert_within_budget("dx", got, reference.vq_residual_backward, exact, tolerance.GRADIENTS)


@each_gradient
def test_residual_backward_of_wide_rows(gradient: str) -> None:
    x, codebooks, *_ = inputs(Case(4, (3, 2), 1100))
    index = torch.stack([cases.places(1, 4, K)[0] for K in (3, 2)], dim=-1)
    grads = upstream(4, 1100, 2, GIVEN[2], torch.float32)
    call = (*grads, x, torch.cat(codebooks), [3, 2], index, cases.GRADIENTS.index(gradient))
    got = cases.run("vq_residual_backward", "triton", *call)
    exact = (*grads, x, codebooks, index, gradient)
    assert_within_budget("dx", got, reference.vq_residual_backward, exact, tolerance.GRADIENTS)


# ---- codes as bits ----


def test_bytes_after_the_last_code_are_checked_too() -> None:
    packed = torch.zeros(3, 4, dtype=torch.uint8)
    packed[2, 3] = 1
    with pytest.raises(ValueError, match="vq_unpack: packed is corrupted: bits after the last code of line 2 are"):
        vq_codes.vq_unpack(packed, 8, 2)

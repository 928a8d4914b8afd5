"""The lookup's kernels: the definition's index and score for any rows and codes, by the sweep and by the screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastseq import reference
from fastseq.ops._triton import interpreted
from tests.ops import vq_cases as cases
from tests.ops.vq_cases import KINDS, Case
from tests.tolerance import assert_same_bits, assert_within_budget

pytest.importorskip("triton", reason="triton is not installed")
from fastseq_kernels import _launch, _pieces, vq_nearest, vq_screen  # noqa: E402
from fastseq_kernels._scores import turned_codes  # noqa: E402
from fastseq_kernels.vq_quantize import vq_quantize  # noqa: E402

DEVICE = "cpu" if interpreted() else "cuda"
if not (interpreted() or torch.cuda.is_available()):
    pytest.skip("triton: neither CUDA nor TRITON_INTERPRET=1", allow_module_level=True)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, of numbers that are not finite
]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = {"bf16": (BF16, BF16), "fp16": (FP16, FP16), "mixed": (BF16, FP32), "mixed16": (FP16, FP32)}
SWEEP, SCREEN = 0, 1
# Rows of one tile, codes of two, and a column of the second chunk that is not there.
SMALL = Case(20, 150, 18)


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """The interpreter runs one program after another, so a chip of two multiprocessors."""
    if not interpreted():
        yield
        return
    with _launch.targeting(_launch.TARGETS[80]._replace(multiprocessors=2)):
        yield


def lookup(x: Tensor, codebook: Tensor, mask: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    """``vq_nearest`` of the kernels, on whatever device they run."""
    moved = (t if t is None else t.to(DEVICE) for t in (x, codebook, mask))
    return tuple(t.cpu() for t in vq_nearest.vq_nearest(*moved, *options))


def right(x: Tensor, codebook: Tensor, mask: Tensor | None, dot: bool, best: int = 1, screen: int = SCREEN) -> bool:
    """Whether index and score are the definition's."""
    index, _, score = lookup(x, codebook, mask, dot, best, 64, False, True, screen)
    given = (x.float(), codebook.float(), mask, dot)
    expected = reference.vq_nearest(*given, best)
    return torch.equal(index, expected) and torch.equal(score, cases.expected_scores(*given, expected))


def opened(x: Tensor, codebook: Tensor, dot: bool = False) -> int:
    """How many rows the screen leaves open."""
    x, codebook = x.to(DEVICE), codebook.to(DEVICE)
    index = torch.empty(x.shape[:2], dtype=torch.int64, device=DEVICE)
    call = vq_screen.Lookup(x, codebook, *turned_codes(codebook, dot), dot, None, index, None)
    return sum(int(part.count.sum()) for part in vq_screen.screened(call))


@pytest.mark.parametrize("kind", KINDS)
def test_screen(kind: str) -> None:
    x, codebook, mask = cases.inputs(SMALL._replace(kind=kind, masked=True))
    assert right(x, codebook, mask, False)


@pytest.mark.parametrize("kind", ["normal", "neighbours", "corners", "magnitudes", "tiny_rows", "huge", "strange"])
def test_screen_of_products(kind: str) -> None:
    assert right(*cases.inputs(SMALL._replace(kind=kind, G=2)), True)


@pytest.mark.parametrize("kind", KINDS)
def test_sweep(kind: str) -> None:
    """Several tiles of rows and codes, and codes that programs share."""
    for dot in (False, True):
        assert right(*cases.inputs(Case(66, 140, 5, kind=kind, masked=True)), dot, screen=SWEEP)


@pytest.mark.parametrize("kind", ["normal", "mean", "duplicates", "strange"])
@pytest.mark.parametrize("pair", PAIRS)
def test_16_bits(pair: str, kind: str) -> None:
    """By one product, two and three; the definition takes the same numbers in float32."""
    x, codebook, mask = cases.inputs(SMALL._replace(kind=kind, masked=True))
    assert right(x.to(PAIRS[pair][0]), codebook.to(PAIRS[pair][1]), mask, False)


@pytest.mark.skipif(not interpreted(), reason="a GPU has its own tiles")
@pytest.mark.parametrize("capability, D", [(90, 70), (90, 30), (100, 33)])
def test_tiles_of_other_devices(capability: int, D: int) -> None:
    """Rows that stay on the chip and rows that do not, tiles of 256 codes."""
    with _launch.targeting(_launch.TARGETS[capability]._replace(multiprocessors=2)):
        for kind, dtype in (("mean", FP32), ("duplicates", BF16)):
            x, codebook, _ = cases.inputs(Case(9, 140, D, kind=kind))
            assert right(x.to(dtype), codebook.to(dtype), None, False)


def test_near_ties_of_one_class() -> None:
    """The screen keeps one code of a class; others as near as its roundings leave the row to the sweep."""
    x, base, _ = cases.inputs(Case(60, _pieces.LANES, 40))
    codebook = base.repeat(1, 4, 1) + 2e-7 * cases.normals(1, 4 * _pieces.LANES, 40)
    assert right(x, codebook, None, False)


def test_a_bound_that_is_too_small_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same inputs that the screen gets right, so it is the bound that makes it so."""
    monkeypatch.setattr(_pieces, "_SLACK", 1 / 64)
    for kind, dot in (("corners", False), ("sphere", True)):
        given = cases.inputs(Case(24, 150, 20, kind=kind))
        assert not right(*given, dot)
    monkeypatch.undo()
    for kind, dot in (("corners", False), ("sphere", True)):
        assert right(*cases.inputs(Case(24, 150, 20, kind=kind)), dot)


def test_the_bound_is_worth_having() -> None:
    """Ordinary rows are decided among few candidates, and codes that are not finite open none."""
    for kind, dtype in (("normal", FP32), ("rows_are_codes", FP32), ("clusters", BF16)):
        x, codebook, _ = cases.inputs(Case(100, 150, 32, kind=kind))
        codebook[0, 7, 3] = torch.nan
        assert opened(x.to(dtype), codebook.to(dtype)) <= 2


def test_what_the_bound_does_not_reach_is_open() -> None:
    x, codebook, _ = cases.inputs(Case(20, 64, 40))
    assert opened(x, codebook) == 0
    x[0, 3] *= 1e25
    x[0, 5, 2], x[0, 6, 2] = torch.nan, torch.inf
    assert opened(x, codebook) == 3
    assert opened(x, torch.full_like(codebook, torch.inf)) == 20


def test_parts_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share one scratch after another give what they give together, and alone."""
    x, codebook, mask = cases.inputs(Case(300, 40, 20, kind="duplicates", masked=True))
    options = (False, 1, 64, True, True, SCREEN)
    whole = lookup(x, codebook, mask, *options)
    monkeypatch.setattr(vq_screen, "_PIECES", 1)
    assert_same_bits("index distance score", lookup(x, codebook, mask, *options), whole)
    some = slice(130, 139)
    alone = lookup(x[:, some].contiguous(), codebook, mask[:, some].contiguous(), *options)
    assert_same_bits("index distance score", alone, tuple(t[:, some] for t in whole))


@pytest.mark.parametrize("kind", ["whole", "strange", "duplicates", "no_code", "huge"])
def test_best(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several codes of each row, up to all; few rows at a time."""
    monkeypatch.setattr(vq_nearest, "_SCRATCH", 8 * 70 * 2 * 7)
    for dot, best in ((False, 3), (True, 70)):
        assert right(*cases.inputs(Case(20, 70, 9, G=2, kind=kind, masked=True)), dot, best)


@pytest.mark.parametrize("bits, dtype", [(16, torch.int16), (32, torch.int32), (64, torch.int64)])
def test_index_widths(bits: int, dtype: torch.dtype) -> None:
    x, codebook, mask = cases.inputs(SMALL._replace(masked=True))
    expected = reference.vq_nearest(x, codebook, mask, False, 2).to(dtype)
    for best, screen in ((1, SWEEP), (1, SCREEN), (2, SWEEP)):
        index = lookup(x, codebook, mask, False, best, bits, False, False, screen)[0]
        assert index.dtype == dtype and torch.equal(index, expected[..., :best])


def test_automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screened unasked from some sizes on, and never where codes are short or too long for the bound."""
    monkeypatch.setattr(vq_nearest, "_LEAST_WORK", 12 * 20 * 17)
    monkeypatch.setattr(vq_nearest, "_LEAST_K", 20)
    monkeypatch.setattr(vq_nearest, "MOST_D", 18)
    screened = []
    original = vq_nearest.screened
    monkeypatch.setattr(vq_nearest, "screened", lambda call: screened.append(call.x.shape) or original(call))
    for N, K, D in ((12, 20, 17), (11, 20, 17), (13, 19, 17), (15, 20, 16), (12, 20, 19), (0, 20, 17)):
        assert right(*cases.inputs(Case(N, K, D)), False, screen=2)
    assert screened == [(1, 12, 17)]


@pytest.mark.parametrize("pair", PAIRS)
def test_quantize_16_bits(pair: str) -> None:
    """The codes in x's dtype, all else float32; distances from the codes as they are."""
    x, codebook, mask = cases.inputs(Case(30, 40, 20, G=2, masked=True))
    x, codebook = x.to(PAIRS[pair][0]), codebook.to(PAIRS[pair][1])
    moved = (t.to(DEVICE) for t in (x, codebook, mask))
    codes, index, apart, counts, total = (t.cpu() for t in vq_quantize(*moved, False, True))
    rows, book = x.float(), codebook.float()
    assert torch.equal(index, reference.vq_nearest(rows, book, mask)[..., 0])
    assert_same_bits("codes", codes.view(torch.int16), reference.vq_gather(book, index).to(x.dtype).view(torch.int16))
    assert_within_budget("distance", apart, cases.distance, (rows, book, index))
    expected_counts, _ = reference.vq_sums(rows, index, 40)
    assert torch.equal(counts, expected_counts)
    assert_within_budget("sums", total, lambda r, i: reference.vq_sums(r, i, 40)[1], (rows, index))


@pytest.mark.parametrize("pair", {**PAIRS, "fp32": (FP32, FP32)})
def test_fakes_know_the_types(pair: str) -> None:
    """And the definition, where it stands in for the kernels."""
    dtypes = {**PAIRS, "fp32": (FP32, FP32)}[pair]
    x, codebook = (t.to(d) for t, d in zip(cases.inputs(Case(3, 4, 5))[:2], dtypes, strict=True))
    calls = {
        "vq_nearest": (x, codebook, None, False, 2, 16, True, True, 2),
        "vq_quantize": (x, codebook, None, False, True),
    }
    for op, args in calls.items():
        found = {name: cases.run(op, name, *args) for name in ("triton", "reference")} if interpreted() else {}
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
            fake = getattr(torch.ops.fastseq, op)(*fakes)
        for got in found.values():
            assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in fake]


@pytest.mark.skipif(not interpreted(), reason="of the interpreter")
def test_the_interpreter_rounds_once() -> None:
    """Where products nearly cancel what they are added to, and over all sizes."""
    from tests import interpreter

    a, b = (t * cases.powers(t, -15, 16, torch.Generator().manual_seed(1)) for t in cases.normals(2, 5000, 1))
    near = -(a * b) * (1 + 1e-7 * cases.normals(5000, 1))
    for c in (near, cases.normals(5000, 1)):
        got = interpreter.fused(*(t.float().numpy() for t in (a, b, c)))
        assert_same_bits("fused", torch.from_numpy(got), reference.vq.fused(a.float(), b.float(), c.float()))

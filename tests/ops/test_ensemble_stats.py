"""Figures of an ensemble: against the definition, bins and their edges, bits, transforms, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import functional, reference
from tests.ops import mimo_rows as rows
from tests.ops.mimo_rows import IGNORE, Case
from tests.tolerance import assert_same_bits, assert_within_budget

OPS = torch.ops.fastseq
NAMES = "probability prediction confidence members disagreement nll brier histogram totals"
FLOATS = (0, 2, 4, 5, 6)
FLOAT_NAMES = " ".join(NAMES.split()[n] for n in FLOATS)
BINS = 15
needs_compiled = rows.needs_compiled("ensemble_stats")


def labels_of(case: Case) -> Tensor:
    return rows.labels(case)[:, 0].contiguous()


def floats(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What the definition has in the dtype of the logits."""
    found = reference.ensemble_stats(x, *rest)
    return tuple(found[n] for n in FLOATS)


def totals_of(found: Any, labels: Tensor | None, bins: int, ignore: int) -> tuple[Tensor, Tensor]:
    """Histogram and totals of the rows of a result, by the words of the definition."""
    _, prediction, confidence, members, disagreement, nll, brier = found[:7]
    given = torch.ones_like(prediction, dtype=torch.bool) if labels is None else labels != ignore
    right = (prediction == labels) & given if labels is not None else torch.zeros_like(given)
    histogram = torch.zeros(3, bins, dtype=torch.float64)
    for b in given.nonzero().flatten().tolist() if labels is not None else ():
        place = min(bins - 1, math.floor(confidence[b] * bins)) if confidence[b] == confidence[b] else 0
        histogram[:, place] += torch.stack((torch.ones(()), confidence[b], right[b])).double()
    sums = [given, nll, brier, right, torch.where(given, disagreement, 0)]
    hits = members == labels[:, None] if labels is not None else torch.zeros_like(members, dtype=torch.bool)
    each = (hits & given[:, None]).double().sum(0)
    return histogram, torch.cat((torch.stack([v.double().sum() for v in sums]), each))


@pytest.mark.parametrize("labelled", [True, False])
@rows.each_case
@rows.each_backend("ensemble_stats")
def test_figures(backend: str, dtype: torch.dtype, case: Case, labelled: bool) -> None:
    x, labels = rows.logits(case, dtype), labels_of(case) if labelled else None
    rest = (labels, BINS, IGNORE)
    found = rows.run("ensemble_stats", backend, x, *rest, True)
    assert_within_budget(FLOAT_NAMES, [found[n] for n in FLOATS], floats, (x, *rest))
    expected = reference.ensemble_stats(x.double(), *rest)
    assert_same_bits("prediction members", (found[1], found[3]), (expected[1], expected[3]))
    if case.N:
        assert_same_bits("confidence", found[2], found[0].max(1).values)
    assert_within_budget("histogram totals", found[7:], lambda: totals_of(found, *rest), ())
    without = rows.run("ensemble_stats", backend, x, *rest, False)
    assert without[0].numel() == 0
    assert_same_bits(NAMES.split()[1:], without[1:], found[1:])


@rows.each_backend("ensemble_stats")
def test_the_mean_is_of_probabilities(backend: str, dtype: torch.dtype) -> None:
    """Two sure members that contradict each other are undecided together; a mean of logarithms would be far below."""
    args = (torch.tensor([[[30.0, 0, 0], [0, 30, 0]]]).to(dtype), torch.tensor([1]), BINS, IGNORE)
    found = rows.run("ensemble_stats", backend, *args, True)
    assert_within_budget(FLOAT_NAMES, [found[n] for n in FLOATS], floats, args)
    assert found[2] < 0.51 and found[5] < 0.7  # log 2; the mean of logarithms is -15
    assert (found[1].tolist(), found[3].tolist(), found[4].tolist()) == ([0], [[0, 1]], [1.0])


@rows.each_backend("ensemble_stats")
def test_unlikely_labels_keep_their_digits(backend: str, dtype: torch.dtype) -> None:
    """Where every member's probability of the label is below any number of the type."""
    x = torch.zeros(3, 2, 4).to(dtype)
    x[:, :, 0] = 2000
    x[1, 1, 0] = 1500
    args = (x, torch.tensor([2, 2, 0]), BINS, IGNORE)
    found = rows.run("ensemble_stats", backend, *args, True)
    assert_within_budget("nll", found[5], lambda *a: reference.ensemble_stats(*a)[5], args)


@pytest.mark.parametrize("bins", [1, 2, 15])
@rows.each_backend("ensemble_stats")
def test_edges_of_bins(backend: str, dtype: torch.dtype, bins: int) -> None:
    """1 lies in the last bin, and a confidence on an edge in the one above it: 1/2 of two classes, 1/3 of three."""
    x = torch.full((4, 1, 3), -torch.inf)
    x[0, 0, 0] = 0  # 1
    x[1, 0, :2] = 0  # 1/2
    x[2, 0] = 0  # 1/3
    x[3, 0, :2] = torch.tensor([0.0, -9])  # just below 1
    rest = (torch.zeros(4).long(), bins, IGNORE)
    found = rows.run("ensemble_stats", backend, x.to(dtype), *rest, True)
    assert_same_bits("histogram", found[7][::2], totals_of(found, *rest)[0][::2])
    if backend == "cpu":  # the others round on the way to 1/3
        assert found[2][:3].tolist() == [1.0, 0.5, float(torch.tensor(1 / 3, dtype=dtype))]
        places = {1: [0, 0, 0, 0], 2: [1, 1, 0, 1], 15: [14, 7, 5, 14]}[bins]
        assert found[7][0].tolist() == torch.bincount(torch.tensor(places), minlength=bins).tolist()


@rows.each_backend("ensemble_stats")
def test_equal_predictions(backend: str, dtype: torch.dtype) -> None:
    """The first among equals, wherever it lies."""
    for K in (1, 2, 16, 33, 100):
        for place in {0, K // 2, K - 1}:
            x = torch.zeros(2, 3, K)
            x[:, :, place:] = 4.0
            found = rows.run("ensemble_stats", backend, x.to(dtype), None, BINS, IGNORE, False)
            assert (found[1] == place).all() and (found[3] == place).all() and (found[4] == 0).all(), (K, place)


@pytest.mark.parametrize("label", [2, 8])
@rows.each_backend("ensemble_stats")
def test_what_is_not_finite(backend: str, dtype: torch.dtype, label: int) -> None:
    """NaN and infinities come out where the definition has them; predictions stay classes, NaN counts in bin 0."""
    x = rows.strange(dtype)
    labels = torch.full((8,), label)
    labels[3] = IGNORE
    wide = x.to(torch.float32 if dtype.itemsize == 2 else dtype)
    found = rows.run("ensemble_stats", backend, x, labels, BINS, IGNORE, True)
    expected = reference.ensemble_stats(wide, labels, BINS, IGNORE)
    got, _ = rows.finite_where_finite(FLOAT_NAMES, [found[n] for n in FLOATS], [expected[n] for n in FLOATS])

    def finite(*args: Any) -> tuple[Tensor, ...]:
        return tuple(torch.where(v.isfinite(), v, 0) for v in floats(*args))

    assert_within_budget(FLOAT_NAMES, got, finite, (x, labels, BINS, IGNORE))
    assert_same_bits("prediction members", (found[1], found[3]), (expected[1], expected[3]))
    strange = expected[2].isnan() & (labels != IGNORE)
    assert strange.sum() > 2 and (found[1][strange] == 0).all()
    assert found[7][0, 0] >= strange.sum() and found[7][1, 0].isnan() and found[7][0].sum() == 7
    assert found[8][1].isnan() and not found[8][4].isnan()


def test_the_definition() -> None:
    """By plain words, in float64."""
    case = Case(9, 3, 5, 0.3)
    x, labels = rows.logits(case, torch.float64), labels_of(case)
    found = reference.ensemble_stats(x, labels, 4, IGNORE)
    p = torch.stack([row.softmax(-1) for row in x.unbind(1)]).mean(0)
    pairs = torch.stack([(found[3][:, i] != found[3][:, j]).double() for i, j in ((0, 1), (0, 2), (1, 2))]).mean(0)
    given = labels != IGNORE
    safe = labels.clamp_min(0)
    picked = torch.where(given, -p[torch.arange(9), safe].log(), 0)
    brier = torch.where(given, (p - torch.eye(5).double()[safe]).square().sum(1), 0)
    expected = (p, p.max(1).values, pairs, picked, brier)
    assert_within_budget(FLOAT_NAMES, [found[n] for n in FLOATS], lambda: expected, ())
    assert_within_budget("histogram totals", found[7:], lambda: totals_of(found, labels, 4, IGNORE), ())


@needs_compiled
def test_functional() -> None:
    case = Case(40, 3, 6, 0.2)
    x, labels = rows.logits(case), labels_of(case)
    s = functional.ensemble_stats(x, labels, bins=7, ignore_index=IGNORE)
    assert_same_bits(NAMES, tuple(s), OPS.ensemble_stats(x, labels, 7, IGNORE, True))
    given = labels != IGNORE
    right = (s.prediction == labels)[given]
    gaps = []
    for b in range(7):
        inside = (s.confidence[given] * 7).long().clamp_max(6) == b
        gaps.append((right[inside].double().sum() - s.confidence[given][inside].double().sum()).abs())
    expected = (
        s.nll[given].double().mean(),
        s.brier[given].double().mean(),
        right.double().mean(),
        s.disagreement[given].double().mean(),
        (s.member_prediction[given] == labels[given][:, None]).double().mean(0),
        torch.stack(gaps).sum() / given.sum(),
    )
    got = (s.mean_nll, s.mean_brier, s.accuracy, s.mean_disagreement, s.member_accuracy, s.ece)
    assert_within_budget("nll brier accuracy disagreement members ece", got, lambda: expected, ())
    short = functional.ensemble_stats(x, labels.int(), bins=7, ignore_index=IGNORE, return_probability=False)
    assert short.probability is None
    assert_same_bits(NAMES.split()[1:], tuple(short)[1:], tuple(s)[1:])
    strided = functional.ensemble_stats(
        x.transpose(0, 2).contiguous().transpose(0, 2), labels, bins=7, ignore_index=IGNORE
    )
    assert_same_bits(NAMES, tuple(strided), tuple(s))
    for dtype in rows.LOW:
        low = functional.ensemble_stats(x.to(dtype).requires_grad_(), labels, ignore_index=IGNORE)
        wide = functional.ensemble_stats(x.to(dtype).float(), labels, ignore_index=IGNORE)
        assert_same_bits(NAMES, tuple(low), tuple(wide))
        assert not low.nll.requires_grad


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [Case(300, 3, 101, 0.2), Case(7, 5, 4099), Case(4000, 4, 2, 0.5)], ids=str)
def test_bits(case: Case, dtype: torch.dtype) -> None:
    """The same for any number of threads, for a row alone, again, and through numpy."""
    x, labels = rows.logits(case, dtype), labels_of(case)
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.append(OPS.ensemble_stats(x, labels, BINS, IGNORE, True))
    for other in found[1:]:
        assert_same_bits(NAMES, other, found[0])
    alone = OPS.ensemble_stats(x[1:2], labels[1:2], BINS, IGNORE, True)
    assert_same_bits(NAMES.split()[:7], alone[:7], [v[1:2] for v in found[0][:7]])
    for threads in (1, 3):
        by_numpy = rows.numpy_door().ensemble_stats(x.numpy(), labels.numpy(), BINS, IGNORE, threads=threads)
        assert_same_bits(NAMES, by_numpy, found[0])


@needs_compiled
@pytest.mark.parametrize("case", [Case(5, 3, 7, 0.2), Case(0, 3, 7)], ids=str)
def test_opcheck(case: Case) -> None:
    for labels, probability in ((labels_of(case), True), (None, False)):
        found = torch.library.opcheck(
            OPS.ensemble_stats.default, (rows.logits(case), labels, BINS, IGNORE, probability)
        )
        assert set(found.values()) == {"SUCCESS"}


@needs_compiled
def test_transforms() -> None:
    """compile, export and vmap give the bits of a plain call."""

    def run(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return tuple(functional.ensemble_stats(x, labels, ignore_index=IGNORE))  # type: ignore[arg-type]

    class Stats(torch.nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return run(x, labels)

    case = Case(5, 3, 7, 0.2)
    x, labels = rows.logits(case), labels_of(case)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same_bits(NAMES, compiled(x, labels), run(x, labels))
    several = torch.export.Dim("B", min=2)
    made = torch.export.export(Stats(), (x, labels), dynamic_shapes=({0: several}, {0: several}))
    other = (rows.logits(Case(9, 3, 7)), labels_of(Case(9, 3, 7)))
    assert_same_bits(NAMES, made.module()(*other), run(*other))
    both = torch.stack((x, rows.logits(case, seed=1)))
    mapped = torch.func.vmap(run, (0, None))(both, labels)
    assert_same_bits(NAMES, mapped, [torch.stack(v) for v in zip(*(run(one, labels) for one in both), strict=True)])


X, Y = torch.zeros(2, 3, 5), torch.zeros(2, dtype=torch.int64)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (lambda: functional.ensemble_stats(X[0]), r"logits must be \[B, M, K\] with M, K >= 1, got \[3, 5\]"),
    "no_members": (
        lambda: functional.ensemble_stats(X[:, :0]),
        r"logits must be \[B, M, K\] with M, K >= 1, got \[2, 0, 5\]",
    ),
    "no_classes": (
        lambda: functional.ensemble_stats(X[..., :0]),
        r"logits must be \[B, M, K\] with M, K >= 1, got \[2, 3, 0\]",
    ),
    "dtype": (
        lambda: functional.ensemble_stats(X.int()),
        "logits must be float32, float64, bfloat16 or float16, got torch.int32",
    ),
    "bins": (lambda: functional.ensemble_stats(X, bins=0), r"bins must be an integer in 1..4096, got 0"),
    "bins_bool": (lambda: functional.ensemble_stats(X, bins=True), r"bins must be an integer in 1..4096, got True"),
    "bins_large": (lambda: functional.ensemble_stats(X, bins=4097), r"bins must be an integer in 1..4096, got 4097"),
    "labels": (lambda: functional.ensemble_stats(X, Y[:1]), r"labels must be \[B\] = \[2\], got \[1\]"),
    "labels_dtype": (lambda: functional.ensemble_stats(X, Y.float()), "labels must be integers, got torch.float32"),
    "labels_bool": (lambda: functional.ensemble_stats(X, Y.bool()), "labels must be integers, got torch.bool"),
    "device": (lambda: functional.ensemble_stats(X.to("meta"), Y), "labels must be on meta, got one on cpu"),
    "range": (
        lambda: functional.ensemble_stats(X, torch.tensor([0, 5])),
        r"labels must lie in 0 .. K - 1 = 4 or be ignore = -100, got 5 at \[1\]",
    ),
}


@needs_compiled
@pytest.mark.parametrize("call, says", WRONG.values(), ids=WRONG.keys())
def test_wrong_argument(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"ensemble_stats: {says}"):
        call()


RAW: dict[str, tuple[tuple[Any, ...], str]] = {
    "rank": ((X[0], Y, 15, -1, True), r"logits must be \[B, M, K\], got \[3, 5\]"),
    "dtype": ((X.int(), Y, 15, -1, True), "logits must be float32 or float64, got int32"),
    "stride": ((X.mT, Y, 15, -1, True), "logits must be contiguous"),
    "no_members": ((X[:, :0].contiguous(), Y, 15, -1, True), "logits must have M and K of at least 1"),
    "bins": ((X, Y, 0, -1, True), "bins must lie in 1 .. 4096, got 0"),
    "labels": ((X, Y[:1], 15, -1, True), r"labels must be \[B\] = \[2\], got \[1\]"),
    "labels_dtype": ((X, Y.int(), 15, -1, True), "labels must be int64, got int32"),
    "range": ((X, Y + 5, 15, -1, True), r"labels must lie in 0 .. K - 1 = 4 .* got 5 at \[0\]"),
    "negative": ((X, Y - 2, 15, -1, True), r"labels must lie in 0 .. K - 1 = 4 .* got -2 at \[0\]"),
}


@needs_compiled
@pytest.mark.parametrize("door", ["torch", "numpy"])
@pytest.mark.parametrize("call, says", RAW.values(), ids=RAW.keys())
def test_wrong_argument_of_the_operator(call: tuple[Any, ...], says: str, door: str) -> None:
    given = [v.numpy() if door == "numpy" and isinstance(v, Tensor) else v for v in call]
    with pytest.raises(ValueError, match=f"ensemble_stats: {says}"):
        (OPS if door == "torch" else rows.numpy_door()).ensemble_stats(*given)

"""The kernels of MIMO and of ensembles: every tile and chunk, 16 bits, what is out of range, equal bits."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import reference
from fastseq.ops import ensemble_stats as stats_ops
from fastseq.ops import mimo as mimo_ops
from fastseq.ops import mimo_nll as nll_ops
from fastseq.ops._triton import interpreted, why_not_triton
from tests.ops.mimo_triton_cases import (
    FIGURES,
    IGNORE,
    LOSSES,
    PLACES,
    ensemble,
    figures,
    layer,
    loss_inputs,
    normal,
    over_rows,
    whole,
)
from tests.tolerance import GRADIENTS, OUTPUTS, assert_same_bits, assert_within_budget

if why_not_triton() is not None:
    pytest.skip(f"triton: {why_not_triton()}", allow_module_level=True)
if not (interpreted() or torch.cuda.is_available()):
    pytest.skip("triton: neither CUDA nor TRITON_INTERPRET=1", allow_module_level=True)
from fastseq_kernels import ensemble_stats as stats_kernels  # noqa: E402
from fastseq_kernels import mimo as mimo_kernels  # noqa: E402
from fastseq_kernels import mimo_nll as nll_kernels  # noqa: E402

DEVICE = "cpu" if interpreted() else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, of numbers that are not finite
]
TABLES = {**mimo_ops.BACKENDS, **nll_ops.BACKENDS, **stats_ops.BACKENDS}
MODULES = {"mimo_nll": "mimo_nll", "mimo_nll_backward": "mimo_nll", "ensemble_stats": "ensemble_stats"}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
# A, B, S, C, M, N, G: steps first and last, one tile and several, one column and more than a tile has
SIZES = [(3, 5, 2, 7, 3, 11, 9), (1, 4, 19, 1, 2, 4, 5), (1, 2, 1, 520, 3, 4, 530), (1, 1, 1, 1, 1, 1, 1)]
each_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
EMPTY = [(0, 2, 3, 4, 2, 5, 3), (2, 3, 0, 4, 2, 7, 3), (2, 3, 4, 5, 2, 0, 3), (1, 0, 2, 3, 2, 0, 4)]


def run(op: str, *args: Any) -> Any:
    """The host function, which the backend of that name is, on whatever device kernels run."""
    moved = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in args]
    assert next(b for b in TABLES[op] if b.name == "triton").why_not(*moved) is None
    found = getattr(importlib.import_module(f"fastseq_kernels.{MODULES.get(op, 'mimo')}"), op)(*moved)
    return found.cpu() if isinstance(found, Tensor) else tuple(t.cpu() for t in found)


def bits(tensors: Any) -> list[Tensor]:
    """As bytes: numpy has no bfloat16."""
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    return [t.contiguous().view(torch.uint8) if t.dim() else t for t in tensors]


def same(got: Any, expected: Any) -> None:
    got, expected = bits(got), bits(expected)
    assert_same_bits([f"result_{n}" for n in range(len(got))], got, expected)


# ---- rows ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.cdouble])
@each_size
def test_gather_copies_any_dtype(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    A, B, S, C, M, N, _ = sizes
    x = whole(99, A, B, S, C).to(dtype)
    index, labels = whole(B, M, N, dtype=torch.int32), whole(9, B, 3)
    out, taken = run("mimo_gather", x, index, labels)
    assert out.dtype == dtype
    same([out, taken], [reference.mimo_gather(x, index), labels[index.long()].transpose(0, 1)])
    without, none = run("mimo_gather", x, index, None)
    same(without, out)
    assert none.dtype == torch.int64 and none.shape == (0,)


@each_dtype
@each_size
def test_sums_over_slots_and_rows(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    A, B, S, C, M, N, G = sizes
    index = whole(B, M, N, dtype=torch.int32)
    parts, bias = normal(A, B, S, M * G, dtype=dtype), normal(G, seed=1, dtype=dtype)
    for given in (bias, None):
        got = run("mimo_combine", parts, index, given)
        assert_within_budget("out", got, reference.mimo_combine, (parts, index, given))
    d = normal(A, N, S, M * C, seed=2, dtype=dtype)
    got = run("mimo_gather_backward", d, index, B)
    assert_within_budget("dx", got, reference.mimo_gather_backward, (d, index, B), GRADIENTS)
    d = normal(A, N, S, G, seed=3, dtype=dtype)
    got = run("mimo_combine_backward", d, index, B)
    assert_within_budget("dparts", got, reference.mimo_combine_backward, (d, index, B), GRADIENTS)


def test_16_bits_are_summed_in_float32() -> None:
    """Only the result is rounded: ones beyond 256 are lost to bfloat16."""
    index, d = torch.zeros(2, 21, dtype=torch.int32), torch.ones(1, 21, 1, 2, dtype=torch.bfloat16)
    d[0, 0] = 256
    assert run("mimo_gather_backward", d, index, 1).tolist() == [[[[552.0]]]]
    assert run("mimo_combine_backward", d[..., :1].contiguous(), index, 1).tolist() == [[[[276.0, 276.0]]]]
    parts = torch.tensor([256.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16).view(1, 1, 1, 5)
    assert run("mimo_combine", parts, torch.zeros(5, 1, dtype=torch.int32), None).item() == 260


@each_dtype
@pytest.mark.parametrize("R", [1, 3])
def test_project(R: int, dtype: torch.dtype) -> None:
    """Rows first, where there are few, and products first."""
    x, weight, bias, index = layer((2, 5, 3, 7, 2, 5 * R, 11), dtype)
    said = mimo_kernels.mimo_project_detail(x, weight, bias, index)
    assert said == ("5 rows, then their products" if R == 1 else "products of 5 examples, then 15 rows")
    for given in (bias, None):
        got = run("mimo_project", x, weight, given, index)
        assert_within_budget("out", got, reference.mimo_project, (x, weight, given, index))
    d = normal(2, 5 * R, 3, 11, seed=4, dtype=dtype)
    said = mimo_kernels.mimo_project_backward_detail(d, x, weight, index, True, True, True)
    assert said == ("products of 5 rows, then their sums" if R == 1 else "15 rows, then products of 5 examples")
    whole_call = run("mimo_project_backward", d, x, weight, index, True, True, True)
    definition = reference.mimo_project_backward
    assert_within_budget("dx dweight dbias", whole_call, definition, (d, x, weight, index), GRADIENTS)
    for place in range(3):
        needs = [place == n for n in range(3)]
        got = run("mimo_project_backward", d, x, weight, index, *needs)
        same(got, [g if need else g.new_empty(0) for g, need in zip(whole_call, needs, strict=True)])


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(sizes: tuple[int, ...]) -> None:
    A, B, S, C, M, N, G = sizes
    x, weight, bias, index = layer(sizes, torch.float32)
    same(run("mimo_gather", x, index, whole(3, B, 1))[0], reference.mimo_gather(x, index))
    parts, d = normal(A, B, S, M * G), normal(A, N, S, G)
    same(run("mimo_combine", parts, index, bias), reference.mimo_combine(parts, index, bias))
    same(run("mimo_gather_backward", normal(A, N, S, M * C), index, B), torch.zeros(A, B, S, C))
    same(run("mimo_combine_backward", d, index, B), torch.zeros(A, B, S, M * G))
    same(run("mimo_project", x, weight, bias, index), reference.mimo_project(x, weight, bias, index))
    got = run("mimo_project_backward", d, x, weight, index, True, True, True)
    assert_within_budget("dx dweight dbias", got, reference.mimo_project_backward, (d, x, weight, index))


def test_an_index_out_of_range_counts_as_zeros() -> None:
    """Also of what would be NaN: nothing is read."""
    B, index = 3, torch.tensor([[0, -1, 2, 3], [1, 2, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    x, safe = normal(2, B, 5, 4), torch.where((index >= 0) & (index < B), index, B)
    padded = torch.cat((x, torch.zeros(2, 1, 5, 4)), 1)  # an example of zeros
    out, taken = run("mimo_gather", x, index, torch.tensor([[7], [8], [9]]))
    same(out, reference.mimo_gather(padded, safe))
    assert taken.flatten(1).tolist() == [[7, 8], [-1, 9], [9, -1], [-1, -1]]
    same(run("mimo_combine", x, index, None), reference.mimo_combine(padded, safe, None))
    used = torch.where(index == safe, 1.0, torch.nan)  # of slot m of row n
    d = normal(2, 4, 5, 2, 3) * used.T[None, :, None, :, None]
    got = run("mimo_gather_backward", d.flatten(3), index, B)
    expected = reference.mimo_gather_backward(d.nan_to_num(0.0).flatten(3), safe, B + 1)[:, :B]
    same(got, expected)
    d = normal(2, 4, 5, 3)
    same(run("mimo_combine_backward", d, index, B), reference.mimo_combine_backward(d, safe, B + 1)[:, :B])


def test_rows_have_the_same_bits_again() -> None:
    x, weight, bias, index = layer((2, 4, 3, 9, 3, 20, 10), torch.float32)
    d = normal(2, 20, 3, 10, seed=4)
    for op, args in {
        "mimo_gather_backward": (normal(2, 20, 3, 27), index, 4),
        "mimo_combine_backward": (d, index, 4),
        "mimo_project": (x, weight, bias, index),
        "mimo_project_backward": (d, x, weight, index, True, True, True),
    }.items():
        same(run(op, *args), run(op, *args))


# ---- losses ----

# N, M, K: every width of a tile, whole and not, and rows of several tiles
LOGITS = [(5, 3, 7), (70, 1, 16), (5, 1, 65), (1, 3, 1000), (1, 2, 5001), (1, 1, 1)]
each_logits = pytest.mark.parametrize("sizes", LOGITS, ids=str)


@each_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@each_logits
def test_nll(sizes: tuple[int, ...], smoothing: float, dtype: torch.dtype) -> None:
    """Losses in float32; the gradient in the dtype of the logits, rounded once."""
    logits, labels = loss_inputs(sizes, dtype)
    rest = (labels, smoothing, IGNORE)
    got = run("mimo_nll", logits, *rest)
    assert_within_budget(LOSSES, got, reference.mimo_nll, (logits.float(), *rest))
    dloss, dnll = normal(1).squeeze(), normal(*labels.shape, seed=2)
    for given in ((dloss, dnll), (dloss, None), (None, dnll)):
        call = (*given, logits, labels, *got[2:], smoothing, IGNORE)
        d = run("mimo_nll_backward", *call)
        assert d.dtype == dtype
        assert_within_budget("dlogits", d, reference.mimo_nll_backward, call, GRADIENTS)


@pytest.mark.parametrize("N", [16, 17, 60])
def test_nll_of_many_chunks(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk, two, and more than can be; a slot of no labels has no part in the loss."""
    monkeypatch.setattr(nll_kernels, "_CHUNK", 16)
    monkeypatch.setattr(nll_kernels, "_MOST_CHUNKS", 3)
    logits, labels = loss_inputs((N, 3, 5))
    labels[:, 1] = IGNORE
    got = run("mimo_nll", logits, labels, 0.0, IGNORE)
    assert_within_budget(LOSSES, got, reference.mimo_nll, (logits, labels, 0.0, IGNORE))
    call = (normal(1).squeeze(), None, logits, labels, *got[2:], 0.0, IGNORE)
    d = run("mimo_nll_backward", *call)
    assert_within_budget("dlogits", d, reference.mimo_nll_backward, call, GRADIENTS)
    same([*run("mimo_nll", logits, labels, 0.0, IGNORE), run("mimo_nll_backward", *call)], [*got, d])


def test_a_label_out_of_range_is_ignored() -> None:
    """And a row that is ignored has no gradient, whatever its logits are."""
    logits, labels = loss_inputs((6, 2, 4))
    wrong = labels.clone()
    for at, value in enumerate((-1, 4, 2**40, -(2**40), IGNORE)):
        labels[at, 0], wrong[at, 0] = IGNORE, value
    same(run("mimo_nll", logits, wrong, 0.1, IGNORE), run("mimo_nll", logits, labels, 0.1, IGNORE))
    same(run("mimo_nll", logits, wrong, 0.1, 4), run("mimo_nll", logits, labels, 0.1, IGNORE))
    logits[0, 0, 2] = torch.nan
    sums, dloss = run("mimo_nll", logits, labels, 0.1, IGNORE)[2:], torch.tensor(2.0)
    got = run("mimo_nll_backward", dloss, None, logits, wrong, *sums, 0.1, IGNORE)
    assert not got[:5, 0].any() and got.isfinite().all() and got[5, 0].any()


@pytest.mark.skipif(not interpreted(), reason="a GPU's compiler may add in another order")
def test_a_gradient_of_16_bits_is_rounded_once() -> None:
    logits, labels = loss_inputs((3, 2, 70), torch.bfloat16)
    sums, dnll = run("mimo_nll", logits, labels, 0.1, IGNORE)[2:], normal(3, 2)
    got, wide = (run("mimo_nll_backward", None, dnll, x, labels, *sums, 0.1, IGNORE) for x in (logits, logits.float()))
    same(got, wide.to(torch.bfloat16))


def test_an_ignored_label_may_be_a_class() -> None:
    logits, labels = loss_inputs((6, 2, 4))
    got = run("mimo_nll", logits, labels.clamp_min(0), 0.0, 0)
    assert_within_budget(LOSSES, got, reference.mimo_nll, (logits, labels.clamp_min(0), 0.0, 0))


@pytest.mark.parametrize("N, M", [(0, 3), (4, 2)])
def test_nll_of_no_labels(N: int, M: int) -> None:
    logits, labels = normal(N, M, 5), torch.full((N, M), IGNORE)
    loss, nll, *sums = run("mimo_nll", logits, labels, 0.0, IGNORE)
    assert loss.item() == 0 and not nll.any() and [s.shape for s in sums] == [(N, M)] * 2
    assert not run("mimo_nll_backward", torch.tensor(1.0), None, logits, labels, *sums, 0.0, IGNORE).any()


def test_logits_that_are_not_finite() -> None:
    """Classes that cannot be, in whole blocks too, and rows of nothing else; as torch has it."""
    for K in (6, 5000):
        logits = normal(5, 1, K)
        logits[0, 0, : K - 1], logits[1, 0, 1:] = -torch.inf, -torch.inf
        logits[2], logits[3, 0, 0], logits[4, 0, 0] = -torch.inf, torch.inf, torch.nan
        labels = torch.tensor([K - 1, 0, 0, 1, 1])[:, None]
        got = run("mimo_nll", logits, labels, 0.0, IGNORE)
        for found, expected in zip(got, reference.mimo_nll(logits.double(), labels, 0.0, IGNORE), strict=True):
            torch.testing.assert_close(found.double(), expected, equal_nan=True)
        by_torch = torch.nn.functional.cross_entropy(logits[:, 0], labels[:, 0], reduction="none")
        torch.testing.assert_close(got[1][:, 0], by_torch, equal_nan=True)


def test_the_maximum_may_be_in_any_block() -> None:
    """What the blocks before it have added up is scaled to it."""
    logits, labels = loss_inputs((4, 1, 5000))
    logits[:2, :, 4500] += 12
    logits[2, :, 40] += 12
    got = run("mimo_nll", logits, labels, 0.0, IGNORE)
    assert_within_budget(LOSSES, got, reference.mimo_nll, (logits, labels, 0.0, IGNORE))
    check(logits.view(2, 2, 5000), labels[:2, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("K", [20, 5000])
def test_logits_that_are_large(K: int, smoothing: float) -> None:
    """No digit of the distances between them is lost, in a loss, a gradient or a probability."""
    logits, labels = torch.full((3, 1, K), 1e5), torch.tensor([0, 1, IGNORE])[:, None]
    logits[:, 0, 1] = logits[:, 0, K - 1] = 100_003.0
    args, grads = (logits, labels, smoothing, IGNORE), (torch.ones(()), None)
    got = run("mimo_nll", *args)
    assert_within_budget(LOSSES, got, reference.mimo_nll, args)
    d = run("mimo_nll_backward", *grads, *args[:2], *got[2:], *args[2:])
    assert_within_budget("dlogits", d, reference.mimo_nll_backward, (*grads, *args[:2], *got[2:], *args[2:]), GRADIENTS)
    torch.testing.assert_close(d.sum(2), torch.zeros(3, 1), atol=1e-6, rtol=0)
    probability = run("ensemble_stats", logits, labels[:, 0], 15, IGNORE, True)[0]
    assert_within_budget("probability", probability, lambda x: x.softmax(2)[:, 0], (logits,))


# ---- ensembles ----

# B, M, K: tiles of many rows and of one, members that are no power of two, rows of several tiles
ENSEMBLES = [(5, 3, 7), (20, 4, 16), (3, 2, 65), (1, 3, 700), (2, 1, 2500), (1, 9, 1)]


def check(logits: Tensor, labels: Tensor | None, bins: int = 15, ignore: int = IGNORE) -> tuple[Tensor, ...]:
    """All results; whole ones and sums exactly, the sums up to the order of float64."""
    found = run("ensemble_stats", logits, labels, bins, ignore, True)
    wide, K = logits.float(), logits.shape[2]
    safe = labels
    if labels is not None:
        safe = torch.where((labels >= 0) & (labels < K), labels, ignore)
    assert_within_budget(FIGURES, [found[n] for n in PLACES], figures, (wide, safe, bins, ignore), OUTPUTS)
    expected = reference.ensemble_stats(wide, safe, bins, ignore)
    same([found[1], found[3], found[4]], [expected[1], expected[3], expected[4]])
    torch.testing.assert_close(list(found[7:]), over_rows(found, safe, K, bins, ignore), rtol=1e-14, atol=1e-14)
    return tuple(found)


@each_dtype
@pytest.mark.parametrize("sizes", ENSEMBLES, ids=str)
def test_stats(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, labels = ensemble(sizes, dtype)
    found = check(logits, labels)
    without = run("ensemble_stats", logits, labels, 15, IGNORE, False)
    assert without[0].shape == (0,) and without[0].dtype == torch.float32
    same(without[1:], found[1:])
    unlabelled = check(logits, None)
    same(unlabelled[:5], found[:5])


@pytest.mark.parametrize("bins", [1, 70])
def test_stats_of_many_chunks(bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_kernels, "_CHUNK", 12)
    monkeypatch.setattr(stats_kernels, "_MOST_CHUNKS", 3)
    logits, labels = ensemble((40, 3, 5))
    found = check(logits, labels, bins)
    same(run("ensemble_stats", logits, labels, bins, IGNORE, True), found)


def test_stats_of_labels_out_of_range() -> None:
    logits, labels = ensemble((6, 2, 4))
    labels[:4] = torch.tensor([-1, 4, 2**40, -(2**40)])
    assert check(logits, labels)[8][0] == 1  # of rows 4 and 5 one is ignored
    check(logits, labels.clamp(0, 3), ignore=3)


def test_stats_of_nothing() -> None:
    logits, labels = ensemble((0, 3, 5))
    found = check(logits, labels)
    assert not found[7].any() and not found[8].any()


def test_the_first_of_equal_classes() -> None:
    """In one block and across blocks, of members and of their mean."""
    for K in (6, 1500):
        logits = torch.zeros(2, 3, K)
        logits[0, :, [1, 4, K - 1]] = 5
        _, prediction, _, members, *_ = run("ensemble_stats", logits, None, 15, IGNORE, True)
        assert prediction.tolist() == [1, 0] and members.tolist() == [[1] * 3, [0] * 3]


def test_stats_of_classes_that_cannot_be() -> None:
    logits, labels = ensemble((5, 2, 6))
    logits[:, :, 3:5] = -torch.inf
    labels[:3] = torch.tensor([0, 5, 1])
    check(logits, labels)
    labels[0] = 3
    found = run("ensemble_stats", logits, labels, 15, IGNORE, True)
    assert found[5][0] == torch.inf and found[5][1:].isfinite().all()


@each_dtype
@pytest.mark.parametrize("K", [3, 1500])
def test_stats_of_what_is_not_finite(K: int, dtype: torch.dtype) -> None:
    """No number of a row is plausible where a member has no softmax, and a first NaN wins, in one block and across."""
    last, inf, nan = K - 1, torch.inf, torch.nan
    odd = [{0: inf}, {last: inf}, {last: nan}, {1: nan, last: nan}, {0: inf, last: nan}, {0: nan, last: inf}]
    x = normal(9, 3, K)
    for row, values in enumerate(odd):
        for k, value in values.items():
            x[row, 1, k] = value
    x[6, 2], x[7, 0] = -inf, nan
    x, labels = x.to(dtype), torch.tensor([1, 1, 0, last, 1, IGNORE, 0, 1, 2])
    found = run("ensemble_stats", x, labels, 15, IGNORE, True)
    expected = reference.ensemble_stats(x.float(), labels, 15, IGNORE)
    same([found[1], found[3], found[4]], [expected[1], expected[3], expected[4]])
    assert found[3][:6, 1].tolist() == [0, last, last, 1, last, 0]
    for n in PLACES:
        assert torch.equal(found[n].isnan(), expected[n].isnan()) and not found[n].isinf().any()
    assert found[2][:8].isnan().all() and not found[1][:8].any()
    alone = [v[8:] for v in found]
    assert_within_budget(FIGURES, [alone[n] for n in PLACES], figures, (x[8:].float(), labels[8:], 15, IGNORE), OUTPUTS)
    same(found[7][::2], expected[7][::2])
    assert found[7][0, 0] == 7 + (found[2][8] < 1 / 15) and found[7][1, 0].isnan()
    assert torch.equal(found[8].isnan(), expected[8].isnan())
    same([found[8][0], *found[8][3:]], [expected[8][0], *expected[8][3:]])


def test_certain_rows_are_in_the_last_bin() -> None:
    logits = torch.tensor([0.0, 200.0]).expand(3, 2, 2).contiguous()
    histogram = check(logits, torch.tensor([1, 0, 1]), 4)[7]
    assert histogram.tolist() == [[0, 0, 0, 3], [0, 0, 0, 3], [0, 0, 0, 2]]


def test_too_many_members() -> None:
    backend = next(b for b in TABLES["ensemble_stats"] if b.name == "triton")
    call = (torch.zeros(1, 1025, 2, device=DEVICE), None, 15, IGNORE, True)
    assert backend.why_not(*call) == "an ensemble of 1025 members, more than 1024"

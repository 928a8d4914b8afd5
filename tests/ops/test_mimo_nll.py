"""Cross-entropy of slots: loss and gradient against the definition and torch, bits, transforms, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastseq import functional, reference
from fastseq.ops.mimo import BACKENDS as MIMO
from tests.ops import mimo_rows as rows
from tests.ops.mimo_rows import IGNORE, Case
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

OPS = torch.ops.fastseq
OUTPUTS = "loss nll top logsum"
SMOOTHINGS = (0.0, 0.1, 1.0)
needs_compiled = rows.needs_compiled("mimo_nll")
NO_GATHER = MIMO["mimo_gather"][0].why_not(torch.zeros(1))


def upstream(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dloss and dnll, of the dtype that losses have."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    generator = torch.Generator().manual_seed(43)
    draw = torch.randn(case.N * case.M + 1, generator=generator, dtype=torch.float64).to(wide)
    return draw[0], draw[1:].view(case.N, case.M)


def gradient(dloss: Tensor | None, dnll: Tensor | None, x: Tensor, *rest: Any) -> Tensor:
    labels, *options = rest
    return reference.mimo_nll_backward(dloss, dnll, x, labels, *reference.softmax_sums(x), *options)


def finite(values: Any) -> tuple[Tensor, ...]:
    return tuple(torch.where(v.isfinite(), v, 0) for v in values)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@rows.each_case
@rows.each_backend("mimo_nll")
def test_forward(backend: str, dtype: torch.dtype, case: Case, smoothing: float) -> None:
    args = (rows.logits(case, dtype), rows.labels(case), smoothing, IGNORE)
    assert_within_budget(OUTPUTS, rows.run("mimo_nll", backend, *args), reference.mimo_nll, args)


@pytest.mark.parametrize("given", ["loss", "nll", "loss nll"])
@pytest.mark.parametrize("smoothing", SMOOTHINGS[:2])
@rows.each_case
@rows.each_backend("mimo_nll_backward")
def test_backward(backend: str, dtype: torch.dtype, case: Case, smoothing: float, given: str) -> None:
    x, labels = rows.logits(case, dtype), rows.labels(case)
    both = zip(("loss", "nll"), upstream(case, dtype), strict=True)
    dloss, dnll = (d if name in given.split() else None for name, d in both)
    sums = reference.softmax_sums(x.to(torch.float32 if dtype.itemsize == 2 else dtype))
    found = rows.run("mimo_nll_backward", backend, dloss, dnll, x, labels, *sums, smoothing, IGNORE)
    assert found.dtype == dtype
    assert_within_budget("dlogits", found, gradient, (dloss, dnll, x, labels, smoothing, IGNORE), GRADIENTS)


@pytest.mark.parametrize("label", [2, 8])
@pytest.mark.parametrize("smoothing", SMOOTHINGS[:2])
@rows.each_backend("mimo_nll")
def test_what_is_not_finite(backend: str, dtype: torch.dtype, smoothing: float, label: int) -> None:
    """NaN and infinities come out where the definition has them, and the slot beside them is as it would be alone."""
    x = rows.strange(dtype)[: 6 if smoothing else 8]  # a mean of the lowest numbers is infinite in any narrow type
    labels = torch.full(x.shape[:2], label)
    args = (x, labels, smoothing, IGNORE)
    wide = (x.to(torch.float32 if dtype.itemsize == 2 else dtype), *args[1:])
    out, expected = rows.run("mimo_nll", backend, *args), reference.mimo_nll(*wide)
    rows.finite_where_finite(OUTPUTS, out, expected)
    assert_within_budget(OUTPUTS, finite(out), lambda *a: finite(reference.mimo_nll(*a)), args)
    d = rows.run("mimo_nll_backward", backend, torch.ones(()).to(out[0].dtype), None, x, labels, *out[2:], *args[2:])
    ones = (torch.ones(()).to(out[0].dtype), None, *wide)
    rows.finite_where_finite("dlogits", [d], [gradient(*ones)])
    assert_within_budget("dlogits", finite([d]), lambda *a: finite([gradient(*a)]), (*ones[:2], *args), GRADIENTS)


@pytest.mark.parametrize("smoothing", SMOOTHINGS[:2])
@rows.each_backend("mimo_nll")
def test_logits_that_are_large(backend: str, dtype: torch.dtype, smoothing: float) -> None:
    """As good as torch's cross-entropy: no digit of the distances between logits is lost."""
    x = torch.tensor([[100.0, 90, 80], [3e4, 29_999, 29_968], [-3e4, -3e4, -3e4]], dtype=torch.float64)
    x, labels = x.to(dtype)[:, None], torch.zeros(3, 1, dtype=torch.int64)
    out = rows.run("mimo_nll", backend, x, labels, smoothing, IGNORE)
    exact = cross_entropy(x[:, 0].double(), labels[:, 0], reduction="none", label_smoothing=smoothing)
    dloss = torch.ones((), dtype=out[0].dtype)
    eps = torch.finfo(dloss.dtype).eps  # of a sum of exponentials, which is at least 1
    torch.testing.assert_close(out[1][:, 0].double(), exact, rtol=4 * eps, atol=eps)
    d = rows.run("mimo_nll_backward", backend, dloss, None, x.to(dloss.dtype), labels, *out[2:], smoothing, IGNORE)
    torch.testing.assert_close(d.sum(2), torch.zeros_like(d[:, :, 0]), rtol=0, atol=2 * eps)


@rows.each_backend("mimo_nll_backward")
def test_an_ignored_row(backend: str, dtype: torch.dtype) -> None:
    """It has no gradient, whatever its logits are."""
    x, labels = rows.strange(dtype), torch.full((8, 2), IGNORE)
    labels[:, 0] = 1
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    sums = reference.softmax_sums(x.to(wide))
    d = rows.run("mimo_nll_backward", backend, torch.ones((), dtype=wide), None, x, labels, *sums, 0.1, IGNORE)
    assert not d[:, 1].any() and d[:, 0].isfinite().all() and d[:, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_definition(dtype: torch.dtype) -> None:
    """The loss is the sum over slots of each slot's mean, and the gradient is the one of autograd."""
    case = Case(9, 3, 5, 0.3)
    x, labels = rows.logits(case, dtype), rows.labels(case)
    slots = [cross_entropy(x[:, m], labels[:, m], ignore_index=IGNORE, label_smoothing=0.2) for m in range(3)]
    loss = reference.mimo_nll(x, labels, 0.2, IGNORE)[0]
    assert_within_budget("loss", loss, lambda: sum(s.to(dtype) for s in slots), ())
    x64 = rows.logits(case, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.mimo_nll(x, labels[:3], 0.2, IGNORE)[:2], (x64[:3],))
    dloss, dnll = upstream(case, torch.float64)
    (by_torch,) = torch.autograd.grad(reference.mimo_nll(x64, labels, 0.2, IGNORE)[:2], x64, (dloss, dnll))
    args = (dloss, dnll, x64.detach(), labels, 0.2, IGNORE)
    assert_within_budget("dlogits", by_torch, gradient, args, GRADIENTS)


@needs_compiled
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction: str, smoothing: float) -> None:
    """One slot is torch's cross-entropy, ignored labels and smoothing too, and so is its gradient."""
    case = Case(20, 1, 11, 0.3)
    x, labels = rows.logits(case), rows.labels(case)
    options: dict[str, Any] = dict(reduction=reduction, ignore_index=IGNORE, label_smoothing=smoothing)

    def both(call: Callable[..., Tensor], shape: tuple[int, ...]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            loss = call(x.view(*shape, 11), labels.view(shape), **options)
            (d,) = torch.autograd.grad(loss.square().sum(), x)
            return loss.flatten(), d

        return run

    got = both(functional.mimo_nll, (20, 1))(x)
    assert_within_budget("loss dlogits", got, both(cross_entropy, (20,)), (x,), GRADIENTS)


@needs_compiled
def test_all_slots_together() -> None:
    """Without ignored labels M times the mean over everything, as other libraries have it."""
    case = Case(12, 4, 9)
    x, labels = rows.logits(case), rows.labels(case)
    assert_within_budget(
        "loss", functional.mimo_nll(x, labels), lambda x: 4 * cross_entropy(x.flatten(0, 1), labels.flatten()), (x,)
    )


@needs_compiled
def test_layouts() -> None:
    """Leading dimensions, strides, narrow labels and labels of the examples give what plain calls give."""
    case = Case(6, 3, 10, 0.2)
    x, labels = rows.logits(case), rows.labels(case)
    options: dict[str, Any] = dict(ignore_index=IGNORE, reduction="none")
    plain = functional.mimo_nll(x, labels, **options)
    assert_same_bits(
        "leading", functional.mimo_nll(x.view(2, 3, 3, 10), labels.view(2, 3, 3), **options).flatten(0, 1), plain
    )
    assert_same_bits("one_row", functional.mimo_nll(x[0], labels[0], **options), plain[0])
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert_same_bits("strided", functional.mimo_nll(strided, labels.T.contiguous().T, **options), plain)
    assert_same_bits("int32", functional.mimo_nll(x, labels.int(), **options), plain)
    for dtype in rows.LOW:
        low = x.to(dtype).requires_grad_()
        loss = functional.mimo_nll(low, labels, ignore_index=IGNORE)
        assert_same_bits(str(dtype), loss, functional.mimo_nll(low.float(), labels, ignore_index=IGNORE))
        loss.backward()
        assert low.grad is not None and low.grad.dtype == dtype


@needs_compiled
@pytest.mark.skipif(bool(NO_GATHER), reason=f"mimo_gather: {NO_GATHER}")
def test_labels_of_examples() -> None:
    x, examples = rows.logits(Case(6, 3, 10)), torch.tensor([4, IGNORE, 9])
    index = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 1, 0, 2, 1, 0], [1, 1, 0, 0, 2, 2]])
    got = functional.mimo_nll(x, examples, index, ignore_index=IGNORE)
    assert_same_bits("loss", got, functional.mimo_nll(x, examples[index.T], ignore_index=IGNORE))


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [Case(300, 3, 101, 0.2), Case(5, 7, 4099), Case(4000, 5, 2, 0.5)], ids=str)
def test_bits(case: Case, dtype: torch.dtype) -> None:
    """The same for any number of threads, for a row alone, again, and through numpy."""
    x, labels, (dloss, dnll) = rows.logits(case, dtype), rows.labels(case), upstream(case, dtype)
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        out = OPS.mimo_nll(x, labels, 0.1, IGNORE)
        found.append((*out, OPS.mimo_nll_backward(dloss, dnll, x, labels, *out[2:], 0.1, IGNORE)))
    for other in found[1:]:
        assert_same_bits(f"{OUTPUTS} dlogits", other, found[0])
    alone = OPS.mimo_nll(x[1:2], labels[1:2], 0.1, IGNORE)
    assert_same_bits(OUTPUTS[5:], alone[1:], [v[1:2] for v in found[0][1:4]])
    d = OPS.mimo_nll_backward(None, dnll, x, labels, *found[0][2:4], 0.1, IGNORE)
    one = OPS.mimo_nll_backward(None, dnll[1:2], x[1:2], labels[1:2], *alone[2:], 0.1, IGNORE)
    assert_same_bits("dlogits", one, d[1:2])
    core, (n, k, dl, dn) = rows.numpy_door(), (v.numpy() for v in (x, labels, dloss, dnll))
    for threads in (1, 3):
        by_numpy = core.mimo_nll(n, k, 0.1, IGNORE, threads=threads)
        d_numpy = core.mimo_nll_backward(dl, dn, n, k, *by_numpy[2:], 0.1, IGNORE, threads=threads)
        assert_same_bits(f"{OUTPUTS} dlogits", (*by_numpy, d_numpy), found[0])


CALLS: dict[str, tuple[Any, ...]] = {
    "mimo_nll": (rows.logits(Case(5, 3, 7)), rows.labels(Case(5, 3, 7, 0.2)), 0.1, IGNORE),
    "mimo_nll no_rows": (rows.logits(Case(0, 3, 7)), rows.labels(Case(0, 3, 7)), 0.0, IGNORE),
    "mimo_nll_backward": (
        torch.ones(()),
        torch.ones(5, 3),
        *(rows.logits(Case(5, 3, 7)), rows.labels(Case(5, 3, 7)), torch.ones(5, 3), torch.ones(5, 3), 0.0, IGNORE),
    ),
    "mimo_nll_backward some": (
        None,
        torch.ones(5, 3),
        *(rows.logits(Case(5, 3, 7)), rows.labels(Case(5, 3, 7)), torch.ones(5, 3), torch.ones(5, 3), 0.0, IGNORE),
    ),
}


@needs_compiled
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    found = torch.library.opcheck(getattr(OPS, name.split()[0]).default, CALLS[name])
    assert set(found.values()) == {"SUCCESS"}


@needs_compiled
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction: str) -> None:
    case = Case(5, 3, 7, 0.2)
    labels = rows.labels(case)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        loss = functional.mimo_nll(x, labels, reduction=reduction, ignore_index=IGNORE, label_smoothing=0.1)
        return loss, torch.autograd.grad(loss.sum(), x)[0]

    x = rows.logits(case).requires_grad_()
    torch._dynamo.reset()
    loss = torch.compile(
        lambda x: functional.mimo_nll(x, labels, reduction=reduction, ignore_index=IGNORE, label_smoothing=0.1),
        fullgraph=True,
        backend="aot_eager",
    )(x)
    assert_same_bits("loss dlogits", (loss, torch.autograd.grad(loss.sum(), x)[0]), run(x))


@needs_compiled
def test_export() -> None:
    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return functional.mimo_nll(x, labels)

    rows_of = torch.export.Dim("N", min=2)
    made = torch.export.export(
        Loss(), (rows.logits(Case(5, 3, 7)), rows.labels(Case(5, 3, 7))), dynamic_shapes=({0: rows_of}, {0: rows_of})
    )
    x, labels = rows.logits(Case(9, 3, 7)), rows.labels(Case(9, 3, 7))
    assert_same_bits("loss", made.module()(x, labels), functional.mimo_nll(x, labels))


@needs_compiled
def test_func() -> None:
    """grad, vmap and vmap over grad; forward mode is refused."""
    case = Case(4, 3, 7)
    x, labels = torch.stack([rows.logits(case, seed=n) for n in range(3)]), rows.labels(case)
    by_hand = [torch.func.grad(functional.mimo_nll)(one, labels) for one in x]
    assert_same_bits(
        "loss",
        torch.func.vmap(functional.mimo_nll, (0, None))(x, labels),
        torch.stack([functional.mimo_nll(one, labels) for one in x]),
    )
    mapped = torch.func.vmap(torch.func.grad(functional.mimo_nll), (0, None))(x, labels)
    assert_same_bits("dlogits", mapped, torch.stack(by_hand))
    with pytest.raises(NotImplementedError, match="mimo_nll: forward-mode differentiation"):
        torch.func.jvp(lambda x: functional.mimo_nll(x, labels), (x[0],), (x[0],))


@needs_compiled
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(reduction: str) -> None:
    x, labels = rows.logits(Case(3, 2, 4), torch.float64).requires_grad_(), rows.labels(Case(3, 2, 4, 0.3))
    options: dict[str, Any] = dict(reduction=reduction, ignore_index=IGNORE, label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda x: functional.mimo_nll(x, labels, **options), (x,))
    assert torch.autograd.gradgradcheck(lambda x: functional.mimo_nll(x, labels, **options), (x,))


X, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (lambda: functional.mimo_nll(X[0, 0], Y), r"logits must be \[..., M, K\] with K >= 1, got \[5\]"),
    "no_classes": (
        lambda: functional.mimo_nll(X[..., :0], Y),
        r"logits must be \[..., M, K\] with K >= 1, got \[2, 3, 0\]",
    ),
    "dtype": (
        lambda: functional.mimo_nll(X.int(), Y),
        "logits must be float32, float64, bfloat16 or float16, got torch.int32",
    ),
    "reduction": (
        lambda: functional.mimo_nll(X, Y, reduction="max"),
        "reduction must be one of 'mean', 'sum', 'none', got 'max'",
    ),
    "smoothing": (
        lambda: functional.mimo_nll(X, Y, label_smoothing=1.5),
        r"label_smoothing must be a number in \[0, 1\], got 1.5",
    ),
    "index": (
        lambda: functional.mimo_nll(X, Y, Y),
        r"index must be beside logits \[N, M, K\] and labels \[B\], got logits \[2, 3, 5\] and labels \[2, 3\]",
    ),
    "labels": (lambda: functional.mimo_nll(X, Y[0]), r"labels must be \[..., M\] = \[2, 3\], got \[3\]"),
    "labels_dtype": (lambda: functional.mimo_nll(X, Y.float()), "labels must be integers, got torch.float32"),
    "labels_bool": (lambda: functional.mimo_nll(X, Y.bool()), "labels must be integers, got torch.bool"),
    "device": (lambda: functional.mimo_nll(X.to("meta"), Y), "labels must be on meta, got one on cpu"),
    "range": (
        lambda: functional.mimo_nll(X, Y.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(5))),
        r"labels must lie in 0 .. K - 1 = 4 or be ignore = -100, got 5 at \[1, 2\]",
    ),
    "range_leading": (
        lambda: functional.mimo_nll(X, Y - 1, ignore_index=-2),
        r"labels must lie in 0 .. K - 1 = 4 or be ignore = -2, got -1 at \[0, 0\]",
    ),
}


@needs_compiled
@pytest.mark.parametrize("call, says", WRONG.values(), ids=WRONG.keys())
def test_wrong_argument(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"mimo_nll: {says}"):
        call()


F2 = torch.zeros(2, 3)
RAW: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "rank": ("mimo_nll", (X[0], Y, 0.0, -1), r"logits must be \[N, M, K\], got \[3, 5\]"),
    "dtype": ("mimo_nll", (X.int(), Y, 0.0, -1), "logits must be float32 or float64, got int32"),
    "stride": ("mimo_nll", (X.mT, Y, 0.0, -1), "logits must be contiguous"),
    "no_classes": ("mimo_nll", (X[..., :0].contiguous(), Y, 0.0, -1), "logits must have K of at least 1"),
    "labels": ("mimo_nll", (X, Y[0], 0.0, -1), r"labels must be \[N, M\] = \[2, 3\], got \[3\]"),
    "labels_dtype": ("mimo_nll", (X, Y.int(), 0.0, -1), "labels must be int64, got int32"),
    "smoothing": ("mimo_nll", (X, Y, 1.5, -1), "smoothing must lie in 0 .. 1, got 1.5"),
    "smoothing_nan": ("mimo_nll", (X, Y, float("nan"), -1), "smoothing must lie in 0 .. 1, got -?nan"),
    "range": ("mimo_nll", (X, Y + 5, 0.0, -1), r"labels must lie in 0 .. K - 1 = 4 .* got 5 at \[0, 0\]"),
    "negative": ("mimo_nll", (X, Y - 2, 0.0, -1), "labels must lie in 0 .. K - 1 = 4 .* got -2 at"),
    "top": ("mimo_nll_backward", (None, F2, X, Y, F2[0], F2, 0.0, -1), r"top must be \[N, M\] = \[2, 3\], got \[3\]"),
    "logsum": (
        "mimo_nll_backward",
        (None, F2, X, Y, F2, F2.double(), 0.0, -1),
        "logsum must be float32, got float64",
    ),
    "dloss": ("mimo_nll_backward", (F2, None, X, Y, F2, F2, 0.0, -1), r"dloss must be \[\] = \[\], got \[2, 3\]"),
    "dnll": ("mimo_nll_backward", (None, F2[0], X, Y, F2, F2, 0.0, -1), r"dnll must be \[N, M\] = \[2, 3\], got \[3\]"),
    "backward_range": ("mimo_nll_backward", (None, F2, X, Y + 5, F2, F2, 0.0, -1), "labels must lie in .* got 5"),
}


@needs_compiled
@pytest.mark.parametrize("door", ["torch", "numpy"])
@pytest.mark.parametrize("op, call, says", RAW.values(), ids=RAW.keys())
def test_wrong_argument_of_the_operator(op: str, call: tuple[Any, ...], says: str, door: str) -> None:
    given = [v.numpy() if door == "numpy" and isinstance(v, Tensor) else v for v in call]
    with pytest.raises(ValueError, match=f"{op}: {says}"):
        getattr(OPS if door == "torch" else rows.numpy_door(), op)(*given)

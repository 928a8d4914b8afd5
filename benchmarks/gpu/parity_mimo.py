"""What the parity calls of MIMO and of ensembles, most important first."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.parity import Check, Kernels
from fastseq import reference
from tests.ops import mimo_triton_cases as cases
from tests.tolerance import GRADIENTS

IGNORE = cases.IGNORE
# A, B, S, C, M, N, G
ROWS = {
    "usual": (20, 32, 1, 64, 3, 128, 256),
    "batch first": (1, 17, 33, 24, 2, 70, 37),
    "wide": (2, 9, 3, 530, 4, 13, 1025),
    "one": (1, 1, 1, 1, 1, 1, 1),
}
# N or B, M, K
CLASSES = {"usual": (300, 3, 10), "many": (9, 4, 10001), "some": (70, 2, 100), "rows": (3000, 3, 17), "one": (1, 1, 1)}
DRY = "one"


def same(name: str, got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype and torch.equal(got, expected), f"{name}: not the definition's"


def gather(kernels: Kernels, name: str) -> None:
    x, _, _, index = cases.layer(ROWS[name], kernels.torch_dtype)
    labels = cases.whole(9, x.shape[1], 2)
    out, taken = kernels.call("mimo", "mimo_gather", [x, index, labels])
    same("out", out, reference.mimo_gather(x, index))
    same("labels", taken, labels[index.long()].transpose(0, 1))


def combine(kernels: Kernels, name: str) -> None:
    A, B, S, _, M, _, G = ROWS[name]
    _, _, bias, index = cases.layer(ROWS[name], kernels.torch_dtype)
    given = [cases.normal(A, B, S, M * G, dtype=kernels.torch_dtype), index, bias]
    kernels.within_budget("out", kernels.call("mimo", "mimo_combine", given), reference.mimo_combine, given)


def adjoint(kernels: Kernels, name: str, op: str) -> None:
    A, B, S, C, M, N, G = ROWS[name]
    index = cases.layer(ROWS[name], kernels.torch_dtype)[3]
    d = cases.normal(A, N, S, M * C if op == "mimo_gather_backward" else G, dtype=kernels.torch_dtype)
    given = [d, index, B]
    kernels.within_budget("d", kernels.call("mimo", op, given), getattr(reference, op), given, GRADIENTS)


def project(kernels: Kernels, name: str) -> None:
    given = list(cases.layer(ROWS[name], kernels.torch_dtype))
    kernels.within_budget("out", kernels.call("mimo", "mimo_project", given), reference.mimo_project, given)


def project_backward(kernels: Kernels, name: str) -> None:
    A, _, S, _, _, N, G = ROWS[name]
    x, weight, _, index = cases.layer(ROWS[name], kernels.torch_dtype)
    given = [cases.normal(A, N, S, G, seed=4, dtype=kernels.torch_dtype), x, weight, index]
    got = kernels.call("mimo", "mimo_project_backward", [*given, True, True, True])
    kernels.within_budget("dx dweight dbias", got, reference.mimo_project_backward, given, GRADIENTS)


def nll(kernels: Kernels, name: str, smoothing: float) -> None:
    logits, labels = cases.loss_inputs(CLASSES[name], kernels.torch_dtype)
    rest = [labels, smoothing, IGNORE]
    got = kernels.call("mimo_nll", "mimo_nll", [logits, *rest])
    Kernels(kernels.context, "float32").within_budget(cases.LOSSES, got, reference.mimo_nll, [logits.float(), *rest])


def nll_backward(kernels: Kernels, name: str, smoothing: float) -> None:
    logits, labels = cases.loss_inputs(CLASSES[name], kernels.torch_dtype)
    grads = [cases.normal(1).squeeze(), cases.normal(*labels.shape, seed=2)]
    for kept in (grads, [grads[0], None], [None, grads[1]]):
        given = [*kept, logits, labels, *reference.softmax_sums(logits.float()), smoothing, IGNORE]
        got = kernels.call("mimo_nll", "mimo_nll_backward", given)
        kernels.within_budget("dlogits", got, reference.mimo_nll_backward, given, GRADIENTS)


def stats(kernels: Kernels, name: str, labelled: bool) -> None:
    logits, labels = cases.ensemble(CLASSES[name], kernels.torch_dtype)
    given: list[Any] = [logits, labels if labelled else None, 15, IGNORE]
    found = kernels.call("ensemble_stats", "ensemble_stats", [*given, True])
    wide = [logits.float(), *given[1:]]
    got = [found[n] for n in cases.PLACES]
    Kernels(kernels.context, "float32").within_budget(cases.FIGURES, got, cases.figures, wide)
    expected = reference.ensemble_stats(*wide)
    for place, result in ((1, "prediction"), (3, "members")):
        same(result, found[place], expected[place])
    sums = cases.over_rows(found, given[1], logits.shape[2], 15, IGNORE)
    for result, one, other in zip(("histogram", "totals"), found[7:], sums, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max().clamp_min(1), f"{result}: not the sum of the rows"


def checks(kernels: Kernels) -> Iterator[Check]:
    dry = kernels.context.dry
    for name in (DRY,) if dry else ROWS:
        for op, run in (
            ("mimo_project", project),
            ("mimo_project_backward", project_backward),
            ("mimo_gather", gather),
            ("mimo_combine", combine),
        ):
            yield Check("mimo", op, name, functools.partial(run, kernels, name))
        for op in ("mimo_gather_backward", "mimo_combine_backward"):
            yield Check("mimo", op, name, functools.partial(adjoint, kernels, name, op))
    for name in (DRY,) if dry else CLASSES:
        for smoothing in (0.0, 0.1):
            for op, loss in (("mimo_nll", nll), ("mimo_nll_backward", nll_backward)):
                yield Check("mimo_nll", op, f"{name} {smoothing}", functools.partial(loss, kernels, name, smoothing))
        for labelled in (True, False):
            call = functools.partial(stats, kernels, name, labelled)
            yield Check("ensemble_stats", "ensemble_stats", f"{name} {labelled}", call)

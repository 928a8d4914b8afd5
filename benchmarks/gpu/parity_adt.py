"""What the parity calls of ADT, most important first."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks.gpu.parity import Check, Kernels, definition
from fastseq.ops.adt import BACKENDS
from tests.ops.adt_cases import CASES, LIMITS, STEP, Case, inputs
from tests.tolerance import GRADIENTS

# besides those of the tests: many rows of few numbers, and few rows of many
LARGE = {"rows": Case(5, 3000, 3), "images": Case(5, 64, 784, True), "sequences": Case(5, 16, 8192)}
DRY = "few"


def noise(kernels: Kernels, case: Case) -> None:
    given = inputs(case)
    args = [given.mu, given.seed, case.S, STEP]
    kernels.within_budget("noise", kernels.call("adt", "adt_noise", args), definition("adt_noise", BACKENDS), args)


def sample(kernels: Kernels, case: Case, limits: str) -> None:
    args = [*inputs(case, kernels.torch_dtype).state, case.S, STEP, *LIMITS[limits]]
    kernels.within_budget("moved", kernels.call("adt", "adt_sample", args), definition("adt_sample", BACKENDS), args)


def backward(kernels: Kernels, case: Case, limits: str) -> None:
    args = [*inputs(case, kernels.torch_dtype).gradient, STEP, *LIMITS[limits]]
    wide = Kernels(kernels.context, "float32")
    got = kernels.call("adt", "adt_backward", args)
    wide.within_budget("d", got, definition("adt_backward", BACKENDS), args, GRADIENTS)


def ascend(kernels: Kernels, case: Case, limits: str) -> None:
    """Along the gradient that ``adt_backward`` finds, whose signs are not those of the definition where it is 0."""
    given = inputs(case, kernels.torch_dtype)
    (d,) = kernels.call("adt", "adt_backward", [*given.gradient, STEP, *LIMITS[limits]])
    wide, before = Kernels(kernels.context, "float32"), torch.stack((given.mu, given.rho))
    for totals in (None, given.totals):
        got = kernels.call("adt", "adt_ascend", [*given.gradient, totals, STEP, 0.3, *LIMITS[limits]])
        if totals is None:
            wide.within_budget("up", [torch.stack(got[:2])], lambda v, d: v + 0.3 * d.sign(), [before, d])
            continue
        wide.within_budget("totals", [got[2]], lambda t, d: t + d, [totals, d])
        moved = [before, got[2]]
        wide.within_budget("up", [torch.stack(got[:2])], lambda v, t: v + 0.3 * t / (t.abs() + 1e-8), moved)


def checks(kernels: Kernels) -> Iterator[Check]:
    cases = {DRY: CASES[DRY]} if kernels.context.dry else {**LARGE, **CASES}
    for name, case in cases.items():
        if kernels.dtype == "float32":
            yield Check("adt", "adt_noise", name, functools.partial(noise, kernels, case))
        for limits in LIMITS:
            for op, run in (("adt_sample", sample), ("adt_backward", backward), ("adt_ascend", ascend)):
                yield Check("adt", op, f"{name} {limits}", functools.partial(run, kernels, case, limits))

"""Few rows through one codebook or a stack of them, as a streaming codec looks them up: in one launch, by Triton's
kernels, and as it is written without any."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import providers
from benchmarks.gpu.part import Context, Row, Unit

SECONDS = 0.5  # of the rounds of one case
LABELS = (providers.CUDA, "fastseq triton", "expanded float32")


class Case(NamedTuple):
    """N rows, K codes, D dimensions, M levels; float32."""

    N: int
    K: int
    D: int
    M: int

    @property
    def name(self) -> str:
        return "_".join(f"{name}{size}" for name, size in self._asdict().items())


CASES = [Case(N, 1024, D, M) for D, M in ((64, 1), (128, 8)) for N in (64, 1, 16)]
DRY = [Case(2, 20, 4, 2)]


class Inputs(NamedTuple):
    x: Tensor
    codebooks: list[Tensor]
    defined: Tensor  # index [N, M]


def drawn(case: Case, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Rows, and codes of each level that are as long as what is left."""
    generator = torch.Generator(device).manual_seed(0)
    books = [torch.randn(case.K, case.D, device=device, generator=generator) / 2**m for m in range(case.M)]
    return torch.randn(case.N, case.D, device=device, generator=generator), books


@functools.lru_cache(maxsize=1)
def inputs(case: Case, device: torch.device) -> Inputs:
    from fastseq import reference

    x, books = drawn(case, device)
    return Inputs(x, books, reference.vq_residual(x, books)[1])


def _fastseq(given: Inputs) -> Tensor:
    from fastseq import functional

    if len(given.codebooks) == 1:
        return functional.vq_nearest(given.x, given.codebooks[0]).index[:, None]
    return functional.vq_residual(given.x, given.codebooks).index


def _expanded(given: Inputs) -> Tensor:
    rest, found = given.x, []
    for codes in given.codebooks:
        index = (codes.square().sum(1) / 2 - rest @ codes.mT).argmin(1)
        rest = rest - codes[index]
        found.append(index)
    return torch.stack(found, 1)


def measure(case: Case, context: Context) -> list[Row]:
    given = inputs(case, context.device)

    def prepare(label: str) -> tuple[Callable[[], Tensor], Row]:
        call = functools.partial(_fastseq if providers.is_ours(label) else _expanded, given)
        wrong = int((call() != given.defined).sum())
        exact = "passed" if not wrong or not providers.is_ours(label) else f"index: {wrong} are not the definition's"
        return call, {"gate": exact, "wrong": wrong / given.defined.numel()}

    shared: Row = {"op": "vq_lookup", "table": "few rows", "case": case.name, "mode": "lookup", "dtype": "float32"}
    return providers.measure(context, shared, LABELS, prepare, SECONDS)


def units(context: Context) -> list[Unit]:
    cases = context.pick(CASES, DRY)
    return [Unit(f"few rows {case.name}", 3.0, functools.partial(measure, case, context)) for case in cases]


def small(device: torch.device) -> None:
    """A small call in several parts, and screens of every number of products: what compute-sanitizer looks at."""
    from fastseq.ops import vq_lookup, vq_screen

    x, books = drawn(Case(19, 70, 33, 2), device)
    vq_lookup.lookup(vq_lookup.Call(x, books, score=True), 3)
    for D in (40, 130):
        x, (codes,) = drawn(Case(300, 300, D, 1), device)
        for low, of_codes in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
            vq_screen.run(vq_lookup.Call(x[None].to(low), [codes[None].to(of_codes)], score=True))
    torch.cuda.synchronize()
    print("lookup: done", flush=True)

"""Vector quantization: who looks up and who quantizes, and what the harness asks about each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, vq_gate, vq_layers
from benchmarks.harness import CannotRun
from benchmarks.vq_case import Case, Provider, Work, inputs

NAME = "vq"
PACKAGES = ("faiss-cpu", "vector-quantize-pytorch", "wordllama")  # whose versions each row notes
PRODUCTS = ("sgemm", "square")  # no lookups, only the matrix product whose rate they are compared with
SQUARE = 2048  # the product that shows torch's best rate
SCORES = 1 << 27  # of rows by codes that the rivals which form them may hold: 512 MB
PRODUCT = 1 << 20  # of a product alone that are written before the same memory is used again


def _lookup(run: Callable[[], Any]) -> Work:
    """Of a call that returns an index for each row, as a tensor or an array of any shape."""
    return Work(run, lambda: {"index": torch.as_tensor(run()).reshape(-1, 1)})


def _fastseq(screen: bool | None, case: Case, provider: Provider, threads: int) -> Work:
    """``screen``: first in 8-bit integers; None lets the operator choose."""
    from fastseq import functional

    given = inputs(case)
    x, codebook = given.x, given.codebooks[0]
    facts = _opened(x, codebook, threads) if screen else {}
    work = _lookup(lambda: functional.vq_nearest(x, codebook, screen=screen).index)
    return work._replace(facts=facts)


def _opened(x: Tensor, codebook: Tensor, threads: int) -> dict[str, float]:
    """What the screen leaves open: the share of the rows, and panels of codes per row that are scored again."""
    from fastseq import _core

    try:
        panels, rows = _core.vq_screen_opened(x[None].numpy(), codebook[None].numpy(), threads=threads)
    except ValueError as error:
        raise CannotRun(str(error)) from None
    return {"open_rows": round(rows / len(x), 6), "open_panels": round(panels / len(x), 4)}


def _fastseq_numpy(case: Case, provider: Provider, threads: int) -> Work:
    from fastseq import _core

    given = inputs(case)
    x, codebook = given.x[None].numpy(), _core.Codebook(given.codebooks.numpy())  # prepared, as the index of faiss is
    return _lookup(lambda: codebook.nearest(x, threads=threads)[0])


def _faiss(case: Case, provider: Provider, threads: int) -> Work:
    import faiss

    faiss.omp_set_num_threads(threads)
    given = inputs(case)
    x, distance, index = given.x.numpy(), torch.empty(case.N, 1).numpy(), torch.empty(case.N, 1, dtype=int).numpy()
    flat = faiss.IndexFlatL2(case.D)
    flat.add(given.codebooks[0].numpy())
    return _lookup(lambda: flat.search(x, 1, D=distance, I=index)[1])


def _chunked(score: Callable[[Tensor, Tensor], Tensor], case: Case, provider: Provider, threads: int) -> Work:
    given = inputs(case)
    x, codebook = given.x, given.codebooks[0]
    rows = max(1, SCORES // case.K)

    def run() -> Tensor:
        found = [score(part, codebook).argmin(1) for part in x.split(rows)]
        return found[0] if len(found) == 1 else torch.cat(found)

    return _lookup(run)


def _expanded(x: Tensor, codebook: Tensor) -> Tensor:
    return codebook.square().sum(1) - 2 * x @ codebook.mT


def _sgemm(case: Case, provider: Provider, threads: int) -> Work:
    given = inputs(case)
    x, codebook = given.x, given.codebooks[0]
    rows = max(1, PRODUCT // case.K)
    out = torch.empty(min(rows, case.N), case.K)

    def run() -> None:
        for part in x.split(rows):
            torch.mm(part, codebook.mT, out=out[: len(part)])

    return Work(run, dict)


def _square(case: Case, provider: Provider, threads: int) -> Work:
    a, b, out = torch.randn(3, SQUARE, SQUARE, generator=torch.Generator().manual_seed(0))
    return Work(lambda: torch.mm(a, b, out=out), dict)


LOOKUPS: dict[str, Callable[[Case, Provider, int], Work]] = {
    "fastseq": functools.partial(_fastseq, None),
    "fastseq-plain": functools.partial(_fastseq, False),
    "fastseq-screened": functools.partial(_fastseq, True),
    "fastseq-numpy": _fastseq_numpy,
    "faiss": _faiss,
    "cdist": functools.partial(_chunked, torch.cdist),
    "expanded": functools.partial(_chunked, _expanded),
    "sgemm": _sgemm,
    "square": _square,
}
PROVIDERS = {**vq_layers.PROVIDERS, **LOOKUPS}
OURS = tuple(name for name in PROVIDERS if name.startswith("fastseq"))  # the other providers are rivals


def setup(case: Case, provider: Provider, threads: int) -> Work:
    """The callable of one provider on one case.

    Raises:
        ModuleNotFoundError: when the provider's package is not installed.
        CannotRun: when the case is not for this machine.
    """
    makers = LOOKUPS if case.mode in ("lookup", "words") else vq_layers.PROVIDERS
    return makers[provider.name](case, provider, threads)


def judge(case: Case, provider: Provider, work: Work) -> tuple[str, dict[str, Any]]:
    """The verdict of the gate, and what else is known of the outputs."""
    if provider.name in PRODUCTS:
        return "passed", {}  # there is no index that could be wrong
    got = work.outputs()
    verdict, facts = vq_gate.judge(case, provider.rotation, got)
    return verdict, {**facts, **work.facts}


def describe(provider: Provider) -> dict[str, Any]:
    """What a row says about its provider."""
    name = f"fastseq/{backend()}" if provider.name in OURS else provider.name
    return {"provider": name, "rotation": provider.rotation}


def every(case: Case, provider: Provider) -> int:
    """Slow rivals of the large cases run in every second round, which is enough to tell a factor of ten."""
    return 2 if provider.name == "vector-quantize-pytorch" and case.N * case.K > 1 << 26 else 1


def flops(case: Case, provider: Provider) -> int:
    return 2 * SQUARE**3 if provider.name == "square" else case.flops


def reads(case: Case, provider: Provider) -> harness.Reads:
    return harness.Reads(case.bytes_read, case.weight_bytes)


def backend() -> str:
    from fastseq.ops import vq

    return harness.backend("vq_nearest", vq.BACKENDS["vq_nearest"])

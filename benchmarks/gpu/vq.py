"""The nearest code on a GPU: ours, and what finds it otherwise, with the share of wrong indices beside the time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import vq_gate, vq_plain
from benchmarks.gpu import providers, rivals
from benchmarks.gpu.part import Context, Row, Unit

SECONDS = 0.8  # of the rounds of one case
SAMPLE = 256  # rows whose index is compared with that of the definition
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


class Case(NamedTuple):
    """N rows, K codes, D dimensions; dtypes of rows and codes."""

    N: int
    K: int
    D: int
    x: torch.dtype
    codebook: torch.dtype

    @property
    def name(self) -> str:
        return f"N{self.N}_K{self.K}_D{self.D}"

    @property
    def dtype(self) -> str:
        """bfloat16, or bfloat16/float32 where rows and codes differ."""
        names = [str(dtype).removeprefix("torch.") for dtype in (self.x, self.codebook)]
        return "/".join(dict.fromkeys(names))

    @property
    def flops(self) -> int:
        return 2 * self.N * self.K * self.D


LARGE, TALL, FEW, NARROW = (65536, 8192, 256), (1_000_000, 1024, 64), (64, 1024, 64), (32768, 1024, 8)
CASES = [
    Case(*LARGE, BFLOAT16, BFLOAT16),
    Case(*TALL, BFLOAT16, BFLOAT16),
    Case(*LARGE, BFLOAT16, FLOAT32),
    Case(*TALL, FLOAT32, FLOAT32),
    Case(*NARROW, FLOAT32, FLOAT32),
    Case(*FEW, BFLOAT16, BFLOAT16),
    Case(*LARGE, FLOAT32, FLOAT32),
    Case(*TALL, BFLOAT16, FLOAT32),
    Case(*FEW, FLOAT32, FLOAT32),
    Case(*NARROW, BFLOAT16, BFLOAT16),
]
DRY = [Case(300, 16, 8, FLOAT32, FLOAT32)]


class Inputs(NamedTuple):
    """The same numbers for every provider: rows [N, D], codes [K, D], and the nearest of them in float64."""

    x: Tensor
    codebook: Tensor
    nearest: vq_gate.Nearest
    defined: Tensor  # index of the first rows by the definition


@functools.lru_cache(maxsize=1)
def inputs(case: Case, device: torch.device) -> Inputs:
    """Normal rows with a mean, and the means of others that are nearest to K of them, so that codes lie as trained."""
    from fastseq import reference

    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.N, case.D, device=device, generator=generator) + 1
    learn = torch.randn(4 * case.K, case.D, device=device, generator=generator) + 1
    index = vq_plain.nearest(learn, learn[: case.K])
    counts = torch.bincount(index, minlength=case.K).clamp_min(1)
    order = torch.argsort(index, stable=True)  # sums in one order: the same codes in every run
    ends = counts.cumsum(0)
    sums = learn[order].double().cumsum(0)[ends - 1].diff(dim=0, prepend=learn.new_zeros(1, case.D).double())
    x, codebook = x.to(case.x), (sums / counts[:, None]).to(case.codebook)
    near = vq_gate.nearest(x.double(), x.float(), codebook.float())
    defined = reference.vq_nearest(x[None, :SAMPLE].float(), codebook[None].float())[0, :, 0]
    return Inputs(x, codebook, near, defined)


def judge(case: Case, given: Inputs, index: Any) -> Row:
    """The verdict; wrong: share of the rows whose index is not that of float64; undefined: rows of the first SAMPLE
    whose index is not that of the definition, to the last tie."""
    if index.shape != (case.N,) or not bool(((index >= 0) & (index < case.K)).all()):
        return {"gate": f"index: {list(index.shape)} in {int(index.min())}..{int(index.max())}"}
    index, near = index.long(), given.nearest
    facts: Row = {
        "wrong": float(f"{(index != near.index).double().mean():.3g}"),
        "undefined": int((index[: len(given.defined)] != given.defined).sum()),
    }
    excess = 0.0
    for part in torch.arange(case.N, device=index.device).split(1 << 18):
        codes, rows = given.codebook[index[part]].double(), given.x[part].double()
        scores = codes.square().sum(1) / 2 - (rows * codes).sum(1)
        excess = max(excess, float((scores - near.score[part]).max()))
    verdict = "passed" if excess <= near.budget else f"index: excess {excess:.1e}, budget {near.budget:.1e}"
    return {"gate": verdict, "error": float(f"{excess:.3g}"), **facts}


def _fastseq(case: Case, given: Inputs, screen: bool | None = None) -> Callable[[], Tensor]:
    from fastseq import functional

    return lambda: functional.vq_nearest(given.x, given.codebook, screen=screen).index


def _expanded(dtype: torch.dtype, tf32: bool, compiled: bool, case: Case, given: Inputs) -> Callable[[], Tensor]:
    """Scores of all rows and codes, then the smallest: what is written without a kernel."""
    x, codebook = given.x.to(dtype), given.codebook.to(dtype)

    def scores(x: Tensor, codebook: Tensor) -> Tensor:
        half = codebook.float().square().sum(1) / 2
        return (half - (x @ codebook.mT).float()).argmin(1)

    call = torch.compile(scores, dynamic=False) if compiled else scores

    def run() -> Tensor:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return call(x, codebook)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return run


def _cdist(case: Case, given: Inputs) -> Callable[[], Tensor]:
    x, codebook = given.x.float(), given.codebook.float()
    return lambda: torch.cdist(x, codebook).argmin(1)


def _library(make: Callable[[Tensor, Tensor], Callable[[], Tensor]], case: Case, given: Inputs) -> Any:
    return make(given.x, given.codebook)


PROVIDERS: dict[str, Callable[[Case, Inputs], Callable[[], Tensor]]] = {
    "fastseq": _fastseq,
    providers.CUDA: functools.partial(_fastseq, screen=True),
    "fastseq plain": functools.partial(_fastseq, screen=False),
    "expanded bfloat16": functools.partial(_expanded, BFLOAT16, False, False),
    "expanded tf32": functools.partial(_expanded, FLOAT32, True, False),
    "expanded float32": functools.partial(_expanded, FLOAT32, False, False),
    "cdist": _cdist,
    "expanded bfloat16 compiled": functools.partial(_expanded, BFLOAT16, False, True),
    "expanded tf32 compiled": functools.partial(_expanded, FLOAT32, True, True),
    "flash-kmeans": functools.partial(_library, rivals.flash_kmeans),
    "cuVS": functools.partial(_library, rivals.cuvs),
}


def measure(case: Case, context: Context, labels: tuple[str, ...]) -> list[Row]:
    given = inputs(case, context.device)

    def prepare(label: str) -> tuple[providers.Call, Row]:
        call = PROVIDERS[label](case, given)
        return call, judge(case, given, call())

    shared: Row = {"op": "vq", "table": "vq", "case": case.name, "mode": "lookup", "cold": True, "dtype": case.dtype}
    rows = providers.measure(context, shared, labels, prepare, SECONDS, cold=True)
    for row in rows:
        if "ms" in row:
            row["tflops"] = float(f"{case.flops / row['ms'] / 1e9:.4g}")
    return rows


def units(context: Context) -> list[Unit]:
    dry = ("fastseq", providers.CUDA, "expanded float32", "cdist", "flash-kmeans")
    labels = dry if context.dry else tuple(PROVIDERS)
    found = []
    for n, case in enumerate(context.pick(CASES, DRY)):
        # one compilation of the rivals is enough to see what it brings
        own = labels if n < 2 or context.dry else tuple(label for label in labels if "compiled" not in label)
        call = functools.partial(measure, case, context, own)
        found.append(Unit(f"{case.name} {case.dtype}", 20.0 if n < 2 else 7.0, call))
    return found

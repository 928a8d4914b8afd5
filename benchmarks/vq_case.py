"""What vector quantization is measured on: cases, their numbers, and what a provider makes of one."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import vq_plain
from benchmarks.harness import CannotRun

WIDTH = 128  # of the rows in front of the projection of a residual quantizer
LEARNED_FROM = 32768  # most rows that a random codebook is the means of
WORDS_D = 256  # of the word embeddings
ITERATIONS = 10  # of k-means on them


class Case(NamedTuple):
    """N rows, K codes, D dimensions, M levels (above one: a residual quantizer behind a projection from WIDTH to D).

    mode: "lookup" (the index alone), "words" (the same for word embeddings), "eval" (a layer without gradients),
    "train" (forward, backward and moving averages).
    """

    N: int
    K: int
    D: int
    M: int
    mode: str

    @property
    def name(self) -> str:
        return f"N{self.N}_K{self.K}_D{self.D}" + (f"_M{self.M}" if self.M > 1 else "")

    @classmethod
    def parse(cls, name: str, mode: str) -> Case:
        """The case of a name such as N4096_K512_D64 or N4096_K1024_D8_M8."""
        found = re.fullmatch(r"N([1-9]\d*)_K([1-9]\d*)_D([1-9]\d*)(?:_M([1-9]\d*))?", name)
        if found is None:
            raise ValueError(f"case must look like N4096_K512_D64 or N4096_K1024_D8_M8, got {name}")
        return cls(*(int(n or 1) for n in found.groups()), mode)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.N, self.K, self.D

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @property
    def flops(self) -> int:
        """Of the scores of all rows and codes, and no more: 2*N*K*D a level."""
        return 2 * self.N * self.K * self.D * self.M

    @property
    def weight_bytes(self) -> int:
        return 4 * self.K * self.D * self.M

    @property
    def bytes_read(self) -> int:
        """At the least: rows and codes once."""
        return 4 * self.N * (WIDTH if self.M > 1 else self.D) + self.weight_bytes


class Provider(NamedTuple):
    """Who computes, and where; with ``rotation`` the gradient takes the rotation trick."""

    name: str
    rotation: bool = False
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.name} rotation" if self.rotation else self.name


class Work(NamedTuple):
    """What the harness times, and what the gate looks at."""

    run: Callable[[], object]
    outputs: Callable[[], dict[str, Tensor]]  # of one run from the initial state; index [N, M], and what the mode has
    facts: Mapping[str, Any] = MappingProxyType({})  # what its row tells beside


class Inputs(NamedTuple):
    """The same numbers for every provider of a case."""

    x: Tensor  # [N, D], or [N, WIDTH] where there are several levels
    dy: Tensor  # as x
    codebooks: Tensor  # [M, K, D]
    project: tuple[nn.Linear, nn.Linear] | None  # in and out, where there are several levels


def inputs(case: Case) -> Inputs:
    """Rows, upstream gradient and codebooks: random, or those of the words.

    Raises:
        CannotRun, ModuleNotFoundError: the words are not there.
    """
    return _words(case.N, case.K, case.D) if case.mode == "words" else _random(*case[:4])


@functools.lru_cache(maxsize=2)
def _random(N: int, K: int, D: int, M: int) -> Inputs:
    """Normal rows. A codebook holds means of other rows, those nearest to K of them: so codes lie in training."""
    generator = torch.Generator().manual_seed(0)
    width = WIDTH if M > 1 else D
    x, dy = torch.randn(2, N, width, generator=generator)
    learn = torch.randn(max(K, min(4 * K, LEARNED_FROM)), width, generator=generator)
    project = None
    if M > 1:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            project = nn.Linear(WIDTH, D), nn.Linear(D, WIDTH)
        learn = project[0](learn).detach()
    codebooks = []
    for _ in range(M):
        codebooks.append(_means(learn, K))
        learn = learn - codebooks[-1][vq_plain.nearest(learn, codebooks[-1])]
    return Inputs(x, dy, torch.stack(codebooks), project)


def _means(rows: Tensor, K: int) -> Tensor:
    index = vq_plain.nearest(rows, rows[:K])
    counts = torch.bincount(index, minlength=K).clamp_min(1)
    return torch.zeros_like(rows[:K]).index_add_(0, index, rows) / counts[:, None]


@functools.lru_cache(maxsize=1)
def _words(N: int, K: int, D: int) -> Inputs:
    """The first N of the word embeddings, and K means of them."""
    from fastseq.nn.kmeans import kmeans

    rows = word_embeddings()
    if N > len(rows) or D != rows.shape[1]:
        raise CannotRun(f"there are {len(rows)} word embeddings of {rows.shape[1]} numbers")
    x = rows[:N].contiguous()
    means, _ = kmeans(x[None], K, iterations=ITERATIONS, generator=torch.Generator().manual_seed(0))
    return Inputs(x, torch.zeros_like(x), means, None)


def word_embeddings() -> Tensor:
    """The float16 embeddings [32000, 256] of the package wordllama, in float32; the package is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
        CannotRun: it has no such file.
    """
    from safetensors.torch import load_file

    package = importlib.util.find_spec("wordllama")
    if package is None:
        raise ModuleNotFoundError("No module named 'wordllama'", name="wordllama")
    folders = package.submodule_search_locations or []
    files = [file for folder in folders for file in Path(folder).glob(f"weights/*_{WORDS_D}.safetensors")]
    if not files:
        raise CannotRun(f"this wordllama has no weights/*_{WORDS_D}.safetensors")
    (embeddings,) = load_file(min(files)).values()
    return embeddings.float()

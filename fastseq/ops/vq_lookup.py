"""``fastseq::vq_lookup``: few rows through a stack of codebooks, ``csrc/cuda/vq_lookup.h``; one of the two ways of the
backend "cuda" of the quantizers' operators, see ``vq_cuda``.

x [G, N, D], codebooks M of [G, K, D], mask [G, N], levels [N]. Written: index [G, N, M], distance and score [G, M, N],
quantized [G, N, D]. The numbers below say up to where it comes before triton's way: those marked so are estimates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.ops._library import library

library.define(
    "vq_lookup(Tensor x, Tensor[] codebooks, Tensor? mask, Tensor? levels, bool dot, int parts, Tensor(a!) index, "
    "Tensor(b!)? distance, Tensor(c!)? score, Tensor(d!)? quantized) -> ()"
)
library.define("vq_lookup_parts(int device, int G, int N, int D, int[] sizes) -> int")

MOST_D, MOST_LEVELS = 512, 32
ROWS = 16  # of a block of threads
# Estimates. Triton's way takes 310 us for (N, K, D) = (64, 1024, 64) on an H100 (measured), nearly all of it launches.
# One launch is over long before that, but a multiply-add costs 2 to 4 times as much: every 16 rows read all codes,
# and a thread has four scores for each number of a code where triton's have eight.
MOST_ROWS = 512
MOST_WORK = 1 << 28  # multiply-adds; from here on tensor cores look in triton's way
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX = {16: torch.int16, 32: torch.int32, 64: torch.int64}


@torch.library.register_fake("fastseq::vq_lookup", lib=library)
def _(*args: Any) -> None:
    """Everything is written into tensors that are given."""


class Shape(NamedTuple):
    """What the choice of a way depends on."""

    device: torch.device
    size: tuple[int, int, int]  # G, N, D
    sizes: tuple[int, ...]  # K of each level
    dtypes: tuple[torch.dtype, ...]  # of x, and of the codes of each level
    grouped: bool  # x has G
    sums: bool
    best: int
    screen: int

    @property
    def groups(self) -> int:
        """Of rows that blocks of threads share."""
        G, N, _ = self.size
        return G * math.ceil(N / ROWS)


class Call(NamedTuple):
    """Arguments of any of the operators that have this backend, in one form."""

    data: Tensor  # x [G, N, D]; or [N, D], then codebooks and mask have no G either
    codebooks: Sequence[Tensor]
    mask: Tensor | None = None
    levels: Tensor | None = None
    dot: bool = False
    bits: int = 64
    distance: bool = True
    score: bool = False
    quantized: bool = True
    keep: bool = False  # the codes, copied
    sums: bool = False  # counts and sums by code
    best: int = 1
    screen: int = 2  # 0: none, 1: one where there can be, 2: where it is faster

    @property
    def size(self) -> tuple[int, int, int]:
        size = tuple(self.data.shape)
        return size if len(size) == 3 else (1, *size)  # type: ignore[return-value]

    @property
    def shape(self) -> Shape:
        x, books = self.data, self.codebooks
        sizes, dtypes = tuple([c.shape[-2] for c in books]), (x.dtype, *[c.dtype for c in books])
        return Shape(x.device, self.size, sizes, dtypes, x.dim() == 3, self.sums, self.best, self.screen)


class Found(NamedTuple):
    """What it writes; without elements where not asked for."""

    index: Tensor  # type: ignore[assignment]
    distance: Tensor
    score: Tensor
    quantized: Tensor


@functools.lru_cache(maxsize=1024)
def parts_of(shape: Shape) -> int | None:
    """In how many parts the codes are looked at, 0 where the device has no room; None: there is no device, as for fake
    tensors."""
    if not torch.cuda.is_available():
        return None
    found: int = torch.ops.fastseq.vq_lookup_parts(shape.device.index or 0, *shape.size, shape.sizes)
    return found


def why_not(shape: Shape) -> str | None:
    D, M = shape.size[2], len(shape.sizes)
    if shape.sums:
        return "no sums by code of few rows"
    if D > MOST_D:
        return f"D = {D} is more than it holds, D <= {MOST_D} is not"
    if M > MOST_LEVELS:
        return f"{M} levels are more than it has room for, {MOST_LEVELS} are not"
    parts = parts_of(shape)
    if parts is None:
        return "no CUDA device is here"
    return None if parts else f"needs {shape.groups} blocks of threads at a time, the device holds fewer"


def doubt(shape: Shape) -> str | None:
    """Where triton's way is said to cost less: more rows, or more work than pays for its launches."""
    G, N, D = shape.size
    if G * N > MOST_ROWS:
        return f"{G * N} rows are more than the {MOST_ROWS} up to which one launch is faster by our estimate"
    work = G * N * D * sum(shape.sizes)
    if work > MOST_WORK:
        return f"{work / 1e9:.2g}e9 multiply-adds are more than pays for one launch by our estimate"
    return None


def detail(shape: Shape) -> str:
    parts, few = parts_of(shape), min(ROWS, shape.size[1])
    return f"one launch: {shape.groups} groups of up to {few} rows, the codes in {parts} parts"


def lookup(call: Call, parts: int) -> Found:
    x, (G, N, _), M = call.data, call.size, len(call.codebooks)
    index = torch.empty(G, N, M, dtype=INDEX[call.bits], device=x.device)
    wide = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    distance, score = (wide(G, M, N) if wanted else wide(0) for wanted in (call.distance, call.score))
    quantized = torch.empty_like(x) if call.quantized else x.new_empty(0)

    def grouped(t: Tensor) -> Tensor:
        return t if x.dim() == 3 else t.unsqueeze(0)

    given = (grouped(x), [grouped(c) for c in call.codebooks], None if call.mask is None else grouped(call.mask))
    outs = (distance if call.distance else None, score if call.score else None)
    last = grouped(quantized) if call.quantized else None
    torch.ops.fastseq.vq_lookup.default(*given, call.levels, call.dot, parts, index, *outs, last)
    return Found(index, distance, score, quantized)


def run(call: Call) -> Found:
    parts = parts_of(call.shape)
    assert parts, "no room"
    return lookup(call, parts)

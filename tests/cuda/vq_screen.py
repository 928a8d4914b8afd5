"""The screen of many rows as it is in csrc/cuda, compiled for the CPU: ``fastseq::vq_screen`` on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.cuda.emulated import CSRC as CSRC
from tests.cuda.emulated import N, P, compile_cpp, pointer, structure
from tests.cuda.vq_lookup import NUMBERS

CODES = 128  # of which there is a multiple
_I = ctypes.c_int
_NEVER = 2.0**126

Screen = structure(
    "Screen",
    **dict.fromkeys(("G", "N", "D", "K", "padded", "width"), N),
    **dict.fromkeys(("products", "row", "code", "piece"), _I),
    **dict.fromkeys(("x", "codes", "starts", "pieces", "h", "most", "centre", "mask"), P),
    dot=ctypes.c_bool,
    slack=ctypes.c_float,
    bits=_I,
    **dict.fromkeys(("index", "score", "open", "count"), P),
)


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "vq_screen.so"
        compile_cpp("vq_screen.cpp", made, 0, "-fPIC", "-shared")
        return ctypes.CDLL(str(made))


class Codes(NamedTuple):
    """A codebook in pieces: what ``fastseq_kernels._pieces.split_codes`` makes of it, in torch."""

    products: int
    starts: Tensor
    pieces: Tensor
    h: Tensor
    most: Tensor
    centre: Tensor | None


def split(x: Tensor, codebook: Tensor, dot: bool) -> Codes:
    """Codes for rows of x's dtype."""
    (G, K, D), same = codebook.shape, x.dtype == codebook.dtype and x.dtype != torch.float32
    products = 1 if same else 2 if x.dtype == torch.bfloat16 else 3
    wide = codebook.double()
    half = 0.5 * wide.square().sum(-1)
    good = half.float() < torch.inf
    starts = torch.where(good, torch.zeros(()) if dot else half.float(), torch.inf)
    wide = torch.where(good[..., None], wide, 0.0)
    centre = wide.mean(1).float() if products == 3 else torch.zeros(G, D)
    exactly = wide - centre[:, None].double()
    moved = torch.where(good[..., None], wide.float() - centre[:, None], 0.0)
    low = x.dtype if products == 1 else torch.bfloat16
    hi = moved.to(low).float()
    lo = torch.zeros_like(hi) if products == 1 else (moved - hi).to(low).float()
    left = moved.double() - hi.double() - lo.double()
    h = -(exactly * centre[:, None].double()).sum(-1) if dot else 0.5 * exactly.square().sum(-1)
    h = torch.where(good, h.float(), _NEVER)
    more = 1 + 2.0**-9

    def length(v: Tensor) -> Tensor:
        return (v.double().square().sum(-1).mul(more).add(2.0**-113).sqrt() * more).float()

    rounded = 0.0 if products == 1 else length(left) + 2.0**-24 * length(moved) + 2.0**-118
    sizes = [length(moved), rounded * torch.ones(G, K), length(lo) * (products > 1), length(wide), h.abs()]
    most = torch.stack([torch.where(good, v, 0.0).amax(-1) for v in sizes], -1)
    padded, width = -(-K // CODES) * CODES, next(w for w in (64, 128, 256) if w >= D)
    pieces = torch.zeros(G, 1 if products == 1 else 2, padded, width, dtype=low)
    pieces[:, 0, :K, :D] = -hi
    if products > 1:
        pieces[:, 1, :K, :D] = -lo
    beyond = torch.full((G, padded), _NEVER)
    beyond[:, :K] = h
    return Codes(products, starts, pieces, beyond, most.contiguous(), centre if products == 3 else None)


def run(x: Tensor, codebook: Tensor, starts: Tensor, pieces: Tensor, h: Tensor, most: Tensor, centre: Tensor | None,
        mask: Tensor | None, products: int, dot: bool, slack: float, index: Tensor, score: Tensor | None,
        open_rows: Tensor, count: Tensor, seed: int = 0) -> None:  # fmt: skip
    padded, width = pieces.shape[2:]
    sizes = (*x.shape, codebook.shape[1], padded, width, products, *(NUMBERS[t.dtype] for t in (x, codebook, pieces)))
    tensors = map(pointer, (x, codebook, starts, pieces, h, most, centre, mask))
    outs = map(pointer, (index, score, open_rows, count))
    call = Screen(*sizes, *tensors, dot, slack, 8 * index.element_size(), *outs)
    assert library().emulate_vq_screen(ctypes.byref(call), seed)


@contextmanager
def registered() -> Iterator[None]:
    """Inside, the operator takes CPU tensors."""
    with torch.library._scoped_library("fastseq", "IMPL") as given:
        given.impl("vq_screen", run, "CPU")
        yield

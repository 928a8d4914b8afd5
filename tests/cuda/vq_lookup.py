"""The lookup of few rows as it is in csrc/cuda, compiled for the CPU: ``fastseq::vq_lookup`` on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.cuda.emulated import CSRC as CSRC
from tests.cuda.emulated import N, P, compile_cpp, pointer, structure

MOST_LEVELS = 32
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BITS = {torch.int16: 16, torch.int32: 32, torch.int64: 64}

Level = structure("Level", K=N, codes=P)
Lookup = structure(
    "Lookup",
    **dict.fromkeys(("G", "N", "D"), N),
    levels=ctypes.c_int,
    level=Level * MOST_LEVELS,
    **dict.fromkeys(("x", "mask", "depth"), P),
    **dict.fromkeys(("row", "code"), ctypes.c_int),
    dot=ctypes.c_bool,
    bits=ctypes.c_int,
    **dict.fromkeys(("index", "distance", "score", "quantized"), P),
)


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "vq_lookup.so"
        compile_cpp("vq_lookup.cpp", made, 0, "-fPIC", "-shared")
        return ctypes.CDLL(str(made))


def sizes(G: int, rows: int, D: int, codes: Sequence[int]) -> Any:
    """The structure with nothing but sizes."""
    return Lookup(G=G, N=rows, D=D, levels=len(codes), level=(Level * MOST_LEVELS)(*((K, None) for K in codes)))


def parts(device: int, G: int, rows: int, D: int, codes: Sequence[int]) -> int:
    """``fastseq::vq_lookup_parts`` of a device that has room for all."""
    return int(library().emulate_vq_most_parts(ctypes.byref(sizes(G, rows, D, codes))))


def run(x: Tensor, codebooks: Sequence[Tensor], mask: Tensor | None, levels: Tensor | None, dot: bool, parts: int,
        index: Tensor, distance: Tensor | None, score: Tensor | None, quantized: Tensor | None,
        seed: int = 0) -> None:  # fmt: skip
    call = sizes(*x.shape, [c.shape[1] for c in codebooks])
    for m, codes in enumerate(codebooks):
        call.level[m].codes = pointer(codes)
    call.row, call.code, call.dot, call.bits = NUMBERS[x.dtype], NUMBERS[codebooks[0].dtype], dot, BITS[index.dtype]
    given = {"x": x, "mask": mask, "depth": levels, "index": index}
    for name, tensor in (given | {"distance": distance, "score": score, "quantized": quantized}).items():
        setattr(call, name, pointer(tensor))
    library().emulate_vq_lookup(ctypes.byref(call), parts, seed)


@contextmanager
def registered() -> Iterator[None]:
    """Inside, the operators take CPU tensors."""
    with torch.library._scoped_library("fastseq", "IMPL") as given:
        given.impl("vq_lookup", run, "CPU")
        given.impl("vq_lookup_parts", parts, "CompositeExplicitAutograd")
        yield

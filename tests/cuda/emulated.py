"""The persistent LSTM's kernels as they are in csrc/cuda, compiled for the CPU and called with torch's tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.ops.lstm import Options

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{CSRC}", f"-I{ROOT}"]
TILES = 17
FIRST_CLUSTER = 11  # tiles from here on


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


P, N = ctypes.c_void_p, ctypes.c_int64
Shape = structure(
    "Shape",
    T=N,
    B=N,
    H=N,
    lengths=P,
    offsets=P,
    inverse_tau=ctypes.c_float,
    hard=ctypes.c_bool,
    bfloat16=ctypes.c_bool,
    int8=ctypes.c_bool,
)
_POINTERS = {
    "Forward": "x_gates weight_hh scale h0 c0 h c gates h_n c_n",
    "Backward": "dh dh_n dc_n gates c weight_hh c0 dx_gates dh0 dc0",
}
Forward, Backward = (
    structure(name, **dict.fromkeys(fields.split(), P), reverse=ctypes.c_bool) for name, fields in _POINTERS.items()
)
TileSizes = structure("TileSizes", units=N, rows=N, depth=N, threads=N, cluster=ctypes.c_bool, int8_depth=N)


def compiler() -> str:
    return os.environ.get("CXX") or str(sysconfig.get_config_var("CXX")).split()[0]


def compile_cpp(source: str, made: Path, tile: int, *flags: str) -> None:
    """Compile a file of this folder for one tile."""
    given = [*FLAGS, *flags, f"-DFASTSEQ_ONLY_TILE={tile}", str(CSRC.parent / "tests" / "cuda" / source)]
    subprocess.run([compiler(), *given, "-o", str(made)], check=True)


@functools.cache
def library(tile: int) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "emulated.so"
        compile_cpp("emulate.cpp", made, tile, "-fPIC", "-shared")
        return ctypes.CDLL(str(made))


class Sizes(NamedTuple):
    units: int
    rows: int
    depth: int
    threads: int
    cluster: bool
    int8_depth: int


def tile_sizes(tile: int) -> Sizes:
    found = TileSizes()
    assert library(tile).emulate_tile(tile, ctypes.byref(found))
    return Sizes(*(getattr(found, name) for name in Sizes._fields))


class Direction(NamedTuple):
    """One direction of a call."""

    x_gates: Tensor
    weight_hh: Tensor
    h0: Tensor
    c0: Tensor
    reverse: bool
    scale: Tensor | None = None  # of int8 weights


def pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def layout(data: Tensor, options: Options, B: int) -> tuple[int, Tensor | None, Tensor | None]:
    """T, lengths and offsets, as the kernels take them."""
    if options.batch_sizes is None:
        return data.shape[0], options.lengths, None
    sizes = options.batch_sizes
    lengths = (sizes[:, None] > torch.arange(B)).sum(0)
    return len(sizes), lengths, sizes.cumsum(0) - sizes


def _shape(first: Direction, options: Options) -> tuple[Any, list[Any]]:
    """The structure, and what must outlive it."""
    B, H = first.c0.shape
    T, *places = layout(first.x_gates, options, B)
    pointers = [pointer(v) for v in places]
    kind = (first.h0.dtype == torch.bfloat16, first.scale is not None)
    return Shape(T, B, H, *pointers, 1 / options.tau, options.hard, *kind), places


def forward(
    directions: list[Direction], options: Options, tile: int, seed: int = 0, in_place: bool = False
) -> list[tuple[Tensor, ...]]:
    """h, c, gates, h_n, c_n of each direction; ``in_place``: gates take the place of x_gates."""
    shape, kept = _shape(directions[0], options)
    calls, found = (Forward * len(directions))(), []
    for n, d in enumerate(directions):
        lead, H = d.x_gates.shape[:-1], d.c0.shape[1]
        x = d.x_gates.clone()
        gates = x if in_place else torch.full_like(x, torch.nan)
        h, c = x.new_full((*lead, H), torch.nan), d.c0.new_full((*lead, H), torch.nan)
        out = (h, c, gates, torch.full_like(d.h0, torch.nan), torch.full_like(d.c0, torch.nan))
        given = [x, d.weight_hh, d.scale, d.h0, d.c0]
        calls[n] = Forward(*(pointer(t) for t in (*given, *out)), d.reverse)
        kept.append(given)
        found.append(out)
    assert library(tile).emulate_forward(ctypes.byref(shape), calls, len(directions), tile, seed)
    return found


def backward(
    directions: list[Direction],
    outputs: list[tuple[Tensor, ...]],
    grads: list[tuple[Tensor | None, Tensor | None, Tensor | None]],
    options: Options,
    tile: int,
    seed: int = 0,
) -> list[tuple[Tensor, ...]]:
    """dx_gates, dh0, dc0 of each direction; ``grads`` are those of h, h_n and c_n."""
    shape, kept = _shape(directions[0], options)
    calls, found = (Backward * len(directions))(), []
    for n, (d, out, upstream) in enumerate(zip(directions, outputs, grads, strict=True)):
        made = tuple(torch.full_like(v, torch.nan) for v in (d.x_gates, d.h0, d.c0))
        given = [*upstream, out[2], out[1], d.weight_hh, d.c0]
        calls[n] = Backward(*(pointer(t) for t in (*given, *made)), d.reverse)
        kept.append(given)
        found.append(made)
    assert library(tile).emulate_backward(ctypes.byref(shape), calls, len(directions), tile, seed)
    return found

"""The persistent low-rank LSTM's kernels, compiled for the CPU; as ``emulated`` has the dense ones."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.cuda.emulated import N, P, Shape, compile_cpp, layout, pointer, structure

TILES = 11
SHARED, SEPARATE = BOTH = 0, 6  # with one matrix down for all gates, and with one for each
LowRankShape = structure("LowRankShape", base=Shape, rank=N, downs=N)
_POINTERS = {
    "forward": "x_gates up down h0 c0 h c gates h_n c_n",
    "backward": "dh dh_n dc_n gates c up down c0 dx_gates dh0 dc0",
}
PASSES = {
    name: structure(name, **dict.fromkeys(fields.split(), P), reverse=ctypes.c_bool)
    for name, fields in _POINTERS.items()
}
TileSizes = structure("LowRankTileSizes", units=N, rows=N, rank=N, downs=N, threads=N)


@functools.cache
def _compiled(tile: int) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "emulated.so"
        compile_cpp("emulate_lowrank.cpp", made, tile, "-fPIC", "-shared")
        return ctypes.CDLL(str(made))


def library(tile: int) -> ctypes.CDLL:
    """Those of ``BOTH`` for both dtypes, the others together, each for bfloat16 or float16 in turn."""
    return _compiled(tile if tile in BOTH else -1)


class Sizes(NamedTuple):
    units: int
    rows: int
    rank: int
    downs: int
    threads: int


def tile_sizes(tile: int) -> Sizes:
    found = TileSizes()
    assert library(tile).emulate_lowrank_tile(tile, ctypes.byref(found))
    return Sizes(*(getattr(found, name) for name in Sizes._fields))


def run(
    kernel: str,
    tensors: list[Tensor | None],
    factors: tuple[Tensor, Tensor],
    sizes: tuple[int, int, int],
    places: tuple[Tensor | None, Tensor | None],
    gate: tuple[float, bool, bool, int],
    seed: int = 0,
) -> None:
    """``tensors`` in the order of the structure; sizes: T, B, H; places: lengths and offsets; gate: tau, hard, reverse
    and the tile."""
    (up, down), (tau, hard, reverse, tile) = factors, gate
    base = Shape(*sizes, *map(pointer, places), 1 / tau, hard, up.dtype == torch.bfloat16)
    shape = LowRankShape(base, up.shape[2], down.shape[0])
    direction = PASSES[kernel](*map(pointer, tensors), reverse)
    call = getattr(library(tile), f"emulate_lowrank_{kernel}")
    assert call(ctypes.byref(shape), ctypes.byref(direction), tile, seed)


class Given(NamedTuple):
    """One call."""

    x_gates: Tensor
    up: Tensor
    down: Tensor
    h0: Tensor
    c0: Tensor


def _rest(given: Given, options: Any, tile: int, seed: int) -> tuple[Any, ...]:
    B, H = given.c0.shape
    T, *places = layout(given.x_gates, options, B)
    gate = (options.tau, options.hard, options.reverse, tile)
    return (given.up, given.down), (T, B, H), tuple(places), gate, seed


def forward(given: Given, options: Any, tile: int, seed: int = 0, in_place: bool = False) -> tuple[Tensor, ...]:
    """h, c, gates, h_n, c_n; ``in_place``: gates take the place of x_gates."""
    x = given.x_gates.clone() if in_place else given.x_gates
    lead, H = x.shape[:-1], given.c0.shape[1]
    h, c = x.new_full((*lead, H), torch.nan), given.c0.new_full((*lead, H), torch.nan)
    gates = x if in_place else torch.full_like(x, torch.nan)
    out = (h, c, gates, torch.full_like(given.h0, torch.nan), torch.full_like(given.c0, torch.nan))
    run("forward", [x, *given[1:], *out], *_rest(given, options, tile, seed))
    return out


def backward(
    given: Given, out: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], options: Any, tile: int, seed: int = 0
) -> tuple[Tensor, ...]:
    """dx_gates, dh0, dc0; ``grads`` are those of h, h_n and c_n."""
    made = tuple(torch.full_like(v, torch.nan) for v in (given.x_gates, given.h0, given.c0))
    tensors = [*grads, out[2], out[1], given.up, given.down, given.c0, *made]
    run("backward", tensors, *_rest(given, options, tile, seed))
    return made

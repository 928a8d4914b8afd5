"""The loop of the persistent LSTM alone, ``fastseq::lstm_persist_*``, with every tile of choice.

``python -m benchmarks.gpu.persist_loop`` runs small calls of all tiles, and a lookup of few rows: that is what
compute-sanitizer looks at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import lookup
from benchmarks.harness import CannotRun
from fastseq.ops.lstm import Options

OUTPUTS, GRADIENTS = ("h", "c", "gates", "h_n", "c_n"), ("dx_gates", "dh0", "dc0")
Results = tuple[Tensor, ...]


class Direction(NamedTuple):
    """One direction of a call, on the device."""

    x_gates: Tensor
    weight_hh: Tensor
    h0: Tensor
    c0: Tensor  # float32
    scale: Tensor | None = None  # of int8 weights


def tiles(dry: bool) -> dict[int, Any]:
    """Number -> what a tile is; in a dry run of those that are emulated."""
    if dry:
        from tests.cuda import emulated

        return {0: emulated.tile_sizes(0)}
    from fastseq.ops import lstm_persist

    return dict(enumerate(lstm_persist.TILES))


@contextmanager
def runs(dry: bool) -> Iterator[None]:
    """Inside, the operators can be called; in a dry run on CPU tensors, by the emulated kernels."""
    if not dry:
        yield
        return
    from tests.cuda import stand

    with stand.registered():
        yield


def layout(data: Tensor, options: Options, B: int) -> tuple[int, Tensor | None, Tensor | None]:
    """T, lengths and offsets."""
    if options.batch_sizes is None:
        return data.shape[0], options.lengths, None
    sizes = options.batch_sizes
    lengths = (sizes[:, None] > torch.arange(B)).sum(0)
    return len(sizes), lengths.to(data.device), (sizes.cumsum(0) - sizes).to(data.device)


def room(first: Direction, options: Options, tile: int, count: int, backward: bool) -> tuple[int, int]:
    """Blocks of threads that the call needs at a time, and how many the device can hold."""
    from fastseq.ops import lstm_persist

    (B, H), packed = first.c0.shape, options.batch_sizes is not None
    flags = (packed or options.lengths is not None, packed, options.hard)
    kind = (first.h0.dtype, first.h0.device, backward, first.scale is not None)
    shape = lstm_persist.Shape(1, B, H, count, *flags, *kind)
    return lstm_persist._room(shape, tile) or (1, 1)  # None: a dry run


def needs_room(first: Direction, options: Options, tile: int, count: int = 1) -> None:
    """Raises:
    CannotRun: forward or backward needs more blocks of threads than the device holds.
    """
    for backward in (False, True) if first.scale is None else (False,):
        needed, held = room(first, options, tile, count, backward)
        if needed > held:
            raise CannotRun(f"needs {needed} blocks of threads at a time, the device holds {held}")


def forward_of(
    directions: Sequence[Direction], options: Options, tile: int, in_place: bool = False
) -> tuple[Callable[[], None], list[Results]]:
    """The call, and what it writes: h, c, gates, h_n and c_n of each direction, full of NaN before; ``in_place``: gates
    where a copy of x_gates is."""
    first, found = directions[0], []
    _, *places = layout(first.x_gates, options, first.c0.shape[0])
    given = [d.x_gates.clone() for d in directions] if in_place else [d.x_gates for d in directions]
    for x, d in zip(given, directions, strict=True):
        lead, H = x.shape[:-1], d.c0.shape[1]
        gates = x if in_place else torch.full_like(x, torch.nan)
        h, c = x.new_full((*lead, H), torch.nan), d.c0.new_full((*lead, H), torch.nan)
        found.append((h, c, gates, torch.full_like(d.h0, torch.nan), torch.full_like(d.c0, torch.nan)))
    weights, *states = ([getattr(d, name) for d in directions] for name in Direction._fields[1:4])
    scales, outs = [d.scale for d in directions if d.scale is not None], map(list, zip(*found, strict=True))
    args = (given, weights, scales, *states, *places, *options.gate, tile, *outs)
    return functools.partial(torch.ops.fastseq.lstm_persist_forward.default, *args), found


def forward(directions: Sequence[Direction], options: Options, tile: int, in_place: bool = False) -> list[Results]:
    call, found = forward_of(directions, options, tile, in_place)
    call()
    return found


def backward_of(
    directions: Sequence[Direction],
    outputs: Sequence[Results],
    grads: Sequence[Sequence[Tensor | None]],
    options: Options,
    tile: int,
) -> tuple[Callable[[], None], list[Results]]:
    """The call, and what it writes: dx_gates, dh0 and dc0 of each direction; ``grads`` are those of h, h_n and c_n."""
    first = directions[0]
    _, *places = layout(first.x_gates, options, first.c0.shape[0])
    found = [tuple(torch.full_like(v, torch.nan) for v in (d.x_gates, d.h0, d.c0)) for d in directions]
    kept = [[out[2] for out in outputs], [out[1] for out in outputs]]
    weights = [[d.weight_hh for d in directions], [d.c0 for d in directions]]
    given, outs = map(list, zip(*grads, strict=True)), map(list, zip(*found, strict=True))
    args = (*given, *kept, *weights, *places, *options.gate, tile, *outs)
    return functools.partial(torch.ops.fastseq.lstm_persist_backward.default, *args), found


def backward(
    directions: Sequence[Direction],
    outputs: Sequence[Results],
    grads: Sequence[Sequence[Tensor | None]],
    options: Options,
    tile: int,
) -> list[Results]:
    call, found = backward_of(directions, outputs, grads, options, tile)
    call()
    return found


def drawn(T: int, B: int, H: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Direction:
    """Random numbers on the device, as large as those of a layer."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    x, weight = normal(T, B, 4 * H).to(dtype), (normal(4 * H, H) / H**0.5).to(dtype)
    return Direction(x, weight, normal(B, H).to(dtype), normal(B, H))


def main() -> None:
    """Every tile that has room, forward and backward: two groups of blocks, and a row that is shorter; and a lookup."""
    device = torch.device("cuda")
    for number, tile in tiles(False).items():
        call = drawn(3, tile.rows + 1, tile.units + 3, torch.bfloat16, device)
        options = Options(lengths=torch.tensor([3] * tile.rows + [1], device=device))
        try:
            needs_room(call, options, number)
        except CannotRun as error:
            print(f"tile {number}: {error}")
            continue
        out = forward([call], options, number)
        backward([call], out, [(out[0][0], out[0][3], out[0][4])], options, number)
        torch.cuda.synchronize()
        print(f"tile {number}: done", flush=True)
    lookup.small(device)


if __name__ == "__main__":
    main()

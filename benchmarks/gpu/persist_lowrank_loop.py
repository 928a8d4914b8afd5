"""The loop of the persistent low-rank LSTM alone, ``fastseq::lstm_persist_lowrank_*``, with every tile of choice.

``python -m benchmarks.gpu.persist_lowrank_loop`` runs small calls of all tiles: what compute-sanitizer looks at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.persist_loop import GRADIENTS as GRADIENTS
from benchmarks.gpu.persist_loop import OUTPUTS as OUTPUTS
from benchmarks.gpu.persist_loop import Results, layout
from benchmarks.harness import CannotRun
from fastseq.ops.lstm import Options


class Given(NamedTuple):
    """One call, on the device."""

    x_gates: Tensor
    up: Tensor
    down: Tensor
    h0: Tensor
    c0: Tensor  # float32


def tiles(dry: bool) -> dict[int, Any]:
    """Number -> units, rows, rank, downs and threads; in a dry run of one that is emulated for every dtype."""
    if dry:
        from tests.cuda import emulated_lowrank

        return {emulated_lowrank.SEPARATE: emulated_lowrank.tile_sizes(emulated_lowrank.SEPARATE)}
    from fastseq.ops import lstm_persist_lowrank

    return dict(enumerate(lstm_persist_lowrank.TILES))


@contextmanager
def runs(dry: bool) -> Iterator[None]:
    """Inside, the operators can be called; in a dry run on CPU tensors, by the emulated kernels."""
    if not dry:
        yield
        return
    from tests.cuda import stand_lowrank

    with stand_lowrank.registered():
        yield


def room(call: Given, tile: int, backward: bool) -> tuple[int, int]:
    """Blocks of threads that the call needs at a time, and how many the device can hold."""
    from fastseq.ops import lstm_persist_lowrank

    (B, H), kind = call.c0.shape, (call.h0.dtype, call.h0.device, backward)
    shape = lstm_persist_lowrank.Shape(B, H, call.up.shape[2], call.down.shape[0], *kind)
    return lstm_persist_lowrank._room(shape, tile) or (1, 1)  # None: a dry run


def needs_room(call: Given, tile: int) -> None:
    """Raises:
    CannotRun: forward or backward needs more blocks of threads than the device holds.
    """
    for backward in (False, True):
        needed, held = room(call, tile, backward)
        if needed > held:
            raise CannotRun(f"needs {needed} blocks of threads at a time, the device holds {held}")


def forward_of(call: Given, options: Options, tile: int, in_place: bool = False) -> tuple[Callable[[], None], Results]:
    """The call, and what it writes: h, c, gates, h_n and c_n, full of NaN before; ``in_place``: gates where a copy of
    x_gates is."""
    _, *places = layout(call.x_gates, options, call.c0.shape[0])
    x = call.x_gates.clone() if in_place else call.x_gates
    lead, H = x.shape[:-1], call.c0.shape[1]
    gates = x if in_place else torch.full_like(x, torch.nan)
    h, c = x.new_full((*lead, H), torch.nan), call.c0.new_full((*lead, H), torch.nan)
    found = (h, c, gates, torch.full_like(call.h0, torch.nan), torch.full_like(call.c0, torch.nan))
    args = (x, *call[1:], *places, *options.gate, tile, *found)
    return functools.partial(torch.ops.fastseq.lstm_persist_lowrank_forward.default, *args), found


def forward(call: Given, options: Options, tile: int, in_place: bool = False) -> Results:
    run, found = forward_of(call, options, tile, in_place)
    run()
    return found


def backward_of(
    call: Given, out: Results, grads: Sequence[Tensor | None], options: Options, tile: int
) -> tuple[Callable[[], None], Results]:
    """The call, and what it writes: dx_gates, dh0 and dc0; ``grads`` are those of h, h_n and c_n."""
    _, *places = layout(call.x_gates, options, call.c0.shape[0])
    found = tuple(torch.full_like(v, torch.nan) for v in (call.x_gates, call.h0, call.c0))
    args = (*grads, out[2], out[1], call.up, call.down, call.c0, *places, *options.gate, tile, *found)
    return functools.partial(torch.ops.fastseq.lstm_persist_lowrank_backward.default, *args), found


def backward(call: Given, out: Results, grads: Sequence[Tensor | None], options: Options, tile: int) -> Results:
    run, found = backward_of(call, out, grads, options, tile)
    run()
    return found


def drawn(
    T: int, B: int, H: int, rank: int, downs: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Given:
    """Random numbers on the device, as large as those of a layer."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    up, down = normal(4, H, rank) / rank**0.5, normal(downs, rank, H) / H**0.5
    low = [v.to(dtype) for v in (normal(T, B, 4 * H), up, down, normal(B, H))]
    return Given(*low, normal(B, H))


def main() -> None:
    """Every tile that has room, forward and backward: two groups of two blocks, and a row that is shorter."""
    device = torch.device("cuda")
    for number, tile in tiles(False).items():
        sizes = (3, tile.rows + 1, tile.units + 3, tile.rank - 1, tile.downs)
        call = drawn(*sizes, torch.bfloat16, device)
        options = Options(lengths=torch.tensor([3] * tile.rows + [1], device=device))
        try:
            needs_room(call, number)
        except CannotRun as error:
            print(f"tile {number}: {error}")
            continue
        out = forward(call, options, number)
        backward(call, out, (out[0], out[3], out[4]), options, number)
        torch.cuda.synchronize()
        print(f"tile {number}: done", flush=True)


if __name__ == "__main__":
    main()

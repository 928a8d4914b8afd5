"""``fastseq::lstm_persist_lowrank_*``: the loop over time of ``csrc/cuda/lstm_persist_lowrank.h``, and the backend
"cuda" around it.

Noise comes before the loop and the gradients of the factors after it, as in ``fastseq_kernels.lstm_lowrank``. c and
gates may be None.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.ops import lstm_costs
from fastseq.ops._cuda import cuda_backend, why_not_loaded
from fastseq.ops._library import library
from fastseq.ops._triton import kernels
from fastseq.ops.lstm_costs import LowRankTile
from fastseq.ops.lstm_persist import Chosen, best

_ROWS = "Tensor? lengths, Tensor? offsets, float tau, bool hard, bool reverse, int tile"
library.define(
    f"lstm_persist_lowrank_forward(Tensor x_gates, Tensor up, Tensor down, Tensor h0, Tensor c0, {_ROWS}, "
    "Tensor(a!) h, Tensor(b!)? c, Tensor(c!)? gates, Tensor(d!) h_n, Tensor(e!) c_n) -> ()"
)
library.define(
    "lstm_persist_lowrank_backward(Tensor? dh, Tensor? dh_n, Tensor? dc_n, Tensor gates, Tensor c, Tensor up, "
    f"Tensor down, Tensor c0, {_ROWS}, Tensor(a!) dx_gates, Tensor(b!) dh0, Tensor(c!) dc0) -> ()"
)
library.define("lstm_persist_lowrank_tiles() -> int[]")
library.define(
    "lstm_persist_lowrank_room(int device, int B, int H, bool bfloat16, int tile, bool backward) -> (int, int)"
)


@torch.library.register_fake("fastseq::lstm_persist_lowrank_forward", lib=library)
@torch.library.register_fake("fastseq::lstm_persist_lowrank_backward", lib=library)
def _(*args: Any) -> None:
    """Everything is written into tensors that are given."""


TILES: tuple[LowRankTile, ...] = ()
if why_not_loaded is None and torch._C._dispatch_has_kernel("fastseq::lstm_persist_lowrank_tiles"):
    _numbers = torch.ops.fastseq.lstm_persist_lowrank_tiles()
    TILES = tuple(LowRankTile(*_numbers[n : n + 5]) for n in range(0, len(_numbers), 5))


class Shape(NamedTuple):
    """What the choice of a tile depends on."""

    B: int
    H: int
    rank: int
    downs: int
    dtype: torch.dtype
    device: torch.device
    backward: bool


@functools.lru_cache(maxsize=1024)
def chosen(shape: Shape) -> Chosen | str:
    """The cheapest tile that the device has room for; or why there is none."""
    mine = [n for n, tile in enumerate(TILES) if tile.downs == shape.downs]
    fit = [n for n in mine if TILES[n].rank >= shape.rank]
    if not fit:
        most = max(TILES[n].rank for n in mine)
        return f"rank {shape.rank} is more than any tile has, {most} with {shape.downs} down"
    found = []
    for n in fit:
        room = _room(shape, n)
        if room is None:
            return "no CUDA device is here"
        found.append(Chosen(n, lstm_costs.persist_lowrank(TILES[n], shape.B, shape.H), *room))
    return best(found)


def _room(shape: Shape, tile: int) -> tuple[int, int] | None:
    """Blocks of threads that a call needs at a time, and how many the device can hold. None: there is no device, as for
    fake tensors."""
    if not torch.cuda.is_available():
        return None
    kind = (shape.dtype == torch.bfloat16, tile, shape.backward)
    found: tuple[int, int] = torch.ops.fastseq.lstm_persist_lowrank_room(
        shape.device.index or 0, shape.B, shape.H, *kind
    )
    return found


class Call(NamedTuple):
    """Arguments of either operator in one form."""

    data: Tensor  # x_gates or gates
    up: Tensor
    down: Tensor
    h0: Tensor
    c0: Tensor
    state: Sequence[Any]  # lengths, batch_sizes, reset, h_start, c_start
    gate: Sequence[Any]  # tau, hard, reverse
    rest: Sequence[Any]  # noise and save; or weights
    grads: Sequence[Tensor | None] | None = None  # None: this is a forward
    kept: tuple[Tensor, ...] = ()  # h and c

    @property
    def T(self) -> int:
        batch_sizes = self.state[1]
        return len(self.data if batch_sizes is None else batch_sizes)

    @property
    def shape(self) -> Shape:
        (B, H), kind = self.c0.shape, (self.data.dtype, self.data.device, self.grads is not None)
        return Shape(B, H, self.up.shape[2], self.down.shape[0], *kind)


def _of_forward(x_gates: Tensor, up: Tensor, down: Tensor, h0: Tensor, c0: Tensor, *args: Any) -> Call:
    return Call(x_gates, up, down, h0, c0, state=args[:5], gate=args[10:13], rest=(*args[5:10], args[13]))


def _of_backward(*args: Any) -> Call:
    gates, h, c, up, down, h0, c0 = args[5:12]
    own = (args[12:17], args[17:20], args[20:])
    return Call(gates, up, down, h0, c0, *own, grads=args[:5], kept=(h, c))


def _why_not(call: Call) -> str | None:
    shape = call.shape
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"only bfloat16 and float16, got {str(shape.dtype).removeprefix('torch.')}"
    if call.state[2] is not None:
        return "no segments (reset)"
    if call.grads is not None and any(d is not None for d in call.grads[1:3]):
        return "no gradients of the cells or gates of each step"
    if 0 in (call.T, *shape[:3]):
        return "no steps, rows, units or ranks"
    if not TILES:
        return "not in the compiled library, which an older version built; rebuild it"
    found = chosen(shape)
    return found if isinstance(found, str) else None


def _tile(call: Call) -> Chosen:
    found = chosen(call.shape)
    assert isinstance(found, Chosen), found
    return found


def _doubt(call: Call) -> str | None:
    """Where a way in triton is said to cost less: few steps."""
    (_, H, rank, downs, dtype, device, backward), ours = call.shape, _tile(call).cost
    route = kernels("lstm_lowrank").plan(H, rank, downs, dtype, kernels("_launch").target(device)).route
    theirs = lstm_costs.triton_lowrank(H, rank, downs, route, backward)
    if ours.of(call.T) <= theirs.of(call.T):
        return None
    return f"{ours.of(call.T):.0f} us for all steps by our estimate, {theirs.of(call.T):.0f} in triton"


def _detail(call: Call) -> str:
    found = _tile(call)
    units, rows, rank, downs, threads = TILES[found.tile]
    return (
        f"persistent: {found.needs} blocks of {threads} threads, each of {units} units and up to {rows} rows, "
        f"{downs * rank} numbers of a row between them, {found.cost.step:.1f} us a step by our estimate"
    )


def _forward(call: Call) -> tuple[Tensor, ...]:
    *noise, save = call.rest
    base = kernels("_call").recurrence(call.data, call.up, call.h0, call.c0, call.state, call.gate)
    out = kernels("_call").outputs(base, call.data, tuple(noise), save)
    torch.ops.fastseq.lstm_persist_lowrank_forward.default(
        *(
            out.x,
            call.up,
            call.down,
            call.h0,
            call.c0,
            base.rows.lengths,
            base.rows.offsets,
            *call.gate,
            _tile(call).tile,
        ),
        *(out.h, out.c, out.gates, out.h_n, out.c_n),
    )
    found: tuple[Tensor, ...] = out.results()
    return found


def _backward(call: Call) -> tuple[Tensor, ...]:
    assert call.grads is not None
    lowrank, (h, c), (up, down) = kernels("lstm_lowrank"), call.kept, (call.up, call.down)
    base = kernels("_call").recurrence(call.data, up, call.h0, call.c0, call.state, call.gate)
    d, dh0, dc0 = map(torch.empty_like, (call.data, call.h0, call.c0))
    torch.ops.fastseq.lstm_persist_lowrank_backward.default(
        *(call.grads[0], *call.grads[3:], call.data, c, up, down, call.c0, base.rows.lengths, base.rows.offsets),
        *(*call.gate, _tile(call).tile, d, dh0, dc0),
    )
    around = lowrank._Call(base, up, down, None)
    factors = (up.new_empty(0), down.new_empty(0))
    if call.rest[0]:
        factors = lowrank._factor_gradients(around, d, _between(d, up, down.shape[0]), h)
    return (d, *factors, dh0, dc0, *lowrank._start_gradients(around, None, None))


def _between(d: Tensor, up: Tensor, downs: int) -> Tensor:
    """The gradient of down @ h, [N, downs*r], from that of the pre-activations."""
    product, flat = kernels("gemm").layer_product, d.reshape(-1, d.shape[-1])
    if downs == 1:
        found: Tensor = product(flat, up.flatten(0, 1))
        return found
    return torch.cat([product(one, own) for one, own in zip(flat.chunk(4, 1), up, strict=True)], 1)


BACKEND = {
    op: cuda_backend("lstm_persist_lowrank", call_of, run, _why_not, _detail, _doubt)
    for op, call_of, run in (
        ("lstm_lowrank_forward", _of_forward, _forward),
        ("lstm_lowrank_backward", _of_backward, _backward),
    )
}

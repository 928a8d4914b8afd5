"""``fastseq::lstm_persist_*``: the loop over time of ``csrc/cuda/lstm_persist.h``, and the backend "cuda" around it.

What comes before and after the loop, noise, products and gradients of weights, is what ``fastseq_kernels`` does around
its own loops. Lists hold one tensor per direction, ``reverse`` is that of the first; c and gates may be empty, scale is
where weight_hh is not int8.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.ops import lstm_costs
from fastseq.ops._cuda import cuda_backend, unverified, why_not_loaded
from fastseq.ops._library import library
from fastseq.ops._triton import kernels
from fastseq.ops.lstm_costs import Cost, Tile

_ROWS = "Tensor? lengths, Tensor? offsets, float tau, bool hard, bool reverse, int tile"
library.define(
    f"lstm_persist_forward(Tensor[] x_gates, Tensor[] weight_hh, Tensor[] scale, Tensor[] h0, Tensor[] c0, {_ROWS}, "
    "Tensor(a!)[] h, Tensor(b!)[] c, Tensor(c!)[] gates, Tensor(d!)[] h_n, Tensor(e!)[] c_n) -> ()"
)
library.define(
    "lstm_persist_backward(Tensor?[] dh, Tensor?[] dh_n, Tensor?[] dc_n, Tensor[] gates, Tensor[] c, "
    f"Tensor[] weight_hh, Tensor[] c0, {_ROWS}, Tensor(a!)[] dx_gates, Tensor(b!)[] dh0, Tensor(c!)[] dc0) -> ()"
)
library.define("lstm_persist_tiles() -> int[]")
library.define(
    "lstm_persist_room(int device, int T, int B, int H, bool lengths, bool packed, bool hard, bool bfloat16, "
    "bool int8, int tile, int directions, bool backward) -> (int, int)"
)


@torch.library.register_fake("fastseq::lstm_persist_forward", lib=library)
@torch.library.register_fake("fastseq::lstm_persist_backward", lib=library)
def _(*args: Any) -> None:
    """Everything is written into tensors that are given."""


TILES: tuple[Tile, ...] = ()
if why_not_loaded is None:
    _numbers = torch.ops.fastseq.lstm_persist_tiles()
    _wide = len(Tile._fields)
    TILES = tuple(Tile(*_numbers[n : n + _wide]) for n in range(0, len(_numbers), _wide))


class Shape(NamedTuple):
    """What the choice of a tile depends on."""

    T: int
    B: int
    H: int
    directions: int
    lengths: bool
    packed: bool
    hard: bool
    dtype: torch.dtype
    device: torch.device
    backward: bool
    int8: bool = False  # weight_hh


class Chosen(NamedTuple):
    """A tile, what it costs, and the blocks of threads that it needs at a time (of a cluster those of one, which are
    followed by the next) and that the device has room for."""

    tile: int
    cost: Cost
    needs: int
    room: int


@functools.lru_cache(maxsize=1024)
def chosen(shape: Shape) -> Chosen | str:
    """The cheapest tile that the device has room for; or why there is none. T does not count."""
    depths = [tile.int8_depth if shape.int8 else tile.depth for tile in TILES]
    deep = [n for n, depth in enumerate(depths) if depth >= shape.H]
    if not deep:
        return f"H = {shape.H} is more than any tile has, H <= {max(depths)} is not"
    found = []
    for n in deep:
        room = _room(shape, n)
        if room is None:
            return "no CUDA device is here"
        found.append(Chosen(n, lstm_costs.persist(TILES[n], *shape[1:4], shape.backward, shape.int8, room[1]), *room))
    return best(found)


def layer_cost(B: int, inputs: int, H: int, dtype: torch.dtype, device: torch.device) -> Cost | None:
    """Of a layer of one direction with the product of its inputs, forward; None where these kernels have no room or
    were not seen right on this device."""
    if why_not_loaded is not None or unverified("lstm_persist", device, dtype) is not None:
        return None
    found = chosen(Shape(1, B, H, 1, False, False, False, dtype, device, False))
    if isinstance(found, str):
        return None
    return found.cost._replace(step=found.cost.step + 4 * B * inputs * H / lstm_costs.PRODUCT)


def best(found: Sequence[Chosen]) -> Chosen | str:
    """The cheapest that there is room for, or why there is none."""
    first = min(found, key=lambda c: (c.needs > c.room, c.cost.step, c.needs))
    if first.needs <= first.room:
        return first
    return f"needs {first.needs} blocks of threads at a time, the device holds {first.room}"


def _room(shape: Shape, tile: int) -> tuple[int, int] | None:
    """Blocks of threads that a call needs at a time, and how many the device can hold; T does not count. None: there is
    no device, as for fake tensors."""
    if not torch.cuda.is_available():
        return None
    T, B, H, directions, *flags, dtype, device, backward, int8 = shape
    kind = (dtype == torch.bfloat16, int8, tile, directions, backward)
    found: tuple[int, int] = torch.ops.fastseq.lstm_persist_room(device.index or 0, T, B, H, *flags, *kind)
    return found


class Call(NamedTuple):
    """Arguments of any of the operators that have this backend, in one form. Lists: one entry per direction."""

    data: Tensor  # x, or x_gates or gates where weight_ih is empty
    weight_ih: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    weight_hh: Sequence[Tensor]
    h0: Sequence[Tensor]
    c0: Sequence[Tensor]
    weight_hr: Tensor | None
    scale: Sequence[Tensor]  # empty where weight_hh is not int8
    sizes: Sequence[Any]  # lengths, batch_sizes, reset
    starts: Sequence[tuple[Tensor | None, Tensor | None]]  # h_start and c_start
    noise: Sequence[Any]
    gate: Sequence[Any]  # tau, hard, reverse
    grads: Sequence[Sequence[Tensor | None]] | None = None  # None: this is a forward
    kept: tuple[Sequence[Tensor | None], Sequence[Tensor], Sequence[Tensor]] = ((), (), ())  # gates, h and c
    rest: Sequence[Any] = ()  # save; or needs_x, needs_weight_ih, needs_bias, weights

    @property
    def shape(self) -> Shape:
        lengths, batch_sizes, _ = self.sizes
        T, B, H = len(self.data if batch_sizes is None else batch_sizes), len(self.c0[0]), self.c0[0].shape[-1]
        packed = batch_sizes is not None
        ragged, kind = packed or lengths is not None, (self.data.dtype, self.data.device)
        backward, int8 = self.grads is not None, len(self.scale) > 0
        return Shape(T, B, H, len(self.c0), ragged, packed, self.gate[1], *kind, backward, int8)


def _one(state: Sequence[Any], noise: Sequence[Any], gate: Sequence[Any]) -> dict[str, Any]:
    """The part that the operators of one direction share, from weight_hh to c_start, and of noise and gates."""
    weight_hh, h0, c0, weight_hr, *sizes, h_start, c_start = state
    own = {"weight_hh": [weight_hh], "h0": [h0], "c0": [c0], "weight_hr": weight_hr, "scale": ()}
    return {**own, "sizes": sizes, "starts": [(h_start, c_start)], "noise": noise, "gate": gate}


def _of_forward(x_gates: Tensor, *args: Any) -> Call:
    return Call(x_gates, (), (), **_one(args[:9], args[9:14], args[14:17]), rest=args[17:])


def _of_backward(*args: Any) -> Call:
    gates, h, c = args[5:8]
    own = _one(args[8:17], (None,) * 5, args[17:20])
    rest = (False, False, False, args[20])
    return Call(gates, (), (), **own, grads=[args[:5]], kept=([gates], [h], [c]), rest=rest)


def _of_layer_forward(x: Tensor, weight_ih: Tensor, bias: Tensor | None, *args: Any) -> Call:
    return Call(x, [weight_ih], [bias], **_one(args[:9], args[9:14], args[14:17]), rest=args[17:])


def _of_layer_backward(*args: Any) -> Call:
    x, weight_ih, bias, gates, h, c = args[5:11]
    own = _one(args[11:20], args[20:25], args[25:28])
    return Call(x, [weight_ih], [bias], **own, grads=[args[:5]], kept=([gates], [h], [c]), rest=args[28:])


def _of_int8_forward(x_gates: Tensor, weight_hh: Tensor, scale: Tensor, h0: Tensor, c0: Tensor, *args: Any) -> Call:
    own = _one((weight_hh, h0, c0, None, *args[:5]), args[5:10], args[10:13])
    return Call(x_gates, (), (), **{**own, "scale": [scale]}, rest=args[13:])


def _both(state: Sequence[Any], noise: Sequence[Any], gate: Sequence[Any]) -> dict[str, Any]:
    """``_one`` of the operators of both directions."""
    weight_hh, h0, c0, *sizes, h_start, c_start = state
    starts = list(zip(h_start or (None, None), c_start or (None, None), strict=True))
    own = {"weight_hh": weight_hh, "h0": h0, "c0": c0, "weight_hr": None, "scale": (), "sizes": sizes, "starts": starts}
    return {**own, "noise": noise, "gate": (*gate, False)}


def _of_both_forward(x: Tensor, weight_ih: list[Tensor], bias: list[Tensor], *args: Any) -> Call:
    own = _both(args[:8], args[8:13], args[13:15])
    return Call(x, weight_ih, bias or (None, None), **own, rest=args[15:])


def _of_both_backward(grads: Sequence[Tensor | None], x: Tensor, weight_ih: Any, bias: Any, *args: Any) -> Call:
    gates, h, c = args[:3]
    own = _both(args[3:11], args[11:16], args[16:18])
    kept = (gates or (None, None), h, c)
    return Call(x, weight_ih, bias or (None, None), **own, grads=[grads[::2], grads[1::2]], kept=kept, rest=args[18:])


def _why_not(call: Call) -> str | None:
    shape, (_, _, reset) = call.shape, call.sizes
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"only bfloat16 and float16, got {str(shape.dtype).removeprefix('torch.')}"
    if call.weight_hr is not None:
        return "no projection"
    if reset is not None:
        return "no segments (reset)"
    if any(dc is not None or dgates is not None for _, dc, dgates, *_ in call.grads or ()):
        return "no gradients of the cells or gates of each step"
    if 0 in shape[:3]:
        return "no steps, rows or units"
    found = chosen(shape._replace(T=1))
    return found if isinstance(found, str) else None


def _tile(call: Call) -> Chosen:
    found = chosen(call.shape._replace(T=1))
    assert isinstance(found, Chosen), found
    return found


def _doubt(call: Call) -> str | None:
    """Where a way in triton is said to cost less: few steps, or more rows than this one is made for."""
    (T, B, H, *_), ours = call.shape, _tile(call).cost
    target, int8 = kernels("_launch").target(call.data.device), len(call.scale) > 0
    if int8:
        resident = kernels("lstm_int8").plan(H, target).route == "resident"
    else:
        resident = kernels("lstm_resident").why_not(H, call.data.dtype, False, target) is None
    theirs = lstm_costs.triton(T, B, H, resident, call.grads is not None, not int8)
    if ours.of(T) <= theirs.of(T):
        return None
    return f"{ours.of(T):.0f} us for all steps by our estimate, {theirs.of(T):.0f} in triton"


def _detail(call: Call) -> str:
    found = _tile(call)
    tile = TILES[found.tile]
    blocks = f"{'clusters of ' if tile.cluster else ''}{found.needs} blocks of {tile.threads} threads"
    return (
        f"persistent: {blocks}, each of {tile.units} units and up to {tile.rows} rows, "
        f"{found.cost.step:.1f} us a step by our estimate"
    )


def _recurrences(call: Call) -> list[Any]:
    """What ``fastseq_kernels`` is given, per direction; their rows are the same tensors."""
    state, (tau, hard, reverse) = (*call.sizes, None, None), call.gate
    own = list(zip(call.weight_hh, call.h0, call.c0, call.starts, strict=True))
    if call.scale:  # the door checks what it is given
        first = kernels("_call").recurrence(call.data, *own[0][:3], state, (tau, hard, reverse))
    else:
        first = kernels("lstm").recurrence(call.data, *own[0][:3], (call.weight_hr, *state), (tau, hard, reverse))
    return [
        first._replace(weight_hh=w, h0=h0, c0=c0, h_start=start[0], c_start=start[1], reverse=reverse != (n == 1))
        for n, (w, h0, c0, start) in enumerate(own)
    ]


def _x_gates(call: Call, n: int) -> tuple[Tensor, Any, bool]:
    """Pre-activations of the input, the noise that is added to them, and whether they may be overwritten."""
    seed, rows, row_offset, stream, probability = call.noise
    noise = kernels("lstm").Noise(seed, rows, row_offset, stream + n, probability)
    if not call.weight_ih:
        return call.data, noise, False
    return kernels("lstm_layer")._x_gates(call.data, call.weight_ih[n], call.bias[n]), noise, True


def loop_forward(directions: list[Any], scale: Sequence[Tensor], tile: int) -> list[tuple[Tensor, Tensor]]:
    """Write h, c and gates of ``fastseq_kernels.lstm_resident.Direction``; returns h_n and c_n of each."""
    call = directions[0].call
    h_n = [torch.empty_like(d.call.h0, memory_format=torch.contiguous_format) for d in directions]
    c_n = [torch.empty_like(d.call.c0) for d in directions]
    torch.ops.fastseq.lstm_persist_forward.default(
        [d.x_gates for d in directions],
        *([d.call.weight_hh for d in directions], list(scale)),
        *([getattr(d.call, name) for d in directions] for name in ("h0", "c0")),
        *(call.rows.lengths, call.rows.offsets, call.tau, call.hard, call.reverse, tile),
        [d.h for d in directions],
        *([v for v in (getattr(d, name) for d in directions) if v is not None] for name in ("c", "gates")),
        *(h_n, c_n),
    )
    return list(zip(h_n, c_n, strict=True))


def loop_backward(directions: list[Any], tile: int) -> list[Any]:
    """``fastseq_kernels._steps.Found`` of each ``fastseq_kernels.lstm_resident.Given``."""
    call = directions[0].call
    out = [tuple(map(torch.empty_like, (d.gates, d.call.h0, d.call.c0))) for d in directions]
    torch.ops.fastseq.lstm_persist_backward.default(
        *([getattr(d.grads, name) for d in directions] for name in ("h", "h_n", "c_n")),
        *([d.gates for d in directions], [d.c for d in directions]),
        *([d.call.weight_hh for d in directions], [d.call.c0 for d in directions]),
        *(call.rows.lengths, call.rows.offsets, call.tau, call.hard, call.reverse, tile),
        *(list(values) for values in zip(*out, strict=True)),
    )
    return [kernels("_steps").Found(*values, None, None, None, None) for values in out]


def _forward(call: Call) -> list[tuple[Tensor, ...]]:
    """h, c, gates, h_n and c_n of each direction."""
    lstm, tile, directions = kernels("lstm"), _tile(call).tile, []
    for n, recurrence in enumerate(_recurrences(call)):
        x_gates, noise, ours = _x_gates(call, n)
        directions.append(lstm.prepared(recurrence, x_gates, noise, call.rest[0], ours))
    last = loop_forward(directions, call.scale, tile)
    return [lstm.kept(d, *states) for d, states in zip(directions, last, strict=True)]


def _backward(call: Call) -> list[tuple[Tensor, ...]]:
    """dx, dweight_ih, dbias and what ``lstm_backward`` returns, of each direction; without weight_ih that alone."""
    lstm, layer, tile, given = kernels("lstm"), kernels("lstm_layer"), _tile(call).tile, []
    assert call.grads is not None
    recurrences, (*needs, weights) = _recurrences(call), call.rest
    for n, (recurrence, gates, h, c) in enumerate(zip(recurrences, *call.kept, strict=True)):
        if gates is None:
            x_gates, *way = _x_gates(call, n)
            gates = lstm.rebuilt(recurrence, x_gates, h, *way)
        grads = kernels("_steps").Grads(*call.grads[n])
        kernels("_checks").backward(recurrence, grads, gates, h, c)
        given.append(kernels("lstm_resident").Given(recurrence, grads, gates, c))
    out = []
    for n, found in enumerate(loop_backward(given, tile)):
        d, *rest = lstm.gradients(recurrences[n], found, call.kept[1][n], weights)
        first = layer._input_gradients(d, call.data, call.weight_ih[n], *needs) if call.weight_ih else (d,)
        out.append((*first, *rest))
    return out


def _both_forward(call: Call) -> list[Tensor]:
    return [v for pair in zip(*_forward(call), strict=True) for v in pair]


def _both_backward(call: Call) -> list[Tensor]:
    (dx, *first), (other_dx, *second) = _backward(call)
    pairs = list(zip(first, second, strict=True))
    del pairs[5]  # of a projection
    return [dx.add_(other_dx), *(v for pair in pairs for v in pair)]


BACKEND = {
    op: cuda_backend("lstm_persist", call_of, run, _why_not, _detail, _doubt)
    for op, call_of, run in (
        ("lstm_forward", _of_forward, lambda call: _forward(call)[0]),
        ("lstm_backward", _of_backward, lambda call: _backward(call)[0]),
        ("lstm_int8_forward", _of_int8_forward, lambda call: _forward(call)[0]),
        ("lstm_layer_forward", _of_layer_forward, lambda call: _forward(call)[0]),
        ("lstm_layer_backward", _of_layer_backward, lambda call: _backward(call)[0]),
        ("lstm_layer_both_forward", _of_both_forward, _both_forward),
        ("lstm_layer_both_backward", _of_both_backward, _both_backward),
    )
}

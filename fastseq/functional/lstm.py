"""``lstm``: checks, dtypes and layout around the operators. Time comes first, [T, B, ...], as in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import _check
from fastseq.functional.lstm_arguments import (
    Factors,
    State,
    Weights,
    check_input,
    check_numbers,
    check_state,
    check_weights,
    dtypes,
    wide,
)
from fastseq.functional.lstm_factors import factored_layer
from fastseq.functional.lstm_stock import BACKENDS, StockCall, stock
from fastseq.functional.mimo_arguments import checked_index
from fastseq.ops import mimo
from fastseq.ops._select import allowed, choose
from fastseq.ops._triton import in_low_precision
from fastseq.ops.lstm_autograd import layer
from fastseq.ops.lstm_both import Both, both_directions


class Gates(NamedTuple):
    """Input gates, forget gates and cell states of one layer in one direction, [T, B, H] or packed [N, H] each."""

    i: Tensor
    f: Tensor
    c: Tensor


class Result(NamedTuple):
    """What ``lstm`` returns; ``gates`` is empty unless asked for, else ordered as h_n."""

    output: Tensor  # [T, B, D*P] or [N, D*P]
    h_n: Tensor  # [L*D, B, P]
    c_n: Tensor  # [L*D, B, H]
    gates: list[Gates]


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A fresh seed of gate noise from torch's default generator of the device: int64 [1].

    Follows ``torch.manual_seed`` and replays under checkpointing; drawn on a GPU, every replay of a CUDA graph has
    fresh noise. The noise depends on the seed alone, not on the device that it is computed on.

    Where ``torch.distributed`` is initialized the rank is mixed in, so that ranks that share a manual seed draw
    different noise.
    """
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mixed = torch.distributed.get_rank() * 0x9E3779B97F4A7C15 % 2**64
        seed = seed ^ (mixed - 2**64 if mixed >= 2**63 else mixed)
    return seed


def packed_places(batch_sizes: Tensor, total: int, device: torch.device | str = "cpu") -> State:
    """Step and row [N] of every element of a packed sequence, without reading a value (so that export passes)."""
    sizes = batch_sizes.to(torch.int64)
    step = torch.repeat_interleave(torch.arange(sizes.shape[0]), sizes, output_size=total)
    row = torch.arange(total) - (sizes.cumsum(0) - sizes)[step]
    return step.to(device, non_blocking=True), row.to(device, non_blocking=True)


def lstm(
    x: Tensor,
    weights: Sequence[Weights],
    hx: State | None = None,
    *,
    bidirectional: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
    row_offset: int = 0,
    noise_probability: float = 1.0,
    tau: float = 1.0,
    hard: bool = False,
    dropout: float = 0.0,
    variational_dropout: float = 0.0,
    recompute: bool = False,
    return_gates: bool = False,
    index: Tensor | None = None,
) -> Result:
    """A net of L LSTM layers in D directions (``fastseq.reference.lstm`` is the definition of each).

    Args:
        x: [T, B, I], or packed [N, I] with ``batch_sizes``. bfloat16 and float16 are computed in float32 on the CPU;
            on a GPU they are multiplied as they are and added up in float32, and c is float32 throughout.
        weights: L*D of them, layer by layer, in each layer forward before reverse.
        hx: h_0 [L*D, B, P] and c_0 [L*D, B, H] of x's dtype; None means the start states.
        lengths: integers [B], valid steps per row in [0, T]; results beyond them are zeros. On a GPU they may lie
            there or on the CPU; there they are not checked but bounded by T, since a check would wait for the device.
        batch_sizes: int64 [T] on the CPU, rows per step, falling, with sum N.
        reset: bool [T, B] or packed [N]: this step begins a new segment, in either direction.
        seed: int64, one element, see ``draw_seed``; None means no noise on the input and forget gates.
        rows: int64 [B] on x's device or the CPU, the number of each row before sorting; row_offset: added to it
            (0 .. 2**32 - 1).
        noise_probability: share of gates that get noise, in [0, 1].
        tau: temperature of the input and forget gates, > 0. hard: threshold them at 0 instead.
        dropout: probability between layers, per element; variational_dropout: one mask per row for all steps.
        recompute: hold h and c until backward, not the gates, and rebuild these with one product. With ``index`` the
            first layer holds its pre-activations instead, which saves nothing there.
        return_gates: return i, f and all c_t; this holds the gates, whatever ``recompute`` says.
        index: int32 [M, N], see ``mimo_index``: rows of several examples. x is [T, B, C], the B examples, and the
            first weight_ih [4*H, M*C]; all else, lengths and states too, is of the N rows. Not with ``batch_sizes``.

    Returns:
        ``Result``. Non-contiguous tensors are copied.

    Raises:
        ArgumentError: a ``ValueError`` and ``RuntimeError``, naming the argument.
    """
    dtype, out_dtype = dtypes("lstm", x, weights[0].weight_ih if weights else x, hx)
    if index is not None:
        index = _checked_index(x, batch_sizes, index)
    # what stands for the rows of several examples until it is known who takes them
    rows_of_x = x if index is None else x.new_empty(()).expand(x.shape[0], index.shape[1], index.shape[0] * x.shape[2])
    B = check_input(rows_of_x, weights, hx, bidirectional, lengths, batch_sizes, reset, rows)
    check_numbers(noise_probability, tau, dropout, variational_dropout)
    if recompute and any(w.factors is not None for w in weights):
        _check.fail("lstm", "recompute", "False beside factors", recompute)
    if _stock_may_run(x):
        special = {
            "lengths": lengths is not None,
            "reset": reset is not None,
            "gate noise": seed is not None,
            "temperature": tau != 1,
            "hard gates": hard,
            "variational dropout": variational_dropout > 0,
            "recomputation": recompute,
            "way to return all cell states": return_gates,
            "low-rank recurrent weights": any(w.factors is not None for w in weights),
        }
        call = StockCall(rows_of_x, weights, hx, bidirectional, batch_sizes, dropout, special)
        found = _by_torch(call, B, None if index is None else lambda: mimo.gather(x.unsqueeze(2).contiguous(), index))
        if found is not None:
            return found
    x = (x if x.dtype is dtype else x.to(dtype)).contiguous()
    if lengths is not None:
        lengths = lengths.to("cpu" if x.device.type == "cpu" else lengths.device, torch.int64).contiguous()
    sizes = (lengths, batch_sizes, None if reset is None else reset.contiguous())
    options, memory = (seed, rows, row_offset, noise_probability, tau, hard), (2 if return_gates else 0, recompute)
    out, h_n, c_n, gates = _net(
        x, weights, hx, bidirectional, B, sizes, options, memory, (dropout, variational_dropout), index
    )
    kept = [_gates(v, out_dtype) for v in gates] if return_gates else []
    return Result(out.to(out_dtype), h_n.to(out_dtype), c_n.to(out_dtype), kept)


def _net(
    x: Tensor,
    weights: Sequence[Weights],
    hx: State | None,
    bidirectional: bool,
    B: int,
    sizes: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: tuple[Any, ...],
    memory: tuple[int, bool] = (0, False),
    dropouts: tuple[float, float] = (0.0, 0.0),
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """All layers by our operators: output, h_n, c_n, and what each layer and direction returned."""
    out, found, step = x, [], 2 if bidirectional else 1
    for n in range(0, len(weights), step):
        if n and any(dropouts):
            out = _between(out, *dropouts, B, sizes[1])
        layer = _layer(out, n, weights[n : n + step], hx, B, sizes, options, memory, None if n else index)
        out = layer[0][0] if step == 1 else torch.cat([v[0] for v in layer], -1)
        found += layer
    if len(found) == 1:
        return out, found[0][3].unsqueeze(0), found[0][4].unsqueeze(0), found
    return out, torch.stack([v[3] for v in found]), torch.stack([v[4] for v in found]), found


def _stock_may_run(x: Tensor) -> bool:
    """On the CPU ours is the faster one."""
    only = allowed()
    return (only == "torch" or (only is None and not x.is_cpu)) and not torch.compiler.is_compiling()


def _by_torch(call: StockCall, B: int, gather: Callable[[], Tensor] | None) -> Result | None:
    """By torch's own LSTM, or None where it cannot do what is asked. gather: makes the rows, [T, B, 1, I]."""
    if choose("lstm", BACKENDS, call, operator=False).name != "torch":
        return None
    if gather is not None:
        call = call._replace(x=gather().squeeze(2))
    width, step = call.x.shape[-1], 2 if call.bidirectional else 1
    for n, w in enumerate(call.weights):
        check_weights("lstm", n, w, width, call.x.device)
        if call.hx is not None:
            check_state("lstm", n, w, call.hx[0].select(0, n), call.hx[1].select(0, n), B)
        if (n + 1) % step == 0:
            width = w.weight_hh.shape[1] * step

    def again(x: Tensor, weights: Sequence[Weights], hx: State) -> tuple[Tensor, ...]:
        dtype, out_dtype = dtypes("lstm", x, weights[0].weight_ih, hx)
        options, sizes = (None, None, 0, 1.0, 1.0, False), (None, call.batch_sizes, None)
        out = _net(x.to(dtype).contiguous(), weights, hx, call.bidirectional, B, sizes, options)
        return tuple(v.to(out_dtype) for v in out[:3])

    return Result(*stock(call, again), [])


def _layer(
    x: Tensor,
    first: int,
    weights: Sequence[Weights],
    hx: State | None,
    B: int,
    sizes: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: tuple[Any, ...],
    memory: tuple[int, bool],
    index: Tensor | None = None,
) -> list[tuple[Tensor, ...]]:
    """h, c, gates, h_n, c_n of one layer, per direction; ``first`` is the number of its forward direction."""
    seed, rows, row_offset, noise_probability, tau, hard = options
    prepared, states = [], []
    for n, given in enumerate(weights, first):
        w, bias = _prepare("lstm", n, given, x, 1 if index is None else index.shape[0])
        prepared.append((w, bias))
        states.append(_start(w, B) if hx is None else _state("lstm", n, w, hx[0].select(0, n), hx[1].select(0, n), B))
    stream = 2 * (first // len(weights))
    projected: list[Tensor] | None = None
    if index is not None:
        projected = [mimo.project(x.unsqueeze(2), w.weight_ih, bias, index).squeeze(2) for w, bias in prepared]
    elif _in_one_call(x, prepared):
        found: Any = ([v for v in values if v is not None] for values in zip(*(w for w, _ in prepared), strict=True))
        weight_ih, weight_hh, _, _, _, h_start, c_start, _ = found
        biases = [b for _, b in prepared if b is not None]
        both = Both(weight_ih, biases, weight_hh, [h for h, _ in states], [c for _, c in states], h_start, c_start)
        noise = (seed, rows, row_offset, stream, noise_probability, tau, hard)
        return both_directions(x, both, sizes, noise, *memory)
    out = []
    for direction, ((w, bias), (h0, c0)) in enumerate(zip(prepared, states, strict=True)):
        state = (w.weight_hr, *sizes, w.h_start, w.c_start, seed, rows, row_offset, stream + direction)
        options = (*state, noise_probability, tau, hard, direction == 1)
        values, weight_ih = (x, w.weight_ih) if projected is None else (projected[direction], None)
        bias = bias if projected is None else None
        if w.factors is not None:
            out.append(factored_layer(values, weight_ih, w, w.factors, bias, h0, c0, options, memory[0]))
            continue
        out.append(layer(values, weight_ih, bias, w.weight_hh, h0, c0, options, *memory))
    return out


def _checked_index(x: Tensor, batch_sizes: Tensor | None, index: Tensor) -> Tensor:
    """As the operators take it."""
    if batch_sizes is not None:
        _check.fail("lstm", "index", "None for packed x", list(index.shape))
    if x.dim() != 3:
        _check.fail("lstm", "x", "[T, B, C] beside index", list(x.shape))
    return checked_index("lstm", index, x.device)


def _in_one_call(x: Tensor, prepared: Sequence[tuple[Weights, Tensor | None]]) -> bool:
    """Whether both directions of a layer go to one operator: on a GPU, where they can share a launch.

    Not in graphs and transforms, for which the operator of one direction has rules.
    """
    if len(prepared) != 2 or not in_low_precision(x.device) or torch.compiler.is_compiling():
        return False
    (one, bias), (other, other_bias) = prepared
    if one.factors is not None or other.factors is not None:
        return False
    alike = (bias is None) == (other_bias is None) and one.weight_hh.shape == other.weight_hh.shape
    alike = alike and (one.h_start is None, one.c_start is None) == (other.h_start is None, other.c_start is None)
    return alike and one.weight_hr is other.weight_hr is None and not torch._C._are_functorch_transforms_active()


def _gates(out: tuple[Tensor, ...], dtype: torch.dtype) -> Gates:
    i, f, _, _ = out[2].chunk(4, -1)
    return Gates(i.to(dtype), f.to(dtype), out[1].to(dtype))


def lstm_cell(
    x: Tensor,
    hx: State | None,
    weights: Weights,
    *,
    seed: Tensor | None = None,
    noise_probability: float = 1.0,
    tau: float = 1.0,
    hard: bool = False,
) -> State:
    """One step of ``lstm``: x [B, I], hx of [B, H] each (None means the start state), returns h' and c' [B, H]."""
    dtype, out_dtype = dtypes("lstm_cell", x, weights.weight_ih, hx)
    check_numbers(noise_probability, tau, 0, 0)
    if x.dim() != 2:
        _check.fail("lstm_cell", "x", "[B, I]", list(x.shape))
    B = x.shape[0]
    x = (x if x.dtype is dtype else x.to(dtype)).contiguous().unsqueeze(0)
    w, bias = _prepare("lstm_cell", 0, weights, x)
    h0, c0 = _start(w, B) if hx is None else _state("lstm_cell", 0, w, hx[0], hx[1], B)
    options = (None, None, None, None, None, None, seed, None, 0, 0, noise_probability, tau, hard, False)
    _, _, _, h, c = layer(x, w.weight_ih, bias, w.weight_hh, h0, c0, options)
    return h.to(out_dtype), c.to(out_dtype)


def _state(function: str, n: int, w: Weights, h0: Tensor, c0: Tensor, B: int) -> State:
    """The given state of layer and direction n, checked, contiguous, h0 of the weights' dtype, c0 wide."""
    check_state(function, n, w, h0, c0, B)
    dtype = w.weight_hh.dtype
    if h0.dtype is not dtype or c0.dtype is not wide(dtype):
        h0, c0 = h0.to(dtype), c0.to(wide(dtype))
    if h0 is c0:
        c0 = c0.clone()  # torch.compile takes no tensor twice in one autograd function
    return h0.contiguous(), c0.contiguous()


def _start(w: Weights, B: int) -> State:
    """The start state of every row."""
    H, P = w.H, w.weight_hh.shape[1]
    h0 = w.weight_hh.new_zeros((B, P)) if w.h_start is None else w.h_start.expand(B, P).contiguous()
    if w.c_start is None:
        return h0, w.weight_hh.new_zeros((B, H), dtype=wide(w.weight_hh.dtype))
    return h0, w.c_start.expand(B, H).contiguous()


def _prepare(function: str, n: int, w: Weights, x: Tensor, M: int = 1) -> tuple[Weights, Tensor | None]:
    """Check the weights of layer and direction n, bring them to the dtype of x, and add up the biases. M: examples that
    a row takes side by side."""
    check_weights(function, n, w, M * x.shape[-1], x.device)
    dtype = x.dtype
    if w.weight_ih.dtype is not dtype or w.weight_hh.dtype is not dtype:
        w = _each(w, lambda v: v.to(dtype))
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, _, c_start, factors = w
    if c_start is not None and c_start.dtype is not wide(dtype):
        w = w._replace(c_start=c_start.to(wide(dtype)))
    bias = bias_ih if bias_hh is None else bias_hh if bias_ih is None else bias_ih + bias_hh
    given = (weight_ih, weight_hh, weight_hr, *(() if factors is None else factors[:2]))
    if all(v is None or v.is_contiguous() for v in given):
        return w, bias
    return _each(w, Tensor.contiguous), bias


def _each(w: Weights, change: Callable[[Tensor], Tensor]) -> Weights:
    """All tensors of one layer and direction, changed."""
    tensors: Any = (None if v is None else change(v) for v in w[:7])
    if w.factors is None:
        return Weights(*tensors)
    factors = Factors(change(w.factors.up), change(w.factors.down), w.factors.ranks)
    return Weights(*tensors)._replace(factors=factors)


def _between(x: Tensor, dropout: float, variational: float, B: int, batch_sizes: Tensor | None) -> Tensor:
    """Dropout between two layers; variational: a mask [B, I] for all steps of a row."""
    if dropout:
        x = F.dropout(x, dropout)
    if variational:
        mask = F.dropout(x.new_ones(B, x.shape[-1]), variational)
        x = x * (mask if batch_sizes is None else mask[packed_places(batch_sizes, x.shape[0], x.device)[1]])
    return x

"""``lstm``: checks, dtypes and layout around the operators. Time comes first, [T, B, ...], as in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import _check
from fastseq.functional.lstm_stock import BACKENDS, StockCall, stock
from fastseq.ops._select import allowed, choose
from fastseq.ops._triton import in_low_precision
from fastseq.ops.lstm_autograd import layer

State = tuple[Tensor, Tensor]
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_ARITHMETIC = (torch.float32, torch.float64)
_CPU = torch.device("cpu")


class Weights(NamedTuple):
    """Parameters of one layer in one direction, named and laid out as in ``torch.nn.LSTM``.

    P is H, or proj_size where there is a weight_hr. Start states of None are zeros.
    """

    weight_ih: Tensor  # [4*H, I]
    weight_hh: Tensor  # [4*H, P]
    bias_ih: Tensor | None = None  # [4*H]
    bias_hh: Tensor | None = None  # [4*H]
    weight_hr: Tensor | None = None  # [P, H]
    h_start: Tensor | None = None  # [P]
    c_start: Tensor | None = None  # [H]


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
        recompute: hold h and c until backward, not the gates, and rebuild these with one product.
        return_gates: return i, f and all c_t; this holds the gates, whatever ``recompute`` says.

    Returns:
        ``Result``. Non-contiguous tensors are copied.

    Raises:
        ArgumentError: a ``ValueError`` and ``RuntimeError``, naming the argument.
    """
    dtype, out_dtype = _dtypes("lstm", x, weights[0].weight_ih if weights else x, hx)
    B = _check_input(x, weights, hx, bidirectional, lengths, batch_sizes, reset, rows)
    _check_numbers(noise_probability, tau, dropout, variational_dropout)
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
        }
        call = StockCall(x, weights, hx, bidirectional, batch_sizes, dropout, special)
        if choose("lstm", BACKENDS, call, operator=False).name == "torch":
            _check_net(x, weights, hx, bidirectional, B)

            def again(x: Tensor, weights: Sequence[Weights], hx: State) -> tuple[Tensor, ...]:
                options = (None, None, 0, 1.0, 1.0, False)
                x = x.to(dtype).contiguous()
                out = _net(x, weights, hx, bidirectional, B, (None, batch_sizes, None), options)
                return tuple(v.to(out_dtype) for v in out[:3])

            return Result(*stock(call, again), [])
    x = (x if x.dtype is dtype else x.to(dtype)).contiguous()
    if lengths is not None:
        lengths = lengths.to("cpu" if x.device.type == "cpu" else lengths.device, torch.int64).contiguous()
    sizes = (lengths, batch_sizes, None if reset is None else reset.contiguous())
    options, memory = (seed, rows, row_offset, noise_probability, tau, hard), (2 if return_gates else 0, recompute)
    out, h_n, c_n, gates = _net(
        x, weights, hx, bidirectional, B, sizes, options, memory, (dropout, variational_dropout)
    )
    found = [_gates(v, out_dtype) for v in gates] if return_gates else []
    return Result(out.to(out_dtype), h_n.to(out_dtype), c_n.to(out_dtype), found)


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
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """All layers by our operators: output, h_n, c_n, and what each layer and direction returned."""
    out, found, step = x, [], 2 if bidirectional else 1
    for n in range(0, len(weights), step):
        if n and any(dropouts):
            out = _between(out, *dropouts, B, sizes[1])
        layer = _layer(out, n, weights[n : n + step], hx, B, sizes, options, memory)
        out = layer[0][0] if step == 1 else torch.cat([v[0] for v in layer], -1)
        found += layer
    if len(found) == 1:
        return out, found[0][3].unsqueeze(0), found[0][4].unsqueeze(0), found
    return out, torch.stack([v[3] for v in found]), torch.stack([v[4] for v in found]), found


def _stock_may_run(x: Tensor) -> bool:
    """On the CPU ours is the faster one."""
    if torch.compiler.is_compiling() or allowed() not in (None, "torch"):
        return False
    return x.device.type != "cpu" or allowed() == "torch"


def _check_net(x: Tensor, weights: Sequence[Weights], hx: State | None, bidirectional: bool, B: int) -> None:
    """What ``_layer`` checks on its way, for torch's LSTM."""
    width, step = x.shape[-1], 2 if bidirectional else 1
    for n, w in enumerate(weights):
        _check_weights("lstm", n, w, width, x.device)
        if hx is not None:
            _check_state("lstm", n, w, hx[0].select(0, n), hx[1].select(0, n), B)
        if (n + 1) % step == 0:
            width = w.weight_hh.shape[1] * step


def _layer(
    x: Tensor,
    first: int,
    weights: Sequence[Weights],
    hx: State | None,
    B: int,
    sizes: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: tuple[Any, ...],
    memory: tuple[int, bool],
) -> list[tuple[Tensor, ...]]:
    """h, c, gates, h_n, c_n of one layer, per direction; ``first`` is the number of its forward direction."""
    seed, rows, row_offset, noise_probability, tau, hard = options
    out = []
    for direction in range(len(weights)):
        n = first + direction
        w, bias = _prepare("lstm", n, weights[direction], x)
        h0, c0 = _start(w, B) if hx is None else _state("lstm", n, w, hx[0].select(0, n), hx[1].select(0, n), B)
        stream = 2 * (first // len(weights)) + direction
        state = (w.weight_hr, *sizes, w.h_start, w.c_start, seed, rows, row_offset, stream)
        options = (*state, noise_probability, tau, hard, direction == 1)
        out.append(layer(x, w.weight_ih, bias, w.weight_hh, h0, c0, options, *memory))
    return out


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
    dtype, out_dtype = _dtypes("lstm_cell", x, weights.weight_ih, hx)
    _check_numbers(noise_probability, tau, 0, 0)
    if x.dim() != 2:
        _check.fail("lstm_cell", "x", "[B, I]", list(x.shape))
    B = x.shape[0]
    x = (x if x.dtype is dtype else x.to(dtype)).contiguous().unsqueeze(0)
    w, bias = _prepare("lstm_cell", 0, weights, x)
    h0, c0 = _start(w, B) if hx is None else _state("lstm_cell", 0, w, hx[0], hx[1], B)
    options = (None, None, None, None, None, None, seed, None, 0, 0, noise_probability, tau, hard, False)
    _, _, _, h, c = layer(x, w.weight_ih, bias, w.weight_hh, h0, c0, options)
    return h.to(out_dtype), c.to(out_dtype)


def _check_input(
    x: Tensor,
    weights: Sequence[Weights],
    hx: State | None,
    bidirectional: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    rows: Tensor | None,
) -> int:
    """Check everything but the weights; the number of rows B, read from a shape where one has it."""
    if not weights or (bidirectional and len(weights) % 2):
        _check.fail("lstm", "weights", "one entry per layer and direction", len(weights))
    if x.dim() != (3 if batch_sizes is None else 2):
        _check.fail("lstm", "x", "[T, B, I]" if batch_sizes is None else "packed [N, I]", list(x.shape))
    if batch_sizes is not None:
        if lengths is not None:
            _check.fail("lstm", "lengths", "None where batch_sizes say how long each row is", list(lengths.shape))
        if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
            got = f"{list(batch_sizes.shape)} of {batch_sizes.dtype} on {batch_sizes.device}"
            _check.fail("lstm", "batch_sizes", "int64 [T] on the CPU", got)
    if x.shape[0] == 0 or (batch_sizes is not None and batch_sizes.shape[0] == 0):
        raise _check.ArgumentError("lstm: Expected sequence length to be larger than 0 in RNN")
    if batch_sizes is None:
        B = x.shape[1]
    else:
        B = rows.shape[0] if rows is not None else hx[0].shape[1] if hx is not None else int(batch_sizes[0])
    if rows is not None and (rows.shape != (B,) or rows.dtype != torch.int64 or rows.device not in (x.device, _CPU)):
        got = f"{list(rows.shape)} of {rows.dtype} on {rows.device}"
        _check.fail("lstm", "rows", f"int64 [B] = [{B}] on the CPU{_or_there(x)}", got)
    if hx is not None:
        for name, t in zip(("h_0", "c_0"), hx, strict=True):
            if t.dim() != 3 or t.shape[0] != len(weights):
                _check.fail("lstm", name, f"[L*D, B, ...] = [{len(weights)}, {B}, ...]", list(t.shape))
    if lengths is not None:
        _check.shape("lstm", "lengths", lengths, "B", x.shape[1])
        if lengths.dtype not in _INDEX_DTYPES:
            _check.fail("lstm", "lengths", "integers", lengths.dtype)
        if lengths.device not in (x.device, _CPU) and x.device != _CPU:
            _check.fail("lstm", "lengths", f"on the CPU{_or_there(x)}", f"one on {lengths.device}")
    if reset is not None:
        _check.shape("lstm", "reset", reset, "N" if batch_sizes is not None else "T, B", *x.shape[:-1])
        _check.dtype("lstm", "reset", reset, torch.bool)
        _check.device("lstm", "reset", reset, x.device)
    return B


def _or_there(x: Tensor) -> str:
    return "" if x.device == _CPU else f" or {x.device}"


def _check_numbers(noise_probability: float, tau: float, dropout: float, variational_dropout: float) -> None:
    if not 0 <= noise_probability <= 1:
        _check.probability("lstm", "noise_probability", noise_probability)
    if not 0 < tau < float("inf"):
        _check.positive("lstm", "tau", tau)
    if not 0 <= dropout <= 1:
        _check.probability("lstm", "dropout", dropout)
    if not 0 <= variational_dropout <= 1:
        _check.probability("lstm", "variational_dropout", variational_dropout)


def _state(function: str, n: int, w: Weights, h0: Tensor, c0: Tensor, B: int) -> State:
    """The given state of layer and direction n, checked, contiguous, h0 of the weights' dtype, c0 wide."""
    _check_state(function, n, w, h0, c0, B)
    dtype = w.weight_hh.dtype
    if h0.dtype is not dtype or c0.dtype is not _wide(dtype):
        h0, c0 = h0.to(dtype), c0.to(_wide(dtype))
    if h0 is c0:
        c0 = c0.clone()  # torch.compile takes no tensor twice in one autograd function
    return h0.contiguous(), c0.contiguous()


def _check_state(function: str, n: int, w: Weights, h0: Tensor, c0: Tensor, B: int) -> None:
    G, P = w.weight_hh.shape
    _check.shape(function, f"h_0[{n}]", h0, "B, P", B, P)
    _check.shape(function, f"c_0[{n}]", c0, "B, H", B, G // 4)
    _check.device(function, f"h_0[{n}]", h0, w.weight_hh.device)
    _check.device(function, f"c_0[{n}]", c0, w.weight_hh.device)


def _start(w: Weights, B: int) -> State:
    """The start state of every row."""
    G, P = w.weight_hh.shape
    h0 = w.weight_hh.new_zeros((B, P)) if w.h_start is None else w.h_start.expand(B, P).contiguous()
    wide = _wide(w.weight_hh.dtype)
    if w.c_start is None:
        return h0, w.weight_hh.new_zeros((B, G // 4), dtype=wide)
    return h0, w.c_start.expand(B, G // 4).contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of cell states beside weights of ``dtype``: never 16 bits."""
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def _prepare(function: str, n: int, w: Weights, x: Tensor) -> tuple[Weights, Tensor | None]:
    """Check the weights of layer and direction n, bring them to the dtype of x, and add up the biases."""
    _check_weights(function, n, w, x.shape[-1], x.device)
    dtype = x.dtype
    if w.weight_ih.dtype is not dtype or w.weight_hh.dtype is not dtype:
        w = Weights(*(None if v is None else v.to(dtype) for v in w))  # type: ignore[arg-type]
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, _, c_start = w
    if c_start is not None and c_start.dtype is not _wide(dtype):
        w = w._replace(c_start=c_start.to(_wide(dtype)))
    bias = bias_ih if bias_hh is None else bias_hh if bias_ih is None else bias_ih + bias_hh
    if weight_ih.is_contiguous() and weight_hh.is_contiguous() and (weight_hr is None or weight_hr.is_contiguous()):
        return w, bias
    return Weights(*(None if v is None else v.contiguous() for v in w)), bias  # type: ignore[arg-type]


def _check_weights(function: str, n: int, w: Weights, width: int, device: torch.device) -> None:
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h_start, c_start = w
    G, P = weight_hh.shape
    fits = (
        weight_ih.shape == (G, width)
        and (G == 4 * P if weight_hr is None else 4 * weight_hr.shape[1] == G and weight_hr.shape[0] == P)
        and (bias_ih is None or bias_ih.shape == (G,))
        and (bias_hh is None or bias_hh.shape == (G,))
        and (h_start is None or h_start.shape == (P,))
        and (c_start is None or 4 * c_start.shape[0] == G)
        and weight_ih.device == device == weight_hh.device
    )
    if not fits:
        _explain(function, n, w, width, device)


def _explain(function: str, n: int, w: Weights, width: int, device: torch.device) -> None:
    """Raise for the first of the weights that does not fit the others or x."""
    G, P = w.weight_hh.shape
    H = G // 4
    if G != 4 * H or (w.weight_hr is None and H != P):
        _check.fail(function, f"weights[{n}].weight_hh", f"[4*H, H] = [{4 * P}, {P}]", [G, P])
    _check.shape(function, f"weights[{n}].weight_ih", w.weight_ih, "4*H, I", G, width)
    shapes = {"bias_ih": ("4*H", G), "bias_hh": ("4*H", G), "weight_hr": ("P, H", P, H)}
    shapes |= {"h_start": ("P", P), "c_start": ("H", H)}
    for name, (symbols, *sizes) in shapes.items():
        value = getattr(w, name)
        if value is not None:
            _check.shape(function, f"weights[{n}].{name}", value, str(symbols), *map(int, sizes))
    _check.device(function, f"weights[{n}].weight_ih", w.weight_ih, device)
    _check.device(function, f"weights[{n}].weight_hh", w.weight_hh, device)


def _dtypes(function: str, x: Tensor, weight: Tensor, hx: State | None) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the arithmetic and that of the results."""
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    if not autocast:
        if x.dtype != weight.dtype:
            raise _check.ArgumentError(
                f"{function}: RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        for n, state in enumerate(hx or ()):
            if state.dtype != x.dtype:
                _check.fail(function, f"hidden[{n}]", f"of the input's dtype {x.dtype}", state.dtype)
    for t in (x, weight):
        if t.dtype not in _ARITHMETIC and t.dtype not in _LOW_PRECISION:
            _check.fail(function, "dtype", "float32, float64, bfloat16 or float16", t.dtype)
    if weight.dtype == torch.float64:
        return torch.float64, torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    return dtype if in_low_precision(x.device) else torch.float32, dtype


def _between(x: Tensor, dropout: float, variational: float, B: int, batch_sizes: Tensor | None) -> Tensor:
    """Dropout between two layers; variational: a mask [B, I] for all steps of a row."""
    if dropout:
        x = F.dropout(x, dropout)
    if variational:
        mask = F.dropout(x.new_ones(B, x.shape[-1]), variational)
        x = x * (mask if batch_sizes is None else mask[packed_places(batch_sizes, x.shape[0], x.device)[1]])
    return x

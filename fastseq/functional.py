"""What users call: checks, dtypes and layout around the operators. Time comes first, [T, B, ...], as in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import _check
from fastseq.ops import lstm as _lstm

State = tuple[Tensor, Tensor]
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_ARITHMETIC = (torch.float32, torch.float64)


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


def draw_seed() -> Tensor:
    """A fresh seed of gate noise from torch's default generator: int64 [1], on the CPU.

    Follows ``torch.manual_seed`` and replays under checkpointing. Where ``torch.distributed`` is initialized the rank
    is mixed in, so that ranks that share a manual seed draw different noise.
    """
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mixed = torch.distributed.get_rank() * 0x9E3779B97F4A7C15 % 2**64
        seed = seed ^ (mixed - 2**64 if mixed >= 2**63 else mixed)
    return seed


def packed_places(batch_sizes: Tensor, total: int) -> State:
    """Step and row [N] of every element of a packed sequence, without reading a value (so that export passes)."""
    sizes = batch_sizes.to(torch.int64)
    step = torch.repeat_interleave(torch.arange(sizes.shape[0]), sizes, output_size=total)
    return step, torch.arange(total) - (sizes.cumsum(0) - sizes)[step]


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
        x: [T, B, I], or packed [N, I] with ``batch_sizes``. bfloat16 and float16 are computed in float32.
        weights: L*D of them, layer by layer, in each layer forward before reverse.
        hx: h_0 [L*D, B, P] and c_0 [L*D, B, H] of x's dtype; None means the start states.
        lengths: integers [B], valid steps per row in [0, T]; results beyond them are zeros.
        batch_sizes: int64 [T] on the CPU, rows per step, falling, with sum N.
        reset: bool [T, B] or packed [N]: this step begins a new segment, in either direction.
        seed: int64, one element, see ``draw_seed``; None means no noise on the input and forget gates.
        rows: int64 [B], the number of each row before sorting; row_offset: added to it (0 .. 2**32 - 1).
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
    x = x.to(dtype).contiguous()
    lengths = None if lengths is None else lengths.to("cpu", torch.int64).contiguous()
    reset = None if reset is None else reset.contiguous()
    sizes = (lengths, batch_sizes, reset)
    noise = (seed, rows, row_offset, noise_probability, tau, hard)
    directions = 2 if bidirectional else 1
    h_n, c_n, gates = [], [], []
    for first in range(0, len(weights), directions):
        if first and dropout:
            x = F.dropout(x, dropout)
        if first and variational_dropout:
            x = x * _row_mask(x, variational_dropout, B, batch_sizes)
        out = []
        for n in range(first, first + directions):
            w, bias = _prepare("lstm", n, weights[n], x, dtype)
            h0, c0 = _start("lstm", w, B) if hx is None else _state("lstm", n, w, hx[0][n], hx[1][n], B)
            options = _options(w, sizes, noise, 2 * (first // directions), n > first)
            save = 2 if return_gates else 0
            h, c, g, h_last, c_last = _lstm.layer(x, w.weight_ih, bias, w.weight_hh, h0, c0, options, save, recompute)
            out.append(h)
            h_n.append(h_last)
            c_n.append(c_last)
            if return_gates:
                i, f, _, _ = g.chunk(4, -1)
                gates.append(Gates(i.to(out_dtype), f.to(out_dtype), c.to(out_dtype)))
        x = torch.cat(out, -1) if bidirectional else out[0]
    return Result(x.to(out_dtype), _stack(h_n).to(out_dtype), _stack(c_n).to(out_dtype), gates)


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
    x = x.to(dtype).contiguous().unsqueeze(0)
    w, bias = _prepare("lstm_cell", 0, weights, x, dtype)
    h0, c0 = _start("lstm_cell", w, B) if hx is None else _state("lstm_cell", 0, w, *hx, B)
    options = _options(w, (None, None, None), (seed, None, 0, noise_probability, tau, hard), 0, False)
    _, _, _, h, c = _lstm.layer(x, w.weight_ih, bias, w.weight_hh, h0, c0, options)
    return h.to(out_dtype), c.to(out_dtype)


def _options(w: Weights, sizes: tuple[Any, ...], noise: tuple[Any, ...], stream: int, reverse: bool) -> _lstm.Options:
    lengths, batch_sizes, reset = sizes
    seed, rows, row_offset, noise_probability, tau, hard = noise
    state = (w.weight_hr, lengths, batch_sizes, reset, w.h_start, w.c_start, seed, rows)
    return _lstm.Options(*state, row_offset, stream + reverse, noise_probability, tau, hard, reverse)


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
    if rows is not None and (rows.shape != (B,) or rows.dtype != torch.int64 or rows.device.type != "cpu"):
        _check.fail("lstm", "rows", f"int64 [B] = [{B}] on the CPU", f"{list(rows.shape)} of {rows.dtype}")
    if hx is not None:
        for name, t in zip(("h_0", "c_0"), hx, strict=True):
            if t.dim() != 3 or t.shape[0] != len(weights):
                _check.fail("lstm", name, f"[L*D, B, ...] = [{len(weights)}, {B}, ...]", list(t.shape))
    if lengths is not None:
        _check.shape("lstm", "lengths", lengths, "B", x.shape[1])
        if lengths.dtype not in _INDEX_DTYPES:
            _check.fail("lstm", "lengths", "integers", lengths.dtype)
    if reset is not None:
        _check.shape("lstm", "reset", reset, "N" if batch_sizes is not None else "T, B", *x.shape[:-1])
        _check.dtype("lstm", "reset", reset, torch.bool)
        _check.device("lstm", "reset", reset, x.device)
    return B


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
    """The given state of layer and direction n, checked, contiguous and of the weights' dtype."""
    _check.shape(function, f"h_0[{n}]", h0, "B, P", B, w.weight_hh.shape[1])
    _check.shape(function, f"c_0[{n}]", c0, "B, H", B, w.weight_hh.shape[0] // 4)
    dtype = w.weight_hh.dtype
    if h0 is c0:
        c0 = c0.clone()  # torch.compile takes no tensor twice in one autograd function
    return h0.to(dtype).contiguous(), c0.to(dtype).contiguous()


def _start(function: str, w: Weights, B: int) -> State:
    """The start state of every row."""
    H, P = w.weight_hh.shape[0] // 4, w.weight_hh.shape[1]
    h0 = w.weight_hh.new_zeros(B, P) if w.h_start is None else w.h_start.expand(B, P).contiguous()
    c0 = w.weight_hh.new_zeros(B, H) if w.c_start is None else w.c_start.expand(B, H).contiguous()
    return h0, c0


def _prepare(function: str, n: int, w: Weights, x: Tensor, dtype: torch.dtype) -> tuple[Weights, Tensor | None]:
    """Check the weights of layer and direction n, bring them to ``dtype``, and add up the biases."""
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h_start, c_start = w
    H, P = weight_hh.shape[0] // 4, weight_hh.shape[1]
    _check.shape(function, f"weights[{n}].weight_ih", weight_ih, "4*H, I", 4 * H, x.shape[-1])
    _check.device(function, f"weights[{n}].weight_ih", weight_ih, x.device)
    if weight_hr is not None:
        _check.shape(function, f"weights[{n}].weight_hr", weight_hr, "P, H", P, H)
    elif weight_hh.shape != (4 * P, P):
        _check.shape(function, f"weights[{n}].weight_hh", weight_hh, "4*H, H", 4 * H, H)
    if bias_ih is not None:
        _check.shape(function, f"weights[{n}].bias_ih", bias_ih, "4*H", 4 * H)
    if bias_hh is not None:
        _check.shape(function, f"weights[{n}].bias_hh", bias_hh, "4*H", 4 * H)
    if h_start is not None:
        _check.shape(function, f"weights[{n}].h_start", h_start, "P", P)
    if c_start is not None:
        _check.shape(function, f"weights[{n}].c_start", c_start, "H", H)
    bias = bias_ih if bias_hh is None else bias_hh if bias_ih is None else bias_ih + bias_hh
    if weight_ih.dtype != dtype or weight_hh.dtype != dtype or not weight_ih.is_contiguous():
        w = Weights(*(None if v is None else v.to(dtype).contiguous() for v in w))  # type: ignore[arg-type]
    elif not weight_hh.is_contiguous() or (weight_hr is not None and not weight_hr.is_contiguous()):
        w = Weights(*(None if v is None else v.contiguous() for v in w))  # type: ignore[arg-type]
    return w, None if bias is None else bias.to(dtype)


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
    return torch.float32, torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def _row_mask(x: Tensor, p: float, B: int, batch_sizes: Tensor | None) -> Tensor:
    """A dropout mask [B, I] for all steps of a row, laid out to multiply x."""
    mask = F.dropout(x.new_ones(B, x.shape[-1]), p)
    return mask if batch_sizes is None else mask[packed_places(batch_sizes, x.shape[0])[1]]


def _stack(states: list[Tensor]) -> Tensor:
    return states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)

"""What the compressed recurrences share: their options, the checks of these, and what they return."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq import _check
from fastseq.ops._triton import in_low_precision

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_LOW_PRECISION)
_CPU = torch.device("cpu")


class Recurrence(NamedTuple):
    """Results of one layer in one direction; c and gates only with ``return_gates``."""

    h: Tensor  # [T, B, H] or packed [N, H]
    h_n: Tensor  # [B, H]
    c_n: Tensor  # [B, H]
    c: Tensor | None  # as h
    gates: Tensor | None  # [T, B, 4*H] or packed: i, f, g, o, activated


class RecurrenceOptions(NamedTuple):
    """Everything that a recurrence takes beside its weights and the state that it starts from.

    With 16-bit pre-activations on a GPU cell states are float32; elsewhere everything is computed in float32.
    """

    lengths: Tensor | None = None  # integers [B], valid steps per row in [0, T]; results beyond them are zeros
    batch_sizes: Tensor | None = None  # int64 [T] on the CPU, rows per step, falling, with sum N
    reset: Tensor | None = None  # bool [T, B] or packed [N]: this step begins a new segment
    h_start: Tensor | None = None  # [H], the start state; None means zeros
    c_start: Tensor | None = None  # [H]
    seed: Tensor | None = None  # int64, one element, see ``draw_seed``; None means no noise
    rows: Tensor | None = None  # int64 [B], the number of each row before sorting
    row_offset: int = 0
    stream: int = 0  # 2 * layer + direction
    noise_probability: float = 1.0
    tau: float = 1.0
    hard: bool = False
    reverse: bool = False


def arithmetic(function: str, x_gates: Tensor) -> torch.dtype:
    """The dtype in which a recurrence is computed."""
    if x_gates.dtype not in _DTYPES:
        _check.fail(function, "x_gates", "float32, float64, bfloat16 or float16", x_gates.dtype)
    narrow = x_gates.dtype in _LOW_PRECISION and not in_low_precision(x_gates.device)
    return torch.float32 if narrow else x_gates.dtype


def check_weight(function: str, name: str, value: Tensor, like: Tensor, symbols: str, *sizes: int) -> None:
    """A weight, or a state, of these sizes on the device of ``like``."""
    _check.shape(function, name, value, symbols, *sizes)
    _check.device(function, name, value, like.device)


def prepared(
    function: str, x_gates: Tensor, hx: tuple[Tensor, Tensor] | None, H: int, options: RecurrenceOptions
) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    """x_gates, h0, c0 and options as the operators take them, checked."""
    dtype = arithmetic(function, x_gates)
    wide = torch.float32 if dtype in _LOW_PRECISION else dtype
    packed = options.batch_sizes is not None
    B = _rows(function, x_gates, hx, options)
    if x_gates.dim() != (2 if packed else 3) or x_gates.shape[-1] != 4 * H:
        expected = f"packed [N, 4*H] = [N, {4 * H}]" if packed else f"[T, B, 4*H] = [T, B, {4 * H}]"
        _check.fail(function, "x_gates", expected, list(x_gates.shape))
    _check_options(function, x_gates, B, H, options)
    starts = [
        None if v is None else v.to(d).contiguous() for v, d in ((options.h_start, dtype), (options.c_start, wide))
    ]
    if hx is None:
        h0, c0 = (
            x_gates.new_zeros(B, H, dtype=d) if v is None else v.expand(B, H).contiguous()
            for v, d in zip(starts, (dtype, wide), strict=True)
        )
    else:
        for name, state in zip(("h0", "c0"), hx, strict=True):
            check_weight(function, name, state, x_gates, "B, H", B, H)
        h0, c0 = hx[0].to(dtype).contiguous(), hx[1].to(wide).contiguous()
        c0 = c0.clone() if h0 is c0 else c0  # torch.compile takes no tensor twice in one autograd function
    lengths = options.lengths
    if lengths is not None:
        lengths = lengths.to("cpu" if x_gates.device == _CPU else lengths.device, torch.int64).contiguous()
    reset = None if options.reset is None else options.reset.contiguous()
    rest = options._replace(lengths=lengths, reset=reset, h_start=starts[0], c_start=starts[1])
    return x_gates.to(dtype).contiguous(), h0, c0, tuple(rest)


def _rows(function: str, x_gates: Tensor, hx: tuple[Tensor, Tensor] | None, options: RecurrenceOptions) -> int:
    """B, read from a shape where one has it."""
    sizes = options.batch_sizes
    if sizes is None:
        return x_gates.shape[1] if x_gates.dim() > 1 else 0
    if options.lengths is not None:
        got = list(options.lengths.shape)
        _check.fail(function, "lengths", "None where batch_sizes say how long each row is", got)
    if sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.device != _CPU:
        got_sizes = f"{list(sizes.shape)} of {sizes.dtype} on {sizes.device}"
        _check.fail(function, "batch_sizes", "int64 [T] on the CPU", got_sizes)
    if hx is not None:
        return hx[0].shape[0]
    return options.rows.shape[0] if options.rows is not None else int(sizes[0]) if sizes.shape[0] else 0


def _check_options(function: str, x_gates: Tensor, B: int, H: int, options: RecurrenceOptions) -> None:
    either = (x_gates.device, _CPU)
    there = "the CPU" if x_gates.device == _CPU else f"the CPU or {x_gates.device}"
    if options.lengths is not None:
        _check.shape(function, "lengths", options.lengths, "B", B)
        if options.lengths.is_floating_point() or options.lengths.dtype == torch.bool:
            _check.fail(function, "lengths", "integers", options.lengths.dtype)
        if options.lengths.device not in either:
            _check.fail(function, "lengths", f"on {there}", f"one on {options.lengths.device}")
    if options.reset is not None:
        symbols = "T, B" if options.batch_sizes is None else "N"
        check_weight(function, "reset", options.reset, x_gates, symbols, *x_gates.shape[:-1])
        _check.dtype(function, "reset", options.reset, torch.bool)
    for name in ("h_start", "c_start"):
        if getattr(options, name) is not None:
            check_weight(function, name, getattr(options, name), x_gates, "H", H)
    for name, size in (("seed", 1), ("rows", B)):
        value = getattr(options, name)
        if value is not None and (value.numel() != size or value.dtype != torch.int64 or value.device not in either):
            got = f"{list(value.shape)} of {value.dtype} on {value.device}"
            _check.fail(function, name, f"int64 [{size}] on {there}", got)
    _check.probability(function, "noise_probability", options.noise_probability)
    _check.positive(function, "tau", options.tau)


def result(out: tuple[Tensor, ...], dtype: torch.dtype, return_gates: bool) -> Recurrence:
    """What the operators returned, in the dtype that the caller gave; cell states stay as wide as they are."""
    h, c, gates, h_n, c_n = out
    return Recurrence(
        h.to(dtype), h_n.to(dtype), c_n, c if return_gates else None, gates.to(dtype) if return_gates else None
    )

"""The arguments of ``lstm`` and ``lstm_cell``: weights and states, and what must fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _check
from fastseq.ops._triton import in_low_precision

State = tuple[Tensor, Tensor]
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_ARITHMETIC = (torch.float32, torch.float64)
_CPU = torch.device("cpu")


class Factors(NamedTuple):
    """Factors of the recurrent weights of some gates: those of gate g (i, f, g, o) are up_g [H, r] @ down_g [r, H]."""

    up: Tensor  # [H, R], R the sum of all ranks: the columns of one gate after those of another
    down: Tensor  # [R, H], rows alike
    ranks: tuple[int, int, int, int]  # r of each gate, -1 for a full gate


class Weights(NamedTuple):
    """Parameters of one layer in one direction, named and laid out as in ``torch.nn.LSTM``.

    P is H, or proj_size where there is a weight_hr. Start states of None are zeros. With ``factors`` weight_hh is
    [D*H, H] and holds the D full gates.
    """

    weight_ih: Tensor  # [4*H, I]
    weight_hh: Tensor  # [4*H, P]
    bias_ih: Tensor | None = None  # [4*H]
    bias_hh: Tensor | None = None  # [4*H]
    weight_hr: Tensor | None = None  # [P, H]
    h_start: Tensor | None = None  # [P]
    c_start: Tensor | None = None  # [H]
    factors: Factors | None = None

    @property
    def H(self) -> int:
        return self.weight_hh.shape[0] // 4 if self.factors is None else self.factors.up.shape[0]


def check_input(
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


def check_numbers(noise_probability: float, tau: float, dropout: float, variational_dropout: float) -> None:
    if not 0 <= noise_probability <= 1:
        _check.probability("lstm", "noise_probability", noise_probability)
    if not 0 < tau < float("inf"):
        _check.positive("lstm", "tau", tau)
    if not 0 <= dropout <= 1:
        _check.probability("lstm", "dropout", dropout)
    if not 0 <= variational_dropout <= 1:
        _check.probability("lstm", "variational_dropout", variational_dropout)


def check_state(function: str, n: int, w: Weights, h0: Tensor, c0: Tensor, B: int) -> None:
    _check.shape(function, f"h_0[{n}]", h0, "B, P", B, w.weight_hh.shape[1])
    _check.shape(function, f"c_0[{n}]", c0, "B, H", B, w.H)
    _check.device(function, f"h_0[{n}]", h0, w.weight_hh.device)
    _check.device(function, f"c_0[{n}]", c0, w.weight_hh.device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of cell states beside weights of ``dtype``: never 16 bits."""
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def check_weights(function: str, n: int, w: Weights, width: int, device: torch.device) -> None:
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h_start, c_start, factors = w
    if factors is not None:
        check_factors(function, n, w, factors)
    G, P = 4 * w.H, weight_hh.shape[1]
    fits = (
        weight_ih.shape == (G, width)
        and (factors is not None or weight_hh.shape[0] == G)
        and (G == 4 * P if weight_hr is None else 4 * weight_hr.shape[1] == G and weight_hr.shape[0] == P)
        and (bias_ih is None or bias_ih.shape == (G,))
        and (bias_hh is None or bias_hh.shape == (G,))
        and (h_start is None or h_start.shape == (P,))
        and (c_start is None or 4 * c_start.shape[0] == G)
        and weight_ih.device == device == weight_hh.device
    )
    if not fits:
        _explain(function, n, w, width, device)


def check_factors(function: str, n: int, w: Weights, factors: Factors) -> None:
    """Sizes, dtype and device of factors and full gates, and that there is no projection."""
    up, down, ranks = factors
    at, H = f"weights[{n}]", up.shape[0]
    if len(ranks) != 4 or any(rank < -1 for rank in ranks):
        _check.fail(function, f"{at}.factors.ranks", "four of at least 0, or -1 for a full gate", ranks)
    values, full = sum(rank for rank in ranks if rank > 0), list(ranks).count(-1)
    _check.shape(function, f"{at}.factors.up", up, "H, R", H, values)
    _check.shape(function, f"{at}.factors.down", down, "R, H", values, H)
    _check.shape(function, f"{at}.weight_hh", w.weight_hh, "D*H, H", full * H, H)
    if w.weight_hr is not None:
        _check.fail(function, f"{at}.weight_hr", "None beside factors", list(w.weight_hr.shape))
    for name, value in (("up", up), ("down", down)):
        _check.device(function, f"{at}.factors.{name}", value, w.weight_ih.device)


def _explain(function: str, n: int, w: Weights, width: int, device: torch.device) -> None:
    """Raise for the first of the weights that does not fit the others or x."""
    G, P = w.weight_hh.shape if w.factors is None else (4 * w.H, w.H)
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


def dtypes(function: str, x: Tensor, weight: Tensor, hx: State | None) -> tuple[torch.dtype, torch.dtype]:
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

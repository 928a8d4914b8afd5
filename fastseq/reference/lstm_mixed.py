"""Definition of the LSTM whose recurrent weights are, gate by gate, a product of two thin factors or a full matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.reference.lstm import Outputs, lstm, lstm_backward


def lstm_mixed(
    x_gates: Tensor,
    weight_hh: Tensor | None,
    up: Tensor,
    down: Tensor,
    ranks: Sequence[int],
    h0: Tensor,
    c0: Tensor,
    *options: Any,
) -> Outputs:
    """``lstm`` with recurrent weights of gate g (i, f, g, o) ``up_g @ down_g`` of rank ``ranks[g]``, never multiplied
    together; or, where that is -1, a matrix of ``weight_hh``.

    Args:
        weight_hh: [D*H, H], the matrices of the D full gates one after the other, or None where there are none.
        up: [H, R], R the sum of all ranks: the columns of one gate after those of another. down: [R, H], rows alike.
        options: those of ``lstm`` after weight_hr, in its order.

    Returns:
        As ``lstm``.
    """

    def product(h: Tensor) -> Tensor:
        parts = _parts(weight_hh, up, down, ranks)
        return torch.cat([h @ w.mT if d is None else (h @ d.mT) @ w.mT for w, d in parts], -1)

    return lstm(x_gates, product, h0, c0, None, *options)


def lstm_mixed_backward(
    grads: tuple[Tensor | None, ...],
    gates: Tensor,
    h: Tensor,
    c: Tensor,
    weight_hh: Tensor | None,
    up: Tensor,
    down: Tensor,
    ranks: Sequence[int],
    h0: Tensor,
    c0: Tensor,
    *options: Any,
) -> tuple[Any, ...]:
    """Gradients of ``lstm_mixed`` from its outputs, itself differentiable. Arguments as in ``lstm_backward``.

    Returns:
        dx_gates, dweight_hh (without elements where there is none), dup, ddown, dh0, dc0, dh_start [H], dc_start [H].
    """

    def transposed(d: Tensor, h_in: Tensor) -> tuple[Tensor, ...]:
        dh, dfull, dups, ddowns = torch.zeros_like(h_in), [up.new_empty(0, up.shape[0])], [up[:, :0]], [down[:0]]
        for one, (w, factor) in zip(d.chunk(4, -1), _parts(weight_hh, up, down, ranks), strict=True):
            if factor is None:
                dh, dfull = dh + one @ w, [*dfull, one.mT @ h_in]
            else:
                dv = one @ w
                dh, dups, ddowns = dh + dv @ factor, [*dups, one.mT @ (h_in @ factor.mT)], [*ddowns, dv.mT @ h_in]
        return dh, torch.cat(dfull), torch.cat(dups, 1), torch.cat(ddowns)

    out = lstm_backward(grads, gates, h, c, transposed, h0, c0, None, *options)
    dx_gates, (dweight_hh, dup, ddown), dh0, dc0, _, dh_start, dc_start = out
    return dx_gates, dweight_hh, dup, ddown, dh0, dc0, dh_start, dc_start


def _parts(
    weight_hh: Tensor | None, up: Tensor, down: Tensor, ranks: Sequence[int]
) -> list[tuple[Tensor, Tensor | None]]:
    """Both factors of each gate, or its matrix and None."""
    lows = [rank for rank in ranks if rank >= 0]
    factors = iter(zip(up.split(lows, 1), down.split(lows), strict=True))
    full = iter([] if weight_hh is None else weight_hh.split(up.shape[0]) if up.shape[0] else [weight_hh] * 4)
    return [(next(full), None) if rank < 0 else next(factors) for rank in ranks]

"""``lstm_int8``: checks, dtypes and layout around the operator of the int8 recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import _check
from fastseq.functional._recurrence import Recurrence, RecurrenceOptions, check_weight, prepared, result
from fastseq.ops import lstm_int8 as _ops

_LARGEST = (2**31 - 1) // (127 * 128)  # H whose integer sums surely fit in 32 bits


def lstm_int8(
    x_gates: Tensor,
    weight_hh: Tensor,
    scale: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    return_gates: bool = False,
    **options: Any,
) -> Recurrence:
    """One layer in one direction with int8 recurrent weights, for inference; definition: ``reference.lstm_int8``.

    Args:
        x_gates: [T, B, 4*H], or packed [N, 4*H] with ``batch_sizes``: pre-activations i, f, g, o, biases added.
        weight_hh: int8 [4*H, H]. scale: float32 [4*H]; row n of the weights is scale[n] * weight_hh[n].
        hx: h0 and c0, [B, H] each; None means the start states.
        return_gates: return all c and the activated gates.
        options: those of ``RecurrenceOptions``, by name.

    Returns:
        ``Recurrence``, without a gradient.

    Raises:
        ArgumentError: naming the argument, also where one requires a gradient.
    """
    f = "lstm_int8"
    _check.dtype(f, "weight_hh", weight_hh, torch.int8)
    H = weight_hh.shape[-1]
    if H > _LARGEST:
        _check.fail(f, "weight_hh", f"[4*H, H] with H <= {_LARGEST}", list(weight_hh.shape))
    check_weight(f, "weight_hh", weight_hh, x_gates, "4*H, H", 4 * H, H)
    check_weight(f, "scale", scale, x_gates, "4*H", 4 * H)
    _check.dtype(f, "scale", scale, torch.float32)
    given = RecurrenceOptions(**options)
    tensors = {"x_gates": x_gates, "scale": scale, "h_start": given.h_start, "c_start": given.c_start}
    tensors |= {} if hx is None else {"h0": hx[0], "c0": hx[1]}
    for name, value in tensors.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            _check.fail(f, name, "without a gradient (torch.no_grad, or detach)", "one that requires it")
    x, h0, c0, rest = prepared(f, x_gates, hx, H, given)
    save = 2 if return_gates else 0
    out = _ops.lstm_int8(x, weight_hh.contiguous(), scale.contiguous(), h0, c0, *rest, save)
    return result(out, x_gates.dtype, return_gates)

"""``lstm_lowrank``: checks, dtypes and layout around the operators of the low-rank recurrence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastseq import _check
from fastseq.functional._recurrence import Recurrence, RecurrenceOptions, arithmetic, check_weight, prepared, result
from fastseq.ops import lstm_lowrank as _ops


def lstm_lowrank(
    x_gates: Tensor,
    up: Tensor,
    down: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    return_gates: bool = False,
    **options: Any,
) -> Recurrence:
    """One layer in one direction with recurrent weights ``up[g] @ down[g]``; definition: ``reference.lstm_lowrank``.

    Args:
        x_gates: [T, B, 4*H], or packed [N, 4*H] with ``batch_sizes``: pre-activations i, f, g, o, biases added.
        up: [4, H, r]. down: [4, r, H], or [1, r, H], which all gates share.
        hx: h0 and c0, [B, H] each; None means the start states.
        return_gates: return all c and the activated gates.
        options: those of ``RecurrenceOptions``, by name.

    Returns:
        ``Recurrence``. Differentiable in x_gates, up, down, hx, h_start and c_start.

    Raises:
        ArgumentError: naming the argument.
    """
    f = "lstm_lowrank"
    if up.dim() != 3 or up.shape[0] != 4:
        _check.fail(f, "up", "[4, H, r]", list(up.shape))
    _, H, r = up.shape
    downs = 1 if down.dim() == 3 and down.shape[0] == 1 else 4
    check_weight(f, "up", up, x_gates, "4, H, r", 4, H, r)
    check_weight(f, "down", down, x_gates, f"{downs}, r, H", downs, r, H)
    for name, value in (("up", up), ("down", down)):
        _check.dtype(f, name, value, x_gates.dtype)
    dtype = arithmetic(f, x_gates)
    x, h0, c0, rest = prepared(f, x_gates, hx, H, RecurrenceOptions(**options))
    up, down = up.to(dtype).contiguous(), down.to(dtype).contiguous()
    out = _ops.lstm_lowrank(x, up, down, h0, c0, rest, 2 if return_gates else 0)
    return result(out, x_gates.dtype, return_gates)

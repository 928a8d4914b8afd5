"""What would be read or written out of bounds, said in words: the checks of the LSTM's host functions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq_kernels._steps import Grads, Recurrence


def tensor(
    name: str, given: Tensor | None, words: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise for a tensor of another shape, dtype or device, or one that is not contiguous; None passes.

    Raises:
        ValueError: with the name, what is expected with its sizes, and what came.
    """
    if given is None:
        return
    if tuple(given.shape) != shape:
        raise ValueError(f"lstm: {name} must be {words} = {list(shape)}, got {list(given.shape)}")
    if given.dtype != dtype:
        kind, got = (str(d).removeprefix("torch.") for d in (dtype, given.dtype))
        raise ValueError(f"lstm: {name} must be {kind}, got {got}")
    if given.device != device:
        raise ValueError(f"lstm: {name} must be on {device}, got {given.device}")
    if not given.is_contiguous():
        raise ValueError(f"lstm: {name} must be contiguous, got strides {list(given.stride())}")


def recurrence(call: Recurrence, data: Tensor) -> None:
    """Everything that a call is given beside ``data`` [T, B, ...] or [N, ...], whose dtype and device count."""
    (B, H), P = (call.rows.B, call.weight_hh.shape[0] // 4), call.weight_hh.shape[-1]
    of = (data.dtype, data.device)
    lead = "[N, " if call.rows.offsets is not None else "[T, B, "
    if data.dim() != (2 if call.rows.offsets is not None else 3):
        raise ValueError(f"lstm: data must be {lead}...], got {list(data.shape)}")
    if not data.is_contiguous():
        raise ValueError(f"lstm: data must be contiguous, got strides {list(data.stride())}")
    if call.rows.offsets is None and data.shape[1] != B:
        raise ValueError(f"lstm: h0 must be [B, P] = [{data.shape[1]}, {P}], got {list(call.h0.shape)}")
    if call.weight_hr is None and P != H:
        raise ValueError(f"lstm: weight_hh must be [4*H, H] without weight_hr, got {list(call.weight_hh.shape)}")
    tensor("weight_hh", call.weight_hh, "[4*H, P]", (4 * H, P), *of)
    tensor("h0", call.h0, "[B, P]", (B, P), *of)
    tensor("c0", call.c0, "[B, H]", (B, H), torch.float32, data.device)
    tensor("weight_hr", call.weight_hr, "[P, H]", (P, H), *of)
    tensor("h_start", call.h_start, "[P]", (P,), *of)
    tensor("c_start", call.c_start, "[H]", (H,), torch.float32, data.device)
    kind = torch.int64 if call.rows.lengths is None else call.rows.lengths.dtype
    tensor("lengths", call.rows.lengths, "[B]", (B,), kind, data.device)
    tensor("reset", call.reset, lead[:-2] + "]", tuple(data.shape[:-1]), torch.bool, data.device)


def elements(call: Recurrence, data: Tensor, name: str, given: Tensor | None, words: str, width: int) -> None:
    """A tensor with one row of ``width`` per element of ``data``; c and its gradient are float32."""
    lead = "N" if call.rows.offsets is not None else "T, B"
    dtype = torch.float32 if name.endswith("c") else data.dtype
    tensor(name, given, f"[{lead}, {words}]", (*data.shape[:-1], width), dtype, data.device)


def backward(call: Recurrence, grads: Grads, gates: Tensor, h: Tensor, c: Tensor) -> None:
    """What a forward kept, and the gradients of what it returned."""
    B, H, P = call.rows.B, call.H, call.P
    elements(call, h, "gates", gates, "4*H", 4 * H)
    elements(call, h, "h", h, "P", P)
    elements(call, h, "c", c, "H", H)
    elements(call, h, "dh", grads.h, "P", P)
    elements(call, h, "dc", grads.c, "H", H)
    elements(call, h, "dgates", grads.gates, "4*H", 4 * H)
    tensor("dh_n", grads.h_n, "[B, P]", (B, P), h.dtype, h.device)
    tensor("dc_n", grads.c_n, "[B, H]", (B, H), torch.float32, h.device)

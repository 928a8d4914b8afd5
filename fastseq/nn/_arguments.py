"""Argument checks of the modules, in the words of ``torch.nn`` (a packed input is checked like a padded one)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq._check import ArgumentError, fail


def check_input(x: Tensor, input_size: int, weight: Tensor, dims: int) -> None:
    """Sizes and dtype of a layer's input, padded (3-D) or packed (2-D)."""
    if x.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        raise ArgumentError(
            f"LSTM: RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.dim() != dims:
        raise ArgumentError(f"LSTM: input must have {dims} dimensions, got {x.dim()}")
    if x.shape[-1] != input_size:
        raise ArgumentError(
            f"LSTM: input.size(-1) must be equal to input_size. Expected {input_size}, got {x.shape[-1]}"
        )


def check_state(hx: Any, name: str = "LSTM") -> tuple[Tensor, Tensor]:
    """``hx`` is a pair of tensors."""
    pair = isinstance(hx, (tuple, list)) and len(hx) == 2
    if not pair or not isinstance(hx[0], Tensor) or not isinstance(hx[1], Tensor):
        got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"{name}: hx must be a tuple of two tensors (h_0, c_0), got {got}")
    return hx[0], hx[1]


def check_state_dims(hx: tuple[Tensor, Tensor], batched: bool) -> None:
    """State of padded input: 3-D when batched, 2-D when not."""
    dims = 3 if batched else 2
    if hx[0].dim() != dims or hx[1].dim() != dims:
        raise ArgumentError(
            f"LSTM: For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should also be {dims}-D "
            f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )


def check_state_sizes(
    hx: tuple[Tensor, Tensor], x: Tensor, h_size: tuple[int, int, int], c_size: tuple[int, int, int]
) -> None:
    """Sizes, dtype and device of the state."""
    for n, (state, size) in enumerate(zip(hx, (h_size, c_size), strict=True)):
        if state.shape != size:
            raise ArgumentError(f"LSTM: Expected hidden[{n}] size {size}, got {list(state.shape)}")
        if state.dtype != x.dtype and not torch._C._is_any_autocast_enabled():
            fail("LSTM", f"hidden[{n}]", f"of the input's dtype {x.dtype}", state.dtype)
        if state.device != x.device:
            fail("LSTM", f"hidden[{n}]", f"on the input's device {x.device}", state.device)


def check_reset_pack(reset: PackedSequence, batch_sizes: Tensor, order: Tensor | None) -> None:
    """A packed reset mask has the packing of the input."""
    same = reset.batch_sizes.shape == batch_sizes.shape and (reset.sorted_indices is None) == (order is None)
    if same and not torch.compiler.is_compiling():  # a graph does not read values
        same = torch.equal(reset.batch_sizes, batch_sizes)
        other = reset.sorted_indices
        if same and order is not None and other is not None and order is not other and order.is_cpu:
            same = torch.equal(other, order)  # on a GPU the comparison would wait for the device
    if not same:
        fail("LSTM", "reset", "packed as the input is", "other batch_sizes or another order of rows")


def check_cell(x: Tensor, hx: tuple[Tensor, Tensor] | None, input_size: int, hidden_size: int) -> None:
    """Everything that ``nn.LSTMCell`` checks, and the state's dtype and device."""
    if x.dim() not in (1, 2):
        raise ArgumentError(f"LSTMCell: Expected input to be 1D or 2D, got {x.dim()}D instead")
    if x.shape[-1] != input_size:
        raise ArgumentError(f"LSTMCell: input has inconsistent input_size: got {x.shape[-1]} expected {input_size}")
    if hx is None:
        return
    for n, state in enumerate(hx):
        if state.dim() not in (1, 2):
            raise ArgumentError(f"LSTMCell: Expected hx[{n}] to be 1D or 2D, got {state.dim()}D instead")
        if state.dim() != x.dim():
            fail("LSTMCell", f"hx[{n}]", f"{x.dim()}D as the input is", f"{state.dim()}D")
        if x.dim() == 2 and state.shape[0] != x.shape[0]:
            raise ArgumentError(
                f"LSTMCell: Input batch size {x.shape[0]} doesn't match hidden{n} batch size {state.shape[0]}"
            )
        if state.shape[-1] != hidden_size:
            raise ArgumentError(
                f"LSTMCell: hidden{n} has inconsistent hidden_size: got {state.shape[-1]}, expected {hidden_size}"
            )
        if state.dtype != x.dtype and not torch._C._is_any_autocast_enabled():
            fail("LSTMCell", f"hx[{n}]", f"of the input's dtype {x.dtype}", state.dtype)
        if state.device != x.device:
            fail("LSTMCell", f"hx[{n}]", f"on the input's device {x.device}", state.device)

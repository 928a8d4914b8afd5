"""Which rows are alive at which step, and where their elements lie: dense [T, B, ...] or packed [N, ...] data."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The layout of one call. Row b is alive at step t < lengths[b]; its element is offsets[t] + b, or t * B + b."""

    T: int
    B: int
    lengths: Tensor | None  # int64 [B] on the device; None: all rows have T steps
    offsets: Tensor | None  # int64 [T] on the device, of packed data; None: dense


def rows_of(data: Tensor, B: int, lengths: Tensor | None, batch_sizes: Tensor | None) -> Rows:
    """The layout of ``data`` [T, B, ...], or [N, ...] with batch_sizes.

    Lengths that live on the device are not read here; kernels bound them by T.

    Raises:
        ValueError: values out of range, as far as they lie on the CPU.
    """
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        check_sizes(sizes, data.shape[0], B)
        if data.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError("lstm_forward: batch_sizes must be None while a CUDA graph is captured; pass lengths")
        steps = [sum(size > b for size in sizes) for b in range(B)] if B * len(sizes) < 4096 else None
        if steps is None:
            steps = (batch_sizes[:, None] > torch.arange(B)).sum(0).tolist()
        offsets = list(accumulate(sizes, initial=0))[:-1]
        return Rows(len(sizes), B, upload(steps, data.device), upload(offsets, data.device))
    T = data.shape[0]
    if lengths is not None and lengths.device.type == "cpu":
        if ((lengths < 0) | (lengths > T)).any():
            raise ValueError(f"lstm_forward: lengths must lie in 0 .. T = {T}, got {lengths.tolist()}")
        lengths = upload(lengths, data.device)
    return Rows(T, B, lengths, None)


def check_sizes(sizes: list[int], elements: int, B: int) -> None:
    """Raise for batch_sizes that do not describe ``elements`` packed elements of B rows."""
    if any(a < b for a, b in zip([B, *sizes], [*sizes, 0], strict=True)):
        raise ValueError(f"lstm_forward: batch_sizes must not increase and lie in 0 .. B = {B}, got {sizes}")
    if sum(sizes) != elements:
        raise ValueError(f"lstm_forward: batch_sizes must sum to the rows of data = {elements}, got {sum(sizes)}")


def upload(values: list[int] | Tensor, device: torch.device) -> Tensor:
    """int64 on the device, without waiting for it: pinned memory, which torch keeps until the copy is done."""
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host

"""``fastseq::lstm_persist_lowrank_*`` on CPU tensors, by the kernels of csrc/cuda that are compiled for the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tests.cuda import emulated_lowrank


def _sizes(data: Tensor, c0: Tensor, offsets: Tensor | None) -> tuple[int, int, int]:
    B, H = c0.shape
    return len(data if offsets is None else offsets), B, H


def forward(x_gates: Tensor, up: Tensor, down: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None,
            offsets: Tensor | None, tau: float, hard: bool, reverse: bool, tile: int,
            *outs: Tensor | None) -> None:  # fmt: skip
    sizes, gate = _sizes(x_gates, c0, offsets), (tau, hard, reverse, tile)
    tensors = [x_gates, up, down, h0, c0, *outs]
    emulated_lowrank.run("forward", tensors, (up, down), sizes, (lengths, offsets), gate)


def backward(dh: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, c: Tensor, up: Tensor,
             down: Tensor, c0: Tensor, lengths: Tensor | None, offsets: Tensor | None, tau: float, hard: bool,
             reverse: bool, tile: int, *outs: Tensor) -> None:  # fmt: skip
    sizes, gate = _sizes(gates, c0, offsets), (tau, hard, reverse, tile)
    tensors = [dh, dh_n, dc_n, gates, c, up, down, c0, *outs]
    emulated_lowrank.run("backward", tensors, (up, down), sizes, (lengths, offsets), gate)


@contextmanager
def registered() -> Iterator[None]:
    """Inside, the operators take CPU tensors."""
    with torch.library._scoped_library("fastseq", "IMPL") as given:
        given.impl("lstm_persist_lowrank_forward", forward, "CPU")
        given.impl("lstm_persist_lowrank_backward", backward, "CPU")
        yield

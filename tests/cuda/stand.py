"""``fastseq::lstm_persist_*`` on CPU tensors, by the kernels of csrc/cuda that are compiled for the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tests.cuda.emulated import Backward, Forward, Shape, library, pointer

Lists = Sequence[Sequence[Tensor | None]]


def _run(
    kernel: str, lists: Lists, lengths: Tensor | None, offsets: Tensor | None, gate: tuple[float, bool, bool, int]
) -> None:
    """``lists`` in the order of the structure: each has a tensor or None per direction, or is empty."""
    data, state = (0, 4) if kernel == "forward" else (3, 6)  # where x_gates or gates are, and c0
    count, tau, hard, reverse, tile = len(lists[data]), *gate
    first, c0 = lists[data][0], lists[state][0]
    assert first is not None and c0 is not None
    T = len(first if offsets is None else offsets)
    low = first.dtype == torch.bfloat16
    int8 = kernel == "forward" and len(lists[2]) > 0
    shape = Shape(T, *c0.shape, pointer(lengths), pointer(offsets), 1 / tau, hard, low, int8)
    kind = Forward if kernel == "forward" else Backward
    calls = (kind * count)()
    for n in range(count):
        calls[n] = kind(*(pointer(v[n]) if v else None for v in lists), reverse != (n == 1))
    assert getattr(library(tile), f"emulate_{kernel}")(ctypes.byref(shape), calls, count, tile, 0)


def forward(x_gates: Sequence[Tensor], weight_hh: Sequence[Tensor], scale: Sequence[Tensor], h0: Sequence[Tensor],
            c0: Sequence[Tensor], lengths: Tensor | None, offsets: Tensor | None, tau: float, hard: bool,
            reverse: bool, tile: int, *outs: Sequence[Tensor]) -> None:  # fmt: skip
    _run("forward", [x_gates, weight_hh, scale, h0, c0, *outs], lengths, offsets, (tau, hard, reverse, tile))


def backward(dh: Sequence[Tensor | None], dh_n: Sequence[Tensor | None], dc_n: Sequence[Tensor | None],
             gates: Sequence[Tensor], c: Sequence[Tensor], weight_hh: Sequence[Tensor], c0: Sequence[Tensor],
             lengths: Tensor | None, offsets: Tensor | None, tau: float, hard: bool, reverse: bool, tile: int,
             *outs: Sequence[Tensor]) -> None:  # fmt: skip
    lists = [dh, dh_n, dc_n, gates, c, weight_hh, c0, *outs]
    _run("backward", lists, lengths, offsets, (tau, hard, reverse, tile))


@contextmanager
def registered() -> Iterator[None]:
    """Inside, the operators take CPU tensors."""
    with torch.library._scoped_library("fastseq", "IMPL") as given:
        given.impl("lstm_persist_forward", forward, "CPU")
        given.impl("lstm_persist_backward", backward, "CPU")
        yield

"""What the parity calls of the LSTM step by step in CUDA graphs, which nobody chooses before they were seen right.

Verified under the name of its module, ``lstm_graph``. Each case is called twice, since a replay comes after a capture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from benchmarks.gpu.parity import Check, Kernels
from benchmarks.gpu.parity_lstm import backward, by_route, forward
from benchmarks.harness import CannotRun

CASES = ("graphs", "wide", "large", "prime", "long", "lengths", "reset_reverse", "packed", "start", "noise")


def twice(kernels: Kernels, call: Callable[[Kernels, str], None], name: str) -> None:
    if kernels.context.device.type != "cuda":
        raise CannotRun("there are no graphs without CUDA")
    for _ in range(2):
        by_route(kernels, call, name, "graph")


def checks(kernels: Kernels) -> Iterator[Check]:
    for name in CASES:
        yield Check("lstm_graph", "lstm_forward", name, functools.partial(twice, kernels, forward, name))
        yield Check("lstm_graph", "lstm_backward", name, functools.partial(twice, kernels, backward, name))

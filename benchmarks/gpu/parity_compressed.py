"""What the parity calls of the compressed LSTMs: low rank with its gradient, and weights of 8 bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.parity import Check, Kernels, definition
from benchmarks.gpu.parity_lstm import arguments, compare, shortened
from fastseq.ops import lstm_int8, lstm_lowrank
from tests.ops import lstm_cases
from tests.tolerance import GRADIENTS

LOWRANK = ("tiles", "resident", "prime", "wide", "lengths_reverse", "packed", "reset_reverse", "start", "noise", "one")
INT8 = ("tiles", "resident", "wide", "prime", "large")
RANKS = {"own": (4, 5), "shared": (1, 16)}  # factors down of each gate or of all, and their rank
LOWRANK_GRADIENTS = "dx_gates dup ddown dh0 dc0 dh_start dc_start"


def _lowrank(name: str, form: str, dtype: torch.dtype) -> list[Any]:
    """Arguments of ``lstm_lowrank_forward``."""
    args = arguments(name, dtype)
    H = args[3].shape[1]
    gates, rank = RANKS[form]
    generator = torch.Generator().manual_seed(41)
    up = torch.randn(4, H, rank, generator=generator) / rank**0.5
    down = torch.randn(gates, rank, H, generator=generator) / H**0.5
    return [args[0], up.to(dtype), down.to(dtype), *args[2:4], *args[5:]]


def forward(kernels: Kernels, name: str, form: str) -> None:
    args = _lowrank(name, form, kernels.torch_dtype)
    compare(kernels, "lstm_lowrank", "lstm_lowrank_forward", lstm_lowrank.BACKENDS, lstm_cases.OUTPUTS, args, args[6])


def backward(kernels: Kernels, name: str, form: str) -> None:
    args = _lowrank(name, form, kernels.torch_dtype)
    exact = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in args]
    made = definition("lstm_lowrank_forward", lstm_lowrank.BACKENDS)(*exact)
    kept = shortened(list(made), kernels.torch_dtype, {1, 4})
    h, c, gates = kept[:3]
    given = [*kernels.gradients(kept), gates, h, c, *args[1:10], *args[15:18], True]
    table = lstm_lowrank.BACKENDS
    compare(kernels, "lstm_lowrank", "lstm_lowrank_backward", table, LOWRANK_GRADIENTS, given, args[6], GRADIENTS)


def int8(kernels: Kernels, name: str, steps: int) -> None:
    """A step at a time: from a state of the kernel's own, since a rounding of h to 8 bits can go either way."""
    args = arguments(name, kernels.torch_dtype)
    x_gates, _, h0, c0 = args[:4]
    x_gates = x_gates[:steps]
    (B, H), T = c0.shape, len(x_gates)
    generator = torch.Generator().manual_seed(43)
    weight_hh = torch.randint(-127, 128, (4 * H, H), generator=generator, dtype=torch.int8)
    scale = torch.rand(4 * H, generator=generator) / (64 * H**0.5)
    rest = [None] * 7 + [0, 0, 1.0, 1.0, False, False, 2]
    given = [x_gates, weight_hh, scale, h0, c0, *rest]
    h, c, gates, h_n, c_n = kernels.call("lstm_int8", "lstm_int8_forward", given)
    before = [torch.cat((first[None], all_steps[:-1])).flatten(0, 1) for first, all_steps in ((h0, h), (c0, c))]
    flat = [x_gates.reshape(1, T * B, 4 * H), weight_hh, scale, *before, *rest]
    got = [v.reshape(1, T * B, -1) for v in (h, c, gates)]
    one = definition("lstm_int8_forward", lstm_int8.BACKENDS)
    kernels.within_budget("h c gates", got, lambda *a: one(*a)[:3], flat)
    assert torch.equal(h_n, h[-1]) and torch.equal(c_n, c[-1]), "h_n, c_n: not the last of h, c"


def checks(kernels: Kernels) -> Iterator[Check]:
    dry = kernels.context.dry
    for name in LOWRANK[2:3] if dry else LOWRANK:
        for form in RANKS:
            call = functools.partial(forward, kernels, name, form)
            yield Check("lstm_lowrank", "lstm_lowrank_forward", f"{name} {form}", call)
            if not dry:
                call = functools.partial(backward, kernels, name, form)
                yield Check("lstm_lowrank", "lstm_lowrank_backward", f"{name} {form}", call)
    if kernels.dtype == "tf32":
        return
    for name in INT8[3:4] if dry else INT8:
        steps = 4 if kernels.dtype == "float32" else 1  # in 16 bits h is rounded before anybody sees it
        yield Check("lstm_int8", "lstm_int8_forward", name, functools.partial(int8, kernels, name, steps))

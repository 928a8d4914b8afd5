"""What compression costs: the outputs of every LSTM step by step, and milliseconds of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils.hooks import RemovableHandle

CALLS = 7  # of which the median is told


class Steps(NamedTuple):
    """Of one LSTM: the error of its output, relative to its size, at these steps."""

    module: str
    first: float
    middle: float
    last: float


def outputs(model: nn.Module, modules: dict[str, nn.Module], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """What each module returned in a call in evaluation mode, [T, ...]; the steps of a cell are its calls."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str, module: nn.Module, out: Any) -> None:
        out = out[0]
        if isinstance(out, PackedSequence):
            out = pad_packed_sequence(out)[0]
        elif getattr(module, "batch_first", False) and out.dim() == 3:
            out = out.transpose(0, 1)
        found[name].append(out if hasattr(module, "num_layers") else out[None])

    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: keep(name, m, out))
        for name, module in modules.items()
    ]
    observe(model, handles, inputs)
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def observe(model: nn.Module, handles: Sequence[RemovableHandle], inputs: tuple[Any, ...]) -> None:
    """One call in evaluation mode with hooks that go when it ends; modules stay in the mode that they were in."""
    training = {m: m.training for m in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode


def step_errors(true: dict[str, Tensor], found: dict[str, Tensor]) -> list[Steps]:
    rows = []
    for name, expected in true.items():
        got, T = found[name], len(expected)
        if T:
            rows.append(Steps(name, *(_error(got[t], expected[t]) for t in (0, T // 2, T - 1))))
    return rows


def _error(got: Tensor, expected: Tensor) -> float:
    size = expected.double().norm()
    return float((got.double() - expected.double()).norm() / size) if size > 0 else float(got.double().norm())


def times(models: Sequence[nn.Module], inputs: tuple[Any, ...]) -> tuple[float, ...]:
    """Milliseconds of a call of each in evaluation mode, in turn, so that all see the same machine."""
    taken: list[list[float]] = [[] for _ in models]
    modes = [{m: m.training for m in model.modules()} for model in models]
    for model in models:
        model.eval()
    with torch.no_grad():
        for _ in range(CALLS + 1):  # the first is to warm up
            for model, own in zip(models, taken, strict=True):
                begin = time.perf_counter()
                model(*inputs)
                _wait(inputs)
                own.append((time.perf_counter() - begin) * 1e3)
    for mode in modes:
        for module, training in mode.items():
            module.training = training
    return tuple(statistics.median(own[1:]) for own in taken)


def _wait(inputs: tuple[Any, ...]) -> None:
    if any(isinstance(v, Tensor) and v.is_cuda for v in inputs):
        torch.cuda.synchronize()

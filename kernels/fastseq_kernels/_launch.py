"""How kernels are launched, what the device at hand can hold, and how launches are listed without a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when triton was imported


class Target(NamedTuple):
    """What the choice of tiles depends on."""

    capability: int  # 80 for compute capability 8.0
    shared: int  # bytes of shared memory that one program can have
    multiprocessors: int


# Shared memory of one block: CUDA C++ Programming Guide, table of technical specifications per compute capability.
# Multiprocessors: of the full part of each (A100, A10, L40S, H100, B200, RTX 5090).
_KIB = 1024
TARGETS = {
    80: Target(80, 163 * _KIB, 108),
    86: Target(86, 99 * _KIB, 84),
    89: Target(89, 99 * _KIB, 142),
    90: Target(90, 227 * _KIB, 132),
    100: Target(100, 227 * _KIB, 148),
    120: Target(120, 99 * _KIB, 170),
}


class Launch(NamedTuple):
    """One launch: everything that decides which binary runs."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


_target: Target | None = None  # the one to choose tiles for, where it is not the device of the tensors
_recorded: list[Launch] | None = None


def target(device: torch.device) -> Target:
    """What the device can hold. Interpreted kernels, on the CPU, count as sm_80 unless ``targeting`` says otherwise."""
    if _target is not None:
        return _target
    if device.type != "cuda":
        return TARGETS[80]
    found = torch.cuda.get_device_properties(device)
    capability = 10 * found.major + found.minor
    return Target(capability, found.shared_memory_per_block_optin, found.multi_processor_count)


@contextlib.contextmanager
def targeting(chosen: Target) -> Iterator[None]:
    """Choose tiles for another target than the device of the tensors."""
    global _target
    before, _target = _target, chosen
    try:
        yield
    finally:
        _target = before


@contextlib.contextmanager
def recording(chosen: Target) -> Iterator[list[Launch]]:
    """List the launches of what runs inside instead of making them; tensors are fake ones on ``cuda``."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        with targeting(chosen):
            yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 1, **constexprs: Any
) -> Any:
    """Run ``kernel`` on a grid of programs, on the device and stream of its tensors; an empty grid runs none.

    Returns:
        The binary that ran on the current device, or None.
    """
    if 0 in grid:
        return None
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
        return None
    options = {} if INTERPRETED else {"num_warps": num_warps, "num_stages": num_stages}
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constexprs, **options)
        return None
    return kernel[grid](*args, **constexprs, **options)


class Repeated:
    """A launch that a loop makes again and again, with the same tensors and other numbers that specialise no kernel.

    triton looks for the binary of every call, which takes longer than a step on the device; here of the first alone.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int], **options: Any) -> None:
        self._kernel, self._grid, self._options = kernel, grid, options
        self._again: Callable[..., None] | None = None
        self._constants: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> None:
        if self._again is not None:
            self._again(*args, *self._constants)
            return
        binary = launch(self._kernel, self._grid, *args, **self._options)
        if binary is not None and not INTERPRETED:
            self._again = binary[(*self._grid, 1)]
            self._constants = tuple(self._options[name] for name in self._kernel.arg_names[len(args) :])


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1, most: int | None = None) -> int:
    """The smallest power of two that is at least n, within bounds."""
    found = max(least, 1 << max(n - 1, 0).bit_length())
    return found if most is None else min(found, most)


def rnn_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of products inside an LSTM: TF32 where ``torch.backends.cudnn.rnn`` allows it."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"

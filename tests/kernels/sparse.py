"""Tensors of more than 2^31 elements that take no memory, and launches of which only some programs run."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from fastseq_kernels import _launch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime import interpreter

Programs = Callable[[tuple[int, int, int]], Iterable[tuple[int, int, int]]]  # some of a grid
LARGE = 1 << 26  # bytes; smaller tensors are ordinary ones


def sparse(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of which only the pages that are written take memory.

    As many lie before the tensor as a 32-bit offset that overflows can go back: what it reads there is wrong, too.
    """
    size, before = dtype.itemsize * math.prod(shape), dtype.itemsize << 31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python < 3.13 does not name
    memory = mmap.mmap(-1, before + max(size, 1), flags=flags)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=before).view(shape)


def at_end(values: Tensor, n: int, dim: int = 0) -> Tensor:
    """``values`` as the last ones of n along ``dim``; the others are zeros."""
    shape = list(values.shape)
    shape[dim] = n
    if math.prod(shape) * values.dtype.itemsize < LARGE:
        found = torch.zeros(shape, dtype=values.dtype)
    else:
        found = sparse(*shape, dtype=values.dtype)
    found.narrow(dim, n - values.shape[dim], values.shape[dim]).copy_(values)
    return found


class _Sparse(TorchFunctionMode):
    """Large new tensors are sparse ones, and so zeros."""

    MAKES = {torch.empty, torch.zeros, torch.empty_like, torch.zeros_like, Tensor.new_empty, Tensor.new_zeros}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.MAKES:
            like = func(*args, **{**kwargs, "device": "meta"})
            if like.numel() * like.dtype.itemsize >= LARGE:
                return sparse(*like.shape, dtype=like.dtype)
        return func(*args, **kwargs)


def last(grid: tuple[int, int, int]) -> Iterable[tuple[int, int, int]]:
    """All programs along short axes, the last one along long ones."""
    return itertools.product(*(range(n) if n < 1000 else [n - 1] for n in grid))


def _run_some(programs: Programs) -> Callable[..., None]:
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        """``GridExecutor.__call__``, without its copies of all arguments."""
        known = inspect.getfullargspec(self.fn).args
        scope = interpreter._patch_lang(self.fn)
        try:
            bound = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in known})
            bound = {n: a if n in self.constexprs else interpreter._implicit_cvt(a) for n, a in bound.items()}
            grid = (*self.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for place in programs(grid):
                interpreter.interpreter_builder.set_grid_idx(*place)
                self.fn(**bound)
        finally:
            scope.restore()

    return call


@contextlib.contextmanager
def some_programs(programs: Programs = last) -> Iterator[None]:
    """Inside, some programs of every launch run, and large new tensors are sparse.

    The device has so many multiprocessors that no program takes a second tile.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    device = _launch.TARGETS[80]._replace(multiprocessors=1 << 26)
    with mock.patch.object(interpreter.GridExecutor, "__call__", _run_some(programs)), _Sparse():
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            with _launch.targeting(device):
                yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = fill

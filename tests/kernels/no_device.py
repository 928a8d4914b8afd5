"""Tensors that say they are on a GPU, where there is none: shapes, dtypes and strides without values.

torch's own fake tensors do not index, copy or move between devices in a build of torch without CUDA. These are tensors
on ``meta`` with another answer to ``device``; to read a value of one raises, which on a GPU would be to wait for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

DEVICE = torch.device("cuda", 0)
# asked of every tensor again and again, and with answers that are no tensors
PLAIN = {getattr(Tensor, name).__get__ for name in ("dtype", "shape", "requires_grad", "ndim")}
PLAIN |= {Tensor.dim, Tensor.stride, Tensor.is_contiguous, Tensor.numel, Tensor.element_size, Tensor.size}


class OnGPU(Tensor):
    """A tensor on ``meta`` that claims to be on DEVICE."""

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def pin_memory(self, *args: Any) -> Tensor:
        raise RuntimeError("only tensors on the CPU can be pinned")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs on the tensors as they are, because torch's own functions for ``meta`` ask for the device too."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in PLAIN:
                return func(*args)
            args, kwargs = pytree.tree_map_only(OnGPU, lambda t: t.as_subclass(Tensor), (args, kwargs or {}))
            found = func(*args, **kwargs)
            if isinstance(found, torch.Size):
                return found
            return pytree.tree_map_only(Tensor, lambda t: t.as_subclass(OnGPU) if t.is_meta else t, found)


def _is_gpu(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"


class _Moves(TorchFunctionMode):
    """Makes and moves tensors to ``meta`` where ``cuda`` is asked for."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = [v for v in (*args, *kwargs.values()) if not isinstance(v, Tensor)]
        if not any(_is_gpu(v) for v in asked):
            return func(*args, **kwargs)
        moved = func in (Tensor.to, Tensor.cuda) and not isinstance(args[0], OnGPU)
        if func in (torch.tensor, torch.as_tensor) or (moved and not kwargs.get("non_blocking")):
            raise RuntimeError("a copy to the GPU that waits for it; use fastseq_kernels._rows.upload")
        args = tuple("meta" if _is_gpu(v) else v for v in args)
        kwargs = {name: "meta" if _is_gpu(v) else v for name, v in kwargs.items()}
        found = func(*args, **kwargs)
        return found if isinstance(found, OnGPU) else found.as_subclass(OnGPU)


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Inside, ``cuda`` is a device that keeps no values."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda.is_current_stream_capturing", lambda: False))
        stack.enter_context(mock.patch("torch.cuda.current_device", lambda: 0))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self, *args: self))
        stack.enter_context(_Moves())
        yield

"""One call of a host function on fake tensors, and the list of all of them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16}


class Call(NamedTuple):
    """One call of one operator. ``make(**sizes)`` gives its arguments."""

    module: str
    op: str
    variant: str
    make: Callable[..., tuple[Any, ...]]

    @property
    def name(self) -> str:
        return f"{self.op}:{self.variant}"

    @property
    def sizes(self) -> set[str]:
        """The sizes that may change without compiling anew."""
        code = self.make.func.__code__  # type: ignore[attr-defined]
        return set(code.co_varnames[: code.co_argcount]) & {"T", "B", "N", "K"}

    def run(self, **sizes: int) -> Any:
        """Through the host function of the kernels' module, unless its own ``_why_not`` has a reason against it."""
        module = importlib.import_module(f"fastseq_kernels.{self.module}")
        args = self.make(**sizes)
        why_not = getattr(module, f"{self.op}_why_not", None)
        reason = None if why_not is None else why_not(*args)
        if reason is not None:
            raise NotImplementedError(f"{self.name}: {reason}")
        return getattr(module, self.op)(*args)


CALLS: dict[str, list[Call]] = {}  # by module of fastseq_kernels


def call(module: str, op: str, variant: str, make: Callable[..., tuple[Any, ...]], **fixed: Any) -> None:
    CALLS.setdefault(module, []).append(Call(module, op, variant, functools.partial(make, **fixed)))


def new(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")

"""Calls of the host functions that together launch every kernel, with every dtype and option that compiles anew.

Made of fake tensors on a GPU: only their shapes and dtypes count.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Call(NamedTuple):
    """One call of one operator. ``make(**sizes)`` gives its arguments."""

    module: str
    op: str
    variant: str
    make: Callable[..., tuple[Any, ...]]

    @property
    def name(self) -> str:
        return f"{self.op}:{self.variant}"

    def run(self, **sizes: int) -> Any:
        """Through the host function of the kernels' module, which its own ``_why_not`` must allow."""
        module = importlib.import_module(f"fastseq_kernels.{self.module}")
        args = self.make(**sizes)
        why_not = getattr(module, f"{self.op}_why_not", None)
        reason = None if why_not is None else why_not(*args)
        assert reason is None, f"{self.name}: {reason}"
        return getattr(module, self.op)(*args)


CALLS: dict[str, list[Call]] = {}


def call(module: str, op: str, variant: str, make: Callable[..., tuple[Any, ...]], **fixed: Any) -> None:
    CALLS.setdefault(module, []).append(Call(module, op, variant, functools.partial(make, **fixed)))


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def noise(T: int = 5, B: int = 7, H: int = 64, rows: bool = False) -> tuple[Any, ...]:
    numbers = on_gpu(B, dtype=torch.int64) if rows else None
    return (on_gpu(1, dtype=torch.int64), T, B, H, numbers, 5, 3, 0.2)


call("lstm_noise", "lstm_noise", "plain", noise)
call("lstm_noise", "lstm_noise", "rows", noise, rows=True)
call("lstm_noise", "lstm_noise", "odd", noise, H=13)
call("lstm_noise", "lstm_noise", "wide", noise, H=1024)

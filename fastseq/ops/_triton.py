"""The Triton backend of an operator: where it can run, and for which devices results were seen to be right.

Loaded with torch; triton itself and the kernels are imported when a tensor arrives that they could be for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastseq.ops._select import Backend, allowed, first_tensor

LEAST_TRITON = (3, 5)  # pyproject.toml says the same
LEAST_CAPABILITY = 80


@functools.cache
def why_not_triton() -> str | None:
    """The reason why no kernel can run in this process, or None."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return f"triton is not installed; pip install 'triton>={LEAST_TRITON[0]}.{LEAST_TRITON[1]}'"
    if tuple(map(int, version.split(".")[:2])) < LEAST_TRITON:
        return f"triton {version} is older than {LEAST_TRITON[0]}.{LEAST_TRITON[1]}; pip install --upgrade triton"
    return None


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 runs kernels on CPU tensors, slowly, as the tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def in_low_precision(device: torch.device) -> bool:
    """Whether 16-bit numbers are multiplied as they are: on a GPU, and where kernels for one are interpreted."""
    return device.type != "cpu" or (interpreted() and allowed() == "triton")


@functools.cache
def kernels(module: str) -> Any:
    """``fastseq_kernels.<module>``."""
    return importlib.import_module(f"fastseq_kernels.{module}")


def triton_backend(op: str, module: str) -> Backend:
    """``fastseq_kernels.<module>.<op>``, with the reasons against it. The module may add its own,
    ``<op>_why_not``, and say which way a call takes, ``<op>_detail``."""

    def why_not(*args: Any, **kwargs: Any) -> str | None:
        device = first_tensor(args).device
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            return f"input is on {device.type}"
        reason = why_not_triton()
        if reason is not None:
            return reason
        if device.type == "cuda":
            if torch.version.hip:
                return "no kernels for ROCm"
            found = kernels("_verified").capability(device.index or 0)
            if found < LEAST_CAPABILITY:
                return f"sm_{found} is older than sm_{LEAST_CAPABILITY}"
        if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args):
            return "no kernel for float64"
        if not hasattr(kernels(module), op):
            return f"fastseq_kernels.{module} has no {op}"
        own: Callable[..., str | None] | None = getattr(kernels(module), f"{op}_why_not", None)
        return None if own is None else own(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(kernels(module), op)(*args, **kwargs)

    def doubt(*args: Any, **kwargs: Any) -> str | None:
        first = first_tensor(args)
        found: str | None = kernels("_verified").doubt(module, first.device, first.dtype)
        return found

    def detail(*args: Any, **kwargs: Any) -> str | None:
        own: Callable[..., str] | None = getattr(kernels(module), f"{op}_detail", None)
        return None if own is None else own(*args, **kwargs)

    return Backend("triton", run, why_not, doubt, detail)

"""The one torch library of fastseq, the loading of its compiled operators, and their backends."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from fastseq.ops._select import Backend, allowed, choose, first_tensor
from fastseq.ops._transforms import one_by_one
from fastseq.ops._triton import triton_backend

library = torch.library.Library("fastseq", "FRAGMENT")
C = TypeVar("C", bound=Callable[..., Any])
TABLES: dict[str, tuple[Backend, ...]] = {}  # the backends of every registered operator


def fake(op: str) -> Callable[[C], C]:
    """Register the decorated function as the fake of ``op``, and the vmap rule that every operator has."""
    torch.library.register_vmap(f"fastseq::{op}", one_by_one(getattr(torch.ops.fastseq, op)), lib=library)
    register: Callable[[C], C] = torch.library.register_fake(f"fastseq::{op}", lib=library)
    return register


@contextmanager
def no_autocast() -> Iterator[None]:
    """Keep autocast out of a backend written in torch: an operator computes in the dtype of its arguments."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def load(name: str, why_not_built: str) -> str | None:
    """Load the compiled operators of one library; the reason when that is not possible, else None."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = sorted(glob.glob(os.path.join(here, f"{name}*.so")) + glob.glob(os.path.join(here, f"{name}*.pyd")))
    if not found:
        return f"not built ({why_not_built})"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{os.path.basename(found[0])} does not load with torch {torch.__version__}: {error}"
    return None


why_not_compiled = load("_torch", "fastseq was built without torch; rebuild with: pip install --no-build-isolation .")


def _device(args: tuple[Any, ...]) -> str:
    return str(first_tensor(args).device.type)


def _why_not_compiled(op: str) -> str | None:
    if why_not_compiled is None and not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastseq::{op}", "CPU"):
        return "not in the compiled library, which an older version built; rebuild it"
    return why_not_compiled


def without_core(op: str, definition: Callable[..., Any], kernels: str, *others: Backend) -> tuple[Backend, ...]:
    """The backends of an operator that the compiled core does not have: on the CPU its definition stands in.

    Args: as of ``backends``.
    """

    def why_not(*args: Any, **kwargs: Any) -> str | None:
        return None

    return *others, triton_backend(op, kernels), Backend("reference", definition, why_not)


def core_alone(op: str) -> tuple[Backend, ...]:
    """The backends of an operator that only the compiled core has."""
    missing = _why_not_compiled(op)

    def why_not(*args: Any, **kwargs: Any) -> str | None:
        device = _device(args)
        return missing if device == "cpu" else f"input is on {device}"

    return (Backend("cpu", getattr(torch.ops.fastseq, op), why_not),)


def backends(op: str, definition: Callable[..., Any], kernels: str, *others: Backend) -> tuple[Backend, ...]:
    """The backends of an operator, best first.

    Args:
        definition: the operator in plain torch.
        kernels: the module of ``fastseq_kernels`` whose function has the operator's name.
        others: what comes before these kernels.
    """
    missing = _why_not_compiled(op)

    def reference_why_not(*args: Any, **kwargs: Any) -> str | None:
        """The definition stands in where no kernel exists, not where one is missing by mistake."""
        if missing and _device(args) == "cpu" and allowed() != "reference":
            return "only where asked for, by FASTSEQ_BACKEND=reference"
        return None

    return (
        *core_alone(op),
        *others,
        triton_backend(op, kernels),
        Backend("reference", definition, reference_why_not),
    )


def register(op: str, table: tuple[Backend, ...]) -> None:
    """Give torch the implementations that are not compiled ones."""
    TABLES[op] = table

    def run(*args: Any, **kwargs: Any) -> Any:
        with no_autocast():
            return choose(op, table, *args, **kwargs).run(*args, **kwargs)

    for device in ("CUDA", "MPS", "XPU"):
        library.impl(op, run, device)
    in_core = any(backend.name == "cpu" for backend in table)
    if not in_core or _why_not_compiled(op) or allowed() not in (None, "cpu"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch, that this overrides the compiled one
            library.impl(op, run, "CPU", allow_override=True)

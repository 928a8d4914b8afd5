"""The compiled kernels for CUDA: whether they are there, where they can run, and where results were seen to be right.

The library loads in a torch without CUDA too; it asks for no device before a tensor on one arrives.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastseq.ops._library import load
from fastseq.ops._select import Backend, allowed, first_tensor
from fastseq.ops._triton import LEAST_CAPABILITY, kernels, why_not_triton

_BUILD = Path(__file__).parents[1] / "_build.json"


@functools.cache
def _record() -> dict[str, Any]:
    """What the build wrote; empty when nothing was compiled here."""
    found: dict[str, Any] = json.loads(_BUILD.read_text()) if _BUILD.exists() else {}
    return found


why_not_loaded = load("_cuda", _record().get("missing", {}).get("cuda", "fastseq was built without CUDA"))


def unverified(module: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why nobody has seen these results be right on such a device, or None; as ``fastseq_kernels._verified.doubt``,
    but by the hash of the source that was compiled."""
    verified = kernels("_verified")
    name, wanted = f"sm_{verified.capability(device.index or 0)}", str(dtype).removeprefix("torch.")
    row = verified.rows().get(name, {}).get(module)
    if row is None:
        return f"unverified: no result row of {module} for {name}"
    if row["source"] != (_record().get("cuda") or {}).get("source"):
        return f"unverified: {module} has changed since its result row for {name}"
    if dtype.is_floating_point and wanted not in row["dtypes"]:
        return f"unverified: no result row of {module} in {wanted} for {name}"
    return None


def cuda_backend(
    module: str | Callable[[Any], str],
    call_of: Callable[..., Any],
    run: Callable[[Any], Any],
    why_not: Callable[[Any], str | None],
    detail: Callable[[Any], str],
    doubt: Callable[[Any], str | None],
) -> Backend:
    """The backend "cuda" of an operator.

    Kernels that wait for each other are not tried on a device where nobody has seen them work, but where asked for, by
    FASTSEQ_BACKEND=cuda: there not even an unverified backend gives way to them.

    Args:
        module: the name of the result row in ``verified.json``, or what tells it of a call.
        call_of: makes the operator's arguments into what the others take, whose ``data`` has the dtype that counts.
        why_not: further reasons. doubt: why another backend may be faster.
    """

    def reason(*args: Any, **kwargs: Any) -> str | None:
        device = first_tensor(args).device
        if device.type != "cuda":
            return f"input is on {device.type}"
        missing = why_not_loaded or why_not_triton()  # what is around them is in triton
        if missing is not None:
            return missing
        if torch.version.hip:
            return "no kernels for ROCm"
        found = kernels("_verified").capability(device.index or 0)
        if found < LEAST_CAPABILITY:
            return f"sm_{found} is older than sm_{LEAST_CAPABILITY}"
        call = call_of(*args, **kwargs)
        own = why_not(call)
        if own is not None or allowed() == "cuda":
            return own
        return unverified(module if isinstance(module, str) else module(call), device, call.data.dtype)

    return Backend(
        "cuda",
        lambda *args, **kwargs: run(call_of(*args, **kwargs)),
        reason,
        doubt=lambda *args, **kwargs: doubt(call_of(*args, **kwargs)),
        detail=lambda *args, **kwargs: detail(call_of(*args, **kwargs)),
    )

"""Calls of the host functions that together launch every kernel, with every dtype and option that compiles anew.

Made of fake tensors on a GPU: only their shapes and dtypes count. Sizes are arguments of each call, so that a test can
ask whether another batch compiles anew.
"""

from __future__ import annotations

import importlib

from tests.kernels import adt_calls, lstm_calls, lstm_compressed_calls, mimo_calls, vq_calls  # noqa: F401  (they fill the list)
from tests.kernels._call import CALLS, Call

__all__ = ["CALLS", "Call", "written"]


def written(module: str) -> list[Call]:
    """The calls of a module whose host functions exist."""
    kernels = importlib.import_module(f"fastseq_kernels.{module}")
    return [c for c in CALLS.get(module, ()) if hasattr(kernels, c.op)]

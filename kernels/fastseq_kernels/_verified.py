"""On which devices the results of these kernels were seen to be right: what ``make gpu`` wrote into verified.json."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from fastseq_kernels._launch import rnn_precision
from fastseq_kernels._sources import source_hash

TF32 = ("lstm", "lstm_layer", "lstm_graph", "lstm_lowrank")  # what may round float32 to TF32 counts as another dtype


@functools.cache
def rows() -> dict[str, dict[str, Any]]:
    """Per compute capability ("sm_90") and module: the hash of its source then, the dtypes, and where and when."""
    found: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("verified.json").read_text())
    return found


@functools.cache
def capability(index: int) -> int:
    """90 for compute capability 9.0. Fake tensors on a machine without CUDA count as the least that is supported."""
    if not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def doubt(module: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of ``module`` count as unverified on this device, or None."""
    if device.type != "cuda":
        return None
    name = f"sm_{capability(device.index or 0)}"
    row = rows().get(name, {}).get(module)
    if row is None:
        return f"unverified: no result row of {module} for {name}"
    if row["source"] != source_hash(module):
        return f"unverified: {module} has changed since its result row for {name}"
    wanted = str(dtype).removeprefix("torch.")
    if module in TF32 and rnn_precision(dtype) == "tf32":
        wanted = "tf32"
    if dtype.is_floating_point and wanted not in row["dtypes"]:
        return f"unverified: no result row of {module} in {wanted} for {name}"
    return None

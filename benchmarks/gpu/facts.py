"""What the rows of one run share: the device, its driver, the versions of what computes, and the commit."""

from __future__ import annotations

import platform
import shutil
import subprocess

import torch

from benchmarks import harness
from benchmarks.gpu.part import Context, Row, Unit

PACKAGES = ("triton", "flashrnn", "torchrl", "flash-kmeans", "vector-quantize-pytorch", "cuvs-cu12", "cuvs-cu13")


def _smi(field: str) -> str | None:
    """One answer of nvidia-smi for the first device, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def collect(context: Context) -> list[Row]:
    tree = harness.tree()
    shared: Row = {
        "host": harness.device(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": None,
        **harness.versions(PACKAGES),
        "python": platform.python_version(),
        **tree,
        "date": tree["run"][:10],
    }
    if context.device.type != "cuda":
        return [{"op": "facts", "device": "dry run", "capability": "sm_00", "driver": None, **shared}]
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees none")
    properties = torch.cuda.get_device_properties(0)
    device = {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "driver": _smi("driver_version"),
        "cudnn": torch.backends.cudnn.version(),
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "shared_bytes": properties.shared_memory_per_block_optin,
        "clocks": _smi("clocks.sm,clocks.max.sm,clocks.mem"),
        "power_limit": _smi("power.limit"),
    }
    return [{"op": "facts", **device, **shared}]


def units(context: Context) -> list[Unit]:
    return [Unit("facts", 5.0, lambda: collect(context))]

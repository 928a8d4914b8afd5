"""Memory of a call: what autograd keeps, what torch's allocator hands out, and by how much the process grows."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what Linux takes in CLEAR to let the largest resident size begin anew
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
HEAP_BYTES = 128 << 10  # least of what is taken from the system by itself while memory is measured


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Torch's profiler writes a line to file descriptor 2 at each start and stop, whatever its log level."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _allocated(run: Callable[[], object]) -> float:
    """Megabytes that torch's allocator has handed out at the most during ``run``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak_bytes = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak_bytes = max(peak_bytes, total)
    return round(peak_bytes / 1e6, 3)


def of_training(run: Callable[[], object], leaves: Sequence[Tensor]) -> dict[str, float]:
    """Megabytes of one training step: what autograd holds between forward and backward, and the largest total.

    Args:
        run: forward and backward. leaves: input and parameters, which are there anyway and do not count.
    """
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    held: dict[int, Tensor] = {}  # keeps the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    saved = sum(t.untyped_storage().nbytes() for address, t in held.items() if address not in given)
    held.clear()
    return {"saved_mb": round(saved / 1e6, 3), "peak_mb": _allocated(run)}


def _resident() -> dict[str, int]:
    """Kilobytes of this process that lie in memory: at the most (HWM), and at present (RSS)."""
    return {name: int(value) for name, value in re.findall(r"Vm(HWM|RSS):\s+(\d+) kB", STATUS.read_text())}


@contextlib.contextmanager
def _fresh_pages() -> Iterator[None]:
    """Let the C library (glibc) hold no free memory to speak of, and take larger blocks from the system one by one.

    Else memory that was freed before is used again, and a process does not grow by it. What is set afterwards is where
    glibc's own rule ends once a tensor of 32 MB has been freed.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, HEAP_BYTES)
    libc.malloc_trim(0)  # leaves the end of this thread's own heap, which a free beside it then gives back
    libc.free(libc.malloc(HEAP_BYTES // 2))
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)


def _growth(run: Callable[[], object]) -> float:
    torch.ones(1 << 17).add_(1)  # the threads of this thread's team begin here, not inside ``run``
    with _fresh_pages():
        CLEAR.write_text(RESET_PEAK)
        before = _resident()["RSS"]
        run()
        return round((_resident()["HWM"] - before) * 1024 / 1e6, 3)


def of_call(run: Callable[[], object]) -> dict[str, float]:
    """Megabytes that a call needs at the most beside its arguments, its results included.

    allocated_mb: what torch's allocator handed out. It does not see numpy's arrays and the buffers of libraries.
    resident_mb: growth of the process, by pages that were touched (Linux with glibc only). Taken in a fresh thread:
    what a library keeps for the next call of a thread would be missed in one that has called it before.
    """
    found = {"allocated_mb": _allocated(run)}
    if os.access(CLEAR, os.W_OK) and hasattr(ctypes.CDLL(None), "mallopt"):
        with ThreadPoolExecutor(1) as fresh:
            found["resident_mb"] = fresh.submit(_growth, run).result()
    return found

"""The two limits of the machine that measures: fused multiply-adds per second and bytes read per second."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("peak.c")


class NoCompiler(RuntimeError):
    """The limits cannot be measured here."""


FMA_LOOPS = ("fma_64", "fma_32", "fma_16")  # widest first; a machine has those that its compiler could build


@functools.cache
def compiled() -> ctypes.CDLL:
    """peak.c, built for this machine into a temporary folder.

    Raises:
        NoCompiler: without a C compiler that works; the fractions of the limits are then unknown.
    """
    compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise NoCompiler("peak: no C compiler (cc, gcc, clang or $CC); fractions of the machine's limits are unknown")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peak.so"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared"]
        command = [*compiler.split(), *flags, str(SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NoCompiler(f"peak: {' '.join(command)} failed:\n{done.stderr}")
        library = ctypes.CDLL(str(target))  # the mapping outlives the file
    for name in FMA_LOOPS:
        if hasattr(library, name):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_void_p], ctypes.c_double
    library.stream_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    library.stream_read.restype = ctypes.c_double
    return library


def _rate(work: Callable[[int], float], threads: int, repeats: int) -> float:
    """Best total of ``work(rank)`` per second, all threads together, over ``repeats`` tries."""
    best = 0.0
    for _ in range(repeats):
        done = [0.0] * threads
        spans: list[tuple[float, float]] = [(0.0, 0.0)] * threads
        start = threading.Barrier(threads)

        def run(rank: int) -> None:
            start.wait()  # noqa: B023 (joined below)
            begin = time.perf_counter()
            done[rank] = work(rank)  # noqa: B023
            spans[rank] = begin, time.perf_counter()  # noqa: B023

        team = [threading.Thread(target=run, args=(rank,)) for rank in range(threads)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        wall = max(end for _, end in spans) - min(begin for begin, _ in spans)
        best = max(best, sum(done) / wall)
    return best


@functools.cache
def fma_by_width(threads: int, seconds: float = 0.03) -> dict[str, float]:
    """GFLOP/s of each register-only loop that this machine has."""
    library = compiled()
    out = (ctypes.c_float * 16)()
    rates = {}
    for name in FMA_LOOPS:
        if not hasattr(library, name):
            continue
        loop = getattr(library, name)
        begin = time.perf_counter()
        loop(100_000, out)
        loops = max(100_000, int(100_000 * seconds / (time.perf_counter() - begin)))
        rates[name] = _rate(lambda rank, f=loop, n=loops: f(n, (ctypes.c_float * 16)()), threads, 7) / 1e9
    return rates


def fma_peak(threads: int) -> float:
    """GFLOP/s that ``threads`` threads reach in a loop that touches only registers; the best vector width."""
    return max(fma_by_width(threads).values())


@functools.cache
def read_bandwidth(total_bytes: int, threads: int, seconds: float = 0.02) -> float:
    """GB/s of reading the same ``total_bytes`` again and again, an equal part in each thread."""
    library = compiled()
    floats = max(128, total_bytes // threads // 4 // 128 * 128)
    parts = [_aligned(floats) for _ in range(threads)]

    def read(loops: int, rank: int) -> float:
        return float(library.stream_read(parts[rank].ctypes.data, floats, loops, (ctypes.c_float * 16)()))

    begin = time.perf_counter()
    read(3, 0)
    loops = max(3, int(3 * seconds / (time.perf_counter() - begin)))
    return _rate(lambda rank: read(loops, rank), threads, 7) / 1e9


def _aligned(floats: int) -> np.ndarray:
    """A vector of ones that begins at a cache line."""
    raw = np.ones(floats + 16, np.float32)
    skip = -raw.ctypes.data // 4 % 16
    return raw[skip : skip + floats]

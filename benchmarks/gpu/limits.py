"""What the device can do, before anything is claimed of it.

Rates of products and copies, cost of launches, reads from L2, and stock nn.LSTM over a grid with the names of its
kernels. What neither torch nor Triton can express (barriers between programs, clusters, multicast) is not measured.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import timing
from benchmarks.gpu.part import Context, Row, Unit, reason

SECONDS = 0.4  # of one measurement
PRODUCT = 8192  # size of the square products
COPY_BYTES = 1 << 30
LAUNCHES = 1000  # in a row, and nodes of a graph
BROADCAST_KIB = (8, 64, 512)
GRID = {"B": (16, 1, 64, 256), "H": (512, 1024, 256, 2048), "dtype": ("bfloat16", "float16", "float32"), "T": 256}
DRY_GRID = {"B": (1,), "H": (8,), "dtype": ("float32",), "T": 4}


def row(case: str, value: float | None = None, unit: str = "", **rest: Any) -> Row:
    measured = {} if value is None else {"value": float(f"{value:.5g}"), "unit": unit}
    return {"op": "limits", "table": "limits", "case": case, **measured, "gate": "passed", **rest}


def _timed(context: Context, call: Callable[[], object], cold: bool = False) -> float:
    samples = timing.interleave(context, {"it": call}, SECONDS, cold)
    return timing.harness.quantile(samples["it"], 0.5)


def product(context: Context, dtype: torch.dtype, tf32: bool) -> list[Row]:
    n = context.pick(PRODUCT, 64)
    a, b = (torch.randn(n, n, device=context.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        seconds = _timed(context, lambda: torch.mm(a, b, out=out))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    return [row(f"matmul {name}", 2 * n**3 / seconds / 1e12, "TFLOP/s", size=n)]


def copy(context: Context) -> list[Row]:
    """Read and write of a buffer that no cache holds; both count."""
    size = context.pick(COPY_BYTES, 1 << 16)
    a = torch.zeros(size // 4, device=context.device)
    b = torch.empty_like(a)
    return [row("memory copy", 2 * size / _timed(context, lambda: b.copy_(a)) / 1e9, "GB/s", bytes=size)]


def launches(context: Context) -> list[Row]:
    """One small kernel many times over: started one by one by torch and by Triton, and as nodes of a CUDA graph."""
    count = context.pick(LAUNCHES, 4)
    x = torch.zeros(1, device=context.device)

    def by_torch() -> None:
        for _ in range(count):
            x.add_(1)

    rows = [row("launch by torch", _timed(context, by_torch) / count * 1e6, "us")]
    if context.dry:
        return rows
    from benchmarks.gpu import limit_kernels

    def by_triton() -> None:
        for _ in range(count):
            limit_kernels.empty[(1,)](x, num_warps=4)

    rows.append(row("launch by Triton", _timed(context, by_triton) / count * 1e6, "us"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        by_triton()
    rows.append(row("node of a CUDA graph", _timed(context, graph.replay) / count * 1e6, "us"))
    return rows


def broadcast(context: Context) -> list[Row]:
    """Every multiprocessor reads the same few kilobytes from L2 again and again, as weights are."""
    from benchmarks.gpu import limit_kernels

    programs = torch.cuda.get_device_properties(context.device).multi_processor_count
    rows = []
    for kib in BROADCAST_KIB:
        x = torch.zeros(kib * 256, dtype=torch.int32, device=context.device)
        out = torch.empty(programs, dtype=torch.int32, device=context.device)
        repeats = max(1, 16384 // kib)
        call = functools.partial(
            limit_kernels.read_again[(programs,)], x, out, x.numel(), repeats, BLOCK=2048, num_warps=8
        )
        rate = programs * kib * 1024 * repeats / _timed(context, call) / 1e9
        rows.append(row(f"all read the same {kib} KiB from L2", rate, "GB/s", programs=programs))
    return rows


def dots(context: Context) -> list[Row]:
    """Products of 16 rows with operands that stay in registers or shared memory: what a resident LSTM is made of."""
    from benchmarks.gpu import limit_kernels

    programs = torch.cuda.get_device_properties(context.device).multi_processor_count
    a = torch.zeros(16, 128, dtype=torch.bfloat16, device=context.device)
    b = torch.zeros(128, 256, dtype=torch.bfloat16, device=context.device)
    out = torch.empty(programs, 16, 256, device=context.device)
    repeats = 2000
    seconds = _timed(
        context, lambda: limit_kernels.dot_again[(programs,)](a, b, out, repeats, M=16, K=128, N=256, num_warps=8)
    )
    rate = 2 * 16 * 128 * 256 * repeats * programs / seconds / 1e12
    return [row("tl.dot of 16 rows, all multiprocessors", rate, "TFLOP/s", programs=programs)]


def kernel_names(call: Callable[[], object]) -> list[str]:
    """The kernels that take most of the time, by the profiler, with how often they run; or why it does not tell."""
    spent: Counter[str] = Counter()
    often: Counter[str] = Counter()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                spent[event.name] += int(event.device_time)
                often[event.name] += 1
    except (RuntimeError, AttributeError) as error:  # a profiler may be refused to whoever is not root
        return [reason(error)]
    return [f"{name[:90]} x{often[name]}" for name, _ in spent.most_common(3)]


def stock(context: Context, T: int, B: int, H: int, dtype: str) -> list[Row]:
    """Forward, and forward with backward, of nn.LSTM of one layer."""
    kind = getattr(torch, dtype)
    module = nn.LSTM(H, H, device=context.device, dtype=kind)
    x = torch.randn(T, B, H, device=context.device, dtype=kind, requires_grad=True)
    dy = torch.randn(T, B, H, device=context.device, dtype=kind)

    def forward() -> object:
        with torch.no_grad():
            return module(x)

    def both() -> None:
        module(x)[0].backward(dy)

    samples = timing.interleave(context, {"infer": forward, "train": both}, 2 * SECONDS)
    with torch.no_grad():
        names = [] if context.dry else kernel_names(lambda: module(x[:64]))
    rows = []
    for mode in ("infer", "train"):
        found = timing.timed(samples, mode)
        found.pop("ratios")
        shared = row(f"T{T}_B{B}_H{H}", mode=mode, dtype=dtype, provider="stock", label=f"stock {dtype}", **found)
        rows.append({**shared, "table": "stock", "kernels": names if mode == "infer" else []})
    return rows


def _grid(context: Context) -> Iterable[tuple[int, int, int, str]]:
    grid: dict[str, Any] = context.pick(GRID, DRY_GRID)
    for B, H, dtype in itertools.product(grid["B"], grid["H"], grid["dtype"]):
        yield grid["T"], B, H, dtype


def units(context: Context) -> list[Unit]:
    kinds = [(torch.bfloat16, False), (torch.float32, True), (torch.float16, False), (torch.float32, False)]
    products = [
        Unit(f"matmul {n}", 1.5, functools.partial(product, context, *kind))
        for n, kind in enumerate(kinds[: context.pick(4, 1)])
    ]
    found = [
        products[0],
        Unit("copy", 1.0, functools.partial(copy, context)),
        Unit("launches", 3.0, functools.partial(launches, context)),
        *products[1:],
    ]
    if not context.dry:
        found += [
            Unit("broadcast", 4.0, functools.partial(broadcast, context)),
            Unit("dots", 3.0, functools.partial(dots, context)),
        ]
    return found + [
        Unit(f"stock T{case[0]}_B{case[1]}_H{case[2]} {case[3]}", 0.8, functools.partial(stock, context, *case))
        for case in _grid(context)
    ]

"""Times on a device: CUDA events around calls, in rounds that visit every provider; the CPU's clock in a dry run.

Before every block of calls a buffer larger than the L2 cache is written. That empties the cache, and while it runs the
host gets ahead, so that the cost of the first launch is not counted. A provider whose launches take longer than its
kernels is still measured at the speed of its launches: that is how long it takes. Where ``cold``, every call has an
empty cache, else a call before it has filled it.
"""

from __future__ import annotations

import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.gpu.part import Context, Row

SCRUB_BYTES = 256 << 20  # more than any L2 cache
BLOCK_SECONDS = 0.01  # short calls repeat until they fill this
MOST_CALLS = 50
ROUNDS = 3, 15  # at the least, at the most


@functools.cache
def _scrubber(device: torch.device) -> Tensor:
    return torch.empty(SCRUB_BYTES // 4, device=device)


def synchronize(context: Context) -> None:
    if not context.dry:
        torch.cuda.synchronize(context.device)


def once(context: Context, call: Callable[[], object]) -> float:
    """Seconds of one call, with the wait for its end."""
    synchronize(context)
    begin = time.perf_counter()
    call()
    synchronize(context)
    return time.perf_counter() - begin


def block(context: Context, call: Callable[[], object], calls: int, cold: bool) -> float:
    """Seconds of one call: the median of ``calls``."""
    if context.dry:
        return statistics.median(once(context, call) for _ in range(calls))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    if not cold:
        _scrubber(context.device).zero_()
        call()
    for begin, end in events:
        if cold:
            _scrubber(context.device).zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(context.device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def interleave(
    context: Context,
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    cold: bool = False,
    around: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> dict[str, dict[int, float]]:
    """name -> {round: seconds of one call}; rounds are as many as fit into ``seconds``, within ROUNDS.

    Args:
        around: what the calls of a name need around them; it is entered once for a block of them, outside of the time.
    """
    order = random.Random(0)
    repeats, cost = {}, 0.0
    for name, call in calls.items():
        with around(name):
            call()
            took = min(once(context, call) for _ in range(2))
        repeats[name] = max(1, min(MOST_CALLS, int(BLOCK_SECONDS / max(took, 1e-6))))
        cost += took * (repeats[name] + (not cold))
    rounds = 2 if context.dry else max(ROUNDS[0], min(ROUNDS[1], int(seconds / max(cost, 1e-6))))
    samples: dict[str, dict[int, float]] = {name: {} for name in calls}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            names = list(calls)
            order.shuffle(names)
            for name in names:
                with around(name):
                    samples[name][number] = block(context, calls[name], 1 if context.dry else repeats[name], cold)
    finally:
        gc.enable()
    return samples


def timed(samples: Mapping[str, Mapping[int, float]], label: str) -> Row:
    """The fields of a row that hold a time: median and quantiles in ms, and paired ratios to the other providers."""
    own = samples[label]
    others = {name: harness.ratio(own, theirs) for name, theirs in samples.items() if name != label}
    return {
        **{f"ms{s}": round(harness.quantile(own, q) * 1e3, 6) for s, q in (("", 0.5), ("_20", 0.2), ("_80", 0.8))},
        "reps": len(own),
        "ratios": {name: [float(f"{v:.5g}") for v in found] for name, found in others.items()},
    }


def peak_mb(context: Context, call: Callable[[], Any]) -> Row:
    """Megabytes that torch's allocator hands out at the most during a call, beside what was there before."""
    if context.dry:
        return {}
    gc.collect()
    torch.cuda.synchronize(context.device)
    before = torch.cuda.memory_allocated(context.device)
    torch.cuda.reset_peak_memory_stats(context.device)
    result = call()
    torch.cuda.synchronize(context.device)
    del result
    return {"peak_mb": round((torch.cuda.max_memory_allocated(context.device) - before) / 1e6, 3)}

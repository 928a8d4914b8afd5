"""How a time is taken and what is written down with it: interleaved rounds, paired ratios, the gate, provenance, rows.

Providers of one case run in one process, in rounds; every round visits each provider once, in an order drawn anew. So a
slow minute of the machine falls on all of them, and a ratio is formed inside a round before any median is taken.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import peak

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
BLOCK_SECONDS = 0.03  # short calls repeat until they fill this; their median is the sample of the round
SETTLE_SECONDS = 0.25  # longest wait for the worker threads of the provider before


ABSENT = "not installed: ", "cannot run: "  # how the reason begins where a provider was not judged


class CannotRun(Exception):
    """A provider that this machine or installation cannot run; the message is the reason."""


class SelfTimed:
    """A call that knows its time better than who waits for it, such as another process: harnesses take its word.

    Args:
        call: what returns the seconds, and what else it found out.
    """

    def __init__(self, call: Callable[[], tuple[float, dict[str, float]]]) -> None:
        self._call = call
        self._found: list[dict[str, float]] = []

    def __call__(self) -> float:
        seconds, found = self._call()
        self._found.append(found)
        return seconds

    def facts(self) -> dict[str, float]:
        """Medians of what the calls found out."""
        return {key: statistics.median(found[key] for found in self._found) for key in self._found[0]}


class Ratio(NamedTuple):
    """Median of the per-round ratios, with the 95 % percentile bootstrap interval of that median."""

    median: float
    low: float
    high: float


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` torch threads, then restore what was set."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _once(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    told = call()
    return told if isinstance(call, SelfTimed) else time.perf_counter() - begin  # type: ignore[return-value]


def _settle() -> None:
    """Wait until no thread of this process computes.

    Worker threads of a runtime spin after its last call: libgomp's for some 10 ms, ONNX Runtime's for some 50 ms (AMD
    EPYC, 2 cores), and would take a core from whoever comes next.
    """
    end = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(0.003)
        if time.process_time() - used < 0.0003:
            return


def _block(call: Callable[[], object], calls: int) -> float:
    """Seconds of one call: the median of ``calls``, after one that only wakes threads and caches."""
    if calls > 1:
        call()
    return statistics.median(_once(call) for _ in range(calls))


def interleave(
    providers: Mapping[str, Callable[[], object]],
    rounds: int | None = None,
    seconds: float = 8.0,
    every: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, dict[int, float]]:
    """Time every provider in shuffled rounds.

    Args:
        providers: name -> callable without arguments.
        rounds: how many; None means as many as fit into ``seconds``, between 5 and 15.
        every: name -> k, for providers that take part in every k-th round only.

    Returns:
        name -> {round: seconds of one call}.
    """
    every = every or {}
    order = random.Random(seed)
    samples: dict[str, dict[int, float]] = {name: {} for name in providers}
    with _no_garbage_collection():
        calls, cost = {}, 0.0
        for name, call in providers.items():
            if isinstance(call, SelfTimed):
                begin = time.perf_counter()
                call()
                calls[name], cost = 1, cost + (time.perf_counter() - begin) / every.get(name, 1)
                continue
            once = _once(call)
            if once < 0.3:  # else the gate's call has been warm-up enough
                _settle()
                once = min(_once(call) for _ in range(2))
            calls[name] = 1 if once > BLOCK_SECONDS else max(3, min(1000, int(BLOCK_SECONDS / once)))
            cost += max(once, 2 * BLOCK_SECONDS) / every.get(name, 1)
        rounds = rounds or (max(5, min(15, int(seconds / cost))) if providers else 0)
        for number in range(rounds):
            names = [name for name in providers if number % every.get(name, 1) == 0]
            order.shuffle(names)
            for name in names:
                _settle()
                samples[name][number] = _block(providers[name], calls[name])
            gc.collect()
    return samples


def quantile(samples: Mapping[int, float], q: float) -> float:
    return float(np.quantile(list(samples.values()), q))


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float], seed: int = 0) -> Ratio:
    """Our time over theirs in the rounds that both took part in."""
    pairs = np.array([ours[n] / theirs[n] for n in sorted(ours) if n in theirs])
    draws = np.random.default_rng(seed).choice(pairs, (2000, len(pairs)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return Ratio(float(np.median(pairs)), float(low), float(high))


class Budget(NamedTuple):
    """What one output of a provider is held against."""

    truth: Tensor  # of the definition in float64
    naive: float  # relative error of the definition in the provider's own dtype


def relative_error(got: Tensor, truth: Tensor) -> float:
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((got.detach().double() - truth).abs().max() / scale)


def gate(got: Mapping[str, Tensor], budgets: Mapping[str, Budget], gradients: frozenset[str]) -> str:
    """The word passed, or which output is how far over the budget.

    The budget is twice (gradients: three times) the error of the definition in the provider's dtype plus four
    roundings, relative to the largest value of the output: the rule of the tests.
    """
    for name, budget in budgets.items():
        value = got[name]
        if value.shape != budget.truth.shape:
            return f"{name}: shape {list(value.shape)}, expected {list(budget.truth.shape)}"
        error = relative_error(value, budget.truth)
        limit = (3 if name in gradients else 2) * budget.naive + 4 * torch.finfo(value.dtype).eps
        if not error <= limit:
            return f"{name}: error {error:.1e}, budget {limit:.1e}"
    return "passed"


def _processor() -> str:
    """Name of the processor as the system gives it, with what tells its generation."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> str:
    return f"{_processor()}, {_cores()} cores"


def results_file(name: str | None = None) -> Path:
    """Where the rows of a device go, by default those of this processor."""
    slug = re.sub(r"[^a-z0-9]+", "-", (name or device()).lower()).strip("-")
    return RESULTS / f"{slug}.jsonl"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def backend(op: str, backends: Sequence[Any]) -> str:
    """Which of the ``backends`` of an operator runs on CPU, with the instruction set of the compiled one."""
    from fastseq.ops._select import choose

    name = choose(op, tuple(backends), torch.zeros(1)).name
    if name != "cpu":
        return name
    from fastseq import _core

    return f"cpu-{_core.isa()}"


def tree() -> dict[str, Any]:
    """Commit, time, and whether the tree is clean. Results do not make it unclean: writing them is what a run does."""
    status = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "clean": status == "" if status is not None else None,
        "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of the distributions that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def provenance(thread_count: int, packages: Sequence[str]) -> dict[str, Any]:
    """What every row of one run shares.

    Args:
        packages: the distributions of the rivals, whose versions are noted.
    """
    return {
        "device": device(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "fma_peak_gflops": _fma_peak(thread_count),
        "torch": torch.__version__,
        **versions(packages),
        "python": platform.python_version(),
        **tree(),
    }


def gated(
    operator: Any, case: Any, providers: Sequence[Any], thread_count: int
) -> tuple[dict[Any, Any], dict[Any, str]]:
    """What may be timed, and what did not pass the gate.

    One of ours that fails has no time. A rival that does keeps it, beside the reason: without it a rival that rounds a
    little worse than the definition would escape the comparison.

    Args:
        operator: a module with ``setup(case, provider, threads)``, ``judge(case, provider, work)`` (the verdict of the
            gate, and what else the outputs tell, for the row) and OURS; for ``measure`` also NAME,
            ``describe(provider)``, ``every(case, provider)``, ``flops(case, provider)`` and ``reads(case, provider)``.

    Returns:
        provider -> (work, what else its outputs tell), and provider -> reason.
    """
    works, reasons = {}, {}
    for provider in providers:
        try:
            work = operator.setup(case, provider, thread_count)
        except ModuleNotFoundError as error:
            reasons[provider] = f"{ABSENT[0]}{error.name}"
            continue
        except CannotRun as error:
            reasons[provider] = f"{ABSENT[1]}{error}"
            continue
        verdict, facts = operator.judge(case, provider, work)
        if verdict != "passed":
            reasons[provider] = verdict
        if verdict == "passed" or provider.name not in operator.OURS:
            works[provider] = work, facts
    return works, reasons


class Reads(NamedTuple):
    """Bytes that a call reads at the least, and of what it reads again and again."""

    call: int
    again: int


def limits(flops: float, reads: Reads, seconds: float, thread_count: int) -> dict[str, float]:
    """Operations and bytes per second of one time, and their fractions of what the machine can do."""
    if not flops:
        return {}
    gflops, gb_s = flops / seconds / 1e9, reads.call / seconds / 1e9
    found = {"gflops": round(gflops, 2), "gb_s": round(gb_s, 2)}
    with contextlib.suppress(peak.NoCompiler):
        found["fma_of_peak"] = round(gflops / peak.fma_peak(thread_count), 4)
        found["bandwidth_of_peak"] = round(gb_s / peak.read_bandwidth(reads.again, thread_count), 4)
    return found


def measure(
    operator: Any,
    case: Any,
    providers: Sequence[Any],
    thread_count: int,
    rounds: int | None = None,
    seconds: float = 8.0,
    memory: Callable[[Any], dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """One row per provider: the gate, then times, ratios to the others, and fractions of the machine's limits.

    Args:
        memory: what to write down of the memory of a work, or None.
    """
    with threads(thread_count):
        works, reasons = gated(operator, case, providers, thread_count)
        every = {provider.label: operator.every(case, provider) for provider in works}
        used = {p.label: memory(work) if memory else {} for p, (work, _) in works.items()}
        samples = interleave({p.label: work.run for p, (work, _) in works.items()}, rounds, seconds, every)
    rows = []
    for provider in providers:
        row: dict[str, Any] = {
            "op": operator.NAME,
            "case": case.name,
            "mode": case.mode,
            "dtype": "float32",
            **operator.describe(provider),
            "label": provider.label,
            "threads": thread_count,
        }
        if provider not in works:
            rows.append({**row, "gate": reasons[provider]})
            continue
        own, work = samples[provider.label], works[provider][0]
        rates = operator.flops(case, provider), operator.reads(case, provider)
        ms = {f"ms{suffix}": round(quantile(own, q) * 1e3, 5) for suffix, q in (("", 0.5), ("_20", 0.2), ("_80", 0.8))}
        others = {label: ratio(own, theirs) for label, theirs in samples.items() if label != provider.label}
        row |= {
            **ms,
            "reps": len(own),
            **limits(*rates, quantile(own, 0.5), thread_count),
            **used[provider.label],
            **works[provider][1],
            **(work.run.facts() if isinstance(work.run, SelfTimed) else {}),
            "gate": reasons.get(provider, "passed"),
        }
        rows.append({**row, "ratios": {label: [float(f"{v:.5g}") for v in found] for label, found in others.items()}})
    return rows


def _fma_peak(thread_count: int) -> float | None:
    try:
        return round(peak.fma_peak(thread_count), 1)
    except peak.NoCompiler:
        return None


def append(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]

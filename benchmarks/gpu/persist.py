"""The persistent LSTM over the grid of rows and units, beside stock nn.LSTM and Triton's kernels; its loop alone by
every tile that has room, which its cost model is fitted to; and what compute-sanitizer finds in small calls."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import lstm, persist_loop, persist_lowrank, timing
from benchmarks.gpu.lstm_case import Case
from benchmarks.gpu.part import Context, Row, Unit, reason
from benchmarks.gpu.persist_loop import Direction, Results
from benchmarks.gpu.process import ROOT
from benchmarks.harness import ABSENT, Budget, CannotRun, gate, relative_error
from fastseq import reference
from fastseq.ops.lstm import Options
from tests.cuda import int8_cases

SECONDS = 0.5  # of the rounds of one case
T = 1024
# rows and units, most important first: where it is aimed at 3 times the speed, then the rest of B x H
AIMED = [(16, 512), (1, 512), (16, 1024), (1, 1024), (16, 256), (1, 256), (1, 2048), (16, 2048)]
REST = [(64, 512), (64, 256), (64, 1024), (256, 512), (256, 256), (64, 2048), (256, 1024), (256, 2048)]
LABELS = (lstm.PERSIST, lstm.OURS, "stock", "stock float16", "stock float32")
GATE_STEPS = 20
TOOLS, TOOL_SECONDS = ("memcheck", "racecheck"), 45.0  # each
LOOPS = ("persist_loop", "persist_lowrank_loop")


def _defined(call: Direction, grads: tuple[Tensor, Tensor, Tensor] | None, dtype: torch.dtype) -> list[Results]:
    """Outputs, and where asked gradients, of the definition in ``dtype``."""
    given = [t.to(dtype) for t in call[:4]]
    outs = reference.lstm(*given)
    if grads is None:
        return [outs]
    dh, dh_n, dc_n = (d.to(dtype) for d in grads)
    found = reference.lstm_backward((dh, None, None, dh_n, dc_n), outs[2], *outs[:2], *given[1:])
    return [outs, (found[0], *found[2:4])]


def _budgets(call: Direction) -> tuple[tuple[Tensor, Tensor, Tensor], list[dict[str, Budget]]]:
    """Gradients of h, h_n and c_n, and the budgets of all results: of the forward, of the backward."""
    dtype, (h, _, _, h_n, c_n) = call.h0.dtype, _defined(call, None, torch.float64)[0]
    grads = (torch.randn_like(h).to(dtype), torch.randn_like(h_n).to(dtype), torch.randn_like(c_n).float())
    truth, naive = _defined(call, grads, torch.float64), _defined(call, grads, dtype)
    names = (persist_loop.OUTPUTS, persist_loop.GRADIENTS)
    return grads, [
        {name: Budget(t, relative_error(n, t)) for name, t, n in zip(named, true, plain, strict=True)}
        for named, true, plain in zip(names, truth, naive, strict=True)
    ]


def _passes(call: Direction, tile: int, short: Direction, judge: Any) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Forward and backward by one tile: the name, the call that is timed, and the verdict of the gate on ``short``."""
    grads, (forward, backward) = judge
    [out] = persist_loop.forward([short], Options(), tile)
    [found] = persist_loop.backward([short], [out], [grads], Options(), tile)
    outs = dict(zip(persist_loop.OUTPUTS, out, strict=True))
    ends = dict(zip(persist_loop.GRADIENTS, found, strict=True))
    run, [out] = persist_loop.forward_of([call], Options(), tile)
    yield "forward", run, gate(outs, forward, frozenset())
    run()
    run, _ = persist_loop.backward_of([call], [out], [(out[0], out[3], out[4])], Options(), tile)
    yield "backward", run, gate(ends, backward, frozenset(persist_loop.GRADIENTS))


def loops(context: Context, B: int, H: int, dtype: torch.dtype) -> list[Row]:
    """The loop alone, by every tile that is deep enough; both passes of a tile in the rounds of all."""
    steps = context.pick(T, 4)
    call = persist_loop.drawn(steps, B, H, dtype, context.device)
    short = call._replace(x_gates=call.x_gates[:GATE_STEPS])
    judge = _budgets(short)
    calls: dict[str, Callable[[], Any]] = {}
    rows: list[Row] = []
    for number, tile in persist_loop.tiles(context.dry).items():
        if tile.depth < H:
            continue
        shared: Row = {"op": "lstm_loop", "table": "persist loop", "case": f"T{steps}_B{B}_H{H}", "tile": number}
        shared |= {"provider": "fastseq", "dtype": str(dtype).removeprefix("torch."), **tile._asdict()}
        needed, held = persist_loop.room(call, Options(), number, 1, False)
        shared |= {"blocks": needed, "room": held}
        label = f"{lstm.PERSIST} tile {number}"
        try:
            persist_loop.needs_room(call, Options(), number)
            for mode, run, verdict in _passes(call, number, short, judge):
                rows.append({**shared, "mode": mode, "label": f"{label} {mode}", "gate": verdict})
                if verdict == "passed":
                    calls[f"{label} {mode}"] = run
        except CannotRun as error:
            rows.append({**shared, "mode": "forward", "label": label, "gate": f"{ABSENT[1]}{error}"})
        except Exception as error:
            timing.synchronize(context)  # raises where the device is lost
            rows.append({**shared, "mode": "forward", "label": label, "gate": f"failed: {reason(error)}"})
    return _timed(context, rows, calls, steps)


def int8_loops(context: Context, B: int, H: int, dtype: torch.dtype) -> list[Row]:
    """The same with int8 weights: forward alone."""
    steps = context.pick(T, 4)
    given = int8_cases.drawn(steps, B, H, dtype)
    call = Direction(*(v.to(context.device) for v in given))
    short = given._replace(x_gates=given.x_gates[:GATE_STEPS])
    few = call._replace(x_gates=call.x_gates[:GATE_STEPS])
    calls: dict[str, Callable[[], Any]] = {}
    rows: list[Row] = []
    for number, tile in persist_loop.tiles(context.dry).items():
        if tile.int8_depth < H:
            continue
        label = f"{lstm.PERSIST} int8 tile {number} forward"
        row: Row = {"op": "lstm_loop", "table": "persist loop", "case": f"T{steps}_B{B}_H{H}", "tile": number}
        row |= {"provider": "fastseq", "dtype": "int8", **tile._asdict(), "mode": "forward", "label": label}
        row["blocks"], row["room"] = persist_loop.room(call, Options(), number, 1, False)
        rows.append(row)
        try:
            persist_loop.needs_room(call, Options(), number)
            out = tuple(v.cpu() for v in persist_loop.forward([few], Options(), number)[0])
            int8_cases.check(short, torch.full((B,), len(short.x_gates)), False, out)
            row["gate"], calls[label] = "passed", persist_loop.forward_of([call], Options(), number)[0]
        except CannotRun as error:
            row["gate"] = f"{ABSENT[1]}{error}"
        except Exception as error:
            timing.synchronize(context)  # raises where the device is lost
            row["gate"] = f"failed: {reason(error)}"
    return _timed(context, rows, calls, steps)


def _timed(context: Context, rows: list[Row], calls: dict[str, Callable[[], Any]], steps: int) -> list[Row]:
    samples = timing.interleave(context, calls, SECONDS)
    for row in rows:
        if row["label"] in samples:
            row |= {k: v for k, v in timing.timed(samples, row["label"]).items() if k != "ratios"}
            row["us_per_step"] = round(row["ms"] * 1e3 / steps, 4)
    return rows


def _loops(context: Context, B: int, H: int, dtype: torch.dtype) -> list[Row]:
    with persist_loop.runs(context.dry):
        return loops(context, B, H, dtype) + int8_loops(context, B, H, dtype)


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    beside = [str(Path(home, "bin")) for home in (*homes, "/usr/local/cuda")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(beside))


def sanitized(context: Context, tool: str, loop: str = "persist_loop") -> list[Row]:
    """Small calls of every tile of a loop under a tool of compute-sanitizer."""
    name = f"lstm_{loop.removesuffix('_loop')} {tool}"
    row: Row = {"op": "tests", "table": "tests", "suite": "sanitizer", "case": name}
    where = sanitizer()
    if where is None or context.dry:
        return [{**row, "gate": f"{ABSENT[1]}compute-sanitizer is not on PATH"}]
    command = [where, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", f"benchmarks.gpu.{loop}"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a block of torch's hides what is beyond
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TOOL_SECONDS)
    except subprocess.TimeoutExpired as error:
        said = str(error.stdout or b"", "utf-8", "replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        print(said)
        return [{**row, "gate": f"{ABSENT[1]}not done after {TOOL_SECONDS:.0f} s, {said.count('done')} tiles were"}]
    print(done.stdout, done.stderr)
    found = [line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=")]
    errors = [line for line in found if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line] or found[-1:]
    said = errors[0] if errors else f"exit status {done.returncode}"
    tiles = done.stdout.count(": done")
    return [{**row, "passed": tiles, "gate": "passed" if done.returncode == 0 else f"failed: {said[:200]}"}]


def grid(context: Context, points: list[tuple[int, int]], dtype: torch.dtype, labels: tuple[str, ...]) -> list[Unit]:
    found = []
    for B, H in points:
        for mode in ("infer", "train"):
            case = Case(context.pick(T, 4), B, H, dtype, mode)
            own = tuple(label for label in labels if B * H < 256 * 2048 or label != "stock float32")  # it takes long
            call = functools.partial(lstm.measure, case, context, own, "persist", SECONDS)
            found.append(Unit(f"{mode} {case.name} {str(dtype).removeprefix('torch.')}", 4.0, call))
    return found


def units(context: Context, kind: str) -> list[Unit]:
    """Of the kind "sanitizer", or all that is timed."""
    if kind == "sanitizer":
        asked = context.pick([(tool, loop) for loop in LOOPS for tool in TOOLS], [(TOOLS[0], LOOPS[0])])
        return [Unit(" ".join(of), 30.0, functools.partial(sanitized, context, *of), TOOL_SECONDS + 30) for of in asked]
    if context.dry:
        return [
            *grid(context, [(2, 8)], torch.float32, LABELS[1:3]),
            _loop(context, 2, 40),
            *persist_lowrank.units(context),
        ]
    alone = [_loop(context, B, H) for B, H in (*AIMED, *REST)]
    halves = [grid(context, points, torch.bfloat16, LABELS) for points in (AIMED, REST)]
    low = grid(context, AIMED[:6], torch.float16, (lstm.PERSIST, lstm.OURS, "stock"))
    return [*halves[0], *alone, *persist_lowrank.units(context), *halves[1], *low]


def _loop(context: Context, B: int, H: int) -> Unit:
    return Unit(f"loop B{B}_H{H}", 3.0, functools.partial(_loops, context, B, H, torch.bfloat16))

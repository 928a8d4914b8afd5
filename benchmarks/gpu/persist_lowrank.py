"""The loop of the persistent low-rank LSTM by every tile that fits, which its cost model is fitted to, beside the
operators as Triton has them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import persist_lowrank_loop, timing
from benchmarks.gpu.part import Context, Row, Unit, reason
from benchmarks.gpu.persist_lowrank_loop import Given, Results
from benchmarks.harness import ABSENT, Budget, CannotRun, gate, relative_error
from fastseq import reference
from fastseq.ops.lstm import Options

SECONDS, T, GATE_STEPS = 0.5, 1024, 20
# rows, units, rank, matrices down; most important first
CASES = [(16, 512, 32, 1), (1, 512, 32, 1), (16, 1024, 64, 1), (16, 512, 32, 4), (1, 1024, 16, 4), (64, 512, 64, 1)]
CASES += [(16, 2048, 128, 1), (256, 512, 32, 1), (16, 128, 32, 1)]
NAMES = persist_lowrank_loop.OUTPUTS, persist_lowrank_loop.GRADIENTS


def _defined(call: Given, grads: Results, dtype: torch.dtype) -> tuple[Results, Results]:
    """Outputs and gradients of the definition in ``dtype``; grads of h, h_n and c_n."""
    given = [t.to(dtype) for t in call]
    outs = reference.lstm_lowrank(*given)
    dh, dh_n, dc_n = (d.to(dtype) for d in grads)
    found = reference.lstm_lowrank_backward((dh, None, None, dh_n, dc_n), outs[2], *outs[:2], *given[1:])
    return outs, (found[0], *found[3:5])


def _judge(call: Given) -> tuple[Results, list[dict[str, Budget]]]:
    """Gradients of h, h_n and c_n, and the budgets of the forward and of the backward."""
    dtype, h = call.h0.dtype, call.x_gates[..., : call.h0.shape[1]]
    grads = (torch.randn_like(h), torch.randn_like(call.h0), torch.randn_like(call.c0))
    found = zip(NAMES, *(_defined(call, grads, d) for d in (torch.float64, dtype)), strict=True)
    return grads, [
        {name: Budget(t, relative_error(n, t)) for name, t, n in zip(names, true, plain, strict=True)}
        for names, true, plain in found
    ]


def _passes(call: Given, tile: int, short: Given, judge: Any) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Forward and backward by one tile: the name, the call that is timed, and the verdict of the gate on ``short``."""
    grads, (forward, backward) = judge
    out = persist_lowrank_loop.forward(short, Options(), tile)
    found = persist_lowrank_loop.backward(short, out, grads, Options(), tile)
    run, kept = persist_lowrank_loop.forward_of(call, Options(), tile)
    yield "forward", run, gate(dict(zip(NAMES[0], out, strict=True)), forward, frozenset())
    run()
    run, _ = persist_lowrank_loop.backward_of(call, kept, (kept[0], kept[3], kept[4]), Options(), tile)
    yield "backward", run, gate(dict(zip(NAMES[1], found, strict=True)), backward, frozenset(NAMES[1]))


def _triton(call: Given) -> dict[str, Callable[[], Any]]:
    """Both operators in triton, the second without gradients of the factors: that is its loop alone."""
    from fastseq_kernels import lstm_lowrank

    none: tuple[Tensor | None, ...] = (None,) * 5
    given = (*call, *none, None, None, 0, 0, 1.0, 1.0, False, False, 2)
    h, c, gates, h_n, c_n = lstm_lowrank.lstm_lowrank_forward(*given)
    back = (h, None, None, h_n, c_n, gates, h, c, *call[1:], *none, 1.0, False, False, False)
    return {
        "forward": functools.partial(lstm_lowrank.lstm_lowrank_forward, *given),
        "backward": functools.partial(lstm_lowrank.lstm_lowrank_backward, *back),
    }


def times(context: Context, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> list[Row]:
    """Both passes of every tile in the rounds of all, and of Triton where there is a GPU."""
    steps, (B, H, rank, downs) = context.pick(T, 4), sizes
    call = persist_lowrank_loop.drawn(steps, *sizes, dtype, context.device)
    short = call._replace(x_gates=call.x_gates[:GATE_STEPS])
    judge, calls, rows = _judge(short), {}, []
    shared: Row = {"op": "lstm_lowrank_loop", "table": "lowrank loop", "case": f"T{steps}_B{B}_H{H}_r{rank}x{downs}"}
    shared |= {"dtype": str(dtype).removeprefix("torch.")}
    for number, tile in persist_lowrank_loop.tiles(context.dry).items():
        if tile.downs != downs or tile.rank < rank:
            continue
        needed, held = persist_lowrank_loop.room(call, number, False)
        own = {**shared, "provider": "fastseq", "tile": number, "blocks": needed, "room": held, "rows": tile.rows}
        label = f"tile {number}"
        try:
            persist_lowrank_loop.needs_room(call, number)
            for mode, run, verdict in _passes(call, number, short, judge):
                rows.append({**own, "mode": mode, "label": f"{label} {mode}", "gate": verdict})
                if verdict == "passed":
                    calls[f"{label} {mode}"] = run
        except CannotRun as error:
            rows.append({**own, "mode": "forward", "label": label, "gate": f"{ABSENT[1]}{error}"})
        except Exception as error:
            timing.synchronize(context)  # raises where the device is lost
            rows.append({**own, "mode": "forward", "label": label, "gate": f"failed: {reason(error)}"})
    for mode, run in ({} if context.dry else _triton(call)).items():
        calls[f"triton {mode}"] = run
        other = {"provider": "triton", "tile": "triton", "blocks": "-", "room": "-", "rows": "-", "gate": "passed"}
        rows.append({**shared, **other, "mode": mode, "label": f"triton {mode}"})
    samples = timing.interleave(context, calls, SECONDS)
    for row in rows:
        if row["label"] in samples:
            row |= {k: v for k, v in timing.timed(samples, row["label"]).items() if k != "ratios"}
            row["us_per_step"] = round(row["ms"] * 1e3 / steps, 4)
    return rows


def _times(context: Context, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> list[Row]:
    with persist_lowrank_loop.runs(context.dry):
        return times(context, sizes, dtype)


def units(context: Context) -> list[Unit]:
    found = []
    for sizes in context.pick(CASES, [(2, 130, 5, 4)]):
        name = "low rank B{}_H{}_r{}x{}".format(*sizes)
        found.append(Unit(name, 3.0, functools.partial(_times, context, sizes, torch.bfloat16)))
    return found

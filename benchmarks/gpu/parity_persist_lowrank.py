"""What the parity calls of the persistent low-rank LSTM, verified as ``lstm_persist_lowrank``: its loop by every tile,
and the operators around it; as ``parity_persist`` has the dense one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.gpu import parity_compressed, parity_persist, persist_lowrank_loop
from benchmarks.gpu.parity import Check, Kernels
from benchmarks.gpu.parity_persist import NAMED, needs_device, same_bits, two_at_once, upstream
from benchmarks.gpu.part import backend
from benchmarks.gpu.persist_lowrank_loop import Given, Results
from benchmarks.harness import CannotRun
from fastseq import reference
from fastseq.ops import lstm_lowrank
from fastseq.ops.lstm import Options
from tests import tolerance
from tests.ops.lstm_cases import Case
from tests.tolerance import assert_within_budget

SECONDS, LIMIT = parity_persist.SECONDS, parity_persist.LIMIT
REPEATS, REAL = 100, (200, 16, 512)
NAMES = ("prime", "tiles", "one", "lengths", "packed_reverse", "noise")
MODULE = "lstm_persist_lowrank"


class Persistent(parity_persist.Persistent):
    """Operators by their backend "cuda"."""

    def call(self, module: str, op: str, args: Sequence[Any], stay: Sequence[Any] = ()) -> list[Tensor]:
        own = next(b for b in lstm_lowrank.BACKENDS[op] if b.name == "cuda")
        moved = self.moved(args, stay)
        with backend("cuda"):
            reason = own.why_not(*moved)
            if reason is not None:
                raise CannotRun(reason)
            return [v.cpu() for v in pytree.tree_leaves(own.run(*moved))]


def drawn(kernels: Kernels, case: Case, tile: Any, seed: int = 0) -> tuple[Given, Options]:
    """Inputs on the device, one rank fewer than the tile has."""
    base = parity_persist.drawn(kernels, case, seed)
    rank, dtype, device = tile.rank - 1, kernels.torch_dtype, kernels.context.device
    factors = persist_lowrank_loop.drawn(1, 1, case.H, rank, tile.downs, dtype, device, seed)[1:3]
    return Given(base.x_gates, *factors, base.h0, base.c0), base.options


def _defined(x_gates: Tensor, up: Tensor, down: Tensor, h0: Tensor, c0: Tensor, options: Options) -> Results:
    return reference.lstm_lowrank(x_gates, up, down, h0, c0, *options.state[1:], None, *options.gate)


def _gradients(*inputs: Any) -> Results:
    """Those of x_gates, h0 and c0, by autograd: the inputs of ``_defined``, then the gradients of h, h_n and c_n."""
    leaves = [t.detach().requires_grad_() for t in inputs[:5]]
    h, _, _, h_n, c_n = _defined(*leaves, inputs[5])
    pairs = [(v, d) for v, d in zip((h, h_n, c_n), inputs[6], strict=True) if d is not None]
    outs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outs, [leaves[n] for n in (0, 3, 4)], grads)


def loop(kernels: Kernels, case: Case, n: int, tile: Any) -> None:
    """Forward and backward against the definition; gates may take the place of x_gates."""
    call, options = drawn(kernels, case, tile)
    persist_lowrank_loop.needs_room(call, n)
    with persist_lowrank_loop.runs(kernels.context.dry):
        out = persist_lowrank_loop.forward(call, options, n)
        in_place = persist_lowrank_loop.forward(call, options, n, in_place=True)
        grads = upstream(out)
        found = persist_lowrank_loop.backward(call, out, grads, options, n)
    same_bits(persist_lowrank_loop.OUTPUTS, in_place, out)
    dtype, inputs = kernels.torch_dtype, (*call, options)
    assert_within_budget(persist_lowrank_loop.OUTPUTS, [v.to(dtype) for v in out], _defined, inputs)
    low, given = [d.to(dtype) for d in found], (*inputs, grads)
    assert_within_budget(persist_lowrank_loop.GRADIENTS, low, _gradients, given, tolerance.GRADIENTS)


def no_steps(kernels: Kernels, case: Case, n: int, tile: Any) -> None:
    """Rows of which none has a step: states and their gradients go through."""
    call, options = drawn(kernels, case._replace(layout="lengths"), tile)
    options = options._replace(lengths=torch.zeros_like(options.lengths))
    persist_lowrank_loop.needs_room(call, n)
    with persist_lowrank_loop.runs(kernels.context.dry):
        out = persist_lowrank_loop.forward(call, options, n)
        found = persist_lowrank_loop.backward(call, out, (out[0], call.h0, call.c0), options, n)
    assert not any(v.any() for v in (*out[:3], found[0])), "what has no step is not zero"
    states = (call.h0, call.c0)
    same_bits(("h_n", "c_n", "dh0", "dc0"), (*out[3:], *found[1:]), (*states, *states))


def _real(kernels: Kernels, tile: Any, seed: int = 0) -> Given:
    T, B, H = kernels.context.pick(REAL, (4, 3, tile.units + 3))
    kind = (kernels.torch_dtype, kernels.context.device, seed)
    return persist_lowrank_loop.drawn(T, B, H, tile.rank, tile.downs, *kind)


def _pass(call: Given, n: int) -> Results:
    """Outputs and gradients; of the gradients, upstream ones are the outputs."""
    out = persist_lowrank_loop.forward(call, Options(), n)
    return *out, *persist_lowrank_loop.backward(call, out, (out[0], out[3], out[4]), Options(), n)


def repeats(kernels: Kernels, n: int, tile: Any) -> None:
    call = _real(kernels, tile)
    persist_lowrank_loop.needs_room(call, n)
    with persist_lowrank_loop.runs(kernels.context.dry):
        first = _pass(call, n)
        for _ in range(kernels.context.pick(REPEATS, 2)):
            same_bits(NAMED, _pass(call, n), first)


def streams(kernels: Kernels, n: int, tile: Any) -> None:
    needs_device(kernels)
    pair = [_real(kernels, tile, seed) for seed in (0, 1)]
    persist_lowrank_loop.needs_room(pair[0], n)
    two_at_once(pair, lambda call: _pass(call, n))


def _of_tile(kernels: Kernels, n: int, tile: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """Checks of one tile: one block that speaks to nobody and several; few rows, few units; layouts, and what else."""
    rows, units = tile.rows, tile.units
    edges = Case(7, rows + 3, units + 5)
    cases = {
        "edges": edges,
        "one": Case(1, 1, 1),
        "alone": Case(9, rows, units),
        "full": Case(4, rows, 4 * units),
        "groups": Case(5, 2 * rows + 1, 3 * units - 2),
        "long": Case(300, rows - 1, 2 * units + 1),
    }
    layouts = {name: edges._replace(**options) for name, options in parity_persist.LAYOUTS.items()}
    if kernels.context.dry:
        cases, layouts = {"edges": edges._replace(T=2)}, {"packed_reverse": layouts["packed_reverse"]._replace(H=34)}
    for name, case in (cases | layouts).items():
        yield name, functools.partial(loop, kernels, case, n, tile)
    yield "no steps", functools.partial(no_steps, kernels, edges._replace(H=34), n, tile)
    yield f"{REPEATS} times", functools.partial(repeats, kernels, n, tile)
    yield "streams", functools.partial(streams, kernels, n, tile)


def checks(kernels: Kernels) -> Iterator[Check]:
    """None in other dtypes: it has no kernels for them."""
    if kernels.dtype not in ("bfloat16", "float16"):
        return
    for n, tile in persist_lowrank_loop.tiles(kernels.context.dry).items():
        for name, call in _of_tile(kernels, n, tile):
            yield Check(MODULE, MODULE, f"tile {n} {name}", call, LIMIT)
    if kernels.context.dry:
        return
    own = Persistent(*kernels)
    for name in NAMES:
        for form in parity_compressed.RANKS:
            for op, run in (("forward", parity_compressed.forward), ("backward", parity_compressed.backward)):
                call = functools.partial(run, own, name, form)
                yield Check(MODULE, f"lstm_lowrank_{op}", f"{name} {form}", call)

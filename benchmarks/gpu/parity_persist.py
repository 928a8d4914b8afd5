"""What the parity calls of the persistent LSTM, verified as ``lstm_persist``: its loop by every tile, and the operators
around it. Kernels that wait for each other can hang: each case has a limit, and one that hung has no result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.gpu import parity_compressed, parity_lstm, persist_loop
from benchmarks.gpu.parity import Check, Kernels
from benchmarks.gpu.part import backend
from benchmarks.gpu.persist_loop import Direction, Results
from benchmarks.harness import CannotRun
from fastseq.ops import lstm, lstm_both, lstm_int8, lstm_layer
from fastseq.ops._select import consider
from fastseq.ops.lstm import Options
from tests import tolerance
from tests.cuda import int8_cases
from tests.ops import lstm_cases
from tests.ops.lstm_cases import Case
from tests.tolerance import assert_within_budget

SECONDS = 0.5  # of a case, roughly
LIMIT = 40.0  # of a loop, before it counts as hung: nothing compiles in it
LAYOUTS = {
    "reverse": dict(reverse=True),
    "lengths": dict(layout="lengths"),
    "lengths_reverse": dict(layout="lengths", reverse=True),
    "packed": dict(layout="packed"),
    "packed_reverse": dict(layout="packed", reverse=True),
    "hard": dict(hard=True),
    "hard_lengths": dict(hard=True, layout="lengths", reverse=True),
    "sharpened": dict(tau=0.2),
}
REPEATS, REAL = 100, (200, 16, 512)
LARGE = (100, 8, 2048)  # two calls of it hold more blocks than a device of today
CROWD = (2, 8192, 1024)  # more blocks than any device holds
NAMES = ("prime", "tiles", "one", "lengths", "packed_reverse", "noise")  # the first beside Triton
OPERATORS: dict[str, Callable[[Kernels, str], None]] = {
    "lstm_forward": parity_lstm.forward,
    "lstm_backward": parity_lstm.backward,
    "lstm_layer_forward": parity_lstm.layer_forward,
    "lstm_layer_backward": parity_lstm.layer_backward,
    "lstm_layer_both_forward": parity_lstm.both_forward,
    "lstm_layer_both_backward": parity_lstm.both_backward,
}


class Persistent(Kernels):
    """Operators by their backend "cuda"."""

    def call(self, module: str, op: str, args: Sequence[Any], stay: Sequence[Any] = ()) -> list[Tensor]:
        table = {**lstm.BACKENDS, **lstm_layer.BACKENDS, **lstm_both.BACKENDS, **lstm_int8.BACKENDS}[op]
        own = next(b for b in table if b.name == "cuda")
        moved = self.moved(args, stay)
        with backend("cuda"):
            reason = own.why_not(*moved)
            if reason is not None:
                raise CannotRun(reason)
            return [v.cpu() for v in pytree.tree_leaves(own.run(*moved))]

    def gradients(self, kept: list[Tensor]) -> list[Any]:
        """None of the cells and gates, which it has no place for."""
        kinds = (n * 5 // len(kept) for n in range(len(kept)))  # one of each kind, or one per direction
        return [d if kind in (0, 3, 4) else None for d, kind in zip(super().gradients(kept), kinds, strict=True)]


class Compared(Persistent):
    """What it returns has the shapes and dtypes of what Triton does."""

    def call(self, module: str, op: str, args: Sequence[Any], stay: Sequence[Any] = ()) -> list[Tensor]:
        got, theirs = super().call(module, op, args, stay), Kernels.call(self, module, op, args, stay)
        assert [(v.shape, v.dtype) for v in got] == [(v.shape, v.dtype) for v in theirs], "shapes and dtypes"
        return got


def on(device: torch.device, args: lstm_cases.Inputs) -> lstm_cases.Inputs:
    """But for batch_sizes, which torch has on the CPU."""
    lengths = None if args.options.lengths is None else args.options.lengths.to(device)
    tensors = (t.to(device) for t in args[:4])
    return lstm_cases.Inputs(*tensors, args.options._replace(lengths=lengths))


def drawn(kernels: Kernels, case: Case, seed: int = 0) -> lstm_cases.Inputs:
    """Inputs on the device; those of hard gates are far from 0, where no rounding turns them."""
    args = lstm_cases.inputs(case, kernels.torch_dtype, seed)
    x = args.x_gates
    if case.hard:
        x = x + 6 * x.sign() * (torch.arange(4 * case.H) < 2 * case.H)
    return on(kernels.context.device, args._replace(x_gates=x.to(kernels.torch_dtype), c0=args.c0.float()))


def _gradients(*inputs: Any) -> Results:
    """Those of ``persist_loop.GRADIENTS`` by the definition."""
    found = lstm_cases.definition_gradients(*inputs)
    return found[0], found[2], found[3]


def upstream(out: Results) -> Results:
    """Gradients of h, h_n and c_n."""
    dh, _, _, dh_n, dc_n = lstm_cases.upstream(tuple(v.cpu() for v in out))
    return tuple(d.to(out[0].device) for d in (dh, dh_n, dc_n))


def same_bits(names: Sequence[str], got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compared on the device, as numbers of the same size: NaN is itself."""
    for name, g, e in zip(names, got, expected, strict=True):
        whole = torch.int16 if g.element_size() == 2 else torch.int32
        assert g.dtype == e.dtype and torch.equal(g.view(whole), e.view(whole)), f"{name}: bits differ"


def loop(kernels: Kernels, case: Case, tile: int, only_h: bool = False) -> None:
    """Forward and backward of one direction against the definition; gates may take the place of x_gates."""
    args = drawn(kernels, case)
    one, options, dtype = Direction(*args[:4]), args.options, kernels.torch_dtype
    persist_loop.needs_room(one, options, tile)
    with persist_loop.runs(kernels.context.dry):
        [out] = persist_loop.forward([one], options, tile)
        [in_place] = persist_loop.forward([one], options, tile, in_place=True)
        grads: tuple[Any, ...] = (upstream(out)[0], None, None) if only_h else upstream(out)
        [found] = persist_loop.backward([one], [out], [grads], options, tile)
    same_bits(persist_loop.OUTPUTS, in_place, out)
    exact = lstm_cases.exact(args)
    assert_within_budget(persist_loop.OUTPUTS, [v.to(dtype) for v in out], lstm_cases.definition, exact)
    given = (*exact, (grads[0], None, None, *grads[1:]))
    low = [d.to(dtype) for d in found]
    assert_within_budget(persist_loop.GRADIENTS, low, _gradients, given, tolerance.GRADIENTS)


def int8(kernels: Kernels, sizes: tuple[int, int, int], tile: int) -> None:
    """Every step of every row, from the state before it; rows of other lengths, in both directions."""
    given = int8_cases.drawn(*sizes, kernels.torch_dtype)
    lengths = torch.arange(sizes[1]) % (sizes[0] + 1)
    lengths[0] = sizes[0]
    one = Direction(*(v.to(kernels.context.device) for v in given))
    options = Options(lengths=lengths.to(kernels.context.device))
    persist_loop.needs_room(one, options, tile)
    for reverse in (False, True):
        with persist_loop.runs(kernels.context.dry):
            [out] = persist_loop.forward([one], options._replace(reverse=reverse), tile)
        int8_cases.check(given, lengths, reverse, tuple(v.cpu() for v in out))


def both(kernels: Kernels, case: Case, tile: int) -> None:
    """One launch for two directions gives the bits of two."""
    pair = [drawn(kernels, case._replace(reverse=n == 1), n) for n in (0, 1)]
    directions, options = [Direction(*args[:4]) for args in pair], pair[0].options
    persist_loop.needs_room(directions[0], options, tile, 2)
    with persist_loop.runs(kernels.context.dry):
        outs = persist_loop.forward(directions, options, tile)
        grads = [upstream(out) for out in outs]
        found = persist_loop.backward(directions, outs, grads, options, tile)
        for n, d in enumerate(directions):
            own = options._replace(reverse=n == 1)
            same_bits(persist_loop.OUTPUTS, outs[n], persist_loop.forward([d], own, tile)[0])
            alone = persist_loop.backward([d], [outs[n]], [grads[n]], own, tile)[0]
            same_bits(persist_loop.GRADIENTS, found[n], alone)


def not_finite(kernels: Kernels, case: Case, tile: int) -> None:
    """A NaN of one unit is one for all units of its row from the next step on, and for no other row."""
    args = drawn(kernels, case)
    unit = case.H - 2
    args.x_gates[0, 1, 2 * case.H + unit] = torch.nan
    args.h0[-1] = 1000.0
    persist_loop.needs_room(Direction(*args[:4]), args.options, tile)
    with persist_loop.runs(kernels.context.dry):
        [out] = persist_loop.forward([Direction(*args[:4])], args.options, tile)
    expected = lstm_cases.definition(*(t.double() for t in args[:4]), args.options, None)
    for name, got, want in zip(persist_loop.OUTPUTS, out, expected, strict=True):
        assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN elsewhere"
    assert int(out[0].isnan().sum()) == 1 + (case.T - 1) * case.H, "h: other rows or units are NaN"


def no_steps(kernels: Kernels, case: Case, tile: int) -> None:
    """Rows of which none has a step: states and their gradients go through."""
    args = drawn(kernels, case._replace(layout="lengths"))
    one, options = Direction(*args[:4]), args.options._replace(lengths=torch.zeros_like(args.options.lengths))
    persist_loop.needs_room(one, options, tile)
    with persist_loop.runs(kernels.context.dry):
        [out] = persist_loop.forward([one], options, tile)
        [found] = persist_loop.backward([one], [out], [(out[0], args.h0, args.c0)], options, tile)
    assert not any(v.any() for v in (*out[:3], found[0])), "what has no step is not zero"
    same_bits(("h_n", "c_n", "dh0", "dc0"), (*out[3:], *found[1:]), (args.h0, args.c0, args.h0, args.c0))


def _real(kernels: Kernels, sizes: tuple[int, int, int], seed: int = 0) -> Direction:
    sizes = kernels.context.pick(sizes, (4, 3, 40))
    return persist_loop.drawn(*sizes, kernels.torch_dtype, kernels.context.device, seed)


def _pass(one: Direction, tile: int) -> Results:
    """Outputs and gradients of one direction; of the gradients, upstream ones are the outputs."""
    [out] = persist_loop.forward([one], Options(), tile)
    return *out, *persist_loop.backward([one], [out], [(out[0], out[3], out[4])], Options(), tile)[0]


NAMED = (*persist_loop.OUTPUTS, *persist_loop.GRADIENTS)


def repeats(kernels: Kernels, tile: int) -> None:
    one = _real(kernels, REAL)
    persist_loop.needs_room(one, Options(), tile)
    with persist_loop.runs(kernels.context.dry):
        first = _pass(one, tile)
        for _ in range(kernels.context.pick(REPEATS, 3)):
            same_bits(NAMED, _pass(one, tile), first)


def needs_device(kernels: Kernels) -> None:
    if kernels.context.dry:
        raise CannotRun("it needs a GPU")


def two_at_once(pair: Sequence[Any], run: Callable[[Any], Results]) -> None:
    """``run`` of both in streams of their own, whose blocks may not have room together, gives the bits of one after the
    other."""
    alone = [run(one) for one in pair]
    torch.cuda.synchronize()
    lanes = [torch.cuda.Stream() for _ in pair]
    for _ in range(20):
        found = []
        for lane, one in zip(lanes, pair, strict=True):
            with torch.cuda.stream(lane):
                found.append(run(one))
        torch.cuda.synchronize()
        for got, expected in zip(found, alone, strict=True):
            same_bits(NAMED, got, expected)


def streams(kernels: Kernels, tile: int, sizes: tuple[int, int, int]) -> None:
    needs_device(kernels)
    pair = [_real(kernels, sizes, seed) for seed in (0, 1)]
    persist_loop.needs_room(pair[0], Options(), tile)
    two_at_once(pair, lambda one: _pass(one, tile))


def graph(kernels: Kernels, tile: int) -> None:
    """Captured once, replayed with other numbers in the same places."""
    needs_device(kernels)
    one = _real(kernels, REAL)
    persist_loop.needs_room(one, Options(), tile)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _pass(one, tile)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = _pass(one, tile)
    for seed in (1, 2):
        other = _real(kernels, REAL, seed)
        for place, value in zip(one[:4], other[:4], strict=True):
            place.copy_(value)
        captured.replay()
        torch.cuda.synchronize()
        same_bits(NAMED, found, _pass(other, tile))


def refused(kernels: Kernels) -> None:
    """A grid that the device cannot hold: an error of the loop, and the next backend takes the call of the operator."""
    needs_device(kernels)
    one, tile = _real(kernels, CROWD), max(n for n, t in persist_loop.tiles(False).items() if t.depth >= CROWD[2])
    needed, held = persist_loop.room(one, Options(), tile, 1, False)
    assert needed > held, f"{needed} blocks have room, {held} do"
    try:
        persist_loop.forward([one], Options(), tile)
    except (RuntimeError, ValueError) as error:
        assert "lstm_persist_forward" in str(error), str(error)
    else:
        raise AssertionError("a grid without room was started")
    torch.cuda.synchronize()
    args = (*one[:4], *Options(), 2)
    found = consider("lstm_forward", lstm.BACKENDS["lstm_forward"], *args)
    assert found.reasons["cuda"].startswith("needs "), found.reasons["cuda"]
    assert found.backend is not None and found.backend.name == "triton", found.why
    got = [v.to(kernels.torch_dtype) for v in torch.ops.fastseq.lstm_forward(*args)]
    assert_within_budget(persist_loop.OUTPUTS, got, lstm_cases.definition, (*one[:4], Options(), None))


def _of_tile(kernels: Kernels, n: int, tile: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """Checks of one tile: two groups of blocks or one, few rows, few units, all units; then layouts, and what else."""
    rows, units, depth = tile.rows, tile.units, tile.depth
    cases = {
        "edges": Case(7, rows + 3, units + 5),
        "one": Case(1, 1, 1),
        "row": Case(9, 1, 2 * units),
        "full": Case(4, rows, depth),
        "odd": Case(5, rows - 1, depth - 3),
        "groups": Case(5, 2 * rows + 1, units - 3),
        "long": Case(300, rows - 1, 2 * units + 1),
    }
    edges = Case(7, rows + 3, units + 5)
    layouts = {name: edges._replace(**options) for name, options in LAYOUTS.items()}
    if kernels.context.dry:
        cases, layouts = {"edges": Case(3, rows + 1, units + 5)}, {"packed_reverse": layouts["packed_reverse"]}
    for name, case in (cases | layouts).items():
        yield name, functools.partial(loop, kernels, case, n, name == "reverse")
    if tile.int8_depth:
        deep = () if kernels.context.dry else ((3, rows, tile.int8_depth), (40, 2 * rows + 1, units - 3))
        for sizes in ((5, rows + 3, units + 5), *deep):
            yield f"int8 {'x'.join(map(str, sizes))}", functools.partial(int8, kernels, sizes, n)
    yield "both", functools.partial(both, kernels, edges._replace(layout="lengths"), n)
    yield "NaN", functools.partial(not_finite, kernels, edges, n)
    yield "no steps", functools.partial(no_steps, kernels, edges, n)
    if depth >= REAL[2] or kernels.context.dry:
        yield f"{REPEATS} times", functools.partial(repeats, kernels, n)
        yield "graph", functools.partial(graph, kernels, n)
        yield "streams", functools.partial(streams, kernels, n, REAL)
    if depth >= LARGE[2]:
        yield "large streams", functools.partial(streams, kernels, n, LARGE)


def checks(kernels: Kernels) -> Iterator[Check]:
    """None in other dtypes: it has no kernels for them."""
    if kernels.dtype not in ("bfloat16", "float16"):
        return
    found = {n: list(_of_tile(kernels, n, tile)) for n, tile in persist_loop.tiles(kernels.context.dry).items()}
    for n, own in found.items():
        for name, call in own:
            yield Check("lstm_persist", "lstm_persist", f"tile {n} {name}", call, LIMIT)
    yield Check("lstm_persist", "lstm_forward", "without room", functools.partial(refused, kernels))
    for op, call in OPERATORS.items() if not kernels.context.dry else ():
        for name in NAMES:
            kind = Compared if name == NAMES[0] else Persistent
            run = functools.partial(call, kind(*kernels), name)
            yield Check("lstm_persist", op, name, run)
    for name in parity_compressed.INT8 if not kernels.context.dry else ():
        run = functools.partial(parity_compressed.int8, Persistent(*kernels), name, 1)
        yield Check("lstm_persist", "lstm_int8_forward", name, run)

"""The backend "cuda" of the low-rank LSTM, without a GPU: when it runs, and what it puts around its loop."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastseq.ops import _cuda, lstm_costs, lstm_persist_lowrank
from fastseq.ops._select import consider
from fastseq.ops._triton import interpreted, kernels, why_not_triton
from fastseq.ops.lstm_costs import Cost, LowRankTile
from fastseq.ops.lstm_lowrank import BACKENDS
from fastseq.ops.lstm_persist import Chosen
from tests import tolerance
from tests.cuda import emulated_lowrank, stand_lowrank
from tests.ops import lstm_cases as cases
from tests.ops import test_lstm_lowrank as lowrank
from tests.ops.lstm_cases import OUTPUTS, Case
from tests.tolerance import assert_within_budget

LOW = torch.bfloat16
TILES = tuple(LowRankTile(*t) for t in ((128, 8, 32, 1, 256), (128, 16, 32, 1, 256), (128, 8, 64, 1, 256),
                                        (128, 8, 16, 4, 256)))  # fmt: skip
OPERATORS = list(BACKENDS)
PLAIN = {
    "dense": Case(4, 3, 5),
    "reverse": Case(4, 3, 6, reverse=True, tau=0.8),
    "lengths": Case(4, 3, 5, layout="lengths"),
}
INTERPRETED = {
    "noise": Case(4, 3, 6, layout="lengths", start=True, noise=0.5, tau=0.8),
    "lengths_reverse": Case(4, 3, 5, layout="lengths", reverse=True),
    "packed": Case(4, 3, 5, layout="packed", rows=True, noise=1.0),
}
needs_triton = pytest.mark.skipif(why_not_triton() is not None, reason=f"triton: {why_not_triton()}")


def inputs(case: Case, shared: bool, rank: int = 3) -> lowrank.Inputs:
    found = lowrank.inputs(case, shared, rank, LOW)
    options = (*found.options[:4], None if found.options[4] is None else found.options[4].float(), *found.options[5:])
    return found._replace(c0=found.c0.float(), options=options)


def as_low(values: Any) -> list[Tensor]:
    return [v.to(LOW) for v in values]


def check(case: Case, shared: bool) -> None:
    """What is around the loop, by the kernels as they run on the CPU: outputs and gradients are within the budget, and
    what is not asked for is empty."""
    args, tile = inputs(case, shared), emulated_lowrank.SHARED if shared else emulated_lowrank.SEPARATE
    run = {op: lstm_persist_lowrank.BACKEND[op].run for op in OPERATORS}
    here = mock.patch.object(lstm_persist_lowrank, "_tile", lambda call: Chosen(tile, Cost(0, 0), 1, 1))
    with here, stand_lowrank.registered():
        kept = [run["lstm_lowrank_forward"](*args[:5], *args.options, save) for save in (0, 1, 2)]
        h, c, gates = out = kept[2][:3]
        grads = [d if n in (0, 3, 4) else None for n, d in enumerate(cases.upstream(kept[2]))]
        given = (*grads, gates, h, c, *args[1:5], *args.options[:5], *args.options[10:])
        found, few = (run["lstm_lowrank_backward"](*given, weights) for weights in (True, False))
    for save, got in enumerate(kept):
        assert [v.numel() > 0 for v in got[1:3]] == [save >= 1, save >= 2]
        assert torch.equal(got[0], out[0]) and torch.equal(got[3], kept[2][3])
    assert_within_budget(OUTPUTS, as_low(kept[2]), lowrank.definition, lowrank.exact(args))
    names = [name for name in lowrank.NAMES if name in lowrank.present(args)]
    got = dict(zip(lowrank.NAMES, found, strict=True))
    expected = (*lowrank.exact(args), grads)
    low = as_low(got[name] for name in names)
    assert_within_budget([f"d{n}" for n in names], low, lowrank.definition_gradients, expected, tolerance.GRADIENTS)
    assert few[1].numel() == few[2].numel() == 0 and torch.equal(few[0], found[0])


@needs_triton
@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN.keys())
@lowrank.each_shared
def test_around_its_loop(shared: bool, case: Case) -> None:
    check(case, shared)


@pytest.mark.skipif(not interpreted(), reason="triton: interpreted with TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", INTERPRETED.values(), ids=INTERPRETED.keys())
@lowrank.each_shared
def test_around_its_loop_with_triton(shared: bool, case: Case) -> None:
    check(case, shared)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if the library were there, and a device that holds a hundred blocks and that nobody has tried."""
    monkeypatch.delenv("FASTSEQ_BACKEND", raising=False)
    monkeypatch.setattr(_cuda, "why_not_loaded", None)
    monkeypatch.setattr(_cuda, "why_not_triton", lambda: None)
    monkeypatch.setattr(lstm_persist_lowrank, "TILES", TILES)
    monkeypatch.setattr(lstm_persist_lowrank, "chosen", lstm_persist_lowrank.chosen.__wrapped__)  # nothing remembered
    monkeypatch.setattr(lstm_persist_lowrank, "_room", lambda shape, tile: (TILES[tile].grid(shape.B, shape.H)[0], 100))
    monkeypatch.setattr(kernels("_verified"), "capability", lambda index: 90)
    monkeypatch.setattr(kernels("_verified"), "rows", lambda: {})
    monkeypatch.setattr(kernels("_launch"), "target", lambda device: kernels("_launch").Target(90, 227 * 1024, 132))
    return monkeypatch


def arguments(op: str, case: Case, shared: bool = True, rank: int = 3, dtype: torch.dtype = LOW) -> list[Any]:
    """Of a call on ``cuda``."""
    args = inputs(case, shared, rank)
    given = [*args[:5], *args.options, 2]
    if op.endswith("backward"):
        lead, H = args.x_gates.shape[:-1], case.H
        kept = (args.x_gates, torch.zeros(*lead, H, dtype=LOW), torch.zeros(*lead, H))
        given = [*(None,) * 5, *kept, *args[1:5], *args.options[:5], *args.options[10:], True]
    with FakeTensorMode(allow_non_fake_inputs=True):

        def on_cuda(value: Any) -> Any:
            if not isinstance(value, Tensor) or value is args.options[1]:  # batch_sizes are on the CPU
                return value
            return torch.empty(value.shape, device="cuda", dtype=dtype if value.dtype == LOW else value.dtype)

        return [on_cuda(v) for v in given]


def reason(op: str, case: Case = PLAIN["dense"], ask: str = "why_not", grad: int | None = None, **kind: Any) -> Any:
    args = arguments(op, case, **kind)
    if grad is not None:
        args[grad] = args[5]
    with FakeTensorMode(allow_non_fake_inputs=True):
        return getattr(next(b for b in BACKENDS[op] if b.name == "cuda"), ask)(*args)


UNVERIFIED = "unverified: no result row of lstm_persist_lowrank for sm_90"


@needs_triton
@pytest.mark.parametrize("op", OPERATORS)
def test_it_runs_where_it_is_verified_or_asked_for(op: str, here: pytest.MonkeyPatch) -> None:
    for case in PLAIN.values():
        assert reason(op, case) == UNVERIFIED
    here.setattr(_cuda, "_record", lambda: {"cuda": {"source": "ab"}})
    row = {"source": "ab", "dtypes": ["bfloat16"]}
    here.setattr(kernels("_verified"), "rows", lambda: {"sm_90": {"lstm_persist_lowrank": row}})
    assert reason(op) is None
    row["source"] = "cd"
    assert reason(op) == "unverified: lstm_persist_lowrank has changed since its result row for sm_90"
    here.setenv("FASTSEQ_BACKEND", "cuda")
    assert reason(op) is None and reason(op, shared=False) is None


@needs_triton
@pytest.mark.parametrize("op", OPERATORS)
def test_what_it_is_not_for(op: str, here: pytest.MonkeyPatch) -> None:
    here.setenv("FASTSEQ_BACKEND", "cuda")
    assert reason(op, dtype=torch.float32) == "only bfloat16 and float16, got float32"
    assert reason(op, Case(4, 3, 5, reset=True, start=True)) == "no segments (reset)"
    for case, rank in ((Case(0, 3, 5), 3), (Case(4, 0, 5), 3), (Case(4, 3, 5), 0)):
        assert reason(op, case, rank=rank) == "no steps, rows, units or ranks"
    assert reason(op, rank=65) == "rank 65 is more than any tile has, 64 with 1 down"
    assert reason(op, rank=17, shared=False) == "rank 17 is more than any tile has, 16 with 4 down"
    here.setattr(lstm_persist_lowrank, "_room", lambda shape, tile: (60, 59))
    assert reason(op) == "needs 60 blocks of threads at a time, the device holds 59"
    here.setattr(lstm_persist_lowrank, "_room", lambda shape, tile: None)
    assert reason(op) == "no CUDA device is here"
    here.setattr(lstm_persist_lowrank, "TILES", ())
    assert reason(op) == "not in the compiled library, which an older version built; rebuild it"


@needs_triton
@pytest.mark.parametrize("which", [1, 2])
def test_gradients_that_it_has_no_place_for(which: int, here: pytest.MonkeyPatch) -> None:
    here.setenv("FASTSEQ_BACKEND", "cuda")
    assert reason("lstm_lowrank_backward", grad=which) == "no gradients of the cells or gates of each step"
    assert reason("lstm_lowrank_backward", grad=3) is None


@needs_triton
def test_the_cheapest_tile_that_there_is_room_for(here: pytest.MonkeyPatch) -> None:
    shape = lstm_persist_lowrank.Shape(12, 200, 20, 1, LOW, torch.device("cuda"), False)
    found = lstm_persist_lowrank.chosen(shape)
    assert isinstance(found, Chosen) and found.tile == 0
    here.setattr(lstm_persist_lowrank, "_room", lambda shape, tile: (7, 6 if tile == 0 else 7))
    found = lstm_persist_lowrank.chosen(shape)
    assert isinstance(found, Chosen) and found.tile in (1, 2)
    [wide, separate] = (
        lstm_persist_lowrank.chosen(shape._replace(**v)) for v in ({"rank": 33}, {"rank": 9, "downs": 4})
    )
    assert isinstance(wide, Chosen) and wide.tile == 2 and isinstance(separate, Chosen) and separate.tile == 3


def test_what_a_step_costs() -> None:
    """More with more blocks, ranks and rows; one block waits for nobody."""
    one, four, wide = (lstm_costs.persist_lowrank(TILES[0], 8, H).step for H in (128, 512, 2048))
    assert one + lstm_costs.EXCHANGE < four < wide
    assert lstm_costs.persist_lowrank(TILES[2], 8, 512).step > four
    assert lstm_costs.persist_lowrank(TILES[1], 8, 512).step > four
    routes = [lstm_costs.triton_lowrank(512, 32, 1, route).step for route in ("resident", "steps")]
    assert four < routes[0] < routes[1]
    assert lstm_costs.triton_lowrank(512, 32, 1, "resident", True).step > routes[0]
    assert lstm_costs.triton_lowrank(512, 32, 1, "loop").step > routes[0]


@needs_triton
def test_few_steps_go_another_way_and_explain_tells_its_tile(here: pytest.MonkeyPatch) -> None:
    op = "lstm_lowrank_forward"
    here.setattr(lstm_costs, "PERSIST_START", 100.0)
    few, many = (reason(op, Case(T, 3, 200), ask="doubt") for T in (1, 1000))
    assert many is None
    assert re.fullmatch(r"\d+ us for all steps by our estimate, \d+ in triton", few)
    here.setenv("FASTSEQ_BACKEND", "cuda")
    args = arguments(op, Case(4, 3, 300))
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = consider(op, BACKENDS[op], *args)
    assert found.backend is not None and found.backend.name == "cuda"
    way = (
        r"persistent: 3 blocks of 256 threads, each of 128 units and up to 8 rows, 32 numbers of a row between them, "
        r"\d\.\d us a step by our estimate"
    )
    assert re.fullmatch(f"FASTSEQ_BACKEND=cuda; (.* in triton; )?{way}", found.why), found.why

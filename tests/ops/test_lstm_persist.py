"""The backend "cuda" of the LSTM's operators, without a GPU: when it runs, and what it puts around its loop."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastseq.ops import _cuda, _library, lstm_both, lstm_costs, lstm_layer, lstm_persist
from fastseq.ops._select import consider
from fastseq.ops._triton import interpreted, kernels, why_not_triton
from fastseq.ops.lstm_costs import Cost
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import Case
from tests.tolerance import assert_same_bits

I = 7  # noqa: E741
NOISE, LOW = (None, None, 0, 0, 1.0), torch.bfloat16
TILES = tuple(
    lstm_persist.Tile(*t) for t in ((8, 16, 256, 256, 0, 512), (8, 16, 512, 256, 0, 0), (16, 64, 512, 256, 1, 0))
)
LAYOUTS = {
    "dense": Case(4, 3, 5),
    "hard_reverse": Case(4, 3, 5, hard=True, reverse=True),
    "lengths": Case(4, 3, 5, layout="lengths", start=True, noise=0.5, tau=0.8),
    "packed": Case(4, 3, 5, layout="packed", rows=True, noise=1.0),
}


class Layer:
    """Arguments of every operator that has the backend, of one call."""

    def __init__(self, case: Case, count: int = 1, bias: bool = True) -> None:
        drawn = [cases.inputs(case, LOW, seed) for seed in range(count)]
        self.options, generator = drawn[0].options, torch.Generator().manual_seed(3)
        lead, H = drawn[0].x_gates.shape[:-1], drawn[0].c0.shape[1]

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(LOW)

        self.x_gates, self.x = drawn[0].x_gates, normal(*lead, I)
        self.weight_ih = [normal(4 * H, I) / 4 for _ in drawn]
        self.bias = [normal(4 * H) for _ in drawn] if bias else []
        self.weight_hh, self.h0 = [d.weight_hh for d in drawn], [d.h0 for d in drawn]
        self.c0 = [d.c0.float() for d in drawn]
        starts = [[getattr(d.options, name) for d in drawn] for name in ("h_start", "c_start")]
        self.starts = [[v for v in values if v is not None] for values in starts]
        self.options = self.options._replace(c_start=self.starts[1][0].float() if self.starts[1] else None)
        self.starts[1] = [v.float() for v in self.starts[1]]

    def forward(self, op: str, save: int) -> tuple[Any, ...]:
        o, state = self.options, (self.weight_hh, self.h0, self.c0)
        if op.startswith("lstm_layer_both"):
            sizes, rest = (*o[1:4], *self.starts, *o[6:11]), (o.tau, o.hard, save)
            return self.x, self.weight_ih, self.bias, *state, *sizes, *rest
        own = [values[0] for values in state]
        if op.startswith("lstm_layer"):
            return self.x, self.weight_ih[0], self.bias[0] if self.bias else None, *own, *o, save
        return self.x_gates, *own, *o, save

    def backward(self, op: str, outputs: Any, grads: list[Any], rebuilt: bool) -> tuple[Any, ...]:
        o, args = self.options, self.forward(op, 2)[:-1]
        if op.startswith("lstm_layer_both"):
            h, c, gates = (list(outputs[n : n + 2]) for n in (0, 2, 4))
            return grads, *args[:3], [] if rebuilt else gates, h, c, *args[3:], True, True, bool(self.bias), True
        h, c, gates = outputs[:3]
        if op.startswith("lstm_layer"):
            kept = (None if rebuilt else gates, h, c)
            return *grads, *args[:3], *kept, *args[3:], True, True, bool(self.bias), True
        return *grads, gates, h, c, *args[1:4], *o.state, *o.gate, True


def gradients(outputs: Any, count: int) -> list[Tensor | None]:
    """Of h, h_n and c_n; those of c and gates are not for this backend."""
    kinds = [n // count for n in range(len(outputs))]
    found = cases.upstream(tuple(outputs))
    return [d if kind in (0, 3, 4) else None for d, kind in zip(found, kinds, strict=True)]


class Stand:
    """The operators of csrc/cuda by kernels of triton, which are given the same; arguments named as in the schema."""

    calls: list[tuple[str, int, int]] = []

    @staticmethod
    def recurrences(data: Any, own: Any, lengths: Any, offsets: Any, tau: float, hard: bool, reverse: bool) -> Any:
        from fastseq_kernels._rows import Rows
        from fastseq_kernels._steps import Recurrence

        T, B = len(data[0] if offsets is None else offsets), len(own[2][0])
        rows, none = Rows(T, B, lengths, offsets), (None,) * 4
        both = zip(*own, (reverse, not reverse), strict=False)
        return [Recurrence(rows, w, h0, c0, *none, tau, hard, way) for w, h0, c0, way in both]

    @staticmethod
    def forward(
        x_gates: Any, weight_hh: Any, scale: Any, h0: Any, c0: Any, lengths: Any, offsets: Any, tau: float, hard: bool,
        reverse: bool, tile: int, h: Any, c: Any, gates: Any, h_n: Any, c_n: Any,
    ) -> None:  # fmt: skip
        from fastseq_kernels import lstm_resident

        Stand.calls.append(("forward", len(x_gates), tile))
        calls = Stand.recurrences(x_gates, (weight_hh, h0, c0), lengths, offsets, tau, hard, reverse)
        outs = zip(calls, x_gates, h, c or (None, None), gates or (None, None), strict=False)
        last = lstm_resident.forward([lstm_resident.Direction(*values) for values in outs])
        for n, (h_last, c_last) in enumerate(last):
            h_n[n].copy_(h_last), c_n[n].copy_(c_last)

    @staticmethod
    def backward(
        dh: Any, dh_n: Any, dc_n: Any, gates: Any, c: Any, weight_hh: Any, c0: Any, lengths: Any, offsets: Any,
        tau: float, hard: bool, reverse: bool, tile: int, dx_gates: Any, dh0: Any, dc0: Any,
    ) -> None:  # fmt: skip
        from fastseq_kernels import lstm_resident
        from fastseq_kernels._steps import Grads

        Stand.calls.append(("backward", len(gates), tile))
        calls = Stand.recurrences(gates, (weight_hh, dh0, c0), lengths, offsets, tau, hard, reverse)
        grads = [Grads(d, None, None, *ends) for d, *ends in zip(dh, dh_n, dc_n, strict=True)]
        given = zip(calls, grads, gates, c, strict=True)
        for n, found in enumerate(lstm_resident.backward([lstm_resident.Given(*values) for values in given])):
            dx_gates[n].copy_(found.dx_gates), dh0[n].copy_(found.dh0), dc0[n].copy_(found.dc0)


@pytest.mark.skipif(
    not interpreted() or why_not_triton() is not None, reason="triton: interpreted with TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("layout", ["hard_reverse", "lengths", "packed"])
@pytest.mark.parametrize("op", ["lstm", "lstm_layer", "lstm_layer_both"])
def test_around_its_loop_it_does_what_triton_does(op: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lstm_persist, "_tile", lambda call: lstm_persist.Chosen(5, Cost(0, 0), 1, 1))
    monkeypatch.setattr(Stand, "calls", [])
    count = 2 if op.endswith("both") else 1
    layer = Layer(LAYOUTS[layout], count, bias=layout != "packed")
    module = kernels("lstm" if op == "lstm" else "lstm_layer")

    def both(way: str, *args: Any) -> Any:
        got = lstm_persist.BACKEND[f"{op}_{way}"].run(*args)
        expected = getattr(module, f"{op}_{way}")(*args)
        assert type(got) is type(expected)
        assert [v.dtype for v in got] == [v.dtype for v in expected]
        names = [str(n) for n in range(len(expected))]
        assert_same_bits(names, [v.float() for v in got], [v.float() for v in expected])
        return got

    with torch.library._scoped_library("fastseq", "IMPL") as library:
        library.impl("lstm_persist_forward", Stand.forward, "CPU")
        library.impl("lstm_persist_backward", Stand.backward, "CPU")
        for save in (0, 1, 2):
            outputs = both("forward", *layer.forward(op, save))
        grads = gradients(outputs, count)
        for rebuilt in (False, True):
            both("backward", *layer.backward(op, outputs, grads, rebuilt))
        nothing = [None if n % 2 else d for n, d in enumerate(grads)]
        both("backward", *layer.backward(op, outputs, nothing, False))
    assert Stand.calls == [("forward", count, 5)] * 3 + [("backward", count, 5)] * 3


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if the library were there, and a device that holds a hundred blocks and that nobody has tried."""
    monkeypatch.delenv("FASTSEQ_BACKEND", raising=False)
    monkeypatch.setattr(_cuda, "why_not_loaded", None)
    monkeypatch.setattr(_cuda, "why_not_triton", lambda: None)
    monkeypatch.setattr(lstm_persist, "TILES", TILES)
    monkeypatch.setattr(lstm_persist, "chosen", lstm_persist.chosen.__wrapped__)  # nothing is remembered
    monkeypatch.setattr(lstm_persist, "_room", lambda shape, tile: (shape.directions * shape.H // 8, 100))
    monkeypatch.setattr(kernels("_verified"), "capability", lambda index: 90)
    monkeypatch.setattr(kernels("_verified"), "rows", lambda: {})
    monkeypatch.setattr(kernels("_launch"), "target", lambda device: kernels("_launch").Target(90, 227 * 1024, 132))
    return monkeypatch


def reason(
    op: str = "lstm_forward",
    case: Any = LAYOUTS["dense"],
    dtype: torch.dtype = LOW,
    ask: str = "why_not",
    **change: Any,
) -> Any:
    """Why the backend does not run a call on ``cuda``; the arguments that the schema names are changed."""
    layer = Layer(case, 2 if "both" in op else 1)
    backward = op.endswith("backward")
    args = layer.forward(op, 2)
    if backward:
        lead, H = layer.x.shape[:-1], layer.c0[0].shape[1]
        out = (torch.zeros(*lead, H, dtype=LOW), torch.zeros(*lead, H), torch.zeros(*lead, 4 * H, dtype=LOW))
        kept = [v for v in out for _ in range(2)] if "both" in op else out
        args = layer.backward(op, kept, [None] * (10 if "both" in op else 5), False)
    names = [a.name for a in getattr(torch.ops.fastseq, op).default._schema.arguments]
    given = {**dict(zip(names, args, strict=True)), **change}
    with FakeTensorMode(allow_non_fake_inputs=True):

        def on_cuda(value: Any) -> Any:
            if isinstance(value, list):
                return [on_cuda(v) for v in value]
            if not isinstance(value, Tensor):
                return value
            return torch.empty(value.shape, device="cuda", dtype=dtype if value.dtype == LOW else value.dtype)

        sizes = {"batch_sizes": given["batch_sizes"]}  # on the CPU
        arguments = {**{name: on_cuda(value) for name, value in given.items()}, **sizes}
        backend = next(b for b in _library.TABLES[op] if b.name == "cuda")
        return getattr(backend, ask)(*arguments.values())


OPERATORS = ["lstm_forward", "lstm_backward", *lstm_layer.BACKENDS, *lstm_both.BACKENDS]
UNVERIFIED = "unverified: no result row of lstm_persist for sm_90"


@pytest.mark.parametrize("op", OPERATORS)
def test_it_runs_where_it_is_verified_or_asked_for(op: str, here: pytest.MonkeyPatch) -> None:
    for case in LAYOUTS.values():
        assert reason(op, case) == UNVERIFIED
    here.setattr(_cuda, "_record", lambda: {"cuda": {"source": "ab"}})
    row = {"source": "ab", "dtypes": ["bfloat16"]}
    here.setattr(kernels("_verified"), "rows", lambda: {"sm_90": {"lstm_persist": row}})
    assert reason(op) is None
    assert reason(op, dtype=torch.float16) == "unverified: no result row of lstm_persist in float16 for sm_90"
    row["source"] = "cd"
    assert reason(op) == "unverified: lstm_persist has changed since its result row for sm_90"
    here.setenv("FASTSEQ_BACKEND", "cuda")
    assert reason(op) is None


@pytest.mark.parametrize("op", OPERATORS)
def test_what_it_is_not_for(op: str, here: pytest.MonkeyPatch) -> None:
    here.setenv("FASTSEQ_BACKEND", "cuda")
    assert reason(op, dtype=torch.float32) == "only bfloat16 and float16, got float32"
    assert reason(op, dtype=torch.float64) == "only bfloat16 and float16, got float64"
    assert reason(op, Case(4, 3, 5, reset=True, start=True)) == "no segments (reset)"
    if "both" not in op:
        assert reason(op, Case(4, 3, 5, P=3)) == "no projection"
    assert reason(op, Case(0, 3, 5)) == reason(op, Case(4, 0, 5)) == "no steps, rows or units"
    assert reason(op, Case(1, 1, 513)) == "H = 513 is more than any tile has, H <= 512 is not"
    here.setattr(lstm_persist, "_room", lambda shape, tile: (shape.directions * 60, 59))
    blocks = 120 if "both" in op else 60
    assert reason(op) == f"needs {blocks} blocks of threads at a time, the device holds 59"
    here.setattr(lstm_persist, "_room", lambda shape, tile: None)
    assert reason(op) == "no CUDA device is here"


@pytest.mark.parametrize("op", ["lstm_backward", "lstm_layer_backward", "lstm_layer_both_backward"])
@pytest.mark.parametrize("which", [1, 2])
def test_gradients_that_it_has_no_place_for(op: str, which: int, here: pytest.MonkeyPatch) -> None:
    if "both" in op:
        grads: list[Any] = [None] * 10
        grads[2 * which + 1] = torch.zeros(1)  # of the second direction
        change: dict[str, Any] = {"grads": grads}
    else:
        change = {("dc", "dgates")[which - 1]: torch.zeros(1)}
    assert reason(op, **change) == "no gradients of the cells or gates of each step"


def test_devices_that_it_is_not_for(here: pytest.MonkeyPatch) -> None:
    here.setattr(kernels("_verified"), "capability", lambda index: 75)
    assert reason() == "sm_75 is older than sm_80"
    here.setattr(torch.version, "hip", "6.4")
    assert reason() == "no kernels for ROCm"
    here.setattr(_cuda, "why_not_triton", lambda: "triton is not installed")
    assert reason() == "triton is not installed"
    here.setattr(_cuda, "why_not_loaded", "not built (FASTSEQ_BUILD=torch)")
    assert reason() == "not built (FASTSEQ_BUILD=torch)"


def test_the_cheapest_tile_that_there_is_room_for(here: pytest.MonkeyPatch) -> None:
    shape = lstm_persist.Shape(1, 3, 200, 1, False, False, False, LOW, torch.device("cuda"), False)
    costs = [lstm_costs.persist(tile, 3, 200).step for tile in TILES]
    found = lstm_persist.chosen(shape)
    assert isinstance(found, lstm_persist.Chosen) and found.cost.step == min(costs)
    best = found.tile
    here.setattr(lstm_persist, "_room", lambda shape, tile: (7, 6 if tile == best else 7))
    found = lstm_persist.chosen(shape)
    assert isinstance(found, lstm_persist.Chosen) and found.tile != best


def test_few_steps_go_another_way(here: pytest.MonkeyPatch) -> None:
    few, many = (reason(case=Case(T, 3, 200), ask="doubt") for T in (1, 1000))
    assert many is None
    assert re.fullmatch(r"\d+ us for all steps by our estimate, 15 in triton", few)


def test_explain_tells_its_tile(here: pytest.MonkeyPatch) -> None:
    here.setenv("FASTSEQ_BACKEND", "cuda")
    with FakeTensorMode():
        x, weight_hh = (torch.empty(*s, device="cuda", dtype=LOW) for s in ((4, 3, 1200), (1200, 300)))
        h0, c0 = torch.empty(3, 300, device="cuda", dtype=LOW), torch.empty(3, 300, device="cuda")
        args = (x, weight_hh, h0, c0, *(None,) * 6, *NOISE, 1.0, False, False, 2)
        found = consider("lstm_forward", _library.TABLES["lstm_forward"], *args)
    assert found.backend is not None and found.backend.name == "cuda"
    way = r"persistent: 37 blocks of 256 threads, each of 8 units and up to 16 rows, \d\.\d us a step by our estimate"
    assert re.fullmatch(f"FASTSEQ_BACKEND=cuda; (.* in triton; )?{way}", found.why), found.why

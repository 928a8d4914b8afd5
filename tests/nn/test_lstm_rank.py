"""``LSTM(rank=...)``: factors in the place of recurrent matrices, against a dense LSTM with their products."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import functional
from fastseq._check import ArgumentError
from fastseq.functional import Factors, Weights
from fastseq.nn import LSTM
from tests.nn.stock import LENGTHS, assert_like, inputs
from tests.ops.lstm_cases import needs_compiled
from tests.tolerance import assert_same_bits

T, B, I, H = 5, 3, 3, 6  # noqa: E741
RANKS: dict[str, Any] = {
    "all": 2,
    "unequal": {"i": 1, "f": 2, "g": 2, "o": 1},
    "much_unequal": {"i": 1, "f": 6, "g": 2, "o": 2},
    "some": {"f": 2, "o": 1},
}
each_rank = pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS.keys())
DEEP = {"num_layers": 2, "bidirectional": True}


class ByProducts(nn.Module):
    """A dense LSTM whose recurrent matrices are computed from factors with the names of ``LSTM(rank=rank)``."""

    def __init__(self, dense: type[nn.Module], rank: Any, dtype: Any, **config: Any) -> None:
        super().__init__()
        plain = {k: v for k, v in config.items() if dense is LSTM or k in ("num_layers", "bidirectional")}
        for name, parameter in LSTM(I, H, rank=rank, dtype=dtype, **config).named_parameters():
            self.register_parameter(name, parameter)
        self.rank = dict.fromkeys("ifgo", rank) if isinstance(rank, int) else rank
        self.__dict__["dense"] = dense(I, H, dtype=dtype, **plain)

    def forward(self, *args: Any, **call: Any) -> Any:
        named = {n: getattr(self, n) for n, _ in self.named_parameters()}
        for name in [n for n in named if n.startswith("weight_hh_up")]:
            up, down = named.pop(name), named.pop(name.replace("_up", "_down"))
            at, dense, full = 0, [], iter(named.get(name.replace("_up", ""), up.new_zeros(0, H)).split(H))
            for gate in "ifgo":
                rank = self.rank.get(gate)
                dense.append(next(full) if rank is None else up[:, at : at + rank] @ down[at : at + rank])
                at += rank or 0
            named[name.replace("_up", "")] = torch.cat(dense)
        self.dense.train(self.training)
        return torch.func.functional_call(self.dense, named, args, call)


def makers(dense: type[nn.Module], rank: Any, **config: Any) -> tuple[Any, Any]:
    return functools.partial(LSTM, I, H, rank=rank, **config), functools.partial(
        ByProducts, dense, rank, dtype=torch.float32, **config
    )


@pytest.mark.parametrize("kind", ["padded", "packed"])
@each_rank
def test_results(rank: Any, kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        ours, theirs = makers(nn.LSTM, rank, **DEEP)
        given = inputs(ours(dtype=dtype), T, B, I, state=[(4, B, H), (4, B, H)])
        assert_like(ours, theirs, given, 3, kind=kind)


@pytest.mark.parametrize(
    "options",
    [{"gates": "binary"}, {"gates": "sharpened", "learnable_state": True}, {"variational_dropout": 0.3}],
    ids=["binary", "sharpened", "variational"],
)
@pytest.mark.parametrize("rank", [2, {"i": 1, "f": 2}], ids=["all", "some"])
def test_options(rank: Any, options: dict[str, Any]) -> None:
    ours, theirs = makers(LSTM, rank, **DEEP, **options)
    call = {"lengths": torch.tensor(LENGTHS), "reset": torch.rand(T, B) < 0.3}
    assert_like(ours, theirs, inputs(ours(), T, B, I), 3, **call)


def test_the_parameters_are_factors_and_full_gates() -> None:
    module = LSTM(I, H, bidirectional=True, rank={"i": 2, "f": 3}, bias=False)
    assert {n: list(p.shape) for n, p in module.named_parameters()} == {
        "weight_ih_l0": [4 * H, I],
        "weight_hh_l0": [2 * H, H],
        "weight_hh_up_l0": [H, 5],
        "weight_hh_down_l0": [5, H],
        "weight_ih_l0_reverse": [4 * H, I],
        "weight_hh_l0_reverse": [2 * H, H],
        "weight_hh_up_l0_reverse": [H, 5],
        "weight_hh_down_l0_reverse": [5, H],
    }
    assert [n for n, _ in LSTM(I, H, rank=2, learnable_state=True).named_parameters()] == [
        *("weight_ih_l0", "weight_hh_up_l0", "weight_hh_down_l0", "bias_ih_l0", "bias_hh_l0", "h_start_l0"),
        "c_start_l0",
    ]
    assert [w.shape[0] for w in module.all_weights[0]] == [4 * H, 2 * H, H, 5]
    assert "rank={'i': 2, 'f': 3}" in repr(module)
    assert repr(LSTM(I, H, rank=2)) == f"LSTM({I}, {H}, rank=2)"


def test_initial_products_vary_as_dense_weights_do() -> None:
    module = LSTM(I, 400, rank={"i": 3, "f": 50, "g": 200, "o": 10}, forget_bias=1.0)
    for part in module.dense_state_dict()["weight_hh_l0"].chunk(4):
        assert 0.8 < float(part.var()) * 3 * 400 < 1.25  # uniform in +- H**-0.5
    total = module.bias_ih_l0 + module.bias_hh_l0
    assert torch.equal(total[400:800], torch.ones(400))


@each_rank
def test_dense_weights_load_as_their_best_factors_and_back(rank: Any, caplog: pytest.LogCaptureFixture) -> None:
    stock, module = nn.LSTM(I, H, **DEEP), LSTM(I, H, **DEEP, rank=rank)
    with caplog.at_level(logging.WARNING, "fastseq"):
        module.load_state_dict(stock.state_dict())
    dense = module.dense_state_dict()
    assert list(dense) == list(stock.state_dict())
    squares = [0.0, 0.0]
    ranks = dict.fromkeys("ifgo", rank) if isinstance(rank, int) else rank
    for name, value in stock.state_dict().items():
        if not name.startswith("weight_hh"):
            assert torch.equal(dense[name], value)
            continue
        for gate, found, part in zip("ifgo", dense[name].chunk(4), value.chunk(4), strict=True):
            lost = torch.linalg.svdvals(part.double())[ranks.get(gate, H) :].square().sum()
            assert torch.allclose((found - part).double().square().sum(), lost, rtol=1e-4, atol=1e-12)
            squares = [squares[0] + float(lost), squares[1] + float(part.double().square().sum())]
    (record,) = caplog.records
    told = re.fullmatch(r"LSTM: dense recurrent weights became factors, relative error (\S+)", record.message)
    assert told and float(told[1]) == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=0.01)
    again, other = LSTM(I, H, **DEEP, rank=rank), nn.LSTM(I, H, **DEEP)
    again.load_state_dict(module.state_dict())
    assert_same_bits(list(dense), list(again.dense_state_dict().values()), list(dense.values()))
    other.load_state_dict(dense)
    up, down = module.weight_hh_up_l0, module.weight_hh_down_l0
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)  # both carry the singular values


def test_inside_a_model_and_with_missing_keys() -> None:
    inner = nn.ModuleDict({"rnn": LSTM(I, H, rank=2)})
    dense = {f"rnn.{k}": v for k, v in nn.LSTM(I, H).state_dict().items()}
    assert not any(inner.load_state_dict(dense))
    assert set(dense) == {f"rnn.{k}" for k in nn.LSTM(I, H).state_dict()}  # the caller's dict stays as it is
    with pytest.raises(RuntimeError, match="Missing key.*rnn.weight_hh_up_l0"):
        inner.load_state_dict({k: v for k, v in dense.items() if "hh" not in k})
    plain = LSTM(I, H)
    assert list(plain.dense_state_dict()) == list(plain.state_dict())
    meta = LSTM(I, H, rank=2, device="meta")
    assert not any(meta.load_state_dict(nn.LSTM(I, H).state_dict(), assign=True))
    assert meta.weight_hh_up_l0.device.type == "cpu"


def test_a_gate_of_zeros_loads() -> None:
    state = nn.LSTM(I, H).state_dict()
    state["weight_hh_l0"][:H] = 0
    module = LSTM(I, H, rank=2)
    module.load_state_dict(state)
    assert torch.equal(module.dense_state_dict()["weight_hh_l0"][:H], torch.zeros(H, H))


@each_rank
def test_copies_and_graphs(rank: Any) -> None:
    module, x = LSTM(I, H, **DEEP, rank=rank), torch.randn(T, B, I)
    want = module(x)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).double().float()):
        assert_same_bits("copy", other(x)[0], want)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = compiled(x)[0]
    grads = [torch.autograd.grad(v.sum(), tuple(module.parameters())) for v in (got, want)]
    assert_same_bits(["out", *(n for n, _ in module.named_parameters())], [got, *grads[0]], [want, *grads[1]])
    assert pickle.loads(pickle.dumps(module)).rank == module.rank


@each_rank
def test_gradcheck(rank: Any) -> None:
    module = LSTM(2, 6, rank=rank, dtype=torch.float64)
    names = [n for n, _ in module.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Any:
        out, (h, c) = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))
        return out, h, c

    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *module.parameters()))


def test_layouts_and_gates() -> None:
    module = LSTM(I, H, rank=2, batch_first=True)
    x = torch.randn(B, T, I)
    out, (h, c), gates = module(x, return_gates=True)
    assert out.shape == (B, T, H) and gates[0].i.shape == (B, T, H)
    assert_same_bits("alone", module(x[1])[0], out[1])
    packed, _ = module(pack_padded_sequence(x, torch.tensor(LENGTHS), True, enforce_sorted=False))
    assert packed.data.shape == (sum(LENGTHS), H)
    low = copy.deepcopy(module).bfloat16()
    assert low(x.bfloat16())[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x)[0], out.bfloat16())


@needs_compiled()
def test_the_compiled_core_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSEQ_BACKEND", raising=False)
    found = fastseq.explain(LSTM(I, H, rank={"i": 2}), torch.randn(T, B, I))
    assert [(s.operator, s.backend) for s in found.forward] == [("gemm", "cpu"), ("lstm_mixed_forward", "cpu")]
    assert ("lstm_mixed_backward", "cpu") in [(s.operator, s.backend) for s in found.backward]


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators that have kernels for a GPU, by their definitions."""
    monkeypatch.setattr("fastseq.functional.lstm_factors.allowed", lambda: "triton")
    yield


@pytest.mark.usefixtures("_as_on_a_gpu")
@each_rank
def test_results_by_the_operators_for_a_gpu(rank: Any) -> None:
    ours, theirs = makers(nn.LSTM, rank, **DEEP)
    assert_like(ours, theirs, inputs(ours(), T, B, I), 3)
    seen = {s.operator for s in fastseq.explain(ours(), torch.randn(T, B, I)).forward}
    factored = rank in (RANKS["all"], RANKS["unequal"])  # others save nothing there
    assert ("lstm_lowrank_forward" in seen) == factored and ("lstm_layer_forward" in seen) != factored


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "zero": ({"rank": 0}, "rank must be a whole number in 1 .. hidden_size = 6, or one for each of some gates"),
    "large": ({"rank": 7}, "rank must be a whole number in 1 .. hidden_size = 6.*got 7"),
    "bool": ({"rank": True}, "rank must be a whole number.*got True"),
    "float": ({"rank": 0.5}, "rank must be a whole number.*got 0.5"),
    "gates": ({"rank": {"x": 2}}, "rank must be a whole number.*some gates i, f, g, o, got {'x': 2}"),
    "none": ({"rank": {}}, "rank must be a whole number.*got {}"),
    "one": ({"rank": {"i": 2, "f": 0}}, "rank must be a whole number.*got {'i': 2, 'f': 0}"),
    "projection": ({"rank": 2, "proj_size": 3}, "proj_size must be 0 beside rank=2, got 3"),
    "weight_dropout": ({"rank": 2, "weight_dropout": 0.5}, "weight_dropout must be 0.0 beside rank=2, got 0.5"),
    "recompute": ({"rank": {"i": 2}, "recompute": True}, "recompute must be False beside rank={'i': 2}, got True"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"LSTM: {message}"):
        LSTM(I, H, **options)


def weights(**change: Any) -> Weights:
    given = {"up": torch.zeros(H, 5), "down": torch.zeros(5, H), "ranks": (2, 3, -1, -1)}
    factors = Factors(**(given | {k: v for k, v in change.items() if k in given}))
    rest = {"weight_ih": torch.zeros(4 * H, I), "weight_hh": torch.zeros(2 * H, H), "weight_hr": None}
    return Weights(**(rest | {k: v for k, v in change.items() if k in rest}), factors=factors)


WRONG_WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "ranks": ({"ranks": (2, 3, -2, -1)}, "factors.ranks must be four of at least 0, or -1 for a full gate"),
    "up": ({"up": torch.zeros(H, 4)}, r"factors.up must be \[H, R\] = \[6, 5\], got \[6, 4\]"),
    "down": ({"down": torch.zeros(4, H)}, r"factors.down must be \[R, H\] = \[5, 6\], got \[4, 6\]"),
    "full": ({"weight_hh": torch.zeros(H, H)}, r"weight_hh must be \[D\*H, H\] = \[12, 6\], got \[6, 6\]"),
    "projection": ({"weight_hr": torch.zeros(2, H)}, r"weight_hr must be None beside factors, got \[2, 6\]"),
    "device": ({"down": torch.zeros(5, H, device="meta")}, "factors.down must be on cpu, got one on meta"),
    "input": ({"weight_ih": torch.zeros(4 * H, 9)}, r"weight_ih must be \[4\*H, I\] = \[24, 3\], got \[24, 9\]"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS.keys())
def test_wrong_weights(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=rf"lstm: weights\[0\]\.{message}"):
        functional.lstm(torch.zeros(T, B, I), [weights(**change)])


def test_wrong_calls() -> None:
    with pytest.raises(ArgumentError, match="lstm: recompute must be False beside factors, got True"):
        functional.lstm(torch.zeros(T, B, I), [weights()], recompute=True)

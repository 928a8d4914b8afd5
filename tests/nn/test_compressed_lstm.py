"""``CompressedLSTM``: the call of ``LSTM`` over compressed weights, what is kept and moved, and how they train on."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq import reference
from fastseq.nn import CompressedLSTM, StoredMatrix
from tests.tolerance import assert_same_bits, assert_within_budget

functional = importlib.import_module("fastseq.functional.lstm_packed")
I, H, T, B = 12, 20, 7, 5  # noqa: E741
WAYS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4_groups": {"weights": "int4", "group": 8},
    "bfloat16": {"weights": "bfloat16"},
    "rank": {"rank": {"i": 3, "f": 2, "g": 3, "o": 4}},
    "int8_rank": {"weights": "int8", "rank": {"i": 4, "f": 4}},
    "by_gate": {"weights": {"i": "int4", "f": "int4", "g": "int8", "o": "int8"}},
}
NETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True},
    "projection": {"num_layers": 2, "proj_size": 6, "bias": False},
    "sharpened": {"gates": "sharpened", "bidirectional": True, "batch_first": True},
    "start": {"gates": "binary", "hard_eval": True, "learnable_state": True},
}
each_way = pytest.mark.parametrize("way", WAYS)
each_net = pytest.mark.parametrize("net", NETS)


def source(net: str, **options: Any) -> fastseq.nn.LSTM:
    torch.manual_seed(5)
    module = fastseq.nn.LSTM(I, H, **NETS[net], **options).eval()
    for name, value in module.named_parameters():
        if "start" in name:
            nn.init.normal_(value, std=0.3)
    return module


def small(net: str, way: str, **options: Any) -> CompressedLSTM:
    found = fastseq.compress(source(net), **WAYS[way], **options).model
    assert isinstance(found, CompressedLSTM)
    return found


def by_definition(m: CompressedLSTM, x: Tensor, hx: Any, lengths: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Layer by layer by ``reference.lstm_packed``; x [T, B, I]."""
    _, _, tau, hard = m.eval()._gate_call(x.device)
    last: list[tuple[Tensor, Tensor]] = []
    weights, D = m._weights(), 2 if m.bidirectional else 1
    for n in range(0, len(weights), D):
        outs = []
        for d, w in enumerate(weights[n : n + D]):
            P = m.proj_size or H
            h0 = x.new_zeros(x.shape[1], P) if w.h_start is None else w.h_start.expand(x.shape[1], P)
            c0 = x.new_zeros(x.shape[1], H) if w.c_start is None else w.c_start.expand(x.shape[1], H)
            h0, c0 = (h0, c0) if hx is None else (hx[0][n + d], hx[1][n + d])
            hr = None if w.weight_hr is None else w.weight_hr.matrix
            options = (w.weight_ih.matrix, w.bias, hr, lengths, None, None, w.h_start, w.c_start, tau, hard, d == 1)
            out = reference.lstm_packed(x, w.weight_hh.matrix, h0, c0, *options)
            outs.append(out[0])
            last.append((out[3], out[4]))
        x = torch.cat(outs, -1)
    return x, *(torch.stack(v) for v in zip(*last, strict=True))  # type: ignore[return-value]


@each_way
@each_net
def test_call(net: str, way: str) -> None:
    """Near the definition: a rounding may turn where the two add up in another order, and stays small."""
    m = small(net, way)
    x, lengths = torch.randn(T, B, I), torch.tensor([T, 3, 0, 1, 5])
    D = 2 if m.bidirectional else 1
    hx = torch.randn(m.num_layers * D, B, m.proj_size or H).tanh(), torch.randn(m.num_layers * D, B, H)
    for state, ends in ((None, None), (hx, lengths)):
        given = x.transpose(0, 1) if m.batch_first else x
        y, last = m(given, state, lengths=ends)
        expected = by_definition(m, x, state, ends)
        y = y.transpose(0, 1) if m.batch_first else y
        for got, want in zip((y, *last), expected, strict=True):
            assert got.shape == want.shape and got.dtype == torch.float32
            assert (got - want).abs().max() < 0.02
            assert (got - want).abs().median() < 1e-5


@each_way
def test_layouts(way: str) -> None:
    m = small("stack", way)
    x, lengths = torch.randn(T, B, I), torch.tensor([3, T, 1, 5, 2])
    y, last = m(x, lengths=lengths)
    packed, states = m(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert_same_bits("y h c", [pad_packed_sequence(packed, total_length=T)[0], *states], [y, *last])
    assert_same_bits("unbatched", m(x[:, 0])[0], m(x[:, :1])[0][:, 0])
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4] = True
    assert_same_bits("reset", m(x, reset=reset)[0][4:, :, :H], m(x[4:])[0][..., :H])
    _, _, gates = m(x, return_gates=True)
    assert len(gates) == 4 and gates[0].c.shape == (T, B, H)


@each_way
def test_output_is_near_that_of_the_whole(way: str) -> None:
    x = torch.randn(T, B, I)
    with torch.no_grad():
        difference = small("plain", way)(x)[0] - source("plain")(x)[0]
    assert 0 < difference.norm() / source("plain")(x)[0].norm() < (0.9 if "rank" in way else 0.2)


def test_copies_and_moves() -> None:
    m = small("start", "by_gate")
    x = torch.randn(T, B, I)
    y = m(x)[0]
    state = {name: value.clone() for name, value in m.state_dict().items()}
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), m.half().double().cpu(), copy.deepcopy(m).float()):
        assert_same_bits("y", other(x)[0], y)
        assert {n: v.dtype for n, v in other.state_dict().items()} == {n: v.dtype for n, v in state.items()}
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    fresh = fastseq.compress(fastseq.nn.LSTM(I, H, **NETS["start"]), **WAYS["by_gate"]).model
    assert not torch.equal(fresh(x)[0], y)
    fresh.load_state_dict(torch.load(file))
    assert_same_bits("y", fresh.eval()(x)[0], y)
    with pytest.raises(RuntimeError, match=r"weight_ih_l0.i_values must be torch.int8, got torch.uint8"):
        small("start", "int8").load_state_dict(state, strict=False)
    assert m.to("meta").weight_ih_l0.packed is None
    for dtype in (torch.bfloat16, torch.float64):
        found, (h, c) = small("plain", "int8")(x.to(dtype))
        assert {found.dtype, h.dtype, c.dtype} == {dtype}


def test_what_is_kept_is_small() -> None:
    m = small("plain", "int8")
    assert sum(v.numel() * v.element_size() for v in m.state_dict().values()) < 4 * H * (I + H + 4 + 4 + 4) + 1
    assert not list(m.parameters())
    text = repr(small("plain", "int8_rank"))
    assert "CompressedLSTM(\n  12, 20" in text
    assert "(weight_hh_l0): StoredMatrix([80, 20], i: rank 4, int8; f: rank 4, int8; g: int8; o: int8)" in text
    assert "(weight_ih_l0): StoredMatrix([80, 12], int4 by 8)" in repr(small("plain", "int4_groups"))


@each_net
def test_gradients_go_straight_through(net: str) -> None:
    """Those of the definition's values where weights are floats, which are not rounded at all."""
    m = small(net, "bfloat16")
    x = torch.randn(T, B, I, requires_grad=True)
    given = x.transpose(0, 1) if m.batch_first else x
    y = m(given)[0]
    assert_same_bits("y", y, m(given.detach())[0])
    if net == "start":
        return  # hard gates have no gradient to compare
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)

    def gradient(x: Tensor, dy: Tensor) -> Tensor:
        dense = fastseq.nn.LSTM(I, H, **NETS[net]).to(x.dtype).eval()
        for name, value in source(net).state_dict().items():
            dense.state_dict()[name].copy_(value.bfloat16() if "weight" in name else value)
        leaf = x.detach().requires_grad_()
        out = dense(leaf.transpose(0, 1) if dense.batch_first else leaf)[0]
        return torch.autograd.grad(out, leaf, dy)[0]

    assert_within_budget("dx", dx, gradient, (x.detach(), dy), 3)


def test_a_model_runs_without_no_grad() -> None:
    model = nn.Sequential(nn.Embedding(9, I), nn.LSTM(I, H))
    tokens = torch.randint(0, 9, (T, B))
    y = fastseq.compress(model, "int8").model(tokens)[0]
    y.sum().backward()


@pytest.mark.parametrize("way", ["int8", "int4_groups", "int8_rank"])
@pytest.mark.parametrize("net", ["stack", "projection"])
def test_training_with_the_rounding_in_place(net: str, way: str) -> None:
    """The loss of the rounded model falls, by steps of the weights before rounding, and stays when training ends."""
    torch.manual_seed(2)
    m = small(net, way, trainable=True).train()
    x, target = torch.randn(T, B, I), torch.randn(T, B, (m.proj_size or H) * (2 if m.bidirectional else 1)) / 4
    adam, losses = torch.optim.Adam(m.parameters(), 1e-2), []
    for _ in range(60):
        loss = (m(x)[0] - target).square().mean()
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())
    again = copy.deepcopy(m)
    y = m(x)[0].detach()
    again.eval()
    assert_same_bits("y", again(x)[0].detach(), y)
    assert losses[-1] < 0.8 * losses[0]
    fresh = small(net, way, trainable=True).eval()
    fresh.load_state_dict(m.state_dict())
    assert_same_bits("loaded", fresh(x)[0].detach(), y)


def test_noise_in_training() -> None:
    m = fastseq.compress(fastseq.nn.LSTM(I, H, gates="binary"), "int8", trainable=True).model.train()
    x = torch.randn(T, B, I)
    assert not torch.equal(m(x)[0], m(x)[0])
    packed = pack_padded_sequence(x, torch.tensor([T, 5, 3, 2, 1]))
    torch.manual_seed(1)
    y = m(packed)[0].data
    torch.manual_seed(1)
    assert_same_bits("y", m(packed)[0].data, y)
    m.eval()
    assert_same_bits("eval", m(x)[0], m(x)[0])
    still = fastseq.compress(fastseq.nn.LSTM(I, H, gates="binary"), "int8").model.train()
    assert_same_bits("still", still(x)[0], still(x)[0])


@pytest.mark.parametrize("way", ["int8", "rank"])
def test_what_a_gpu_would_run(way: str) -> None:
    """The same by the functions whose kernels are for GPUs, here on the CPU."""
    m = small("stack", way)
    (w, _, _, _), x = m._weights(), torch.randn(T, B, I)
    h0, c0 = torch.zeros(B, H), torch.randn(B, H)
    options = (torch.tensor([T, 3, 0, 1, 5]), None, None, None, None, 0.9, False, True)
    got = functional.by_kernels(x, w.weight_ih, w.bias, w, h0, c0, options, 2)
    expected = functional.recurrence(x, w.weight_ih, w.bias, w, h0, c0, options, 2)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() < (1e-6 if way == "rank" else 0.02) * 4
    with pytest.raises(ValueError, match="lstm_packed: weight_hh must be int8 with one scale a row, or all factors"):
        functional.by_kernels(x, None, None, small("plain", "int4_groups")._weights()[0], h0, c0, options, 0)


def test_compile_and_export() -> None:
    m = small("stack", "int8")
    x = torch.randn(T, B, I)
    assert_same_bits("compiled", torch.compile(m, fullgraph=True)(x)[0], m(x)[0])
    exported = torch.export.export(m, (x,)).module()
    assert_same_bits("exported", exported(x)[0], m(x)[0])


def test_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = small("plain", "int8"), torch.randn(T, B, I)
    y = m(x)[0]
    monkeypatch.setenv("FASTSEQ_BACKEND", "reference")
    assert (m(x)[0] - y).abs().max() < 0.02


def test_what_is_refused() -> None:
    m = small("plain", "int8")
    with pytest.raises(ValueError, match="CompressedLSTM: input must be 3-D with 12 features, got"):
        m(torch.randn(T, B, I + 1))
    with pytest.raises(ValueError, match="CompressedLSTM: input must be of a floating-point dtype, got torch.int64"):
        m(torch.zeros(T, B, I, dtype=torch.int64))
    with pytest.raises(ValueError, match="CompressedLSTM: input must be on the module's device cpu, got meta"):
        m(torch.zeros(T, B, I, device="meta"))
    with pytest.raises(ValueError, match=r"LSTM: Expected hidden\[0\] size"):
        m(torch.randn(T, B, I), (torch.zeros(1, B, H + 1), torch.zeros(1, B, H)))
    assert isinstance(m.weight_ih_l0, StoredMatrix)

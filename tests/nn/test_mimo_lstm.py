"""MIMOLSTM: every mode against wide LSTMs, lengths, packed sequences, carried state and resets."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq.nn import LSTM, MIMOLSTM, MIMOHead, MIMOState
from tests.nn.mimo_cases import B, M, R, all_of_lstm, assert_agrees, by, compare, draw, gathered, slots_last
from tests.tolerance import assert_same_bits, assert_within_budget

T, C, H, N = 7, 3, 5, R * B
LENGTHS = torch.tensor([7, 3, 1, 5, 2, 6])
SHAPES = [
    {"num_layers": layers, "batch_first": first, "bidirectional": both, "proj_size": proj, "bias": bias}
    for layers, first, both, proj, bias in [
        (1, False, False, 0, True),
        (2, True, True, 0, True),
        (1, False, True, 2, False),
        (2, True, False, 2, True),
    ]
]


def both(config: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[MIMOLSTM, nn.LSTM]:
    return MIMOLSTM(C, H, M=M, dtype=dtype, **config), nn.LSTM(M * C, H, **config)


def lay(x: Tensor, module: Any) -> Tensor:
    """x [T, B, ...] as the module takes it."""
    return x.transpose(0, 1) if module.batch_first else x


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_parameters_are_those_of_the_wide_lstm(config: dict[str, Any]) -> None:
    torch.manual_seed(3)
    ours = MIMOLSTM(C, H, M=M, **config)
    torch.manual_seed(3)
    wide = nn.LSTM(M * C, H, **config)
    assert list(ours.state_dict()) == list(wide.state_dict())
    assert_same_bits(list(wide.state_dict()), list(ours.parameters()), list(wide.parameters()))
    wide.load_state_dict(ours.state_dict())
    assert ours.channels == C and f"M={M}" in repr(ours)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", ["train", "ensemble", "multiplex"])
@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_modes(config: dict[str, Any], mode: str, dtype: torch.dtype) -> None:
    ours, wide = both(config, dtype)
    b, index = (0 if ours.batch_first else 1), draw()
    x = lay(torch.randn(T, B, *((M, C) if mode == "multiplex" else (C,)), dtype=dtype), ours)

    def call(x: Tensor) -> Tensor:
        out, state = ours(x, index) if mode == "train" else ours(x, mode=mode)
        return torch.cat([out.flatten(), state[0].flatten(), state[1].flatten()])

    def prepare(x: Tensor) -> Tensor:
        if mode == "train":
            return gathered(x, index, b)
        return torch.cat([x] * M, -1) if mode == "ensemble" else slots_last(x, -1)

    def plain(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out, (h, c) = functional_call(wide, parameters, (prepare(x),))
        return torch.cat([out.flatten(), h.flatten(), c.flatten()])

    compare(ours, call, x, plain)
    assert ours(x, index)[0].shape[b] == N if mode == "train" else True


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_rows_run_to_the_longest_of_their_slots(config: dict[str, Any]) -> None:
    ours, wide = both(config)
    b, index = (0 if ours.batch_first else 1), draw()
    x = torch.randn(T, B, C, dtype=torch.float64)
    x = torch.where(torch.arange(T)[:, None, None] < LENGTHS[:, None], x, torch.nan)  # what padding may hold
    out, state = ours(lay(x, ours), index, lengths=LENGTHS)
    ends = ours.slot_lengths(index, LENGTHS)
    assert torch.equal(ends, LENGTHS[index.long()].T)
    rows = ends.amax(1)

    def reference(x: Tensor, *parameters: Tensor) -> list[Tensor]:
        packed = pack_padded_sequence(gathered(x.nan_to_num(), index, b), rows, ours.batch_first, enforce_sorted=False)
        names = [name for name, _ in ours.named_parameters()]
        out, (h, c) = functional_call(wide, dict(zip(names, parameters, strict=True)), (packed,))
        return [pad_packed_sequence(out, ours.batch_first, total_length=T)[0], h, c]

    given = [lay(x, ours), *ours.parameters()]
    assert_within_budget("out h c", [out, state.h, state.c], reference, given)
    grads = torch.autograd.grad(out.square().sum(), list(ours.parameters()))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["train", "ensemble", "multiplex"])
def test_packed_is_as_lengths(config: dict[str, Any], mode: str) -> None:
    ours, _ = both(config)
    x = lay(torch.randn(T, B, *((M, C) if mode == "multiplex" else (C,)), dtype=torch.float64), ours)
    given = {"index": draw()} if mode == "train" else {"mode": mode}
    packed = pack_padded_sequence(x, LENGTHS, ours.batch_first, enforce_sorted=False)
    lengths = LENGTHS[:, None].expand(-1, M) if mode == "multiplex" else LENGTHS
    state = ours(x, lengths=lengths, **given)[1]
    got, packed_state, packed_gates = ours(packed, return_gates=True, **given)
    assert isinstance(got, PackedSequence)
    unpacked = [pad_packed_sequence(v, ours.batch_first, total_length=T)[0] for v in (got, packed_gates[-1].i)]
    rows = got.batch_sizes[0]
    assert rows == (N if mode == "train" else B)
    keep = lay((torch.arange(T)[:, None] < pad_packed_sequence(got)[1])[..., None], ours)  # gates beyond a row's end

    def pick(out: Any) -> list[Tensor]:
        return [out[0], torch.where(keep, out[2][-1].i, 0), *out[1][:2]]

    args, given = (x,), given | {"lengths": lengths, "return_gates": True}
    assert_agrees("out i h c", [*unpacked, *packed_state[:2]], ours, *args, pick=pick, **given)
    assert type(packed_state) is type(state) is (MIMOState if mode == "train" else tuple)


def test_multiplex_takes_the_length_of_each_slot() -> None:
    ours = MIMOLSTM(C, H, bidirectional=True, M=M, dtype=torch.float64)
    x = torch.randn(T, 2, M, C, dtype=torch.float64)
    lengths = LENGTHS.view(2, M)
    filled = torch.where((torch.arange(T)[:, None, None] < lengths)[..., None], x, torch.nan)
    out, (h, c) = ours(filled, mode="multiplex", lengths=lengths)
    wide = nn.LSTM(M * C, H, bidirectional=True)
    names = [name for name, _ in ours.named_parameters()]

    def reference(x: Tensor, *parameters: Tensor) -> list[Tensor]:
        packed = pack_padded_sequence(x.nan_to_num().flatten(2), lengths.amax(1), enforce_sorted=False)
        out, (h, c) = functional_call(wide, dict(zip(names, parameters, strict=True)), (packed,))
        return [pad_packed_sequence(out, total_length=T)[0], h, c]

    assert_within_budget("out h c", [out, h, c], reference, [filled, *ours.parameters()])


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_last_of_slots_is_h_n_of_sequences_that_end_there(config: dict[str, Any]) -> None:
    """Of a slot that ends first nothing is seen but zeros after its end; forward and reverse direction apart."""
    ours, _ = both(config)
    P = config["proj_size"] or H
    index, x = draw(), lay(torch.randn(T, B, C, dtype=torch.float64), ours)
    lengths = LENGTHS.clone()
    lengths[2] = 0
    out, _ = ours(x, index, lengths=lengths)
    ends = ours.slot_lengths(index, lengths)
    found = ours.last_of_slots(out, ends)
    assert found.shape == (N, M, P * (2 if ours.bidirectional else 1))
    for n, m in itertools.product(range(N), range(M)):
        rows = lay(out, ours)[:, n]
        end = int(ends[n, m])
        forward = rows[end - 1, :P] if end else torch.zeros_like(rows[0, :P])
        assert_same_bits("forward", found[n, m, :P], forward)
        if ours.bidirectional:
            assert_same_bits("reverse", found[n, m, P:], rows[0, P:] if end else torch.zeros_like(rows[0, P:]))
    longest = ends.argmax(1)
    if not ours.bidirectional and config["num_layers"] == 1:
        h = ours(x, index, lengths=lengths)[1].h[0]
        some = ends.amax(1) > 0
        assert_same_bits("h_n", found[torch.arange(N), longest][some], h[some])
    assert MIMOHead(found.shape[2], 4, M, dtype=torch.float64)(found, per_slot=True).shape == (N, M, 4)


def test_last_of_slots_of_packed_output_and_of_the_ensemble() -> None:
    ours, index = MIMOLSTM(C, H, batch_first=True, M=M), draw()
    x = torch.randn(B, T, C)
    packed = pack_padded_sequence(x, LENGTHS, True, enforce_sorted=False)
    ends = ours.slot_lengths(index, LENGTHS)
    out, got = ours(x, index, lengths=LENGTHS)[0], ours(packed, index)[0]
    assert_same_bits("last", ours.last_of_slots(got, ends), ours.last_of_slots(out, ends))
    out, (h, _) = ours(x, lengths=LENGTHS)
    last = ours.last_of_slots(out, ours.slot_lengths(None, LENGTHS))
    assert_same_bits("last", last, h[0][:, None].expand(-1, M, -1))


def test_carried_state_keeps_the_slots() -> None:
    ours, index = MIMOLSTM(C, H, 2, M=M, dtype=torch.float64), draw()
    x = torch.randn(T, B, C, dtype=torch.float64)
    first, state = ours(x[:3], index)
    assert isinstance(state, MIMOState) and state.index is index
    for given in ({}, {"index": index}, {"index": index.long().clone()}):
        second, final = ours(x[3:], state, **given)
        whole = [torch.cat([first, second]), final.h, final.c]
        assert_agrees("out h c", whole, ours, x, index, pick=all_of_lstm)
        assert final.index is index
    detached = state.detach()
    assert not detached.h.requires_grad and not detached.c.requires_grad and detached.index is index
    with pytest.raises(ValueError, match="MIMOLSTM: index must be that of the state, whose rows hold these examples"):
        ours(x[3:], state, index=draw(rho=0.9))
    with pytest.raises(ValueError, match="MIMOLSTM: hx must be a MIMOState in mode 'train', got tuple"):
        ours(x[3:], (state.h, state.c), index)
    with pytest.raises(ValueError, match=r"MIMOLSTM: hx must be \(h_0, c_0\) in mode 'ensemble', got a MIMOState"):
        ours(x[3:], state, mode="ensemble")
    plain = torch.randn(2, B, H, dtype=torch.float64)
    assert type(ours(x, (plain, plain))[1]) is tuple
    with pytest.raises(ValueError, match=r"Expected hidden\[0\] size \(2, 24, 5\), got \[2, 6, 5\]"):
        ours(x, MIMOState(plain, plain, index))


@pytest.mark.parametrize("batch_first", [False, True])
def test_reset_is_of_rows(batch_first: bool) -> None:
    ours, index = MIMOLSTM(C, H, batch_first=batch_first, M=M, dtype=torch.float64), draw()
    x = torch.randn(T, B, C, dtype=torch.float64)
    reset = torch.rand(T, N) < 0.3
    wide = LSTM(M * C, H, batch_first=batch_first)
    got = ours(lay(x, ours), index, reset=lay(reset, ours))[0]

    def reference(x: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in ours.named_parameters()]
        rows = gathered(x, index, 0 if batch_first else 1)
        return functional_call(wide, dict(zip(names, parameters, strict=True)), (rows,), {"reset": lay(reset, ours)})[0]

    assert_within_budget("out", got, reference, [lay(x, ours), *ours.parameters()])
    packed = pack_padded_sequence(lay(x, ours), torch.full((B,), T), batch_first)
    got_packed = pad_packed_sequence(ours(packed, index, reset=lay(reset, ours))[0], batch_first)[0]
    assert_same_bits("packed", got_packed, got)


OPTIONS: dict[str, dict[str, Any]] = {
    "binary": {"gates": "binary", "noise_probability": 0.5},
    "hard": {"gates": "binary", "hard_eval": True},
    "sharpened": {"gates": "sharpened", "tau": 0.5},
    "rank": {"rank": {"i": 2, "f": 2}},
    "start": {"learnable_state": True, "forget_bias": 1.0},
    "dropout": {"num_layers": 2, "variational_dropout": 0.5},
    "weights": {"weight_dropout": 0.5},
    "recompute": {"recompute": True, "bidirectional": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_options_of_the_base(option: str, training: bool) -> None:
    """With the same draws as the wide LSTM of ours, which has its own tests."""
    make = functools.partial(MIMOLSTM, C, H, M=M, dtype=torch.float64, **OPTIONS[option])
    ours, index = make().train(training), draw()
    wide = LSTM(M * C, H, **OPTIONS[option]).train(training)
    x = torch.randn(T, B, C, dtype=torch.float64)

    def call(module: Any, x: Tensor, *index: Tensor) -> Tensor:
        torch.manual_seed(7)
        out: Tensor = module(x, *index)[0]
        return out

    def plain(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        torch.manual_seed(7)
        out: Tensor = functional_call(wide, parameters, (gathered(x, index, 1),))[0]
        return out

    compare(ours, lambda x: call(ours, x, index), x, plain)
    if not training:
        folded = ours.to_plain()
        assert isinstance(folded, LSTM) and not isinstance(folded, MIMOLSTM) and folded.input_size == C
        assert_agrees("out", folded(x)[0], ours, x)
        assert {n: getattr(folded, n) for n in ("gates", "tau", "rank", "hard_eval", "learnable_state")} == {
            n: getattr(ours, n) for n in ("gates", "tau", "rank", "hard_eval", "learnable_state")
        }


def test_every_head_depends_on_every_slot_from_the_start() -> None:
    ours, index = MIMOLSTM(C, H, M=M, dtype=torch.float64), draw(rho=0.0)
    head = MIMOHead(H, 2, M, dtype=torch.float64)
    x = torch.randn(T, B, C, dtype=torch.float64)
    row = int((index.long().sort(0).values.diff(dim=0) != 0).all(0).nonzero()[0])
    jacobian = torch.autograd.functional.jacobian(lambda x: head(ours(x, index)[0][-1])[row], x)  # [M, K, T, B, C]
    size = jacobian.abs().amax((1, 2, 4))
    others = [b for b in range(B) if b not in index[:, row].tolist()]
    assert (size[:, index[:, row].long()] > 0).all() and not size[:, others].any()


def test_export_state_is_of_the_folded_lstm() -> None:
    ours = MIMOLSTM(C, H, M=M)
    state, plain = ours.export_state("net"), ours.to_plain().export_state("net")
    assert state["layers"] == plain["layers"] and state["layers"][0]["input_size"] == C
    assert_same_bits(list(plain["tensors"]), list(state["tensors"].values()), list(plain["tensors"].values()))


def ours(**options: Any) -> MIMOLSTM:
    return MIMOLSTM(C, H, M=M, **options)


X = torch.zeros(T, B, C)
CALLS: dict[str, tuple[Any, str]] = {
    "m": (lambda: MIMOLSTM(C, H, M=1), "MIMOLSTM: M must be an integer >= 2, got 1"),
    "dims": (lambda: ours()(X[0], draw()), "LSTM: input must have 3 dimensions, got 2"),
    "width": (lambda: ours()(X[..., 1:], draw()), "Expected 3, got 2"),
    "ensemble_width": (lambda: ours()(X[..., 1:]), "Expected 3, got 2"),
    "dtype": (lambda: ours()(X.double(), draw()), "RNN input dtype"),
    "batch": (lambda: ours()(X[:, 1:], draw()), r"index must be integers \[M, R\*B\] = \[3, R\*5\]"),
    "slots": (
        lambda: ours()(X, mode="multiplex"),
        r"MIMOLSTM: input must be \[..., M, C\] = \[..., 3, 3\], got \[7, 6, 3\]",
    ),
    "lengths": (lambda: ours()(X, draw(), lengths=LENGTHS[1:]), r"MIMOLSTM: lengths must be \[B\] = \[6\], got \[5\]"),
    "long": (lambda: ours()(X, draw(), lengths=LENGTHS + 1), r"MIMOLSTM: lengths must be in 0..T = 0..7, got 2..8"),
    "negative": (lambda: ours()(X, draw(), lengths=LENGTHS - 2), r"lengths must be in 0..T = 0..7, got -1..5"),
    "float": (
        lambda: ours()(X, draw(), lengths=LENGTHS.float()),
        "MIMOLSTM: lengths must be integers, got torch.float32",
    ),
    "multiplex_lengths": (
        lambda: ours()(X.unsqueeze(2).expand(-1, -1, M, -1), mode="multiplex", lengths=LENGTHS),
        r"MIMOLSTM: lengths must be \[B, M\] = \[6, 3\], got \[6\]",
    ),
    "packed_lengths": (
        lambda: ours()(pack_padded_sequence(X, LENGTHS, enforce_sorted=False), draw(), lengths=LENGTHS),
        "MIMOLSTM: lengths must be None for a PackedSequence",
    ),
    "reset": (
        lambda: ours()(X, draw(), reset=torch.zeros(T, B, dtype=torch.bool)),
        r"MIMOLSTM: reset must be \[T, N\] = \[7, 24\], got \[7, 6\]",
    ),
    "reset_kind": (lambda: ours()(X, draw(), reset=torch.zeros(T, N)), "MIMOLSTM: reset must be torch.bool"),
    "reset_packed": (
        lambda: ours()(X, draw(), reset=pack_padded_sequence(X, LENGTHS, enforce_sorted=False)),
        r"MIMOLSTM: reset must be a bool tensor \[T, N\] of the rows, got PackedSequence",
    ),
    "last": (
        lambda: ours().last_of_slots(torch.zeros(T, N, H), torch.ones(B, M)),
        r"last_of_slots: slot_lengths must be \[N, M\] = \[24, 3\], got \[6, 3\]",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_errors(case: str) -> None:
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="MIMOLSTM: hx must be a MIMOState beside index, got a tensor"):
        ours()(X, draw(), draw())


def test_helpers_of_the_cases() -> None:
    """``by`` runs the wide module as it is."""
    wide = nn.LSTM(2, 2)
    assert_same_bits("out", by(wide, lambda x: x)(dict(wide.named_parameters()), X[..., :2])[0], wide(X[..., :2])[0])

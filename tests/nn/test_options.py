"""Options of the modules beyond torch.nn: dropouts, start states, lengths, reset, recompute, what is kept in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq import functional
from fastseq.functional import Weights
from fastseq.nn import LSTM, LSTMCell
from tests.nn.stock import LENGTHS, assert_same_rows, assert_same_sums
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

T, B, I, H = 5, 3, 3, 6  # noqa: E741


def gradients(module: nn.Module, outs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(9)
    upstream = [torch.randn(v.shape).to(v.dtype) for v in outs]
    return list(torch.autograd.grad(outs, list(module.parameters()), upstream, allow_unused=True))


def test_lengths_are_a_packed_sequence() -> None:
    module = LSTM(I, H, 2, bidirectional=True, batch_first=True, proj_size=2, dtype=torch.float64)
    x, lengths = torch.randn(B, T, I, dtype=torch.float64), torch.tensor(LENGTHS)
    out, (h_n, c_n) = module(x, lengths=lengths)
    packed, (h_packed, c_packed) = module(pack_padded_sequence(x, lengths, True, enforce_sorted=False))
    padded = pad_packed_sequence(packed, batch_first=True)[0]
    assert_same_rows("out h c", [out, h_n, c_n], [padded, h_packed, c_packed])
    grads, packed_grads = gradients(module, [out, h_n, c_n]), gradients(module, [padded, h_packed, c_packed])
    names = [n for n, _ in module.named_parameters()]
    assert_same_sums(names, grads, packed_grads)
    assert_same_bits("out", module(x, lengths=lengths.to(torch.int32))[0], out)
    assert not out[0, LENGTHS[0] :].any()
    empty = module(x, lengths=torch.tensor([0, T, T]))
    assert not empty[0][0].any() and not empty[1][0][:, 0].any()


@pytest.mark.parametrize("learnable", [False, True])
def test_reset_is_separate_sequences(learnable: bool) -> None:
    """A mask that cuts every row at the same steps is a call per segment with the start state."""
    module = LSTM(I, H, bidirectional=True, learnable_state=learnable)
    if learnable:
        for name, p in module.named_parameters():
            if "start" in name:
                nn.init.normal_(p)
    x = torch.randn(7, B, I)
    reset = torch.zeros(7, B, dtype=torch.bool)
    reset[[2, 3]] = True
    out = module(x, reset=reset)[0]
    pieces = [module(part)[0] for part in (x[:2], x[2:3], x[3:])]
    assert_same_rows("out", [out], [torch.cat(pieces)])
    reset[0] = True  # forward, the state given does not enter; in reverse nothing comes before step 0
    hx = (torch.randn(2, B, H), torch.randn(2, B, H))
    assert_same_bits("forward", module(x, hx, reset=reset)[0][..., :H], out[..., :H])


def test_reset_layouts_agree() -> None:
    module = LSTM(I, H, 2, bidirectional=True)
    x, lengths, reset = torch.randn(T, B, I), torch.tensor(LENGTHS), torch.rand(T, B) < 0.4
    want = module(x, lengths=lengths, reset=reset)[0]
    for enforce_sorted in (False, True):
        order = torch.argsort(lengths, descending=True) if enforce_sorted else torch.arange(B)

        def pack(v: Tensor, order: Tensor = order, enforce_sorted: bool = enforce_sorted) -> PackedSequence:
            return pack_padded_sequence(v[:, order], lengths[order], enforce_sorted=enforce_sorted)

        for mask in (reset[:, order], pack(reset)):
            got = module(pack(x), reset=mask)[0]
            assert_same_rows("out", [pad_packed_sequence(got)[0]], [want[:, order]])
    first = LSTM(I, H, 2, bidirectional=True, batch_first=True)
    first.load_state_dict(module.state_dict())
    got = first(x.transpose(0, 1), lengths=lengths, reset=reset.T)[0]
    assert_same_rows("out", [got.transpose(0, 1)], [want])
    assert_same_bits("row", module(x[:, 1], reset=reset[:, 1])[0], module(x[:, 1:2], reset=reset[:, 1:2])[0][:, 0])


def test_weight_dropout_is_one_mask_per_forward() -> None:
    module = LSTM(I, H, weight_dropout=0.5, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.manual_seed(2)
    out = module(x)[0]
    torch.manual_seed(2)
    dropped = torch.nn.functional.dropout(module.weight_hh_l0.detach(), 0.5)
    assert (dropped == 0).any()
    plain = LSTM(I, H, dtype=torch.float64)
    plain.load_state_dict(module.state_dict() | {"weight_hh_l0": dropped})
    assert_same_bits("out", out, plain(x)[0])
    out.sum().backward()
    assert not module.weight_hh_l0.grad[dropped == 0].any() and module.weight_hh_l0.grad.any()
    kept = module.weight_hh_l0.detach().clone()
    module.eval()
    plain.load_state_dict(module.state_dict())
    assert_same_bits("out weight", [module(x)[0], module.weight_hh_l0], [plain(x)[0], kept])


@pytest.mark.parametrize("packed", [False, True])
def test_variational_dropout_is_one_mask_per_sequence(packed: bool) -> None:
    module = LSTM(I, H, 2, variational_dropout=0.5, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([5, 3, 2]) if packed else torch.tensor([T] * B)
    given: Any = pack_padded_sequence(x, lengths) if packed else x
    torch.manual_seed(2)
    out = module(given)[0]
    out = pad_packed_sequence(out)[0] if packed else out
    torch.manual_seed(2)
    mask = torch.nn.functional.dropout(torch.ones(B, H, dtype=torch.float64), 0.5)
    assert (mask == 0).any() and (mask == 2).any()
    weights = [Weights(*layer) for layer in module.all_weights]
    first = functional.lstm(x, weights[:1], lengths=lengths).output
    assert_same_bits("out", out, functional.lstm(first * mask, weights[1:], lengths=lengths).output)
    module.eval()
    plain = LSTM(I, H, 2, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    assert_same_bits("out", module(x)[0], plain(x)[0])


@pytest.mark.parametrize("make", [LSTM, LSTMCell])
def test_forget_bias(make: Any) -> None:
    torch.manual_seed(1)
    plain = make(I, H)
    torch.manual_seed(1)
    module = make(I, H, forget_bias=1.5)
    suffix = "_l0" if make is LSTM else ""
    for _ in range(2):
        total = getattr(module, f"bias_ih{suffix}") + getattr(module, f"bias_hh{suffix}")
        assert torch.equal(total[H : 2 * H], torch.full((H,), 1.5))
        torch.manual_seed(1)
        module.reset_parameters()
    for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        rows = slice(None) if "weight" in name else slice(0, H)
        assert torch.equal(p[rows], q[rows])  # the other draws are those without the option


@pytest.mark.parametrize("proj_size", [0, 2])
def test_learnable_state(proj_size: int) -> None:
    torch.manual_seed(1)
    plain = LSTM(I, H, 2, bidirectional=True, proj_size=proj_size)
    torch.manual_seed(1)
    module = LSTM(I, H, 2, bidirectional=True, proj_size=proj_size, learnable_state=True)
    x = torch.randn(T, B, I)
    assert_same_bits("out", module(x)[0], plain(x)[0])  # zeros at first
    starts = [(n, p) for n, p in module.named_parameters() if "start" in n]
    assert len(starts) == 8 and starts[0][0] == "h_start_l0" and starts[0][1].shape == (proj_size or H,)
    for _, p in starts:
        nn.init.normal_(p)
    h0 = torch.stack([p for n, p in starts if n[0] == "h"]).unsqueeze(1).expand(-1, B, -1)
    c0 = torch.stack([p for n, p in starts if n[0] == "c"]).unsqueeze(1).expand(-1, B, -1)
    out = module(x)[0]
    assert_same_bits("out", out, module(x, (h0, c0))[0])
    out.sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in starts)
    module.reset_parameters()
    assert not any(p.any() for _, p in starts)


def test_learnable_state_of_the_cell() -> None:
    cell = LSTMCell(I, H, learnable_state=True)
    nn.init.normal_(cell.h_start)
    nn.init.normal_(cell.c_start)
    x = torch.randn(B, I)
    state = cell.h_start.expand(B, H), cell.c_start.expand(B, H)
    assert_same_bits("h c", cell(x), cell(x, state))
    cell(x)[0].sum().backward()
    assert cell.h_start.grad.any() and cell.c_start.grad.any()


@pytest.mark.parametrize("kind", ["padded", "batch_first", "unbatched", "packed"])
def test_returned_gates(kind: str) -> None:
    module = LSTM(I, H, 2, bidirectional=True, batch_first=kind == "batch_first")
    x: Any = torch.randn(T, I) if kind == "unbatched" else torch.randn(T, B, I)
    if kind == "packed":
        x = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    out, (h_n, c_n), gates = module(x, return_gates=True)
    assert_same_bits("h c", [h_n, c_n], list(module(x)[1]))
    data = [[v.data if kind == "packed" else v for v in g] for g in gates]
    size = (out.data if kind == "packed" else out).shape[:-1]
    assert len(gates) == 4 and all(v.shape == (*size, H) for g in data for v in g)
    assert all(((i > 0) & (i < 1) & (f > 0) & (f < 1)).all() for i, f, _ in data)
    last = {"padded": lambda c: c[-1], "batch_first": lambda c: c[:, -1], "unbatched": lambda c: c[-1]}
    if kind != "packed":
        assert_same_bits("c", last[kind](gates[2].c), c_n[2])
    else:
        assert isinstance(gates[0].c, PackedSequence) and gates[0].c.batch_sizes is x.batch_sizes


def saved_bytes(module: LSTM, x: Tensor) -> tuple[list[tuple[int, ...]], int]:
    """Shapes, and bytes in distinct memory, of what the forward keeps for backward; parameters and x do not count."""
    given = {p.data_ptr() for p in module.parameters()} | {x.data_ptr()}
    seen: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in given:
            seen[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(x)
    return [tuple(t.shape) for t in seen.values()], sum(t.untyped_storage().nbytes() for t in seen.values())


def test_memory_between_forward_and_backward() -> None:
    steps, rows, units, layers = 16, 8, 32, 3
    x = torch.randn(steps, rows, units)
    plain, lean = (LSTM(units, units, layers, gates="binary", recompute=flag) for flag in (False, True))
    shapes, size = saved_bytes(plain, x)
    wide = [s for s in shapes if s[-1] == 4 * units and len(s) > 1]
    assert wide == [(steps, rows, 4 * units)] * layers  # one 4H buffer per layer
    lean_shapes, lean_size = saved_bytes(lean, x)
    assert not [s for s in lean_shapes if s[-1] == 4 * units and len(s) > 1]
    unit = steps * rows * units * 4 * layers
    assert 6 * unit <= size <= 6.3 * unit, size / unit  # 4H of gates, h and c; the rest is [B, H] states
    assert 2 * unit <= lean_size <= 2.3 * unit, lean_size / unit


@pytest.mark.parametrize("layout", ["plain", "lengths", "packed"])
def test_recompute_gives_the_same_gradients(layout: str) -> None:
    options: dict[str, Any] = {"gates": "binary", "noise_probability": 1.0, "bidirectional": True, "proj_size": 2}
    lean = LSTM(I, H, 2, recompute=True, **options)
    plain = LSTM(I, H, 2, **options)
    plain.load_state_dict(lean.state_dict())
    x, call = torch.randn(T, B, I), {}
    given: Any = x
    if layout == "lengths":
        call = {"lengths": torch.tensor(LENGTHS), "reset": torch.rand(T, B) < 0.3}
    if layout == "packed":
        given = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    results = []
    for module in (lean, plain):
        torch.manual_seed(5)
        out, state = module(given, **call)
        outs = [out.data if layout == "packed" else out, *state]
        results.append((outs, gradients(module, outs)))
    assert_same_bits("out h c", results[0][0], results[1][0])

    def through_plain(parameters: list[Tensor], x: Tensor) -> list[Tensor]:
        copy = LSTM(I, H, 2, dtype=x.dtype, **options)
        named = dict(zip((n for n, _ in copy.named_parameters()), parameters, strict=True))
        torch.manual_seed(5)
        again = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False) if layout == "packed" else x
        out, state = torch.func.functional_call(copy, named, (again,), call)
        outs = [out.data if layout == "packed" else out, *state]
        torch.manual_seed(9)
        upstream = [torch.randn(v.shape).to(v.dtype) for v in outs]
        return list(torch.autograd.grad(outs, parameters, upstream))

    names = [n for n, _ in lean.named_parameters()]
    given_again = [[p.detach().requires_grad_() for p in lean.parameters()], x]
    assert_within_budget(names, results[0][1], through_plain, given_again, GRADIENTS)


def test_backward_in_evaluation_and_of_the_input_alone() -> None:
    module = LSTM(I, H, 2).eval().requires_grad_(False)
    x = torch.randn(T, B, I, requires_grad=True)
    asked = []
    run = torch.ops.fastseq.lstm_backward.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is run:
                asked.append(args[-1])
            if func is torch.ops.fastseq.gemm.default:
                asked.append(bool(args[3]) if len(args) > 3 else False)
            return func(*args, **(kwargs or {}))

    out = module(x)[0]
    with Watch():
        (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.shape == x.shape and dx.any()
    assert asked == [False] * 4  # two layers: the recurrence without weights, then the product for the input alone


def test_replaced_weights_are_used() -> None:
    module = LSTM(I, H)
    x = torch.randn(T, B, I)
    weight = torch.zeros_like(module.weight_hh_l0)
    plain = LSTM(I, H)
    plain.load_state_dict(module.state_dict() | {"weight_hh_l0": weight})
    del module.weight_hh_l0
    module.weight_hh_l0 = weight
    assert_same_bits("out", module(x)[0], plain(x)[0])
    assert module.all_weights[0][1] is weight and len(list(module.parameters())) == 3
    tied = LSTM(I, I)
    tied.weight_hh_l0 = tied.weight_ih_l0
    tied(torch.randn(T, B, I))[0].sum().backward()
    assert len(list(tied.parameters())) == 3 and tied.weight_ih_l0.grad.any()

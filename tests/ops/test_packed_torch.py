"""The packed operators in torch: the bits of the numpy door, fakes, compile, export, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastseq.ops import packed as ops
from tests.ops import lstm_cases as cases
from tests.ops import packed_cases as packed
from tests.ops.lstm_cases import Case, numpy_door
from tests.ops.packed_cases import FORMS
from tests.ops.test_lstm_packed import CASES, Call
from tests.tolerance import assert_same_bits

core = numpy_door()
reason = ops.BACKENDS["linear_packed"][0].why_not(torch.zeros(1))
pytestmark = pytest.mark.skipif(reason is not None, reason=f"cpu: {reason}")
each_form = pytest.mark.parametrize("form", FORMS)


def tensors(call: Call) -> list[Any]:
    """Arguments of ``lstm_packed_forward`` but for save."""
    named: dict[str, Any] = dict.fromkeys(("weight_ih", "bias", "weight_hr")) | call.named()
    order = ("x", "weight_hh", "h0", "c0", "weight_ih", "bias", "weight_hr", "lengths", "batch_sizes", "reset")
    values = [named[n] for n in (*order, "h_start", "c_start", "tau", "hard", "reverse")]
    return [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values]


@each_form
def test_linear_is_that_of_the_numpy_door(form: str) -> None:
    for M, N, K in ((1, 5, 3), (9, 48, 130), (0, 3, 2)):
        m, x, bias = packed.matrix(N, K, form), torch.randn(M, K), torch.randn(N)
        w = ops.pack(m, K)
        assert_same_bits("packed", w, packed.pack(core, m, K))
        got = torch.ops.fastseq.linear_packed(x, w, bias, N)
        assert_same_bits("y", got, core.linear_packed(x.numpy(), w.numpy(), bias.numpy()))
        assert_same_bits("bounded", ops.pack(m, K, True), packed.pack(core, m, K, True))


@pytest.mark.parametrize("form", ["int8", "int4_groups", "mixed_factors"])
@pytest.mark.parametrize("name", ["all_dense", "all_lengths_reverse", "all_packed", "hard", "no_steps", "no_rows"])
def test_lstm_is_that_of_the_numpy_door(name: str, form: str) -> None:
    for width in (0, 9):
        call = Call(CASES[name], form, width)
        for save in (0, 2):
            got = torch.ops.fastseq.lstm_packed_forward(*tensors(call), save)
            expected = call.run(save)
            assert_same_bits(cases.OUTPUTS, got, expected)


def test_float16_and_float64_are_packed_as_float32() -> None:
    weight = torch.randn(6, 10).half()
    expected = ops.pack([packed.Gate(packed.Part(weight.float()))], 10)
    for dtype in (torch.float16, torch.float64):
        assert_same_bits("packed", ops.pack([packed.Gate(packed.Part(weight.to(dtype)))], 10), expected)


def test_opcheck() -> None:
    m = packed.matrix(20, 24, "mixed_factors", 4)
    w = ops.pack(m, 24)
    lists = [
        [torch.from_numpy(v) for v in a] if i % 3 < 2 else a
        for i, a in enumerate(packed.pack_arguments(m, 24, False)[:6])
    ]
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (torch.ops.fastseq.linear_packed.default, (torch.randn(3, 24), w, torch.randn(20), 20)),
        (torch.ops.fastseq.linear_packed.default, (torch.randn(3, 24), w, None, 20)),
        (torch.ops.fastseq.lstm_packed_forward.default, (*tensors(Call(CASES["all_lengths"], "int8", 5)), 2)),
        (torch.ops.fastseq.lstm_packed_forward.default, (*tensors(Call(CASES["all_packed"], "int4")), 0)),
        (torch.ops.fastseq.pack_matrix.default, (*lists, 24, True)),
    ]
    for op, args in calls:
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}, op


class Net(nn.Module):
    """A layer over packed weights and a packed product of its output."""

    def __init__(self) -> None:
        super().__init__()
        call = Call(Case(5, 3, 20), "int8", 12)
        self.x = call.x
        for name, value in call.weights().items():
            self.register_buffer(name, torch.from_numpy(value))
        self.register_buffer("head", ops.pack(packed.matrix(7, 20, "int4"), 20))

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(x.shape[1], 20)
        options = (self.weight_ih, self.bias, None, None, None, None, None, None, 1.0, False, False, 0)
        h = torch.ops.fastseq.lstm_packed_forward(x, self.weight_hh, zeros, zeros.clone(), *options)[0]
        return torch.ops.fastseq.linear_packed(h.flatten(0, 1), self.head, None, 7).unflatten(0, h.shape[:2])


def test_compile() -> None:
    net = Net()
    compiled = torch.compile(net, fullgraph=True)
    for T in (5, 2):
        assert_same_bits("y", compiled(net.x[:T].contiguous()), net(net.x[:T].contiguous()))


def test_export(tmp_path: Path) -> None:
    net = Net()
    steps = torch.export.Dim("T", min=2, max=100)
    exported = torch.export.export(net, (net.x,), dynamic_shapes=({0: steps},))
    torch.export.save(exported, tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    for T in (5, 3):
        assert_same_bits("y", again(net.x[:T].contiguous()), net(net.x[:T].contiguous()))


def test_ahead_of_time(tmp_path: Path) -> None:
    """AOTInductor: the weights are in the package, the operators in the library that fastseq loads."""
    net = Net()
    exported = torch.export.export(net, (net.x,))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "net.pt2"))
    assert_same_bits("y", torch._inductor.aoti_load_package(package)(net.x), net(net.x))


def test_what_is_refused() -> None:
    x, w = torch.randn(3, 24), ops.pack(packed.matrix(20, 24, "int8"), 24)
    linear = torch.ops.fastseq.linear_packed
    with pytest.raises(ValueError, match="linear_packed: N must be the rows of weight = 20, got 21"):
        linear(x, w, None, 21)
    with pytest.raises(ValueError, match="linear_packed: x must be float32, got float64"):
        linear(x.double(), w, None, 20)
    with pytest.raises(ValueError, match="weight must be what pack_matrix returned, got 64 other bytes"):
        linear(x, w[:64].clone(), None, 20)
    arguments = tensors(Call(Case(2, 1, 3), "int8"))
    arguments[0] = arguments[0].double()
    with pytest.raises(ValueError, match="lstm_packed_forward: x_gates must be float32, got float64"):
        torch.ops.fastseq.lstm_packed_forward(*arguments, 0)


def test_no_backend_but_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastseq.ops._select import choose

    monkeypatch.setenv("FASTSEQ_BACKEND", "reference")
    with pytest.raises(RuntimeError, match=r"linear_packed: no backend can run this call \(cpu: FASTSEQ_BACKEND=ref"):
        choose("linear_packed", ops.BACKENDS["linear_packed"], torch.zeros(1))

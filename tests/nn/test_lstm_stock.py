"""torch's own LSTM behind ``fastseq.nn.LSTM``: the choice, and that nothing which ours can do is lost by it.

On a GPU it is chosen by itself; here FASTSEQ_BACKEND=torch asks for it on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import reference
from fastseq.functional import Weights, lstm, lstm_stock, mimo_index
from fastseq.functional.lstm_stock import StockCall
from fastseq.ops import lstm_persist
from fastseq.ops._select import choose
from fastseq.ops.lstm_costs import Cost
from tests.tolerance import assert_same_bits

T, B, I, H = 5, 3, 4, 6  # noqa: E741
NETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "projection": {"proj_size": 2, "bias": False},
}


@pytest.fixture(autouse=True)
def _by_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTSEQ_BACKEND", "torch")
    yield


def pair(**options: Any) -> tuple[fastseq.nn.LSTM, nn.LSTM]:
    ours, theirs = fastseq.nn.LSTM(I, H, **options), nn.LSTM(I, H, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(module: nn.Module, x: Tensor, train: bool = True) -> list[Tensor]:
    out, (h, c) = module.train(train)(x)
    loss = out.square().sum() + (2 * h).sum() + c.pow(3).sum()
    return list(torch.autograd.grad(loss, (x, *module.parameters())))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("train", [True, False])
def test_results_are_torchs(net: str, train: bool) -> None:
    """In evaluation mode too, where cuDNN itself has no backward."""
    ours, theirs = pair(**NETS[net])
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.no_grad():
        assert_same_bits("out h c", [ours(x)[0], *ours(x)[1]], [theirs(x)[0], *theirs(x)[1]])
    got, expected = gradients(ours, x, train), gradients(theirs, x, train)
    assert_same_bits([f"d{n}" for n in range(len(got))], got, expected)


def test_packed_and_state() -> None:
    ours, theirs = pair(num_layers=2)
    packed = pack_padded_sequence(torch.randn(T, B, I), [2, 5, 4], enforce_sorted=False)
    hx = torch.randn(2, B, H), torch.randn(2, B, H)
    (got, state), (expected, right) = ours(packed, hx), theirs(packed, hx)
    assert_same_bits("out h c", [got.data, *state], [expected.data, *right])


@pytest.mark.parametrize("net", NETS)
def test_second_derivative_goes_through_ours(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fastseq.nn.LSTM(I, H, **NETS[net]).double()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)

    def second() -> tuple[Tensor, ...]:
        out = module(x)[0]
        (dx,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), (x, *module.parameters()), allow_unused=True)

    monkeypatch.setenv("FASTSEQ_BACKEND", "")
    expected = second()
    monkeypatch.setenv("FASTSEQ_BACKEND", "torch")
    assert type(module(x)[0].grad_fn).__name__ == "StockBackward"
    for got, right in zip(second(), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


def test_no_second_derivative_through_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = fastseq.nn.LSTM(I, H, num_layers=2, dropout=0.5), torch.randn(T, B, I, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x)[0].sum(), x)
    assert dx.abs().sum() > 0
    with pytest.raises(NotImplementedError, match="no second derivative through dropout"):
        torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)


def test_the_graph_is_kept_and_freed_as_asked() -> None:
    module, x = fastseq.nn.LSTM(I, H), torch.randn(T, B, I, requires_grad=True)
    out = module(x)[0]
    node = out.grad_fn
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)
    assert_same_bits("dx", torch.autograd.grad(out.sum(), x), first)
    assert node.inner is None
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), x)


def test_a_tensor_changed_in_place_is_found() -> None:
    module, x = fastseq.nn.LSTM(I, H), torch.randn(T, B, I, requires_grad=True)
    out = module(x)[0]
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_learned_start_state() -> None:
    module = fastseq.nn.LSTM(I, H, learnable_state=True)
    with torch.no_grad():
        module.h_start_l0.normal_()
        module.c_start_l0.normal_()
    expected, theirs = module(torch.ones(T, B, I))[0], nn.LSTM(I, H)
    theirs.load_state_dict({k: v for k, v in module.state_dict().items() if "start" not in k})
    state = module.h_start_l0.expand(1, B, H).contiguous(), module.c_start_l0.expand(1, B, H).contiguous()
    assert_same_bits("out", expected, theirs(torch.ones(T, B, I), state)[0])


LACKING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "binary": ({"gates": "binary"}, {}, "gate noise"),
    "sharpened": ({"gates": "sharpened"}, {}, "temperature"),
    "reset": ({}, {"reset": torch.zeros(T, B, dtype=torch.bool)}, "reset"),
    "gates": ({}, {"return_gates": True}, "way to return all cell states"),
    "lengths": ({}, {"lengths": torch.full((B,), T)}, "lengths"),
    "recompute": ({"recompute": True}, {}, "recomputation"),
    "variational": ({"variational_dropout": 0.5}, {}, "variational dropout"),
}


@pytest.mark.parametrize("case", LACKING)
def test_what_torch_lacks_is_ours(case: str) -> None:
    options, call, words = LACKING[case]
    with pytest.raises(RuntimeError, match=f"torch: torch's LSTM has no {words}"):
        fastseq.nn.LSTM(I, H, **options)(torch.randn(T, B, I), **call)


def test_weights_are_checked_in_the_words_of_ours() -> None:
    module = fastseq.nn.LSTM(I, H)
    module.weight_ih_l0 = nn.Parameter(torch.zeros(24, 5))
    with pytest.raises(
        ValueError, match=r"lstm: weights\[0\].weight_ih must be \[4\*H, I\] = \[24, 4\], got \[24, 5\]"
    ):
        module(torch.randn(T, B, I))


def test_on_a_gpu_it_is_chosen_for_sigmoid_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSEQ_BACKEND")
    with FakeTensorMode():
        x, weight_ih, weight_hh = (torch.empty(size, device="cuda") for size in ((T, B, I), (4 * H, I), (4 * H, H)))
        call = StockCall(x, [Weights(weight_ih, weight_hh)], None, False, None, 0.0, {"reset": False})
        assert choose("lstm", lstm_stock.BACKENDS, call).name == "torch"
        assert choose("lstm", lstm_stock.BACKENDS, call._replace(special={"reset": True})).name == "layers"


@pytest.mark.parametrize(
    ("dtype", "T", "B", "H", "name"),
    [
        (torch.bfloat16, 64, 16, 512, "layers"),
        (torch.bfloat16, 64, 16, 64, "layers"),
        (torch.bfloat16, 63, 16, 512, "torch"),
        (torch.bfloat16, 64, 64, 512, "layers"),
        (torch.bfloat16, 64, 17, 1024, "torch"),
        (torch.float16, 64, 16, 512, "torch"),
        (torch.float32, 64, 16, 512, "torch"),
    ],
)
def test_ours_comes_first_where_it_was_measured_to_be_faster(
    dtype: torch.dtype, T: int, B: int, H: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastseq_kernels import _verified

    monkeypatch.setenv("FASTSEQ_BACKEND", "")
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    with FakeTensorMode():
        x, weight_hh = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((T, B, 8), (4 * H, H)))
        weights = [Weights(torch.empty(4 * H, 8), weight_hh)]
    for layers, missing, expected in ((1, None, name), (1, "lstm_graph", "torch"), (2, None, "torch")):
        call = StockCall(x, weights * layers, None, False, None, 0.0, {})

        def doubt(module: str, *args: Any, missing: str | None = missing) -> str | None:
            return "unverified" if module == missing else None

        monkeypatch.setattr(_verified, "doubt", doubt)
        assert choose("lstm", lstm_stock.BACKENDS, call, operator=False).name == expected


@pytest.mark.parametrize(("step", "name"), [(None, "torch"), (6.5, "layers"), (30.0, "torch")])
def test_the_persistent_kernels_come_first_where_they_are_faster(
    step: float | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a size that is more than Triton's were measured with; torch takes 20 us a step."""
    monkeypatch.setenv("FASTSEQ_BACKEND", "")
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    cost = None if step is None else Cost(15.0, step)
    monkeypatch.setattr(lstm_persist, "layer_cost", lambda *size: cost if size[:3] == (64, 8, 1024) else None)
    with FakeTensorMode():
        x, weight_hh = (torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in ((64, 64, 8), (4096, 1024)))
        weights = [Weights(torch.empty(4096, 8), weight_hh)]
    call = StockCall(x, weights, None, False, None, 0.0, {})
    assert choose("lstm", lstm_stock.BACKENDS, call, operator=False).name == name


@pytest.mark.parametrize("net", NETS)
def test_rows_of_several_examples_are_gathered_for_it(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.ops.mimo.gather", reference.mimo_gather)  # which torch has no operator for
    ours, theirs = fastseq.nn.LSTM(2 * I, H, **NETS[net]), nn.LSTM(2 * I, H, **NETS[net])
    theirs.load_state_dict(ours.state_dict())
    x, index = torch.randn(T, B, I, requires_grad=True), mimo_index(B, 2, 3)
    rows = reference.mimo_gather(x[:, :, None], index).squeeze(2)
    expected, (h, c) = theirs(rows)
    got = lstm(x, ours._weights(), bidirectional=ours.bidirectional, index=index)
    assert_same_bits("out h c", got[:3], (expected, h, c))
    d = torch.randn_like(expected)
    assert_same_bits("dx", torch.autograd.grad(got.output, x, d), torch.autograd.grad(expected, x, d))

"""MIMO, the wrapper, on networks that lay out their rows in their own way, and what it asks or refuses."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.compression import compress
from fastseq.nn import LSTM, MIMO, MIMOLSTM, MIMOEmbedding
from tests.nn.mimo_cases import B, M, assert_agrees, draw
from tests.nn.test_mimo import K, N, Recurrent, T, convolutional, mlp
from tests.tolerance import assert_same_bits, assert_within_budget

NAMES: dict[Any, tuple[str, str]] = {mlp: ("1", "4"), Recurrent: ("body.lstm", "head"), convolutional: ("0.0", "1")}


class Transposed(nn.Module):
    """Takes examples first before an LSTM, or behind a table one, that takes time first."""

    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6) if tokens else None
        self.lstm, self.head = nn.LSTM(6, 8), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.table is None else self.table(x)
        return self.head(self.lstm(x.transpose(0, 1))[0][-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("tokens", [False, True])
def test_a_backbone_that_transposes(tokens: bool) -> None:
    x = torch.randint(0, 9, (B, T)) if tokens else torch.randn(B, T, 6)
    model, index = MIMO(Transposed(tokens), M, example=x, batch_dim=0), draw()
    assert model.batch_dim == 0 and type(model.first) is (MIMOEmbedding if tokens else MIMOLSTM)
    wide = nn.LSTM(6 if tokens else 6 * M, 8)
    parameters = [*model.backbone.lstm.parameters(), model.head.weight, model.head.bias]
    tables = [model.first.weight] if tokens else []

    def by_hand(slots: list[Tensor], *given: Tensor) -> Tensor:
        *lstm, weight, bias = given[len(tables) :]
        if tokens:
            looked_up = [F.embedding(s, w) for s, w in zip(slots, given[0].chunk(M, 1), strict=True)]
            rows = torch.stack(looked_up).sum(0)
        else:
            rows = torch.cat(slots, -1)
        named = dict(zip((name for name, _ in wide.named_parameters()), lstm, strict=True))
        out = torch.func.functional_call(wide, named, (rows.transpose(0, 1),))[0][-1]
        return F.linear(out, weight, bias).unflatten(-1, (M, K))

    slots = [x[slot.long()] for slot in index]  # M of [N, T, ...]
    given = [*tables, *parameters]
    assert_within_budget("train", model(x, index), by_hand, [slots, *given])
    assert_within_budget("ensemble", model(x), by_hand, [[x] * M, *given])
    together = model(torch.stack(slots, 1), mode="multiplex")
    assert_within_budget("multiplex", together, by_hand, [slots, *given])
    labels = torch.randint(0, K, (B,))
    want = model.loss(model(x, index), labels[index.long()].T)
    assert_same_bits("loss", model.loss(model(x, index), labels, index), want)


def test_dimension_of_examples_is_asked_for() -> None:
    """Where a table or a linear layer lies before an LSTM that takes time first."""
    want = r"MIMO: batch_dim must be given, since body.lstm \(LSTM\) takes time first: 0 where the input of table "
    for kind in (nn.LSTM, LSTM, nn.GRU):
        net = Recurrent(LSTM if kind is LSTM else nn.LSTM, False, tokens=True)
        if kind is nn.GRU:
            net.body["lstm"] = nn.GRU(6, 4)
            want = want.replace("LSTM", "GRU")
        with pytest.raises(
            ValueError, match=want + r"\(Embedding\) is \[B, T, ...\], 1 where it is \[T, B, ...\], got"
        ):
            MIMO(net, M, "table", "head")
    model = MIMO(Recurrent(LSTM, False, tokens=True), M, example=torch.randint(0, 9, (T, B)), batch_dim=1)
    assert model(torch.randint(0, 9, (T, B)), draw()).shape == (N, M, K) and model.batch_dim == 1


def test_rows_are_looked_for_where_the_examples_are() -> None:
    """Not in any dimension."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, K))
    MIMO(net, M, example=torch.randn(B, 10, 6))

    class Wrong(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).transpose(0, 1))  # type: ignore[no-any-return]

    with pytest.raises(
        ValueError, match=r"network of 12 rows of logits along 0, with batch_dim = 0, got \[10, 12, 3, 4"
    ):
        MIMO(Wrong(*net), M, example=torch.randn(B, 10, 6))


def test_threads_share_a_model() -> None:
    """Each call waits, between first layer and head, for the other to be as far."""
    meeting: list[threading.Barrier] = []

    class Meet(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for barrier in meeting:
                barrier.wait(10)
            return x

    model = MIMO(nn.Sequential(Meet(), nn.Linear(6, 7), Meet(), nn.Linear(7, K)), M, "1", "3").eval()
    x, index = torch.randn(2, B, 6), draw()
    given: list[tuple[Tensor, ...]] = [(x[0], index), (x[1],)]
    want = [model(*args) for args in given]
    got: dict[int, Tensor] = {}
    meeting.append(threading.Barrier(2))

    def call(n: int) -> None:
        got[n] = model(*given[n])

    threads = [threading.Thread(target=call, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_bits("train ensemble", [got[0], got[1]], want)


def test_a_model_inside_another_model() -> None:
    inner = MIMO(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, K)), M)
    outer = MIMO(nn.Sequential(nn.Linear(5, 6), inner, nn.Flatten(), nn.Linear(M * K, 2)), 2, "0", "3")
    x, index = torch.randn(B, 5), draw()[:2]
    assert_same_bits("out", outer(x, index), outer.head(inner(outer.first(x, index)).flatten(1)))


def test_a_compiled_backbone_is_told_each_index() -> None:
    model = MIMO(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, K)), M)
    x, many = torch.randn(B, 6), [draw(), draw(rho=0.9)]
    plain = copy.deepcopy(model)
    model.backbone.compile(backend="aot_eager", fullgraph=True)
    for args in [*((x, index) for index in many), (x,)]:
        assert_agrees("out", model(*args), plain, *args)


def test_compressed_as_folded() -> None:
    model = MIMO(Recurrent(LSTM), M, example=torch.randn(B, T, 6)).eval().fold()
    small = compress(model, "int8").model
    assert isinstance(small, MIMO) and small(torch.randn(B, T, 6)).shape == (B, M, K)
    for method in ("to_plain", "fold", "unfold"):
        want = rf"MIMO: {method}\(\) needs the weights of each slot: this model was compressed as folded"
        with pytest.raises(ValueError, match=want):
            getattr(small, method)()
    with pytest.raises(ValueError, match="MIMO: mode must be 'ensemble', since the first layer has no weights of each"):
        small(torch.randn(B, M, T, 6), mode="multiplex")


@pytest.mark.parametrize("net", [mlp, Recurrent, convolutional])
def test_copied_weights_stay_frozen(net: Any) -> None:
    plain = net()
    first, head = MIMO(plain, M, *NAMES[net]).report[:2]
    frozen = [f"{first}.{n}" for n, _ in plain.get_submodule(first).named_parameters()][:1] + [f"{head}.bias"]
    for name in frozen:
        plain.get_parameter(name).requires_grad_(False)
    kept = {n: p.requires_grad for n, p in plain.named_parameters()}
    model = MIMO(plain, M, first, head, weights="copy")
    assert {n: p.requires_grad for n, p in model.backbone.named_parameters()} == kept
    assert all(p.requires_grad for p in MIMO(plain, M, first, head).first.parameters())


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("name", ["1", "4"])
def test_hooks_of_layers_to_be_replaced(name: str, kind: str) -> None:
    net = mlp()
    handle = getattr(net.get_submodule(name), f"register_{kind}")(lambda *args: None)
    argument = "first" if name == "1" else "head"
    with pytest.raises(ValueError, match=f"MIMO: {argument} must be a layer without hooks, .*, got {name}, which has"):
        MIMO(net, M, example=torch.randn(B, 6))
    handle.remove()
    MIMO(net, M)


@pytest.mark.parametrize("shape", [(M, K), (K,)])
def test_statistics_of_one_row(shape: tuple[int, ...]) -> None:
    want = rf"MIMO: logits must be \[rows, ..., M, K\] of the ensemble mode, got \[{', '.join(map(str, shape))}\]"
    with pytest.raises(ValueError, match=want):
        MIMO(mlp(), M).stats(torch.randn(shape))

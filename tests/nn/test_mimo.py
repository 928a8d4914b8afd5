"""MIMO, the wrapper: what it finds and replaces, its modes against networks built by hand, loss and statistics."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq.nn import LSTM, MIMO, MIMOLSTM, MIMOConv2d, MIMOEmbedding, MIMOHead, MIMOIndex, MIMOLinear
from fastseq.nn._mimo_fold import calls
from tests.nn.mimo_cases import B, M, R, assert_agrees, draw, gathered
from tests.tolerance import assert_same_bits, assert_within_budget

K, T, N = 4, 5, R * B


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, K))


def convolutional() -> nn.Sequential:
    body = [nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Sequential(*body), nn.Linear(5, K))


class Recurrent(nn.Module):
    """Registers its head first."""

    def __init__(self, kind: Any = nn.LSTM, batch_first: bool = True, tokens: bool = False, tags: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(8, K)
        self.table = nn.Embedding(9, 6) if tokens else None
        self.body = nn.ModuleDict({"lstm": kind(6, 4, 2, batch_first=batch_first, bidirectional=True)})
        self.tags = tags

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = x if self.table is None else self.table(x)
        given: Any = x if lengths is None else pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        out, (h, _) = self.body["lstm"](given)
        if not self.tags:
            return self.head(torch.cat([h[-2], h[-1]], -1))  # type: ignore[no-any-return]
        return self.head(out if lengths is None else pad_packed_sequence(out, True)[0])  # type: ignore[no-any-return]


NETS: dict[str, tuple[Any, tuple[int, ...], tuple[str, str], type]] = {
    "mlp": (mlp, (B, 2, 3), ("1", "4"), MIMOLinear),
    "conv": (convolutional, (B, 3, 6, 6), ("0.0", "1"), MIMOConv2d),
    "lstm": (Recurrent, (B, T, 6), ("body.lstm", "head"), MIMOLSTM),
    "ours": (lambda: Recurrent(LSTM, False), (T, B, 6), ("body.lstm", "head"), MIMOLSTM),
    "tokens": (lambda: Recurrent(tokens=True), (B, T), ("table", "head"), MIMOEmbedding),
    "tagger": (lambda: Recurrent(tags=True), (B, T, 6), ("body.lstm", "head"), MIMOLSTM),
    "time_first_tags": (lambda: Recurrent(nn.LSTM, False, tags=True), (T, B, 6), ("body.lstm", "head"), MIMOLSTM),
}


def given(name: str) -> Tensor:
    shape = NETS[name][1]
    return torch.randint(0, 9, shape) if name == "tokens" else torch.randn(shape)


@pytest.mark.parametrize("name", NETS)
def test_layers_are_found_by_an_example(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, shape, names, kind = NETS[name]
    net = make()
    before = copy.deepcopy(net.state_dict())
    net.train()
    with caplog.at_level(logging.INFO, "fastseq"):
        model = MIMO(net, M, example=given(name))
    assert (model.report.first, model.report.head) == names and model.batch_dim == shape.index(B)
    assert type(model.first) is kind and type(model.head) is MIMOHead and (model.M, model.K) == (M, K)
    assert model.training and all(m.training for m in model.modules())
    assert [r.message for r in caplog.records] == [f"MIMO of {M} slots: {model.report}"]
    assert f"{names[0]}: " in repr(model) and kind.__name__ in str(model.report)
    assert_same_bits(list(before), list(net.state_dict().values()), list(before.values()))  # a copy was changed
    assert not any(m._forward_hooks for m in net.modules())


def test_report() -> None:
    report = MIMO(mlp(), M).report
    assert str(report) == (
        "1: Linear(in_features=6, out_features=7, bias=True) -> MIMOLinear(in_features=18, out_features=7, bias=True, "
        "M=3); 4: Linear(in_features=7, out_features=4, bias=True) -> MIMOHead(in_features=7, out_features=12, "
        "bias=True, M=3); fresh weights; parameters 81 -> 229 (+182.72%)"
    )
    assert report.parameters == (81, 229)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_copied_weights_start_as_the_network_was(name: str, training: bool) -> None:
    net = NETS[name][0]().eval().double()
    x = given(name).double() if name != "tokens" else given(name)
    model = MIMO(net, M, weights="copy", example=x).train(training)
    out = model.eval()(x)
    assert out.shape == (*net(x).shape[:-1], M, K)
    for slot in out.unbind(-2):
        assert_agrees("out", slot, net, x)


@pytest.mark.parametrize("name", NETS)
def test_modes(name: str) -> None:
    make, shape, names, _ = NETS[name]
    model, b = MIMO(make(), M, *names).eval().double(), shape.index(B)
    x, index = given(name), draw()
    x = x if name == "tokens" else x.double()
    tags = "tag" in name
    out = model(x, index)
    lead = (T, N) if b and tags else (N, T) if tags else (N,)
    assert out.shape == (*lead, M, K)
    # the rows themselves, as a multiplex call takes them
    rows = torch.stack([x.index_select(b, slot.long()) for slot in index], b + 1)
    assert_agrees("rows", out, model, rows, mode="multiplex")
    ensemble = model(x)
    assert_agrees("ensemble", ensemble, model, torch.stack([x] * M, b + 1), mode="multiplex")
    assert_agrees("folded", model.fold()(x), model, x)
    assert model.first.is_folded and not model.unfold().first.is_folded
    model.train()
    assert model(x, index).shape == out.shape and model(x).shape == ensemble.shape


def test_the_train_mode_is_the_network_on_gathered_rows() -> None:
    """Built by hand from plain layers."""
    model, x, index = MIMO(convolutional(), M), torch.randn(B, 3, 6, 6), draw()
    body, head = model.backbone[0], model.head
    got = model(x, index)

    def reference(x: Tensor, *parameters: Tensor) -> list[Tensor]:
        weight, bias, scale, shift, head_weight, head_bias = parameters
        hidden = F.conv2d(gathered(x, index, 0, 1), weight, bias, padding=1)
        rows = F.batch_norm(hidden, None, None, scale, shift, training=True).relu()
        features = F.adaptive_avg_pool2d(rows, 1).flatten(1)
        return [F.linear(features, head_weight, head_bias).view(N, M, K), 0.1 * hidden.mean((0, 2, 3))]

    parameters = [*body.parameters(), *head.parameters()]
    assert_within_budget("out mean", [got, body[1].running_mean], reference, [x, *parameters])


def test_packed_inside_the_backbone() -> None:
    net = Recurrent(tags=True)
    model, index = MIMO(net, M, example=torch.randn(B, T, 6)), draw()
    x, lengths = torch.randn(B, T, 6), torch.tensor([5, 1, 2, 5, 4, 3])
    rows, ends = model(x, index, lengths), lengths[index.long()].amax(0)
    filled = torch.where(torch.arange(T)[:, None] < lengths[:, None, None], x, 0)
    lstm = model.backbone.body["lstm"]

    def heads(keep: Tensor) -> Any:
        weight, bias = model.head.weight, model.head.bias
        return lambda out: F.linear(
            torch.where(keep[..., None], out[0], 0), weight.to(out[0]), bias.to(out[0])
        ).unflatten(-1, (M, K))

    steps = torch.arange(T)
    assert_agrees("rows", rows, lstm, filled, index, pick=heads(steps < ends[:, None]), lengths=lengths)
    together = model(x.view(2, M, T, 6), lengths=lengths, mode="multiplex")
    slots, longest = lengths.view(2, M), lengths.view(2, M).amax(1)
    side_by_side = filled.view(2, M, T, 6).transpose(1, 2)
    pick = heads(steps < longest[:, None])
    assert_agrees("multiplex", together, lstm, side_by_side, pick=pick, lengths=slots, mode="multiplex")
    assert model(x, lengths=lengths).shape == (B, T, M, K)


def test_in_place_and_names() -> None:
    net = mlp()
    model = MIMO(net, M, "1", "4", inplace=True)
    assert model.backbone is net and type(net[1]) is MIMOLinear
    assert MIMO(mlp(), M, "1", "4", batch_dim=0).batch_dim == 0


@pytest.mark.parametrize("name", NETS)
def test_plain_network_for_deployment(name: str) -> None:
    make, _, names, kind = NETS[name]
    model, x = MIMO(make(), M, *names).eval(), given(name)
    plain = model.to_plain()
    assert not any(isinstance(m, (kind, MIMOHead)) for m in plain.modules()) and not plain.training
    assert_agrees("out", plain(x), model, x)
    before = copy.deepcopy(model.state_dict())
    for p in plain.parameters():
        nn.init.ones_(p)
    assert_same_bits(list(before), list(model.state_dict().values()), list(before.values()))


def test_state_dict_deepcopy_and_pickle() -> None:
    model, x = MIMO(convolutional(), M).eval(), torch.randn(B, 3, 6, 6)
    other = MIMO(convolutional(), M).eval()
    other.load_state_dict(model.state_dict())
    want = model.fold()(x)
    for copied in (other.fold(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits("out", copied(x), want)


def test_an_error_inside_leaves_no_index_behind() -> None:
    model, x = MIMO(mlp(), M).eval(), torch.randn(B, 6)
    want = model(x)
    with pytest.raises(ValueError, match=r"MIMOLinear: index must be integers \[M, R\*B\]"):
        model(x, draw(batch=5))
    with pytest.raises(RuntimeError):
        model(torch.randn(B, 7), draw())
    assert calls.now is None
    assert_same_bits("out", model(x), want)
    with torch.no_grad():
        assert model(x, draw()).shape == (N, M, K)


def test_loss_is_the_sum_over_slots() -> None:
    model, x, index, labels = (
        MIMO(mlp(), M).double().eval(),
        torch.randn(B, 6).double(),
        draw(),
        torch.randint(0, K, (B,)),
    )
    logits = model(x, index)

    def reference(logits: Tensor) -> Tensor:
        each = [F.cross_entropy(logits[:, m], labels[index[m].long()]) for m in range(M)]
        return torch.stack(each).sum()

    assert_within_budget("loss", model.loss(logits, labels, index), reference, [logits.detach()])
    ensemble = model(x)
    every = labels[:, None].expand(-1, M)
    assert_same_bits("labels", model.loss(ensemble, labels), model.loss(ensemble, every))
    smooth = model.loss(logits, labels, index, label_smoothing=0.1, reduction="none")
    assert smooth.shape == (N, M)


@pytest.mark.parametrize("name", ["tagger", "time_first_tags"])
def test_loss_and_statistics_of_taggers(name: str) -> None:
    make, shape, names, _ = NETS[name]
    model, x, index, b = MIMO(make(), M, *names), given(name), draw(), shape.index(B)
    labels = torch.randint(0, K, shape[:2])
    labels.select(1 - b, 0)[:] = -100
    got = model.loss(model(x, index), labels, index)

    def reference(logits: Tensor) -> Tensor:
        rows = [labels.index_select(b, slot.long()) for slot in index]
        each = [F.cross_entropy(logits[..., m, :].flatten(0, 1), rows[m].flatten()) for m in range(M)]
        return torch.stack(each).sum()

    assert_within_budget("loss", got, reference, [model(x, index).detach()])
    stats = model.stats(model(x), labels)
    assert stats.totals[0] == (T - 1) * B and stats.prediction.shape == (T * B,)


def test_statistics_average_probabilities() -> None:
    """Not logits, and not log-probabilities."""
    model, labels = MIMO(mlp(), M), torch.randint(0, K, (B,))
    logits = 3 * torch.randn(B, M, K, dtype=torch.float64)
    stats = model.stats(logits, labels)

    def reference(logits: Tensor) -> list[Tensor]:
        mean = logits.softmax(-1).mean(1)
        return [-mean.gather(1, labels[:, None]).log().squeeze(1), mean]

    assert stats.probability is not None
    assert_within_budget("nll p", [stats.nll, stats.probability], reference, [logits])
    of_logs = F.cross_entropy(logits.mean(1), labels, reduction="none")
    assert not torch.allclose(stats.nll, of_logs)


def test_training_learns_both_slots() -> None:
    """Two slots with different examples, read apart from one hidden vector."""
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, K))
    model = MIMO(net, 2)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    x, labels = torch.eye(4), torch.arange(4)
    source = MIMOIndex(4, 2, 4)
    for _ in range(80):
        index = source.draw()
        optimizer.zero_grad()
        model.loss(model(x, index), labels, index).backward()
        optimizer.step()
    index = source.draw()
    assert torch.equal(model(x, index).argmax(-1), labels[index.long()].T)
    assert model.stats(model.eval().fold()(x), labels).accuracy == 1


class Sliced(nn.Module):
    """Returns something else than its head does."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.head, self.other, self.what = nn.Linear(6, 7), nn.Linear(7, K), nn.Linear(7, 9), what
        if what == "tied":
            self.first = nn.Linear(7, 7)
            self.head.weight = nn.Parameter(torch.zeros(K, 7))
            self.other.weight = self.head.weight
        if what == "shared":
            self.other = self.first

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        if self.what == "batch":
            return self.head(h.view(x.shape[0], -1))
        if self.what == "several":
            return self.head(h), self.other(h)
        if self.what == "twice":
            return self.head(h) + self.head(h)
        if self.what == "softmax":
            return self.head(h).log_softmax(1)
        if self.what == "uncalled":
            return h
        return self.head(h)


X = torch.randn(B, 6)
CALLS: dict[str, tuple[Any, str]] = {
    "m": (lambda: MIMO(mlp(), 1), "MIMO: M must be an integer >= 2, got 1"),
    "weights": (lambda: MIMO(mlp(), M, weights="old"), "MIMO: weights must be one of 'fresh', 'copy', got 'old'"),
    "names": (
        lambda: MIMO(mlp(), M, "stem"),
        r"MIMO: first must be one of 0 \(Flatten\), 1 \(Linear\), .*, got 'stem'",
    ),
    "head_name": (lambda: MIMO(mlp(), M, head="fc"), "MIMO: head must be one of .*, got 'fc'"),
    "kind": (lambda: MIMO(convolutional(), M, "0.1"), r"MIMO: first must be nn.Linear, .*, got 0.1 \(BatchNorm2d\)"),
    "head_kind": (
        lambda: MIMO(convolutional(), M, head="0.1"),
        r"MIMO: head must be nn.Linear, got 0.1 \(BatchNorm2d\)",
    ),
    "whole": (lambda: MIMO(nn.Linear(3, 4), M), "MIMO: backbone must be a network of layers, got Linear without any"),
    "norm_first": (
        lambda: MIMO(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 7), nn.Linear(7, K)), M),
        r"MIMO: first: the first layer registered is 0 \(BatchNorm1d\), not nn.Linear, .*; name it with first=, or "
        r"give an example=. Candidates: 1 \(Linear\), 2 \(Linear\)",
    ),
    "norm_called": (
        lambda: MIMO(nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 7), nn.Linear(7, K)), M, example=X),
        r"MIMO: first: the first layer called is 0 \(BatchNorm1d\), .*; name it with first=. Candidates",
    ),
    "recurrent_first": (lambda: MIMO(nn.Sequential(nn.GRU(6, 7), nn.Linear(7, K)), M), r"registered is 0 \(GRU\), not"),
    "no_head": (
        lambda: MIMO(nn.Sequential(nn.Linear(6, 7), nn.Conv1d(7, K, 1)), M),
        r"MIMO: head: the last layer registered is 1 \(Conv1d\), not nn.Linear; name it with head=, or give an ",
    ),
    "softmax_last": (
        lambda: MIMO(nn.Sequential(nn.Linear(6, 7), nn.Linear(7, K), nn.Softmax(-1)), M, example=X),
        r"MIMO: head: the last layer called is 2 \(Softmax\), not nn.Linear",
    ),
    "one_layer": (
        lambda: MIMO(nn.Sequential(nn.Linear(6, K)), M),
        "with a first layer and a head of its own, got 0 as both",
    ),
    "tables": (
        lambda: MIMO(nn.Sequential(nn.Embedding(9, 6), nn.Embedding(5, 6), nn.Linear(6, K)), M),
        "MIMO: first: there are several tables: 0, 1; name it with first=, or give an example=",
    ),
    "softmax": (
        lambda: MIMO(Sliced("softmax"), M, head="head", example=X),
        r"MIMO: backbone must be a network that returns the output of its head head as it is, got another",
    ),
    "softmax_call": (
        lambda: MIMO(Sliced("softmax"), M, "first", "head")(X),
        r"got another tensor \[6, 3, 4\]; that of the head is \[6, 3, 4\]. Leave softmax, squeeze and the like to the",
    ),
    "several": (
        lambda: MIMO(Sliced("several"), M, head="head", example=X),
        r"as it is, got tuple of tensors \[\[6, 4\], \[6, 9\]\]: several heads are not supported",
    ),
    "several_call": (
        lambda: MIMO(Sliced("several"), M, "first", "head")(X, draw()),
        r"tuple of tensors \[\[24, 3, 4\], \[24, 9\]\]: several heads are not supported",
    ),
    "twice": (
        lambda: MIMO(Sliced("twice"), M, example=X),
        "MIMO: head must be called once in a forward, got head, called 2",
    ),
    "uncalled": (
        lambda: MIMO(Sliced("uncalled"), M, "first", "head")(X),
        "of its head head as it is, got one that does not",
    ),
    "batch": (
        lambda: MIMO(Sliced("batch"), M, example=X),
        r"MIMO: backbone must be a network that takes 6 examples before its first layer first and 12 behind it, got",
    ),
    "tied": (
        lambda: MIMO(Sliced("tied"), M, "first", "head"),
        "head must be a layer with parameters of its own, got head, ",
    ),
    "shared": (
        lambda: MIMO(Sliced("shared"), M, "first", "head"),
        "first must be a layer with one place, got first and other",
    ),
    "groups": (
        lambda: MIMO(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(8, K)), M),
        "MIMOConv1d: groups must be 1",
    ),
    "max_norm": (
        lambda: MIMO(nn.Sequential(nn.Embedding(9, 6, max_norm=1.0), nn.Linear(6, K)), M),
        "MIMO: first must be an Embedding without max_norm, got max_norm=1.0",
    ),
    "mode": (
        lambda: MIMO(mlp(), M)(X, mode="eval"),
        "MIMO: mode must be one of 'train', 'ensemble', 'multiplex', got 'eval'",
    ),
    "index": (lambda: MIMO(mlp(), M)(X, mode="train"), "MIMO: index must be an index in mode 'train', got None"),
    "no_index": (
        lambda: MIMO(mlp(), M)(X, draw(), mode="ensemble"),
        "MIMO: index must be None in mode 'ensemble', got an",
    ),
    "slots": (
        lambda: MIMO(mlp(), M)(X, mode="multiplex"),
        r"MIMO: x must be a tensor with M = 3 examples along 1, got \[6, 6\]",
    ),
    "folded": (lambda: MIMO(mlp(), M).eval().fold()(X, draw()), "mode 'train' needs the weights of each slot"),
    "fold": (lambda: MIMO(mlp(), M).fold(), r"fold: backbone.1 in training mode"),
}


@pytest.mark.parametrize("case", CALLS)
def test_errors(case: str) -> None:
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_backbone_that_is_no_module() -> None:
    with pytest.raises(TypeError, match="MIMO: backbone should be of type nn.Module, got: function"):
        MIMO(lambda x: x, M)  # type: ignore[arg-type]

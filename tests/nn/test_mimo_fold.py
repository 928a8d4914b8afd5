"""Folding, its errors, plain layers, and copies: state_dict, deepcopy, pickle, dtypes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastseq.nn import LSTM, MIMOLSTM, MIMOEmbedding, MIMOHead, MIMOLinear, fold, unfold
from tests.nn.mimo_cases import CASES, M, assert_agrees, draw, first
from tests.tolerance import assert_same_bits, assert_within_budget

LAYERS: dict[str, tuple[Callable[..., Any], tuple[int, ...], int]] = {
    **{name: (case.layer, case.shape, case.channel) for name, case in CASES.items()},
    "embedding": (lambda **o: MIMOEmbedding(9, 4, M, 2, **o), (6, 5), -1),
    "lstm": (lambda **o: MIMOLSTM(3, 5, 2, bidirectional=True, M=M, **o), (4, 6, 3), -1),
}
PLAIN = {"embedding": nn.Embedding, "lstm": LSTM, "conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "same": nn.Conv2d}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    build, shape, _ = LAYERS[name]
    x = torch.randint(0, 9, shape) if name == "embedding" else torch.randn(shape, dtype=dtype)
    return build(dtype=dtype), x


def run(layer: Any, x: Tensor, **options: Any) -> Tensor:
    return first(layer(x, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_folded_is_the_same_example_in_all_slots(name: str, dtype: torch.dtype) -> None:
    layer, x = make(name, dtype)
    channel = LAYERS[name][2]
    at = x.dim() if name == "embedding" else channel if channel >= 0 else x.dim() - 1
    tiled = run(layer, x.unsqueeze(at).expand(*x.shape[:at], M, *x.shape[at:]), mode="multiplex")
    ensemble = run(layer, x)
    layer.eval()
    assert layer.fold() is layer and layer.is_folded
    folded = run(layer, x)
    for got in (folded, tiled):
        assert_agrees("out", got, layer, x)
    plain = layer.to_plain()
    assert type(plain) is PLAIN.get(name, nn.Linear) and not plain.training
    assert_same_bits("plain", run(plain, x), folded)
    assert_same_bits("unfolded", run(layer.unfold(), x), ensemble)


@pytest.mark.parametrize("name", LAYERS)
def test_fold_leaves_no_trace(name: str) -> None:
    layer, x = make(name)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.eval().fold()
    assert list(layer.state_dict()) == list(before)
    layer.unfold()
    assert not layer.is_folded and all(v is None for n, v in layer.named_buffers() if n.startswith("folded"))
    assert_same_bits(list(before), list(layer.state_dict().values()), list(before.values()))
    assert layer.unfold() is layer


def test_weights_are_summed_in_float32_and_rounded_once() -> None:
    layer = MIMOLinear(300, 50, M, dtype=torch.bfloat16).eval()
    want = sum(w.float() for w in layer.weight.detach().chunk(M, 1)).bfloat16()  # type: ignore[union-attr]
    assert_same_bits("folded", layer.fold().folded_weight.float(), want.float())
    embedding = MIMOEmbedding(9, 40, M, dtype=torch.bfloat16)
    want = sum(w.float() for w in embedding.weight.detach().chunk(M, 1)).bfloat16()  # type: ignore[union-attr]
    assert_same_bits("ensemble", embedding(torch.arange(9)).float(), want.float())


def test_training_mode_unfolds_and_refuses_to_fold() -> None:
    layer, x = make("linear")
    with pytest.raises(ValueError, match=r"MIMOLinear: fold\(\) is for evaluation: call .eval\(\) first"):
        layer.fold()
    layer.eval().fold()
    assert layer.eval().is_folded
    assert not layer.train().is_folded
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("name", LAYERS)
def test_other_modes_are_refused_while_folded(name: str) -> None:
    layer, x = make(name)
    layer.eval().fold()
    kind = type(layer).__name__
    for options in ({"index": draw()}, {"mode": "multiplex"}):
        mode = options.get("mode", "train")
        with pytest.raises(ValueError, match=rf"{kind}: mode '{mode}' needs the weights of each slot: call unfold\(\)"):
            layer(x, **options)


def _step(layer: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


CHANGES: dict[str, Callable[[Any, Tensor], object]] = {
    "optimizer": _step,
    "load": lambda layer, x: layer.load_state_dict(copy.deepcopy(layer.state_dict())),
    "assign": lambda layer, x: layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True),
    "in_place": lambda layer, x: nn.init.ones_(next(layer.parameters())),
    "replaced": lambda layer, x: layer.register_parameter(
        layer._folding[-1], nn.Parameter(getattr(layer, layer._folding[-1]).detach().clone())
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "lstm"])
def test_changed_weights_are_noticed(name: str, change: str) -> None:
    layer, x = make(name)
    run(layer.eval().fold(), x)
    CHANGES[change](layer, x)
    with pytest.raises(
        ValueError, match=r"a weight has changed or was loaded since fold\(\): call fold\(\) again, or unfold"
    ):
        layer(x)
    again = run(layer.fold(), x)
    assert_agrees("out", again, layer, x)


@pytest.mark.parametrize("name", ["linear", "embedding", "lstm"])
def test_copies_stay_folded(name: str) -> None:
    layer, x = make(name)
    want = run(layer.eval().fold(), x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert (
            other.is_folded and other.folded_weight_ih_l0 is not layer.folded_weight_ih_l0 if name == "lstm" else True
        )
        assert_same_bits("out", run(other, x), want)
        nn.init.zeros_(next(other.parameters()))
        with pytest.raises(ValueError, match="since fold"):
            other(x)
        assert_same_bits("unharmed", run(layer, x), want)


def test_a_change_of_dtype_folds_anew() -> None:
    layer, x = make("linear", torch.float64)
    layer.eval().fold().bfloat16()
    want = MIMOLinear(5, 7, M, dtype=torch.bfloat16).eval()
    want.load_state_dict(layer.state_dict())
    assert_same_bits("folded", layer.folded_weight.float(), want.fold().folded_weight.float())
    layer(x.bfloat16())


def test_inference_mode() -> None:
    with torch.inference_mode():
        layer, x = make("linear")
        got = layer.eval().fold()(x)
    other = MIMOLinear(5, 7, M)
    other.load_state_dict(layer.state_dict())
    assert_agrees("out", got.clone(), other, x.clone())


@pytest.mark.parametrize("name", ["linear", "conv2d", "lstm"])
def test_folded_under_inference_mode_and_called_with_gradients(name: str) -> None:
    layer, x = make(name)
    with torch.inference_mode():
        layer.eval().fold()
    x.requires_grad_()
    (got,) = torch.autograd.grad(run(layer, x).sum(), x)
    (want,) = torch.autograd.grad(run(layer.unfold().fold(), x).sum(), x)
    assert_same_bits("dx", got, want)


def test_parametrized_weights() -> None:
    layer, x = make("linear")
    parametrizations.weight_norm(layer)
    layer.eval().fold()
    assert_agrees("out", layer(x), layer, x)
    nn.init.zeros_(layer.parametrizations.weight.original0)
    with pytest.raises(ValueError, match="since fold"):
        layer(x)


def test_whole_models() -> None:
    model = nn.Sequential(
        MIMOLinear(5, 7, M), nn.ReLU(), nn.Sequential(nn.Linear(7, 5), MIMOLinear(5, 6, M)), MIMOHead(6, 2, M)
    )
    x = torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"fold: 0, 2.1 in training mode: call .eval\(\) first"):
        fold(model)
    model.eval()
    model[2].train()
    with pytest.raises(ValueError, match="fold: 2.1 in training mode"):
        fold(model)
    assert not model[0].is_folded  # all or none
    assert fold(model.eval()) is model and model[0].is_folded and model[2][1].is_folded
    assert_agrees("out", model(x), model, x)
    assert unfold(model) is model and not model[0].is_folded
    fold(model).train()
    assert not model[2][1].is_folded
    for function, name in ((fold, "fold"), (unfold, "unfold")):
        with pytest.raises(ValueError, match=f"{name}: model must be a module with MIMO layers inside, got Linear"):
            function(nn.Linear(2, 2))


def test_plain_layers_keep_what_is_frozen() -> None:
    layer, _ = make("linear")
    layer.weight.requires_grad_(False)
    plain = layer.to_plain()
    assert not plain.weight.requires_grad and plain.bias.requires_grad and plain.training
    head = MIMOHead(5, 4, M).eval()
    x = torch.randn(2, 5)
    assert_same_bits("head", head.to_plain()(x), head(x))
    assert not head.to_plain().training
    lstm = MIMOLSTM(3, 5, M=M)
    lstm.bias_hh_l0.requires_grad_(False)
    assert [n for n, p in lstm.to_plain().named_parameters() if not p.requires_grad] == ["bias_hh_l0"]


def test_gradient_of_the_input_while_folded() -> None:
    layer, x = make("linear")
    x.requires_grad_()
    out = layer.eval().fold()(x)
    upstream = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, upstream)

    def reference(weight: Tensor, upstream: Tensor) -> Tensor:
        return upstream @ sum(weight.chunk(M, 1))  # type: ignore[arg-type]

    assert_within_budget("dx", got, reference, [layer.weight, upstream])

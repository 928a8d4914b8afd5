"""replace(model) and replaced(model)."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastseq
from fastseq._check import ArgumentError
from fastseq.nn import LSTM, LSTMCell

T, B, I, H = 5, 3, 4, 6  # noqa: E741
ROUNDING = 16 * torch.finfo(torch.float32).eps  # of results below one, after a handful of steps


class Model(nn.Module):
    """An encoder used twice, a cell, and LSTMs deeper down."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(I, H, 2, bidirectional=True, batch_first=True)
        self.cell = nn.LSTMCell(2 * H, H)
        self.blocks = nn.ModuleDict({"a": nn.Sequential(nn.Linear(H, H), nn.LSTM(H, H, proj_size=2))})
        self.again = self.encoder
        self.out = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        both = self.encoder(x)[0] + self.again(x)[0]
        h, _ = self.cell(both[:, -1])
        out: Tensor = self.out(self.blocks["a"](h.unsqueeze(0))[0])
        return out


def test_outputs_and_parameters_stay() -> None:
    model = Model()
    x = torch.randn(B, T, I)
    want, parameters, keys = model(x), list(model.parameters()), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert fastseq.replace(model) is model
    assert [type(m) for m in (model.encoder, model.cell, model.blocks["a"][1])] == [LSTM, LSTMCell, LSTM]
    assert model.again is model.encoder
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert (model(x) - want).abs().max() <= ROUNDING
    before = model.encoder.weight_hh_l0.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model.encoder.weight_hh_l0, before)
    assert [(r.name, r.was) for r in fastseq.replaced(model)] == [
        ("encoder", "torch.nn.LSTM"),
        ("cell", "torch.nn.LSTMCell"),
        ("blocks.a.1", "torch.nn.LSTM"),
    ]
    assert all(r.module is model.get_submodule(r.name) for r in fastseq.replaced(model))
    assert fastseq.replaced(Model()) == [] and [r.name for r in fastseq.replaced(copy.deepcopy(model))][0] == "encoder"


@pytest.mark.parametrize("stock, ours", [(nn.LSTM, LSTM), (nn.LSTMCell, LSTMCell)])
def test_the_model_itself(stock: Any, ours: Any) -> None:
    module = stock(I, H)
    new = fastseq.replace(module)
    assert type(new) is ours and new.weight_ih_l0 is module.weight_ih_l0 if stock is nn.LSTM else True
    assert [r.name for r in fastseq.replaced(new)] == [""]
    assert repr(new) == repr(module) and not hasattr(module, "_replaced")


def test_options_reach_layers_and_cells() -> None:
    model = fastseq.replace(Model(), "binary", noise_probability=1.0, weight_dropout=0.5, recompute=True)
    for module in (model.encoder, model.cell, model.blocks["a"][1]):
        assert (module.gates, module.tau, module.noise_probability) == ("binary", 0.9, 1.0)
    assert model.encoder.weight_dropout == 0.5 and model.encoder.recompute
    x = torch.randn(B, T, I)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    assert (model(x) - Model.forward(model, x)).abs().max() == 0
    assert fastseq.replace(nn.LSTM(I, H), gates="sharpened").tau == 0.2
    assert fastseq.replace(nn.LSTM(I, H), gates="binary", hard_eval=True, tau=0.5).hard_eval


def test_bad_options_change_nothing() -> None:
    model = Model()
    for error, options in (
        (TypeError, {"noise": 1}),
        (TypeError, {"forget_bias": 1.0}),  # would change the parameters
        (ArgumentError, {"gates": "hard"}),
        (ArgumentError, {"gates": "binary", "tau": -1.0}),
        (ArgumentError, {"variational_dropout": 2.0}),
    ):
        with pytest.raises(error, match="unknown option|must be"):
            fastseq.replace(model, **options)
    assert type(model.encoder) is nn.LSTM and type(model.cell) is nn.LSTMCell
    with pytest.raises(TypeError, match="replace: model should be of type nn.Module, got: list"):
        fastseq.replace([model])


def test_hooks_survive() -> None:
    model, seen = nn.Sequential(nn.LSTM(I, H)), []
    stock = model[0]
    handle = stock.register_forward_hook(lambda module, args, out: seen.append(("forward", type(module))))
    stock.register_forward_pre_hook(lambda module, args: seen.append(("before", type(module))))
    stock.register_full_backward_hook(lambda module, grads_in, grads_out: seen.append(("backward", type(module))))
    stock.register_load_state_dict_pre_hook(lambda module, *args: seen.append(("load", type(module))))
    stock.register_load_state_dict_post_hook(lambda module, keys: seen.append(("loaded", type(module))))
    fastseq.replace(model)
    del stock
    x = torch.randn(T, B, I, requires_grad=True)
    model(x)[0].sum().backward()
    assert seen == [("before", LSTM), ("forward", LSTM), ("backward", LSTM)]
    handle.remove()
    model(x)
    model.load_state_dict(model.state_dict())
    assert seen[3:] == [("before", LSTM), ("load", LSTM), ("loaded", LSTM)]


def test_settings_survive() -> None:
    module = nn.LSTM(I, H, 2, dropout=0.5, dtype=torch.float64).eval()
    module.weight_hh_l0.requires_grad_(False)
    module.note = "kept"
    new = fastseq.replace(nn.Sequential(module))[0]
    assert not new.training and new.weight_ih_l0.dtype == torch.float64 and new.note == "kept"
    assert not new.weight_hh_l0.requires_grad and new.dropout == 0.5
    assert fastseq.replace(nn.LSTM(I, H, device="meta")).weight_ih_l0.device.type == "meta"


def test_tied_weights_survive() -> None:
    first, second = nn.LSTM(I, H), nn.LSTM(I, H)
    second.weight_hh_l0 = first.weight_hh_l0
    model = fastseq.replace(nn.ModuleList([first, second]))
    assert model[0].weight_hh_l0 is model[1].weight_hh_l0
    assert len(list(model.parameters())) == 7
    assert model[1]._flat_weights[1] is model[0].weight_hh_l0


@pytest.mark.parametrize("used", [False, True])
def test_parametrizations_survive(used: bool) -> None:
    module = parametrizations.weight_norm(nn.LSTM(I, H), "weight_hh_l0")
    parametrizations.orthogonal(module, "weight_ih_l0")
    x = torch.randn(T, B, I)
    want = module(x)[0]
    new = fastseq.replace(nn.Sequential(module))[0]
    assert isinstance(new, LSTM) and not isinstance(new, nn.LSTM) and parametrize.is_parametrized(new, "weight_hh_l0")
    assert (new(x)[0] - want).abs().max() <= ROUNDING
    assert (copy.deepcopy(new)(x)[0] - want).abs().max() <= ROUNDING
    new(x)[0].sum().backward()
    assert new.parametrizations.weight_hh_l0.original0.grad.any()
    parametrize.remove_parametrizations(new, "weight_hh_l0")
    parametrize.remove_parametrizations(new, "weight_ih_l0")
    assert type(new) is LSTM and (new(x)[0] - want).abs().max() <= ROUNDING


def test_old_weight_norm_survives() -> None:
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(nn.LSTM(I, H), "weight_hh_l0")
    x = torch.randn(T, B, I)
    want = module(x)[0]
    new = fastseq.replace(nn.Sequential(module))[0]
    assert (new(x)[0] - want).abs().max() <= ROUNDING
    with torch.no_grad():
        new.weight_hh_l0_g.zero_()
    assert not torch.equal(new(x)[0], want)  # the hook still computes the weight


class Peephole(nn.LSTM):
    """A user's subclass."""


def test_what_is_left_alone_and_why(caplog: pytest.LogCaptureFixture) -> None:
    patched, compiled = nn.LSTM(I, H), nn.LSTM(I, H)
    patched.forward = lambda x: x  # type: ignore[method-assign,assignment]
    compiled.compile()
    model = nn.ModuleDict(
        {
            "sub": Peephole(I, H),
            "normed": parametrizations.weight_norm(Peephole(I, H), "weight_hh_l0"),
            "patched": patched,
            "compiled": compiled,
            "complex": nn.LSTM(I, H).to(torch.complex64),
            "gru": nn.GRU(I, H),
            "good": nn.LSTM(I, H),
        }
    )
    kept = dict(model.items())
    with caplog.at_level(logging.INFO, "fastseq"):
        fastseq.replace(model)
    assert [k for k, m in model.items() if m is not kept[k]] == ["good"]
    messages = {r.getMessage(): r.levelno for r in caplog.records}
    for words in (
        "replace: sub: left alone, because tests.nn.test_replacement.Peephole is a subclass of LSTM",
        "replace: normed: left alone, because",
        "replace: patched: left alone, because its forward was replaced on the instance",
        "replace: compiled: left alone, because it was compiled in place",
        "replace: complex: left alone, because torch.complex64 is not supported",
    ):
        assert [level for m, level in messages.items() if m.startswith(words)] == [logging.WARNING], words
    assert messages["replace: good: LSTM swapped, gates='sigmoid'"] == logging.INFO
    assert [r.name for r in fastseq.replaced(model)] == ["good"]
    assert len(messages) == 6


def test_a_shared_module_is_swapped_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    shared = nn.LSTM(I, I)
    model = nn.Sequential(nn.Sequential(shared), nn.ModuleList([shared]), shared)
    with caplog.at_level(logging.INFO, "fastseq"):
        fastseq.replace(model)
    assert type(model[2]) is LSTM and model[0][0] is model[1][0] is model[2]
    assert len(caplog.records) == 1 == len(fastseq.replaced(model))


def test_twice_is_once() -> None:
    model = fastseq.replace(Model(), "binary")
    modules = list(model.modules())
    assert list(fastseq.replace(model).modules()) == modules and model.encoder.gates == "binary"

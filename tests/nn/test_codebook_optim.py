"""Parameter groups of models with codebooks, and moments that are forgotten."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseq._check import ArgumentError
from fastseq.nn.codebook_optim import codebook_parameter_groups, codebook_parameters, reset_codebook_moments
from fastseq.nn.vector_quantize import VectorQuantize
from tests.tolerance import assert_same_bits


class Model(nn.Module):
    """Two learnable codebooks, one of them used twice, one by moving averages, and other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 4)
        self.first = VectorQuantize(4, 8, learnable_codebook=True, ema_update=False)
        self.second = VectorQuantize(4, 8, learnable_codebook=True, ema_update=False, codebook_dim=2)
        self.averages = VectorQuantize(4, 8)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.tied = VectorQuantize(4, 8, learnable_codebook=True, ema_update=False)
        self.tied._codebook.embed = self.first._codebook.embed  # counted once

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.encode(x), torch.zeros(())
        for layer in (self.first, self.second, self.averages):
            x, _, loss = layer(x)
            total = total + loss
        return total + x.square().mean()


def names(model: nn.Module, parameters: list[Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is q for q in parameters)}


def test_groups() -> None:
    model = Model()
    codes = {"first._codebook.embed", "second._codebook.embed"}
    assert names(model, list(codebook_parameters(model))) == codes
    rest, books = codebook_parameter_groups(model, 2e-3, weight_decay=0.1)
    assert names(model, books["params"]) == codes and len(books["params"]) == 2
    every = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names(model, rest["params"]) == every - codes
    assert (rest["lr"], books["lr"]) == (2e-3, pytest.approx(2e-2))
    assert rest["weight_decay"] == books["weight_decay"] == 0.1
    assert codebook_parameter_groups(model, 1e-3, multiplier=3)[1]["lr"] == pytest.approx(3e-3)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [1e-3, 1e-2], 10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    ],
)
def test_schedules_keep_the_ratio(schedule: Any) -> None:
    optimizer = torch.optim.Adam(codebook_parameter_groups(Model(), 1e-3))
    schedule = schedule(optimizer)
    start = optimizer.param_groups[0]["lr"]
    for _ in range(5):
        optimizer.step()
        schedule.step()
        rest, books = (g["lr"] for g in optimizer.param_groups)
        assert books == pytest.approx(10 * rest)
    assert rest != start


OPTIMIZERS: dict[str, Any] = {
    "Adam": torch.optim.Adam,
    "AdamW, amsgrad": lambda g: torch.optim.AdamW(g, amsgrad=True),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "Adadelta": torch.optim.Adadelta,
    "RMSprop": lambda g: torch.optim.RMSprop(g, centered=True, momentum=0.9),
    "Rprop": torch.optim.Rprop,
    "SGD": lambda g: torch.optim.SGD(g, momentum=0.9, dampening=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_reset_the_codes_step_as_at_first(name: str) -> None:
    """The next step of the codes is that of a fresh optimizer; other parameters go on as if nothing had happened."""
    model, x = Model(), torch.randn(5, 7, 3)
    optimizer = OPTIMIZERS[name](codebook_parameter_groups(model, 1e-2))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()

    for _ in range(4):
        step(model, optimizer)
    fresh, kept = copy.deepcopy(model), copy.deepcopy(model)
    fresh_optimizer = OPTIMIZERS[name](codebook_parameter_groups(fresh, 1e-2))
    kept_optimizer = OPTIMIZERS[name](codebook_parameter_groups(kept, 1e-2))
    kept_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = model.second._codebook.embed.detach().clone()
    reset_codebook_moments(optimizer, model.first)
    for m, o in ((model, optimizer), (fresh, fresh_optimizer), (kept, kept_optimizer)):
        step(m, o)
    assert_same_bits("reset", model.first._codebook.embed, fresh.first._codebook.embed)
    assert not torch.equal(model.first._codebook.embed, kept.first._codebook.embed)
    assert_same_bits(
        "other book", list(model.second.project_in.parameters()), list(kept.second.project_in.parameters())
    )
    assert_same_bits("second", model.second._codebook.embed, kept.second._codebook.embed)
    assert not torch.equal(before, model.second._codebook.embed)


def test_adam_is_reset_in_place() -> None:
    model = Model()
    optimizer = torch.optim.Adam(codebook_parameter_groups(model, 1e-2))
    model(torch.randn(2, 3, 3)).backward()
    optimizer.step()
    embed = model.first._codebook.embed
    state = dict(optimizer.state[embed])
    reset_codebook_moments(optimizer, model)
    assert {k: v.abs().max().item() for k, v in state.items()} == {"step": 0, "exp_avg": 0, "exp_avg_sq": 0}
    assert all(optimizer.state[embed][k] is v for k, v in state.items())


def test_a_reset_without_state_changes_nothing() -> None:
    model = Model()
    optimizer = torch.optim.Adam(model.encode.parameters())
    reset_codebook_moments(optimizer, model)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (
            VectorQuantize(4, 8),
            {},
            "codebook_parameter_groups: model must be one with a learnable codebook (learnable_codebook=True), got one",
        ),
        (Model(), {"lr": 0.0}, "codebook_parameter_groups: lr must be a finite number > 0, got 0.0"),
        (Model(), {"multiplier": -1}, "codebook_parameter_groups: multiplier must be a finite number > 0, got -1"),
    ],
)
def test_messages(model: nn.Module, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(words)):
        codebook_parameter_groups(model, **{"lr": 1e-3, **options})

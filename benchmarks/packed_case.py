"""What packed weights are measured on: cases, their numbers, and what a provider makes of one."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import Reads

STEPS = 64  # of input that streams are given, over and over
# form -> the options of ``fastseq.compress``, bytes of a number, and what remains of the numbers; None: all floats stay
FORMS: dict[str, tuple[dict[str, Any] | None, float, float]] = {
    "float32": (None, 4, 1),
    "bfloat16": ({"weights": "bfloat16"}, 2, 1),
    "int8": ({"weights": "int8"}, 1, 1),
    "int4": ({"weights": "int4"}, 0.5, 1),
    "int4 by 32": ({"weights": "int4", "group": 32}, 0.5, 1),
    "rank H/8": ({"gates": "ifgo"}, 4, 1 / 4),  # each gate's [H, H] as [H, H/8] by [H/8, H]
    "rank H/8 int8": ({"gates": "ifgo", "weights": "int8"}, 1, 1 / 4),
}


class Case(NamedTuple):
    """A layer of H inputs and H units, T steps of B rows.

    mode: "int8" and "forms" (a call is the whole), "stream" (a call is a step), "cabi" (a step in a program of its own,
    T of them), "load" (a process from its start), "dksplit" (three layers, B names of T letters).
    """

    T: int
    B: int
    H: int
    mode: str

    @property
    def name(self) -> str:
        return f"T{self.T}_B{self.B}_H{self.H}"

    @classmethod
    def parse(cls, name: str, mode: str) -> Case:
        """The case of a name such as T100_B1_H128."""
        found = re.fullmatch(r"T([1-9]\d*)_B([1-9]\d*)_H([1-9]\d*)", name)
        if found is None:
            raise ValueError(f"case must look like T100_B1_H128, got {name}")
        return cls(*map(int, found.groups()), mode)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.T, self.B, self.H

    @property
    def streams(self) -> bool:
        return self.mode in ("stream", "cabi")

    @property
    def numbers(self) -> int:
        """Of one step, which multiply each row's input or state."""
        # dksplit: both directions of three layers, whose inputs are H, then 2*H numbers
        return (2 * 4 * (2 + 3 + 3) if self.mode == "dksplit" else 4 * 2) * self.H**2

    @property
    def flops(self) -> int:
        return 0 if self.mode == "load" else 2 * self.T * self.B * self.numbers


class Provider(NamedTuple):
    """Who computes, and on what: a form of the weights, or a part of the work."""

    name: str
    form: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.form}"


class Work(NamedTuple):
    """What the harness times, and what the gate looks at."""

    run: Callable[[], object]
    outputs: Callable[[], Any]  # y [T, B, H]; words of each name for dksplit
    state: Mapping[str, Any] = MappingProxyType({})  # of ours: the layers and tensors that were deployed


class Inputs(NamedTuple):
    """The same numbers for every provider of a case."""

    x: Tensor  # [T, B, H]; [STEPS, 1, H] where steps come one by one
    stock: nn.LSTM


@functools.lru_cache(maxsize=2)
def inputs(case: Case) -> Inputs:
    """Random input, and weights whose singular values fall as those of trained layers do.

    Dense of the size that keeps pre-activations near one, with the usual 1 as bias of the forget gate.
    """
    generator = torch.Generator().manual_seed(0)
    T, B, H = STEPS if case.streams else case.T, case.B, case.H
    x = torch.randn(T, B, H, generator=generator)
    stock = nn.LSTM(H, H)
    falling = (1 + 16 * torch.arange(H) / H) ** -1.0
    with torch.no_grad():
        for weight in (stock.weight_ih_l0, stock.weight_hh_l0):
            value = torch.randn(4 * H, H, generator=generator) * falling @ torch.randn(H, H, generator=generator)
            weight.copy_(value / value.std() / H**0.5)
        for bias in (stock.bias_ih_l0, stock.bias_hh_l0):
            bias.zero_()
        stock.bias_ih_l0[H : 2 * H] = 1
    return Inputs(x, stock.eval().requires_grad_(False))


@functools.lru_cache(maxsize=2)
def truth(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    """y [T, B, H] by the definition of the LSTM over the weights before they were compressed."""
    from fastseq import reference

    given = inputs(case)
    weights = (getattr(given.stock, f"{name}_l0").to(dtype) for name in ("weight_ih", "weight_hh", "bias_ih"))
    weight_ih, weight_hh, bias = weights
    zeros = torch.zeros(case.B, case.H, dtype=dtype)
    return reference.lstm(given.x.to(dtype) @ weight_ih.mT + bias, weight_hh, zeros, zeros)[0]


def snr(got: Tensor, wanted: Tensor) -> float:
    """Decibels; infinite where nothing differs."""
    noise = (got.double() - wanted.double()).square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / noise)) if noise > 0 else float("inf")


def remaining(form: str) -> float:
    """The share of the numbers of dense matrices that a form has."""
    return FORMS[form][2] if form in FORMS else 1


def reads(case: Case, form: str) -> Reads:
    """Of weights alone: recurrent ones by every step, those of the input once, or with every step that comes alone."""
    number = FORMS[form][1] if form in FORMS else 1
    every = int(case.numbers * remaining(form) * number)
    if case.streams:
        return Reads(every, every)
    if case.mode == "dksplit":
        return Reads(every * (3 * case.T + 5) // 8, every // 16)
    return Reads(every * (case.T + 1) // 2, every // 2)

"""What MIMO is measured on: cases, their numbers, and what a provider makes of one."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = 10  # of the heads of LSTM models
ROWS, LAYERS = ("stats", "nll"), ("project", "train", "infer")


class Case(NamedTuple):
    """Sizes by letter. Modes "stats" and "nll": N rows, M slots, K classes. Modes "project" (a first layer, forward and
    backward), "train" (a step of an LSTM) and "infer" (an LSTM and its heads): T steps of B examples, M slots, each
    example R times, C channels, H units."""

    sizes: tuple[tuple[str, int], ...]
    mode: str
    device: str = "cpu"

    @property
    def name(self) -> str:
        return "_".join(f"{letter}{value}" for letter, value in self.sizes)

    def __getattr__(self, letter: str) -> int:
        for name, value in self.sizes:
            if name == letter:
                return value
        raise AttributeError(letter)

    @classmethod
    def parse(cls, name: str, mode: str) -> Case:
        """The case of a name such as N512_M4_K100 or T50_B32_M3_R4_C300_H256."""
        letters = "NMK" if mode in ROWS else "TBMRCH"
        found = re.fullmatch("_".join(rf"{letter}([1-9]\d*)" for letter in letters), name)
        if found is None:
            example = "N512_M4_K100" if mode in ROWS else "T50_B32_M3_R4_C300_H256"
            raise ValueError(f"case must look like {example}, got {name}")
        return cls(tuple(zip(letters, map(int, found.groups()), strict=True)), mode)

    @property
    def rows(self) -> int:
        return self.B if self.mode == "infer" else self.B * self.R

    @property
    def flops(self) -> int:
        """Multiply-adds twice, of what has to be done: a folded or projected first layer. None are counted in rows."""
        if self.mode in ROWS:
            return 0
        first = 2 * self.T * self.B * 4 * self.H * self.C * (1 if self.mode == "infer" else self.M)
        if self.mode == "project":
            return 2 * first
        recurrent = 2 * self.T * self.rows * 4 * self.H * self.H
        return first + recurrent if self.mode == "infer" else 2 * first + 3 * recurrent

    @property
    def step_ratio(self) -> float:
        """Operations of a step with M*C channels over those of one with C, on the same rows; no gradient of x."""
        return (2 * self.M * self.C + 3 * self.H) / (2 * self.C + 3 * self.H)


class Provider(NamedTuple):
    """Who computes."""

    name: str

    @property
    def label(self) -> str:
        return self.name


class Work(NamedTuple):
    """What the harness times, and what the gate looks at."""

    run: Callable[[], object]
    outputs: Callable[[], Mapping[str, Tensor]]


class Inputs(NamedTuple):
    """The same numbers for every provider of a case, on its device; by mode."""

    x: Tensor  # logits [N, M, K], or [T, B, C]
    labels: Tensor  # [N] for "stats", [N, M] for "nll"
    index: Tensor  # int32 [M, rows]
    weights: Mapping[str, Tensor]  # of the wide LSTM and its heads
    dy: Tensor  # upstream gradient [T, rows, 4*H] of "project", [T, rows, H] of "train"


@functools.lru_cache(maxsize=2)
def inputs(case: Case) -> Inputs:
    from fastseq import functional

    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(case.device)

    none = torch.empty(0)
    if case.mode in ROWS:
        size = (case.N,) if case.mode == "stats" else (case.N, case.M)
        labels = torch.randint(case.K, size, generator=generator).to(case.device)
        return Inputs(2 * draw(case.N, case.M, case.K), labels, none, {}, none)
    T, B, M, C, H = case.T, case.B, case.M, case.C, case.H
    index = functional.mimo_index(B, M, case.R, generator=generator).to(case.device)
    sizes = {"weight_ih": (4 * H, M * C), "weight_hh": (4 * H, H), "bias": (4 * H,), "head": (M * CLASSES, H)}
    weights = {name: draw(*size) * (size[-1] ** -0.5) for name, size in sizes.items()}
    return Inputs(draw(T, B, C), none, index, weights, draw(T, case.rows, 4 * H if case.mode == "project" else H))

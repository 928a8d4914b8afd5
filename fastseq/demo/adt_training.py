"""One small LSTM trained on the rows of digits three ways, and how much of what it says withstands perturbations."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.demo.mimo_digits import Digits
from fastseq.demo.mimo_training import RowLSTM
from fastseq.demo.seeds import that_fit
from fastseq.recipes import ADT, Threat, attacks

STANDARD, PGD, OURS = "plain training", "PGD training", "ADT"
KINDS = (STANDARD, PGD, OURS)

Report = Callable[[float, str], None]  # fraction done, remark


@dataclass(frozen=True)
class Setting:
    """H: units. eps: of the training, reached half-way. radii: of the attacks. images: of the test, attacked."""

    H: int = 64
    steps: int = 200
    batch: int = 64
    rate: float = 1e-2
    eps: float = 0.1
    radii: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2)
    images: int = 250


@dataclass(frozen=True)
class Run:
    """withstood: share of test images that stay right, by radius. seconds: of a training step, on average."""

    kind: str
    seed: int
    withstood: Sequence[float]
    seconds: float
    model: nn.Module


def train(kind: str, seed: int, setting: Setting, data: Digits) -> Run:
    """One training, and the two attacks that it has not seen: twenty steps of PGD on the margin, and MIM."""
    torch.manual_seed(seed)
    s, model, order = setting, RowLSTM(setting.H), torch.Generator().manual_seed(seed)
    threat = Threat(s.eps, clamp=(0.0, 1.0))
    adt = ADT(model, s.eps, clamp=(0.0, 1.0), seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), s.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.rate, total_steps=s.steps)
    begin = time.perf_counter()
    for step in range(s.steps):
        which = torch.randperm(len(data.training.x), generator=order)[: s.batch]
        x, labels = data.training.x[which], data.training.labels[which]
        now = dataclasses.replace(threat, eps=s.eps * min(1.0, 2 * (step + 1) / s.steps))
        if kind == OURS:
            adt.threat = now
            loss = adt(x, labels)
        else:
            if kind == PGD:
                x = attacks.pgd(model, x, labels, now, steps=7, seed=seed * s.steps + step)
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = (time.perf_counter() - begin) / s.steps
    x, labels = data.test.x[: s.images], data.test.labels[: s.images]
    return Run(kind, seed, [_share(model.eval(), x, labels, radius) for radius in s.radii], seconds, model)


def _share(model: nn.Module, x: Tensor, labels: Tensor, radius: float) -> float:
    versions = [x]
    if radius > 0:
        threat = Threat(radius, clamp=(0.0, 1.0))
        versions += [attacks.cw(model, x, labels, threat, steps=20), attacks.mim(model, x, labels, threat)]
    return float(attacks.withstood(model, labels, versions).double().mean())


def train_all(seeds: Sequence[int], setting: Setting, data: Digits, seconds: float, report: Report) -> list[Run]:
    """Every kind for as many of the seeds as fit into the time, at least for one."""
    runs = list[Run]()
    for done, seed in that_fit(seeds, seconds, report):
        for j, kind in enumerate(KINDS):
            report(done + j / len(KINDS) / len(seeds), f"seed {seed}, {kind}")
            runs.append(train(kind, seed, setting, data))
    return runs

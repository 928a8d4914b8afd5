"""Milliseconds per training step of one autoencoder: ours, vector-quantize-pytorch's and no quantizer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

import fastseq.nn
from fastseq.demo import vq_autoencoder
from fastseq.demo.race import time_in_turns
from fastseq.demo.vq_photographs import Patches, Photographs
from fastseq.demo.vq_training import Kind, Report, Setting, autoencoder, train_step

OURS, THEIRS, NONE = "fastseq", "vector-quantize-pytorch", "no quantizer"
_RIVAL = "vector_quantize_pytorch"


def rival() -> str | None:
    """The version of vector-quantize-pytorch, or None where it is not installed."""
    return version("vector-quantize-pytorch") if find_spec(_RIVAL) else None


@dataclass(frozen=True)
class Timed:
    """Milliseconds of training steps taken in turns, and whether both quantizers did the same.

    Args:
        equal: share of patches to which both gave the same code, from the same weights; None without a rival.
    """

    recipe: str
    K: int
    milliseconds: dict[str, list[float]]
    equal: float | None

    def ratio(self) -> tuple[float, float, float]:
        """Their time over ours within a turn: median, and 20 % and 80 % quantiles over the turns."""
        ratios = np.divide(self.milliseconds[THEIRS], self.milliseconds[OURS])
        middle, low, high = np.quantile(ratios, (0.5, 0.2, 0.8))
        return float(middle), float(low), float(high)


def time_all(
    kinds: Sequence[Kind], seed: int, setting: Setting, photographs: Photographs, seconds: float, report: Report
) -> list[Timed]:
    """Time plain quantizers.

    Args:
        seconds: for all together.
    """
    found = []
    for k, (recipe, K) in enumerate(kinds):

        def part(done: float, _: str, k: int = k) -> None:
            report((k + done) / len(kinds), f"K {kinds[k][1]}, {kinds[k][0]}")

        found.append(_time(recipe, K, seed, setting, photographs, seconds / len(kinds), part))
    return found


def _time(
    recipe: str, K: int, seed: int, setting: Setting, photographs: Photographs, seconds: float, report: Report
) -> Timed:
    options = vq_autoencoder.options(recipe)
    made: dict[str, Callable[[], nn.Module] | None] = {
        OURS: lambda: fastseq.nn.VectorQuantize(setting.D, K, **options),
        NONE: None,
    }
    if rival():
        theirs: Any = importlib.import_module(_RIVAL).VectorQuantize
        made[THEIRS] = lambda: theirs(setting.D, K, **options)
    models = {name: autoencoder(setting, seed, make) for name, make in made.items()}
    batch = next(Patches(photographs.training, setting.side, setting.N, seed))
    equal = None
    if THEIRS in models:
        models[THEIRS].load_state_dict(models[OURS].state_dict())
        codes = [models[name].eval()(batch)[1] for name in (OURS, THEIRS)]
        equal = (codes[0] == codes[1]).double().mean().item()
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        adam = torch.optim.Adam(model.train().parameters(), lr=setting.rate)
        calls[name] = lambda model=model, adam=adam: train_step(model, adam, batch)  # type: ignore[misc]
    return Timed(recipe, K, time_in_turns(calls, seconds, report), equal)

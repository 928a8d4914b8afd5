"""The character model of the demo, on the help that CPython ships."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq.nn
from benchmarks.quality_case import KINDS, Kind, Task
from fastseq.demo.character_model import CharacterModel, chunks, corpus
from fastseq.demo.race import Chunk, bits_per_character, forward

T, B, E, H = 100, 8, 128, 256


def masked(model: nn.Module) -> bool:
    """Whether the LSTM is ours, which takes the mask that restarts the state; see ``fastseq.demo.race``."""
    return isinstance(model.lstm, fastseq.nn.LSTM)


def loss(model: nn.Module, batch: Chunk, state: Any) -> tuple[Tensor, Any]:
    logits, state = forward(model, batch, state, masked(model))  # type: ignore[arg-type]
    return F.cross_entropy(logits.flatten(0, 1), batch[0][1:].flatten()), tuple(part.detach() for part in state)


def task() -> Task:
    """Stock gates are those of ``torch.nn.LSTM`` itself."""
    data = corpus()
    held_out = chunks(data.held_out, T, B)
    per_epoch = len(chunks(data.training, T, B))

    def build(kind: Kind) -> nn.Module:
        lstm = nn.LSTM(E, H) if kind.gates == "sigmoid" else fastseq.nn.LSTM(E, H, **kind.options)
        return CharacterModel(lstm, len(data.alphabet))

    @functools.lru_cache(2)
    def epoch(number: int, seed: int) -> list[Chunk]:
        order = torch.randperm(len(data.training), generator=torch.Generator().manual_seed(1000 * seed + number))
        return chunks([data.training[k] for k in order.tolist()], T, B)

    return Task(
        name="characters",
        metric="bits per character",
        kinds=tuple(KINDS),
        seeds=3,
        steps=2000,
        peak=6e-3,
        clip=1.0,
        ranks=(64, 32, 16),
        sizes={"T": T, "B": B, "E": E, "H": H, "symbols": len(data.alphabet), "epoch": per_epoch},
        build=build,
        batch=lambda step, seed: epoch(step // per_epoch, seed)[step % per_epoch],
        loss=loss,
        evaluate=lambda model: {"test": bits_per_character(model, held_out, masked(model))},  # type: ignore[arg-type]
    )

"""Trained models, compressed and with hard gates, and the rows that tell what is left of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
import fastseq.nn
from benchmarks.quality_case import Kind, Task, Trained
from fastseq.compression import recurrent

AS_TRAINED, HARD = "as trained", "hard gates"
EDGE = 0.1  # gates below it are near 0, above one less it near 1

Way = dict[str, Any]  # options of fastseq.compress


def ways(ranks: tuple[int, ...]) -> dict[str, Way | None]:
    """How, in words -> options of ``fastseq.compress``; None where nothing is compressed."""
    return {
        AS_TRAINED: None,
        HARD: None,
        "i, f to 0.2": {"step": 0.2},
        "i, f to 0.2, clip 0.4": {"step": 0.2, "clip": 0.4},
        "int8": {"weights": "int8"},
        "int4 by 32": {"weights": "int4", "group": 32},
        **{f"i, f rank {rank}": {"rank": rank} for rank in ranks},
        **{f"all gates rank {rank}": {"rank": rank, "gates": "ifgo"} for rank in ranks},
    }


def twin(lstm: nn.Module, **options: Any) -> fastseq.nn.LSTM:
    """Ours with the weights of an LSTM that has neither projection nor a second direction, at evaluation."""
    sizes: dict[str, Any] = {name: getattr(lstm, name) for name in ("input_size", "hidden_size", "num_layers")}
    found = fastseq.nn.LSTM(**sizes, **options)
    found.load_state_dict(lstm.state_dict())
    return found.eval()


def hardened(model: nn.Module) -> nn.Module:
    """A copy in which i and f are 1 where their pre-activation is positive, else 0."""
    found = copy.deepcopy(model)
    for name, lstm in recurrent(found).items():
        parent, _, own = name.rpartition(".")
        setattr(found.get_submodule(parent), own, twin(lstm, gates="binary", hard_eval=True))
    return found


def near(values: Tensor) -> list[float]:
    """Share of gates below EDGE, and above 1 - EDGE."""
    return [round(float(flags.double().mean()), 4) for flags in (values < EDGE, values > 1 - EDGE)]


@torch.no_grad()
def gate_shares(task: Task, model: nn.Module) -> dict[str, list[float]]:
    """``near`` of i and f over the evaluated text and all layers, each layer counting alike."""
    shares: dict[str, list[list[float]]] = {"i": [], "f": []}

    def look(lstm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ours = lstm if isinstance(lstm, fastseq.nn.LSTM) else twin(lstm)
        for gates in ours.forward(*args, **kwargs, return_gates=True)[2]:
            shares["i"].append(near(gates.i))
            shares["f"].append(near(gates.f))

    handles = [lstm.register_forward_pre_hook(look, with_kwargs=True) for lstm in recurrent(model).values()]
    try:
        task.evaluate(model)
    finally:
        for handle in handles:
            handle.remove()
    return {gate: [round(sum(v) / len(v), 4) for v in zip(*found, strict=True)] for gate, found in shares.items()}


def rows(
    task: Task, kind: Kind, seed: int, steps: int, trained: Trained, known: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One row per way that is not in ``known``, way -> row, each as it is there."""
    head = {
        "task": task.name,
        "model": kind.name,
        **kind.options,
        "last_tau": kind.last_tau,
        "seed": seed,
        "steps": steps,
        "minutes": round(trained.seconds / 60, 1),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        **task.sizes,
        "metric": task.metric,
    }
    whole = known[AS_TRAINED]["test"] if AS_TRAINED in known else None
    for way, options in ways(task.ranks).items():
        if way in known:
            continue
        found: dict[str, Any] = {}
        model = hardened(trained.model) if way == HARD else trained.model
        if options is not None:
            model, report = fastseq.compress(model, **options)
            found = {"bytes_before": report.bytes_before, "bytes_after": report.bytes_after}
        found = {**task.evaluate(model), **found}
        if way == AS_TRAINED:
            whole = found["test"]
            found["near"] = gate_shares(task, model)
        yield {**head, "way": way, **found, "cost": found["test"] - (whole or 0.0)}

"""The trained model as files that run without torch: how large they are, how well and how fast they predict."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import fastseq
from fastseq import deploy
from fastseq.demo.character_model import CharacterModel
from fastseq.demo.race import Chunk
from fastseq.demo.report import Section, Table, Text

ORDER = ["embedding", "lstm", "decoder"]
# how, in words: options of fastseq.compress
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"weights": "int8"},
    "int4 by 32": {"weights": "int4", "group": 32},
}
CHARACTERS = 400  # of one stream, in a timing


def section(model: CharacterModel, held_out: Sequence[Chunk], report: Callable[[float, str], None]) -> Section:
    """A row for each way to keep the LSTM's matrices, and one for torch."""
    text = held_out[0][0][:, 0].to(torch.int32)
    rows = [("torch, as trained", "", "", f"{_microseconds(_by_torch(model), text):.0f}")]
    with tempfile.TemporaryDirectory() as folder:
        for n, (way, options) in enumerate(WAYS.items()):
            report(n / len(WAYS), way)
            small = fastseq.compress(model, **options).model if options else model
            path = Path(folder) / "model.fastseq"
            deploy.save(fastseq.export_state(small, ORDER), path)
            found = deploy.Model.load(str(path))
            bits, took = _bits_per_character(found, held_out), _microseconds(found.stream().step, text)
            rows.append((f"fastseq.deploy, {way}", f"{path.stat().st_size / 1e3:.0f}", f"{bits:.3f}", f"{took:.1f}"))
    report(1.0, "")
    head = ("runtime, matrices of the LSTM", "file, kB", "bits per character", "µs per character")
    caption = (
        "Held-out text. Time: median over one text that is read character by character, from Python, one thread. "
        "Embedding and output layer stay in float32."
    )
    story = (
        "fastseq.export_state and fastseq.deploy.save write the binary model as one file; a process that has numpy and "
        "no torch loads it and reads text as it comes."
    )
    return Section("The same model without torch", [Text(story), Table(head, rows, caption)])


def _bits_per_character(model: deploy.Model, held_out: Sequence[Chunk]) -> float:
    """As ``race.bits_per_character``."""
    total, count, state = 0.0, 0, None
    for text, begins in held_out:
        if state is not None:
            state = state * ~begins.numpy()[:, None]
        logits, state = model.run(text[:-1].to(torch.int32).numpy(), state=state)
        total += F.cross_entropy(torch.from_numpy(logits).flatten(0, 1), text[1:].flatten(), reduction="sum").item()
        count += text[1:].numel()
    return float(total / count / np.log(2))


@torch.no_grad()
def _microseconds(step: Callable[[Any], Any], text: torch.Tensor) -> float:
    """Median time of a step, character by character."""
    characters, taken = [np.array(character) for character in text.numpy()], []
    for n in range(CHARACTERS):
        x = characters[n % len(characters)]
        begin = time.perf_counter()
        step(x)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1e6


def _by_torch(model: CharacterModel) -> Callable[[Any], Any]:
    state = None

    def step(x: Any) -> Any:
        nonlocal state
        logits, state = model(torch.from_numpy(x).view(1, 1), state)
        return logits

    return step

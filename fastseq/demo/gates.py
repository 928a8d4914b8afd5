"""What the gates of a trained LSTM do: how often they are near 0 and 1, and over a sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastseq import functional
from fastseq.demo.character_model import CharacterModel, Corpus, State
from fastseq.functional import Gates

BINS = 10


def weights_of(lstm: nn.Module) -> list[functional.Weights]:
    """The parameters of a one-directional ``nn.LSTM`` or ``fastseq.nn.LSTM`` without projection, layer by layer."""
    names = ("weight_ih_l{}", "weight_hh_l{}", "bias_ih_l{}", "bias_hh_l{}")
    return [
        functional.Weights(*(getattr(lstm, name.format(layer)) for name in names))
        for layer in range(int(lstm.num_layers))  # type: ignore[arg-type]
    ]


@torch.no_grad()
def gates_of(
    model: CharacterModel, text: Tensor, state: State | None = None, noise: tuple[float, float] | None = None
) -> tuple[Gates, State]:
    """Input and forget gates of the top layer, of whichever kind of LSTM, and the state after the text.

    Args:
        text: [T, B]. noise: tau and noise_probability of training noise to put on the gates; None means evaluation.
    """
    seed = None if noise is None else functional.draw_seed()
    tau, probability = noise or (1.0, 0.0)
    x, weights = model.embedding(text), weights_of(model.lstm)
    result = functional.lstm(x, weights, state, seed=seed, noise_probability=probability, tau=tau, return_gates=True)
    return result.gates[-1], (result.h_n, result.c_n)


def shares(gate: Tensor) -> list[float]:
    """Share of values in each of ten equal bins of [0, 1]."""
    counts = torch.histc(gate.float(), bins=BINS, min=0.0, max=1.0)
    return [float(v) for v in counts / counts.sum()]


def sentence(corpus: Corpus) -> tuple[Tensor, Tensor]:
    """A sentence of the held-out text with what stands before it in its topic: context [N] and sentence [S].

    The first that stands on one line and is 60 to 90 characters long; else the end of the longest topic.
    """
    texts = sorted(map(corpus.decode, corpus.held_out), key=len, reverse=True)
    for text in texts:
        found = re.search(r"(?:^|(?<=\. )|(?<=\n))[A-Z][a-z]+ [^.\n]{52,82}\.(?= |\n)", text[100:])
        if found:
            return corpus.encode(text[: 100 + found.start()]), corpus.encode(found.group())
    return corpus.encode(texts[0][:-80]), corpus.encode(texts[0][-80:])


def liveliest(gate: Tensor, n: int) -> Tensor:
    """Rows [n, T] of the units whose gate [T, H] changes most over the steps, the most changing first."""
    order = gate.var(0).argsort(descending=True)[:n]
    return gate[:, order].T


def visible(characters: Sequence[str]) -> list[str]:
    """Characters as labels: spaces and line ends get a sign."""
    return [{" ": "·", "\n": "⏎"}.get(character, character) for character in characters]

"""A word model in the manner of AWD-LSTM (Merity et al., ICLR 2018), on the King James Bible.

As there: the last LSTM is as wide as the embedding, which is also the softmax; DropConnect on the recurrent matrices;
one dropout mask per sequence between layers; whole words dropped from the embedding. Not as there, to fit a few
minutes: two LSTMs, narrower; less dropout; Adam with a falling rate in place of averaged SGD; sequences of equal
length, and no penalty on activations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq.nn
from benchmarks.quality_case import Kind, Task
from benchmarks.quality_corpus import corpus

T, B, E, H = 35, 20, 300, 600
EVALUATED_T, EVALUATED_B = 70, 10
WEIGHT, WORD, INPUT, BETWEEN, OUTPUT = 0.3, 0.05, 0.2, 0.2, 0.3  # dropout; in the paper 0.5, 0.1, 0.65, 0.3, 0.4
SPREAD = 0.1  # of the embedding at first

States = list[tuple[Tensor, Tensor]]


def locked(x: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout of x [T, B, H] with the same mask at every step."""
    return x * F.dropout(torch.ones_like(x[0]), probability, training)


class WordModel(nn.Module):
    """Embedding, two LSTMs, and the embedding again as softmax over K words."""

    def __init__(self, K: int, kind: Kind) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(K, E).uniform_(-SPREAD, SPREAD))
        self.bias = nn.Parameter(torch.zeros(K))
        sizes = ((E, H), (H, E))
        self.layers = nn.ModuleList(fastseq.nn.LSTM(*s, weight_dropout=WEIGHT, **kind.options) for s in sizes)

    def forward(self, text: Tensor, state: States | None = None) -> tuple[Tensor, States]:
        """Logits [T, B, K] of the next word, for text [T, B], and the state after it."""
        mask = F.dropout(torch.ones(len(self.embedding), 1), WORD, self.training)
        x = locked(F.embedding(text, self.embedding * mask), INPUT, self.training)
        after = []
        for n, (layer, dropout) in enumerate(zip(self.layers, (BETWEEN, OUTPUT), strict=True)):
            x, last = layer(x, None if state is None else state[n])
            x = locked(x, dropout, self.training)
            after.append(last)
        return F.linear(x, self.embedding, self.bias), after


def batches(text: Tensor, T: int, B: int) -> list[Tensor]:
    """[T+1, B] each; B rows through the text, which go on from one to the next. What is left over stays out."""
    n = (len(text) - 1) // (B * T)
    starts = torch.arange(B) * n * T
    return [text[starts[None, :] + torch.arange(k * T, (k + 1) * T + 1)[:, None]] for k in range(n)]


def loss(model: nn.Module, text: Tensor, state: Any) -> tuple[Tensor, Any]:
    logits, after = model(text[:-1], state)
    detached = [(h.detach(), c.detach()) for h, c in after]
    return F.cross_entropy(logits.flatten(0, 1), text[1:].flatten()), detached


@torch.no_grad()
def perplexity(model: nn.Module, parts: list[Tensor]) -> float:
    """Of a word given all before it in its row."""
    total, state = 0.0, None
    for text in parts:
        found, state = loss(model, text, state)
        total += found.item()
    return math.exp(total / len(parts))


def task() -> Task:
    """Stock gates are sigmoids of our LSTM: that of torch has no dropout of weights."""
    data = corpus()
    training = batches(data.training, T, B)
    held_out = {
        "valid": batches(data.validation, EVALUATED_T, EVALUATED_B),
        "test": batches(data.test, EVALUATED_T, EVALUATED_B),
    }
    words = {"training": len(data.training), "validation": len(data.validation), "tested": len(data.test)}
    dropouts = {"weight": WEIGHT, "word": WORD, "input": INPUT, "between": BETWEEN, "output": OUTPUT}
    sizes = {"T": T, "B": B, "E": E, "H": H, "symbols": len(data.vocabulary), "epoch": len(training)}
    return Task(
        name="words",
        metric="perplexity",
        kinds=("binary", "stock", "sharpened"),
        seeds=1,
        steps=6000,
        peak=2e-3,
        clip=1.0,
        ranks=(128, 64, 32),
        sizes={**sizes, "words": words, "dropout": dropouts},
        build=lambda kind: WordModel(len(data.vocabulary), kind),
        batch=lambda step, seed: training[step % len(training)],
        loss=loss,
        evaluate=lambda model: {name: perplexity(model, parts) for name, parts in held_out.items()},
    )

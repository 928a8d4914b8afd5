"""A language model of characters: Python's own help texts, binary gates, then int8 and a sample without torch.

python examples/language_model.py [--quick]
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq


class Model(nn.Module):
    """Logits of the next character."""

    def __init__(self, symbols: int, H: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 32)
        self.lstm = fastseq.nn.LSTM(32, H, gates="binary", forget_bias=1.0)
        self.head = nn.Linear(H, symbols)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(self.embedding(x), state)
        return self.head(y), state


def train(model: Model, text: Tensor, steps: int, T: int = 64, B: int = 16) -> None:
    """B places of the text at once, each read on from step to step with the state that it had."""
    lines = text[: len(text) // B * B].view(B, -1).T  # [time, B]
    optimizer, state = torch.optim.Adam(model.parameters(), lr=0.01), None
    for step in range(steps):
        at = step * T % (len(lines) - T - 1)
        logits, (h, c) = model(lines[at : at + T], state)
        state = h.detach(), c.detach()
        loss = F.cross_entropy(logits.flatten(0, 1), lines[at + 1 : at + T + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def bits(model: Model, text: Tensor) -> float:
    """Per character of a text that was not trained on."""
    logits, _ = model.eval()(text[:-1, None])
    return F.cross_entropy(logits[:, 0], text[1:]).item() / math.log(2)


def sample(path: str, alphabet: str, start: str, length: int) -> str:
    """Goes on from ``start``, with numpy alone."""
    stream = fastseq.deploy.Model.load(path).stream()
    rng, said = np.random.default_rng(0), start
    for n in range(len(start) + length - 1):
        logits = stream.step(np.array([alphabet.index(said[n])], np.int32)).ravel()
        if n + 1 >= len(start):
            odds = np.exp((logits - logits.max()) / 0.7)
            said += alphabet[rng.choice(len(odds), p=odds / odds.sum())]
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    quick = parser.parse_args().quick
    torch.manual_seed(0)

    words = "\n".join(pydoc_data.topics.topics.values())
    alphabet = "".join(sorted(set(words)))
    text = torch.tensor([alphabet.index(letter) for letter in words[: 60_000 if quick else None]])
    model = Model(len(alphabet), 64 if quick else 256)
    train(model, text[:-5000], 60 if quick else 2000)
    print(f"{len(text):,} characters of {len(alphabet)} kinds; {bits(model, text[-5000:]):.2f} bits each, held out")

    small = fastseq.compress(model, "int8").model
    print(f"with int8 weights {bits(small, text[-5000:]):.2f}")
    fastseq.deploy.save(fastseq.export_state(small, ["embedding", "lstm", "head"]), "language_model.fastseq")
    print(sample("language_model.fastseq", alphabet, "The ", 60 if quick else 400))


if __name__ == "__main__":
    main()

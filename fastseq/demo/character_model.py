"""Characters of the text that every CPython ships, and the language model that learns them."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Corpus:
    """Topics as character numbers. ``training`` and ``held_out`` share no paragraph."""

    alphabet: str
    training: list[Tensor]
    held_out: list[Tensor]
    shipped: int  # characters before repeated paragraphs were dropped

    def encode(self, text: str) -> Tensor:
        """[len(text)] int64; characters outside the alphabet raise ``ValueError``."""
        return torch.tensor([self.alphabet.index(character) for character in text], dtype=torch.int64)

    def decode(self, numbers: Tensor) -> str:
        """The text of a 1-d tensor of character numbers."""
        return "".join(self.alphabet[k] for k in numbers.tolist())


def corpus(held_out_share: float = 0.08) -> Corpus:
    """The help topics in ``pydoc_data.topics``: about 465 KB of English in current versions of CPython.

    A paragraph that stands under several topics is kept under the first only. Held out is every fifth topic in
    alphabetical order, of those of middle length, until the share is reached.

    Args:
        held_out_share: of all characters, in (0, 1).
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    seen: set[str] = set()
    texts = []
    for name in sorted(topics):
        kept = []
        for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n")):
            if paragraph.strip() not in seen:
                kept.append(paragraph)
                seen.add(paragraph.strip())
        texts.append("\n\n".join(kept) + "\n")
    total = sum(map(len, texts))
    alphabet = "".join(sorted(set("".join(texts))))
    middle = [k for k, text in enumerate(texts) if 1000 <= len(text) <= 0.04 * total]
    held: set[int] = set()
    for k in middle[::5] + middle:
        if sum(len(texts[n]) for n in held) < held_out_share * total:
            held.add(k)
    whole = Corpus(alphabet, [], [], sum(map(len, topics.values())))
    for k, text in enumerate(texts):
        (whole.held_out if k in held else whole.training).append(whole.encode(text))
    return whole


class Batches:
    """Endless training batches in which topics follow each other and only begin at the start of a chunk.

    Stock ``nn.LSTM`` can restart its state only between two calls, so each topic is cut to whole chunks of T: every
    model then sees the same text and the same restarts.

    Args:
        topics: character numbers. T: steps per chunk. B: rows. seed: of the order of the topics.
    """

    def __init__(self, topics: list[Tensor], T: int, B: int, seed: int) -> None:
        self.topics, self.T, self.B = topics, T, B
        self.generator = torch.Generator().manual_seed(seed)
        self.queue: list[tuple[Tensor, Tensor]] = []

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Characters [T+1, B] and, per row, whether a topic begins [B]."""
        if not self.queue:
            order = torch.randperm(len(self.topics), generator=self.generator).tolist()
            self.queue = list(reversed(chunks([self.topics[k] for k in order], self.T, self.B)))
        return self.queue.pop()


def chunks(topics: list[Tensor], T: int, B: int) -> list[tuple[Tensor, Tensor]]:
    """One pass over ``topics``: characters [T+1, B] and begin flags [B] of each chunk, rows going on in the next."""
    pieces, begins = [], []
    for topic in topics:
        for k in range((len(topic) - 1) // T):
            pieces.append(topic[k * T : (k + 1) * T + 1])
            begins.append(k == 0)
    if len(pieces) < B:
        raise ValueError(f"chunks: the topics must give at least B = {B} chunks of T = {T}, got {len(pieces)}")
    n = len(pieces) // B
    text = torch.stack(pieces[: n * B]).view(B, n, T + 1)
    begin = torch.tensor(begins[: n * B]).view(B, n)
    begin[:, 0] = True  # the row before it in time was another place in the text
    return [(text[:, k].T.contiguous(), begin[:, k].contiguous()) for k in range(n)]


class CharacterModel(nn.Module):
    """Embedding, a given LSTM, and a linear layer to the alphabet.

    Args:
        lstm: any module with ``nn.LSTM``'s attributes and call. K: size of the alphabet.
    """

    def __init__(self, lstm: nn.Module, K: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(K, int(lstm.input_size))  # type: ignore[arg-type]
        self.lstm = lstm
        self.decoder = nn.Linear(int(lstm.hidden_size), K)  # type: ignore[arg-type]

    def forward(self, text: Tensor, state: State | None = None, **options: Tensor) -> tuple[Tensor, State]:
        """Logits of the next character.

        Args:
            text: [T, B]. state: of the LSTM. options: for the LSTM, such as ``reset``.

        Returns:
            [T, B, K] and the state to go on with.
        """
        h, state = self.lstm(self.embedding(text), state, **options)
        return self.decoder(h), state

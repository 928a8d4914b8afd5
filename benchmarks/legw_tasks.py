"""Real data and small models for LEGW: images as rows, characters, and images with LARS."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

T = 50  # characters of a window
IMAGES, WINDOWS = 3584, 16384  # of an epoch: multiples of the largest batch


class Data(NamedTuple):
    x: Tensor
    labels: Tensor


class Splits(NamedTuple):
    training: Data
    held_out: Data  # only for the rate
    test: Data


class Task(NamedTuple):
    """A data set, its network, and what was settled for ``base_batch``.

    Args:
        figure: what is reported, from logits and labels; its unit is in its name.
        rates: among which the one with the least loss on held-out examples is taken. schedule: more arguments of LEGW.
        clip: of the gradient's norm, or None. optimizer: from parameters and rate.
    """

    name: str
    load: Callable[[], Splits]
    network: Callable[[], nn.Module]
    unit: str
    figure: Callable[[Tensor, Tensor], float]
    base_batch: int
    base_warmup_epochs: float
    epochs: int
    rates: tuple[float, ...]
    schedule: dict[str, Any]
    clip: float | None
    optimizer: Callable[[Any, float], torch.optim.Optimizer]


class RowLSTM(nn.Module):
    """Rows of 28 pixels, each projected to 128, into an LSTM of 128 units; logits from its last state."""

    def __init__(self) -> None:
        from fastseq.nn import LSTM

        super().__init__()
        self.input, self.lstm, self.head = nn.Linear(28, 128), LSTM(128, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.input(x))[0][:, -1])


class Characters(nn.Module):
    """Logits of the next character, [B, symbols, T]."""

    def __init__(self, symbols: int) -> None:
        from fastseq.nn import LSTM

        super().__init__()
        self.embedding, self.lstm = nn.Embedding(symbols, 32), LSTM(32, 64, batch_first=True)
        self.head = nn.Linear(64, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0]).mT


@functools.cache
def _rows() -> Splits:
    from benchmarks.mimo_tasks import TASKS as MIMO

    found = MIMO["mnist rows"].load()
    training, held_out, test = (Data(*part[:2]) for part in found[:3])
    return Splits(Data(*(v[:IMAGES] for v in training)), held_out, test)


def _images() -> Splits:
    return Splits(*(part._replace(x=part.x[:, None]) for part in _rows()))


@functools.cache
def _text() -> tuple[Tensor, int]:
    """Windows [N, T + 1] of the King James Bible, in a fixed random order, and how many symbols there are."""
    from benchmarks import quality_corpus

    quality_corpus.fetch()
    text = quality_corpus.decoded(quality_corpus.DATA.read_bytes())
    number = {symbol: k for k, symbol in enumerate(sorted(set(text)))}
    symbols = torch.tensor([number[symbol] for symbol in text])
    windows = symbols[: len(symbols) // (T + 1) * (T + 1)].view(-1, T + 1)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))], len(number)


def _characters() -> Splits:
    windows, _ = _text()
    ends = (0, WINDOWS, WINDOWS + 1024, WINDOWS + 2048)
    parts = (windows[begin:end] for begin, end in zip(ends[:-1], ends[1:], strict=True))
    return Splits(*(Data(part[:, :-1], part[:, 1:]) for part in parts))


def _cnn() -> nn.Module:
    from benchmarks.mimo_tasks import network

    return network()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).double().mean())


def bits(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits.double(), labels) / torch.log(torch.tensor(2.0)))


def _momentum(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, rate, momentum=0.9)


def _lars(parameters: Any, rate: float) -> torch.optim.Optimizer:
    from fastseq.recipes import LARS

    return LARS(parameters, rate, weight_decay=1e-4)


ROWS = Task(
    "mnist rows",
    _rows,
    RowLSTM,
    "accuracy %",
    accuracy,
    base_batch=4,
    base_warmup_epochs=0.1,
    epochs=16,
    rates=(0.01, 0.02, 0.04, 0.08),
    schedule={"decay": "constant"},
    clip=1.0,
    optimizer=_momentum,
)
CHARACTERS = Task(
    "characters",
    _characters,
    lambda: Characters(_text()[1]),
    "bits per character",
    bits,
    base_batch=8,
    base_warmup_epochs=0.025,
    epochs=4,
    rates=(0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    schedule={"decay": "exponential", "gamma": 0.6, "decay_start": 2.0},
    clip=1.0,
    optimizer=_momentum,
)
CNN = Task(
    "mnist cnn, LARS",
    _images,
    _cnn,
    "accuracy %",
    accuracy,
    base_batch=4,
    base_warmup_epochs=0.1,
    epochs=16,
    rates=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    schedule={"decay": "polynomial", "power": 2.0},
    clip=None,
    optimizer=_lars,
)
TASKS = {task.name: task for task in (ROWS, CHARACTERS, CNN)}

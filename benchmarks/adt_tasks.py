"""Real data and small models for ADT: images, images as rows, and speech features of unequal length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastseq.recipes import Threat


class Data(NamedTuple):
    """Examples first. lengths: valid steps of each, or None."""

    x: Tensor
    labels: Tensor
    lengths: Tensor | None

    def rows(self, which: Tensor | slice) -> Data:
        return Data(self.x[which], self.labels[which], None if self.lengths is None else self.lengths[which])

    @property
    def args(self) -> tuple[Tensor, ...]:
        """What the model takes after x."""
        return () if self.lengths is None else (self.lengths,)

    @property
    def mask(self) -> Tensor | None:
        return None if self.lengths is None else torch.arange(self.x.shape[1]) < self.lengths[:, None]


class Task(NamedTuple):
    """A data set, its network and the threat. channels, dims: as the generator wants them."""

    name: str
    load: Callable[[], tuple[Data, Data]]
    network: Callable[[], nn.Module]
    threat: Threat
    channels: int
    dims: int
    epochs: int
    batch: int
    rate: float


class Classifier(nn.Module):
    """Logits from features of a fixed size."""

    def __init__(self, body: nn.Module, size: int, K: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(size, K)

    def features(self, x: Tensor, *args: Any) -> Tensor:
        return self.body(x, *args)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.head(self.features(x, *args))


class LastState(nn.Module):
    """The state of an LSTM at the last valid step of [B, T, C]."""

    def __init__(self, C: int, H: int) -> None:
        from fastseq.nn import LSTM

        super().__init__()
        self.lstm = LSTM(C, H, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        h = self.lstm(x)[0]
        return h[:, -1] if lengths is None else h[torch.arange(len(x)), lengths - 1]


def lstm(C: int, H: int, K: int) -> nn.Module:
    return Classifier(LastState(C, H), H, K)


def cnn() -> nn.Module:
    from benchmarks.mimo_tasks import network

    return Classifier(network()[:-1], 64, 10)


@functools.cache
def _rows() -> tuple[Data, Data]:
    """Pixels in [0, 1]: 3,600 images for training, 1,000 for the test."""
    from benchmarks.mimo_tasks import TASKS as MIMO

    found = MIMO["mnist rows"].load()
    train, test = (Data(part.x * 0.3081 + 0.1307, part.labels, None) for part in (found.train, found.test))
    return train, test


def _images() -> tuple[Data, Data]:
    train, test = (part._replace(x=part.x[:, None].clamp(0, 1)) for part in _rows())
    return train, test


@functools.cache
def _vowels() -> tuple[Data, Data]:
    from benchmarks.mimo_tasks import TASKS as MIMO

    found = MIMO["vowels"].load()
    train, test = (Data(*part) for part in (found.train, found.test))
    return train, test


PIXELS = Threat(0.3, clamp=(0.0, 1.0))
TASKS = {
    task.name: task
    for task in (
        Task("mnist cnn", _images, cnn, PIXELS, 1, 2, 8, 64, 2e-3),
        Task("mnist rows", _rows, lambda: lstm(28, 64, 10), PIXELS, 28, 1, 8, 64, 3e-3),
        Task("vowels", _vowels, lambda: lstm(12, 64, 9), Threat(0.3, normalise="batch"), 12, 1, 24, 32, 3e-3),
    )
}

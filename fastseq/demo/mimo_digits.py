"""Handwritten digits for the demonstration of MIMO: as they are, and turned and noisy."""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DEGREES, NOISE = 30.0, 0.15  # of the shift: the largest turn, and the deviation of the noise on pixels of 0..1
_TRAINING, _HELD_OUT = 1000, 297


class Images(NamedTuple):
    """Gray images [N, 8, 8] of 0..1 and their labels [N]."""

    x: Tensor
    labels: Tensor


class Digits(NamedTuple):
    """held_out: for the temperature. shifted: the test images, turned and noisy."""

    training: Images
    held_out: Images
    test: Images
    shifted: Images


def digits() -> Digits:
    """The 1,797 digits that scikit-learn ships, split and shifted the same way each time."""
    load = importlib.import_module("sklearn.datasets").load_digits

    found = load()
    x, labels = torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target).long()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    parts = order.tensor_split((_TRAINING, _TRAINING + _HELD_OUT))
    training, held_out, test = (Images(x[which], labels[which]) for which in parts)
    angles = DEGREES * (2 * torch.rand(len(test.x), generator=generator) - 1)
    noisy = turned(test.x, angles) + NOISE * torch.randn(test.x.shape, generator=generator)
    return Digits(training, held_out, test, test._replace(x=noisy.clamp(0, 1)))


def turned(images: Tensor, degrees: Tensor) -> Tensor:
    """[N, H, W], each turned by its own angle [N] around its middle; black comes in from outside."""
    angle = degrees * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    maps = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps, [len(images), 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]

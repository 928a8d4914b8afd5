"""The photographs that scikit-learn ships, as patches."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Photographs:
    """Two photographs [H, W, 3], red, green and blue in -0.5..0.5; H and W are multiples of ``side``.

    Args:
        side: of a patch, in pixels.
    """

    side: int
    training: Tensor
    held_out: Tensor


def photographs(side: int) -> Photographs:
    """A Chinese pavilion for training and a flower held out: ``sklearn.datasets.load_sample_image``, cut to patches.

    Args:
        side: of a patch, in pixels, >= 1.
    """
    load = importlib.import_module("sklearn.datasets").load_sample_image
    found = []
    for name in ("china.jpg", "flower.jpg"):
        image = torch.tensor(load(name), dtype=torch.float32) / 255 - 0.5
        found.append(image[: image.shape[0] // side * side, : image.shape[1] // side * side].contiguous())
    return Photographs(side, *found)


def patches(image: Tensor, side: int) -> Tensor:
    """The patches of an image [H, W, 3], side by side: [H * W / side**2, side * side * 3], row by row."""
    H, W, _ = image.shape
    tiles = image.view(H // side, side, W // side, side, 3).transpose(1, 2)
    return tiles.reshape(-1, side * side * 3)


def image_of(rows: Tensor, H: int, W: int, side: int) -> Tensor:
    """The image [H, W, 3] that ``patches`` made these rows of."""
    tiles = rows.view(H // side, W // side, side, side, 3).transpose(1, 2)
    return tiles.reshape(H, W, 3)


class Patches:
    """Endless batches of patches from anywhere in an image.

    Args:
        image: [H, W, 3]. side: of a patch. N: patches per batch. seed: of their places.
    """

    def __init__(self, image: Tensor, side: int, N: int, seed: int) -> None:
        self.windows = image.unfold(0, side, 1).unfold(1, side, 1)  # [H - side + 1, W - side + 1, 3, side, side]
        self.N = N
        self.generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> Tensor:
        """[N, side * side * 3], laid out as by ``patches``."""
        top, left = (torch.randint(n, (self.N,), generator=self.generator) for n in self.windows.shape[:2])
        return self.windows[top, left].permute(0, 2, 3, 1).reshape(self.N, -1)

"""Networks that make perturbations of examples in one pass, for the amortized variants of ADT."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastseq import _check
from fastseq.recipes.threat import channel_dim


class PerturbationGenerator(nn.Module):
    """Residual convolutions from an input and two gradients to numbers for each of its channels; keeps the layout.

    Args:
        channels: C of the input. dims: 0 for [B, C], 1 for sequences [B, T, C], 2 for images [B, C, H, W].
        parts: numbers per channel: 2 for the means and spreads of exp_am, 1 for imp_am.
        width: channels inside. blocks: of two convolutions each. latent: size of the noise that goes in, 0 for none.
    """

    def __init__(
        self, channels: int, dims: int, parts: int = 2, *, width: int = 32, blocks: int = 2, latent: int = 0
    ) -> None:
        super().__init__()
        _check_sizes("PerturbationGenerator", channels=channels, parts=parts, width=width, blocks=blocks)
        conv = _convolution("PerturbationGenerator", dims)
        self.first = conv(3 * channels, width)
        self.latent = nn.Linear(latent, width) if latent else None
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width)) for _ in range(blocks)
        )
        self.last = conv(width, parts * channels)
        if not latent:  # starts where the explicit variant does, mu = rho = 0
            for p in self.last.parameters():
                nn.init.zeros_(p)

    def forward(self, features: Tensor, z: Tensor | None = None) -> Tensor:
        """[B, ..., 3*C] to [B, ..., parts*C], channels where the input has them. z: [B, latent]."""
        h = self.first(_channels_first(features))
        if self.latent is not None and z is not None:
            h = h + self.latent(z)[(...,) + (None,) * (h.dim() - 2)]
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.last(torch.relu(h))
        return _as_found(out, features)


class LatentEncoder(nn.Module):
    """Mean and log variance of the noise that a perturbation was made from, guessed from the perturbation.

    Args:
        channels, dims, width: as of ``PerturbationGenerator``. latent: size of the noise.
    """

    def __init__(self, channels: int, dims: int, latent: int, *, width: int = 32) -> None:
        super().__init__()
        _check_sizes("LatentEncoder", channels=channels, latent=latent, width=width)
        conv = _convolution("LatentEncoder", dims)
        self.body = nn.Sequential(conv(channels, width), nn.ReLU(), conv(width, width), nn.ReLU())
        self.head = nn.Linear(width, 2 * latent)

    def forward(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """[B, ..., C], the perturbation in units of its largest, to [B, latent] each."""
        mean, log_variance = self.head(self.body(_channels_first(direction)).flatten(2).mean(2)).chunk(2, 1)
        return mean, log_variance


def _convolution(function: str, dims: int) -> Callable[[int, int], nn.Module]:
    """From numbers of input and output channels to a convolution that keeps the sizes."""
    if dims not in (0, 1, 2):
        _check.fail(function, "dims", "0, 1 or 2", repr(dims))
    if dims == 2:
        return lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1)
    size = 3 if dims else 1
    return lambda inputs, outputs: nn.Conv1d(inputs, outputs, size, padding=size // 2)


def _channels_first(x: Tensor) -> Tensor:
    """[B, C, T] or [B, C, H, W]; T = 1 of [B, C]."""
    return x[:, :, None] if x.dim() == 2 else x.movedim(channel_dim(x), 1)


def _as_found(out: Tensor, like: Tensor) -> Tensor:
    return out[:, :, 0] if like.dim() == 2 else out.movedim(1, channel_dim(like))


def _check_sizes(function: str, **sizes: int) -> None:
    for name, size in sizes.items():
        _check.count(function, name, size)

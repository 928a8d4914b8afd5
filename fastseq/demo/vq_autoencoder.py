"""The autoencoder with one code per patch, and the ways to learn its codebook."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastseq.nn

GRADIENT, AVERAGES, ROBUST = "plain by gradient", "plain by averages", "robust recipe"
RECIPES = (GRADIENT, AVERAGES, ROBUST)

COMMITMENT = 0.25  # that of van den Oord et al. 2017 and of Lancucki et al. 2020
MULTIPLIER = 10.0  # of the codebook's learning rate in the recipe
FIRST, LAST = 2, 4  # the epochs at whose start the recipe makes new codes; before the first it does not quantize
LLOYD = 3  # rounds of k-means
_ROWS_PER_CODE = 2  # in the reservoir, at least


def options(recipe: str) -> dict[str, Any]:
    """Arguments beside the sizes that ``VectorQuantize`` of fastseq and of vector-quantize-pytorch share."""
    plain = {"commitment_weight": COMMITMENT, "rotation_trick": False}
    return plain if recipe == AVERAGES else {**plain, "learnable_codebook": True, "ema_update": False}


def reservoir_size(K: int) -> int:
    """Rows that the recipe keeps for k-means."""
    return max(4096, _ROWS_PER_CODE * K)


def least_rows(recipe: str, K: int, epoch: int) -> int:
    """Rows that an epoch must have, however slow the machine: as many as the next new codes are made from."""
    return reservoir_size(K) if recipe == ROBUST and FIRST <= epoch + 1 <= LAST else 1


def quantizer(recipe: str, dim: int, K: int) -> nn.Module:
    """A ``fastseq.nn.VectorQuantize`` of K codes of ``dim`` numbers."""
    own: dict[str, Any] = {}
    if recipe == ROBUST:
        schedule = fastseq.nn.AfterWarmup(from_epoch=FIRST, max_epoch=LAST - 1)
        reinit = fastseq.nn.Reinit(schedule, reservoir_size=reservoir_size(K), iterations=LLOYD)
        own = {"batch_norm": "codes", "reinit": reinit}
    return fastseq.nn.VectorQuantize(dim, K, **options(recipe), **own)


def optimiser(model: nn.Module, recipe: str, rate: float) -> torch.optim.Optimizer:
    """Adam, with the codebook's own rate in the recipe and its memory of codes cleared when they are made anew."""
    if recipe != ROBUST:
        return torch.optim.Adam(model.parameters(), lr=rate)
    adam = torch.optim.Adam(fastseq.nn.codebook_parameter_groups(model, rate, MULTIPLIER))
    fastseq.nn.attach(model, adam)
    return adam


class PatchAutoencoder(nn.Module):
    """Two layers, a quantizer, two layers.

    Args:
        width: numbers in a patch. hidden: units. dim: numbers that are quantized.
        quantizer: a module called as ``VectorQuantize``, or None for none.
    """

    def __init__(self, width: int, hidden: int, dim: int, quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.decoder = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """
        Args:
            x: [N, width].

        Returns:
            What the decoder makes of the codes [N, width], the codes' indices [N], and the quantizer's loss.
        """
        z = self.encoder(x)
        if self.quantizer is None:
            return self.decoder(z), None, x.new_zeros(())
        quantized, index, loss = self.quantizer(z)
        return self.decoder(quantized), index, loss

    def patches_of_codes(self) -> Tensor:
        """What the decoder makes of every code: [K, width]."""
        assert self.quantizer is not None
        patches: Tensor = self.decoder(self.quantizer.codebook)
        return patches

"""Small networks that the tests of ADT and of the attacks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastseq.nn

B, T, C, K = 6, 5, 3, 4
STEPS = torch.tensor([5, 3, 1, 4, 5, 2])  # valid ones of each row
MASK = torch.arange(T) < STEPS[:, None]


class Sequences(nn.Module):
    """[B, T, C] to [B, K], from the state at the last valid step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = fastseq.nn.LSTM(C, 7, batch_first=True), nn.Linear(7, K)
        for p in self.parameters():  # steep, as if trained
            nn.init.normal_(p)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        h = self.lstm(x)[0]
        last = h[:, -1] if lengths is None else h[torch.arange(len(x)), lengths - 1]
        return self.head(last)


def images() -> nn.Module:
    """[B, 2, 6, 6] to [B, K], with what has a mode: batch norm and dropout."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 9, K),
    )


def sequence_batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, C, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(K, (B,), generator=generator)


def image_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(B, 2, 6, 6, generator=generator), torch.randint(K, (B,), generator=generator)

"""What every trainer trains for twenty steps: gates with noise, a codebook of moving averages, a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.nn import LSTM, VectorQuantize
from fastseq.recipes import LEGW

STEPS, EPOCHS, T, B, I, TAGS = 20, 4, 6, 8, 5, 4  # noqa: E741
CLIP, RATE = 0.5, 0.05


class Tagger(nn.Module):
    """Tags of steps; ``quantized`` puts a quantizer between the LSTM and the head."""

    def __init__(self, quantized: bool = True) -> None:
        super().__init__()
        self.lstm = LSTM(I, 16, gates="binary", batch_first=True)
        self.quantizer = VectorQuantize(16, 12, decay=0.9, rotation_trick=False) if quantized else None
        self.head = nn.Linear(16, TAGS)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """x: [B, T, I], labels: [B, T]; "loss" and "logits" [B, T, TAGS]."""
        y, extra = self.lstm(x)[0], 0.0
        if self.quantizer is not None:
            y, _, extra = self.quantizer(y)
        logits = self.head(y)
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) + extra, "logits": logits}


def tagger(quantized: bool = True) -> Tagger:
    torch.manual_seed(1)
    return Tagger(quantized)


def examples() -> list[dict[str, Tensor]]:
    """Those of one epoch, which EPOCHS make STEPS of; the tag is the largest of the first features so far."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B * STEPS // EPOCHS, T, I, generator=generator)
    labels = x[..., :TAGS].cumsum(1).argmax(-1)
    return [{"x": row, "labels": tags} for row, tags in zip(x, labels, strict=True)]


def batch(step: int) -> dict[str, Tensor]:
    """Number ``step`` of the training, in the order of the examples."""
    rows = examples()
    at = step * B % len(rows)
    return {name: torch.stack([row[name] for row in rows[at : at + B]]) for name in rows[0]}


def optimizer_of(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=RATE)


def scheduler_of(optimizer: torch.optim.Optimizer) -> LEGW:
    return LEGW(optimizer, B, B, 1, STEPS // EPOCHS, EPOCHS, "polynomial", world_size=1)


def tensors(model: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Parameters and buffers, with their names."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return [*state], [*state.values()]


def fell(losses: list[float]) -> bool:
    """From the first quarter of the training to the last one."""
    quarter = len(losses) // 4
    return sum(losses[-quarter:]) < 0.8 * sum(losses[:quarter])

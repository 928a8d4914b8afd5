"""``fastseq::ensemble_stats``: schema, fake and backends. Meaning and shapes: ``fastseq.reference.ensemble_stats``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq import reference
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._transforms import wide

library.define(
    "ensemble_stats(Tensor logits, Tensor? labels, int bins, int ignore, bool probability)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@fake("ensemble_stats")
def _(logits: Tensor, labels: Tensor | None, bins: int, ignore: int, probability: bool) -> tuple[Tensor, ...]:
    B, M, K = logits.shape
    dtype = wide(logits.dtype)
    return (
        logits.new_empty((B, K) if probability else 0, dtype=dtype),
        logits.new_empty(B, dtype=torch.int64),
        logits.new_empty(B, dtype=dtype),
        logits.new_empty(B, M, dtype=torch.int64),
        logits.new_empty(B, dtype=dtype),
        logits.new_empty(B, dtype=dtype),
        logits.new_empty(B, dtype=dtype),
        logits.new_empty(3, bins, dtype=torch.float64),
        logits.new_empty(5 + M, dtype=torch.float64),
    )


def _stats(logits: Tensor, labels: Tensor | None, bins: int, ignore: int, probability: bool) -> tuple[Tensor, ...]:
    found = reference.ensemble_stats(logits.to(wide(logits.dtype)), labels, bins, ignore)
    return found if probability else (logits.new_empty(0, dtype=found[0].dtype), *found[1:])


BACKENDS = {"ensemble_stats": backends("ensemble_stats", _stats, "ensemble_stats")}
register("ensemble_stats", BACKENDS["ensemble_stats"])

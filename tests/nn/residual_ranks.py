"""What two processes do together with ``ResidualVQ``, for ``test_residual_vq_ranks.py``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastseq.nn.residual_vq import ResidualVQ

STEPS, B, N, D, K, M = 6, 2, 24, 4, 8, 3
DROPOUT: dict[str, Any] = {"quantize_dropout": True}
# name -> options of the module; each is also run by one process on all rows, but for what is drawn
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cosine": {"use_cosine_sim": True},
    "sizes": {"num_quantizers": None, "codebook_size": (3, 8, 5)},
    "masked": {},
    "dropout": DROPOUT,
    "dropout, cosine": {**DROPOUT, "use_cosine_sim": True},
    "dropout per sample": {**DROPOUT, "quantize_dropout_per_sample": True},
    "other levels": {},
    "dead codes": {"threshold_ema_dead_code": 1e6},
    "dead codes, rank 0 alone": {"threshold_ema_dead_code": 1e6},
}


def rows() -> Tensor:
    """[steps, B, N, D] of all ranks, in clusters far apart: every rounding assigns them alike."""
    random = torch.Generator().manual_seed(5)
    centres = 10 * torch.randn(12, D, generator=random)
    pick = torch.randint(12, (STEPS, B, N), generator=random)
    return centres[pick] + torch.randn(STEPS, B, N, D, generator=random)


def module(case: str) -> ResidualVQ:
    torch.manual_seed(1)
    rvq = ResidualVQ(**{"dim": D, "num_quantizers": M, "codebook_size": K, "decay": 0.7, **OPTIONS[case]})
    for layer in rvq.layers:
        layer._codebook.set_codes(5 * layer._codebook.embed)
    return rvq


def arguments(case: str, rank: int) -> dict[str, Any]:
    """Of a call of this rank."""
    if case == "masked" or case.endswith("rank 0 alone"):
        return {"mask": torch.full((B, N // 2), rank == 0)}
    return {"n_quantizers": 1 + 2 * rank} if case == "other levels" else {}


def run_case(case: str, rank: int) -> dict[str, Any]:
    rvq, sent, found = module(case), [], []
    torch.manual_seed(rank)
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *a, **k: (sent.append(a[0].numel()), all_reduce(*a, **k))[1]
    for x in rows().split(N // 2, dim=2)[rank]:
        found.append((x, *rvq(x, **arguments(case, rank))))
    dist.all_reduce = all_reduce
    return {"found": found, "state": rvq.state_dict(), "sent": sent, "before": module(case).codebooks}


def run(rank: int) -> dict[str, Any]:
    return {case: run_case(case, rank) for case in OPTIONS}

"""Quantizers of every kind, for the tests of ``VectorQuantize``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastseq.nn.vector_quantize import VectorQuantize

B, T, D, K = 3, 11, 8, 16
LEARNED: dict[str, Any] = {"learnable_codebook": True, "ema_update": False}
HEADS: dict[str, Any] = {"heads": 2, "codebook_dim": 4}
SEPARATE: dict[str, Any] = {**HEADS, "separate_codebook_per_head": True}

# options whose outputs, gradients and buffers padding must not change
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cosine": {"use_cosine_sim": True},
    "learned": LEARNED,
    "projection": {"codebook_dim": 5, "layernorm_after_project_in": True},
    "shared heads": HEADS,
    "separate heads": SEPARATE,
    "dead codes": {"threshold_ema_dead_code": 2},
    "norm of the input": {"batch_norm": "input", "codebook_dim": 5},
    "norm of the codes": {"batch_norm": "codes", **SEPARATE},
    "orthogonal": {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True},
    "some orthogonal": {
        "orthogonal_reg_weight": 1.0,
        "orthogonal_reg_active_codes_only": True,
        "orthogonal_reg_max_codes": 5,
    },
    "cross-entropy": {"commitment_use_cross_entropy_loss": True},
    "diversity": {"codebook_diversity_loss_weight": 1.0},
    "sampled": {"stochastic_sample_codes": True},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1e-9},
    "affine": {"affine_param": True},
    "affine, dead codes": {"affine_param": True, "threshold_ema_dead_code": 2},
    "bridge": {"vq_bridge": nn.Softplus(), "threshold_ema_dead_code": 2},
    "k-means": {"kmeans_init": True},
}


def make(**options: Any) -> VectorQuantize:
    torch.manual_seed(0)
    return VectorQuantize(**{"dim": D, "codebook_size": K, **options})


def state(module: nn.Module) -> list[Tensor]:
    """A copy of parameters and buffers, in a fixed order."""
    return [v.clone() for _, v in sorted(module.state_dict().items())]


def names_of(module: nn.Module) -> list[str]:
    return sorted(module.state_dict())

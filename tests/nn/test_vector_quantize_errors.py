"""Every message that a user of ``VectorQuantize`` can get, and its type."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastseq._check import ArgumentError
from fastseq.nn import vq_options
from fastseq.nn.reinit import AfterWarmup, Reinit
from fastseq.nn.vector_quantize import VectorQuantize

B, T, D, K = 2, 5, 8, 16
X = torch.zeros(B, T, D)
MASK = torch.ones(B, T, dtype=torch.bool)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "dim": ({"dim": 0}, "dim must be an integer >= 1, got 0"),
    "codebook_size": ({"codebook_size": 2.0}, "codebook_size must be an integer >= 1, got 2.0"),
    "codebook_dim": ({"codebook_dim": -1}, "codebook_dim must be an integer >= 1, got -1"),
    "heads": ({"heads": True}, "heads must be an integer >= 1, got True"),
    "max codes": ({"orthogonal_reg_max_codes": 0}, "orthogonal_reg_max_codes must be an integer >= 1, got 0"),
    "kmeans_iters": ({"kmeans_iters": -1}, "kmeans_iters must be an integer >= 0, got -1"),
    "decay": ({"decay": 1.5}, "decay must be a number in [0, 1], got 1.5"),
    "affine decay": ({"affine_param_batch_decay": -1}, "affine_param_batch_decay must be a number in [0, 1], got -1"),
    "eps": ({"eps": 0.0}, "eps must be a finite number > 0, got 0.0"),
    "threshold": ({"threshold_ema_dead_code": -1}, "threshold_ema_dead_code must be a number >= 0, got -1"),
    "no threshold": (
        {"threshold_ema_dead_code": float("nan")},
        "threshold_ema_dead_code must be a number >= 0, got nan",
    ),
    "weight": ({"commitment_weight": -0.1}, "commitment_weight must be a number >= 0, got -0.1"),
    "temperature": ({"sample_codebook_temp": -1.0}, "sample_codebook_temp must be a number >= 0, got -1.0"),
    "variance": ({"directional_reparam_variance": -1}, "directional_reparam_variance must be a number >= 0, got -1"),
    "two gradients": (
        {"rotation_trick": True, "straight_through": True},
        "rotation_trick, straight_through and directional_reparam must be True one at most, got rotation_trick=True, "
        "straight_through=True, directional_reparam=False",
    ),
    "directional": (
        {"directional_reparam": True},
        "threshold_ema_dead_code must be > 0 beside directional_reparam=True, got 0",
    ),
    "soft and learned": (
        {"straight_through": True, "learnable_codebook": True},
        "straight_through must be False beside learnable_codebook=True, got True",
    ),
    "average and learned": (
        {"ema_update": True, "learnable_codebook": True},
        "ema_update must be False beside learnable_codebook=True, got True",
    ),
    "sync_update_v": (
        {"sync_update_v": 2.0, "learnable_codebook": True},
        "sync_update_v must be a number in [0, 1], got 2.0",
    ),
    "sync_update_v alone": ({"sync_update_v": 0.5}, "sync_update_v must be 0 unless learnable_codebook=True, got 0.5"),
    "cosine and learned": (
        {"use_cosine_sim": True, "learnable_codebook": True},
        "use_cosine_sim must be False beside learnable_codebook=True, got True",
    ),
    "cosine and affine": (
        {"use_cosine_sim": True, "affine_param": True},
        "affine_param must be False beside use_cosine_sim=True, got True",
    ),
    "bridge": (
        {"vq_bridge": nn.Identity(), "learnable_codebook": False},
        "learnable_codebook must be True or None beside vq_bridge, got False",
    ),
    "in place": (
        {"in_place_codebook_optimizer": sgd},
        "in_place_codebook_optimizer must be None unless learnable_codebook=True, got one",
    ),
    "two maps": (
        {"accept_image_fmap": True, "accept_3d_fmap": True},
        "accept_3d_fmap must be False beside accept_image_fmap=True, got True",
    ),
    "batch_norm": ({"batch_norm": "both"}, "batch_norm must be one of 'input', 'codes', got 'both'"),
    "index_dtype": (
        {"index_dtype": torch.uint8},
        "index_dtype must be torch.int64, torch.int32 or torch.int16, got torch.uint8",
    ),
    "narrow index_dtype": (
        {"index_dtype": torch.int16, "codebook_size": 40000},
        "index_dtype must be wide enough for codebook_size = 40000, got torch.int16",
    ),
}

CALLS: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "dimensions": ({}, lambda vq: vq(X[0, 0]), "x must be [B, T, D] or [B, D], got [8]"),
    "channels": ({}, lambda vq: vq(X.mT), "x must be [B, T, D] or [B, D] with D = 8, got [2, 8, 5]"),
    "channels first": (
        {"channel_last": False},
        lambda vq: vq(X),
        "x must be [B, D, T] or [B, D] with D = 8, got [2, 5, 8]",
    ),
    "image": ({"accept_image_fmap": True}, lambda vq: vq(X), "x must be [B, D, H, W], got [2, 5, 8]"),
    "volume": ({"accept_3d_fmap": True}, lambda vq: vq(X), "x must be [B, D, T, H, W], got [2, 5, 8]"),
    "mask": ({}, lambda vq: vq(X, mask=MASK[0]), "mask must be [B, T] = [2, 5], got [5]"),
    "mask dtype": ({}, lambda vq: vq(X, mask=MASK.int()), "mask must be torch.bool, got torch.int32"),
    "mask device": ({}, lambda vq: vq(X, mask=MASK.to("meta")), "mask must be on cpu, got one on meta"),
    "lens": ({}, lambda vq: vq(X, lens=torch.ones(3)), "lens must be [B] = [2], got [3]"),
    "mask and lens": (
        {},
        lambda vq: vq(X, mask=MASK, lens=torch.ones(2)),
        "lens must be None where mask is given, got both",
    ),
    "mask of vectors": (
        {},
        lambda vq: vq(X[:, 0], mask=MASK[:, :1]),
        "mask must be None for maps and for single vectors, got one",
    ),
    "lens of an image": (
        {"accept_image_fmap": True},
        lambda vq: vq(torch.zeros(B, D, 2, 2), lens=torch.ones(2)),
        "lens must be None for maps and for single vectors, got one",
    ),
    "topk": ({}, lambda vq: vq(X, topk=0), "topk must be an integer >= 1, got 0"),
    "topk of heads": ({"heads": 2}, lambda vq: vq(X, topk=2), "topk must be None beside heads=2, got 2"),
    "topk and cross-entropy": (
        {"commitment_use_cross_entropy_loss": True},
        lambda vq: vq(X, topk=2),
        "topk must be None while training with commitment_use_cross_entropy_loss, got 2",
    ),
    "topk in place": (
        {"learnable_codebook": True, "in_place_codebook_optimizer": sgd},
        lambda vq: vq(X, topk=2),
        "topk must be None while training with in_place_codebook_optimizer, got 2",
    ),
    "topk and softmax": (
        {"straight_through": True},
        lambda vq: vq(X, topk=2),
        "topk must be None while training with straight_through, got 2",
    ),
    "transform of heads": (
        {"heads": 2},
        lambda vq: vq(X, codebook_transform_fn=abs),
        "codebook_transform_fn must be None beside heads=2, got a function",
    ),
    "weight": (
        {},
        lambda vq: vq(X, ema_update_weight=torch.ones(3)),
        "ema_update_weight must be [K] or [G, K] = [1, 16], got [3]",
    ),
    "number of indices": (
        {},
        lambda vq: vq(X, indices=torch.zeros(B, dtype=torch.int64)),
        "indices must be of [2, 5] or its layout, got [2]",
    ),
    "number of indices for heads": (
        {"heads": 2},
        lambda vq: vq(X, indices=torch.zeros(B, T, dtype=torch.int64)),
        "indices must be of [2, 5, 2] or its layout, got [2, 5]",
    ),
    "given indices": ({}, lambda vq: vq(X, indices=torch.full((B, T), K)), "indices must be in -1..15, got"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str) -> None:
    options, message = OPTIONS[case]
    with pytest.raises(ArgumentError, match=re.escape(f"VectorQuantize: {message}")):
        VectorQuantize(**{"dim": D, "codebook_size": K, **options})


@pytest.mark.parametrize("case", CALLS)
def test_calls(case: str) -> None:
    options, call, message = CALLS[case]
    vq = VectorQuantize(D, K, **options)
    before = [v.clone() for v in vq.state_dict().values()]
    with pytest.raises(ArgumentError, match=re.escape(message)):
        call(vq)
    if "ema_update_weight" not in message:
        assert all(torch.equal(a, b) for a, b in zip(vq.state_dict().values(), before, strict=True))


@pytest.mark.parametrize("name", ["get_codes_from_indices", "get_output_from_indices"])
def test_indices_of_the_decoder(name: str) -> None:
    decode = getattr(VectorQuantize(D, K), name)
    for wrong in (-2, K):
        with pytest.raises(ArgumentError, match=re.escape(f"{name}: indices must be in -1..15")):
            decode(torch.tensor([[0, wrong]]))
    with pytest.raises(ArgumentError, match="indices must be integers"):
        decode(torch.zeros(2))
    with pytest.raises(ArgumentError, match=re.escape("indices must be [..., heads = 2], got [3]")):
        getattr(VectorQuantize(D, K, heads=2), name)(torch.zeros(3, dtype=torch.int64))


def test_integers_are_no_vectors() -> None:
    with pytest.raises(TypeError, match="VectorQuantize: x must be of a floating-point dtype, got torch.int64"):
        VectorQuantize(D, K)(X.long())


def test_assigned_codes() -> None:
    vq = VectorQuantize(D, K)
    with pytest.raises(ArgumentError, match=re.escape("means must be [G, K, D] = [1, 16, 8], got [1, 3, 8]")):
        vq.codebook = torch.zeros(3, D)
    with pytest.raises(ArgumentError, match=re.escape("counts must be [G, K] = [1, 16], got [16]")):
        vq._codebook.set_codes(torch.zeros(1, K, D), torch.zeros(K))


def test_a_reservoir_that_is_too_small() -> None:
    with pytest.raises(ArgumentError, match="reservoir_size must be at least the number of codes K = 16, got 8"):
        VectorQuantize(D, K, reinit=Reinit(AfterWarmup(), reservoir_size=8))


def test_a_matrix_of_rows_by_codes_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vq_options, "_told", set())
    with caplog.at_level(logging.WARNING, "fastseq"):
        for _ in range(2):
            VectorQuantize(D, K, stochastic_sample_codes=True)
            VectorQuantize(D, K)
    told = "VectorQuantize: stochastic_sample_codes forms a matrix of rows by codes while training"
    assert [r.getMessage() for r in caplog.records] == [told]

"""The options of ``VectorQuantize``: defaults, which exclude each other, which cost a matrix of rows by codes."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch

from fastseq import _check

NAME = "VectorQuantize"
BATCH_NORMS = ("input", "codes")
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16)
_logger = logging.getLogger("fastseq")
_told: set[str] = set()


def resolve(o: SimpleNamespace) -> None:
    """Check the options ``o``, whose names are those of ``VectorQuantize``, and put what it means where one is None.

    Raises:
        ArgumentError: naming the option to change.
    """
    o.codebook_dim = o.dim if o.codebook_dim is None else o.codebook_dim
    by_gradient = o.directional_reparam or o.vq_bridge is not None
    if o.learnable_codebook is None:
        o.learnable_codebook = by_gradient
    if o.ema_update is None:
        o.ema_update = not (o.learnable_codebook or by_gradient)
    _sizes(o)
    if o.rotation_trick is None:
        o.rotation_trick = o.dim > 1 and not (o.directional_reparam or o.straight_through)
    _gradients(o)
    _codebook(o)
    _additions(o)
    for name in ("commitment_weight", "orthogonal_reg_weight", "codebook_diversity_loss_weight"):
        _number(name, getattr(o, name))
    if o.accept_image_fmap and o.accept_3d_fmap:
        _check.fail(NAME, "accept_3d_fmap", "False beside accept_image_fmap=True", True)
    _tell_matrix(
        stochastic_sample_codes=o.stochastic_sample_codes,
        commitment_use_cross_entropy_loss=o.commitment_use_cross_entropy_loss,
        codebook_diversity_loss_weight=o.codebook_diversity_loss_weight > 0,
    )


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not value >= 0:
        _check.fail(NAME, name, "a number >= 0", repr(value))


def _sizes(o: SimpleNamespace) -> None:
    for name in ("dim", "codebook_size", "codebook_dim", "heads", "orthogonal_reg_max_codes"):
        size = getattr(o, name)
        if name == "orthogonal_reg_max_codes" and size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            _check.fail(NAME, name, "an integer >= 1", repr(size))
    if isinstance(o.kmeans_iters, bool) or not isinstance(o.kmeans_iters, int) or o.kmeans_iters < 0:
        _check.fail(NAME, "kmeans_iters", "an integer >= 0", repr(o.kmeans_iters))


def _gradients(o: SimpleNamespace) -> None:
    if o.rotation_trick + o.straight_through + o.directional_reparam > 1:
        names = ("rotation_trick", "straight_through", "directional_reparam")
        got = ", ".join(f"{n}={getattr(o, n)}" for n in names)
        _check.fail(NAME, "rotation_trick, straight_through and directional_reparam", "True one at most", got)
    if o.directional_reparam and not o.threshold_ema_dead_code:
        _check.fail(NAME, "threshold_ema_dead_code", "> 0 beside directional_reparam=True", o.threshold_ema_dead_code)
    if o.learnable_codebook and o.straight_through:
        _check.fail(NAME, "straight_through", "False beside learnable_codebook=True", True)
    if o.learnable_codebook and o.ema_update:
        _check.fail(NAME, "ema_update", "False beside learnable_codebook=True", True)
    _check.probability(NAME, "sync_update_v", o.sync_update_v)
    if o.sync_update_v and not o.learnable_codebook:
        _check.fail(NAME, "sync_update_v", "0 unless learnable_codebook=True", o.sync_update_v)
    _number("directional_reparam_variance", o.directional_reparam_variance)
    _number("sample_codebook_temp", o.sample_codebook_temp)


def _codebook(o: SimpleNamespace) -> None:
    if o.use_cosine_sim and o.learnable_codebook:
        _check.fail(NAME, "use_cosine_sim", "False beside learnable_codebook=True", True)
    if o.use_cosine_sim and o.affine_param:
        _check.fail(NAME, "affine_param", "False beside use_cosine_sim=True", True)
    if o.vq_bridge is not None and not o.learnable_codebook:
        _check.fail(NAME, "learnable_codebook", "True or None beside vq_bridge", False)
    if o.in_place_codebook_optimizer is not None and not o.learnable_codebook:
        _check.fail(NAME, "in_place_codebook_optimizer", "None unless learnable_codebook=True", "one")
    for name in ("decay", "affine_param_batch_decay", "affine_param_codebook_decay"):
        _check.probability(NAME, name, getattr(o, name))
    _check.positive(NAME, "eps", o.eps)
    _number("threshold_ema_dead_code", o.threshold_ema_dead_code)


def _additions(o: SimpleNamespace) -> None:
    if o.batch_norm is not None:
        _check.one_of(NAME, "batch_norm", o.batch_norm, BATCH_NORMS)
    if o.index_dtype not in INDEX_DTYPES:
        _check.fail(NAME, "index_dtype", "torch.int64, torch.int32 or torch.int16", o.index_dtype)
    if o.codebook_size - 1 > torch.iinfo(o.index_dtype).max:
        _check.fail(NAME, "index_dtype", f"wide enough for codebook_size = {o.codebook_size}", o.index_dtype)


def _tell_matrix(**options: bool) -> None:
    for name, on in options.items():
        if on and name not in _told:
            _told.add(name)
            _logger.warning(f"{NAME}: {name} forms a matrix of rows by codes while training")

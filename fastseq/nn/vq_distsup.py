"""The bottlenecks of distsup/DistSup, the code of Lancucki et al. (2020), for ``load_codebooks``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastseq._check import fail
from fastseq.nn.batch_norm import MaskedBatchNorm
from fastseq.nn.vector_quantize import VectorQuantize

MARK = "reestimation_data"  # a buffer that every one of its bottlenecks has
_NORM = "batch_norm.batch_norm."
Get = Callable[..., Tensor]  # a tensor by its name behind the bottleneck's, and its sizes; None for any


def bottleneck(names: set[str], get: Get, function: str, **options: Any) -> nn.Module:
    """``VQBottleneck``, or ``ManyCodebooksVQBottleneck`` and its variant with moving averages.

    The first has [batch norm,] a linear map and no map back, so it becomes ``nn.Sequential`` of ``batch_norm``,
    ``projection`` and ``vq``. The others have no map, and become a ``VectorQuantize`` of image maps with one head for
    each codebook, whose batch norm is shared.

    Args:
        names: of the bottleneck's tensors. function: for messages.
        options: of ``VectorQuantize``.
    """
    if "adapt_bias.weight" in names:
        expected = "a bottleneck that is not conditioned on a speaker or scribe (needs_global_info)"
        fail(function, "source", expected, "one with adapt_bias.weight")
    if "embedding" in names:
        return _many(names, get, **options)
    codes = get("embedding.weight", None, None)
    D = codes.shape[1]
    learned: dict[str, Any] = {"learnable_codebook": True, "ema_update": False, "rotation_trick": False}
    projected, normalized = "projection.weight" in names, f"{_NORM}running_mean" in names
    where = "codes" if normalized and not projected else None
    vq = VectorQuantize(dim=D, codebook_size=len(codes), **{**learned, "batch_norm": where, **options})
    vq._codebook.set_codes(codes[None])
    if not projected:
        if normalized:
            _fill_norm(vq.batch_norm, names, get)
        return vq
    weight = get("projection.weight", D, None)
    projection = nn.Linear(weight.shape[1], D)
    projection.weight.copy_(weight)
    projection.bias.copy_(get("projection.bias", D))
    norm = _fill_norm(MaskedBatchNorm(weight.shape[1]), names, get) if normalized else nn.Identity()
    parts = {"batch_norm": norm, "projection": projection, "vq": vq}
    found = nn.Sequential()
    for name, part in parts.items():
        found.add_module(name, part)
    return found


def _many(names: set[str], get: Get, **options: Any) -> VectorQuantize:
    codes = get("embedding", None, None, None)
    N, K, D = codes.shape
    averaged = "ema_count" in names
    own: dict[str, Any] = {"learnable_codebook": not averaged, "ema_update": averaged, "rotation_trick": False}
    own |= {"decay": 0.999} if averaged else {}
    own |= {"heads": N, "separate_codebook_per_head": N > 1, "accept_image_fmap": True}
    own["batch_norm"] = "codes" if f"{_NORM}running_mean" in names else None
    vq = VectorQuantize(dim=N * D, codebook_size=K, codebook_dim=D, **{**own, **options})
    vq._codebook.set_codes(codes, get("ema_count", N, K) if averaged else None)
    if averaged:
        vq._codebook.embed_avg.copy_(get("ema_weight", N, K, D))
    if own["batch_norm"]:
        _fill_norm(vq.batch_norm, names, get)
    return vq


def _fill_norm(norm: MaskedBatchNorm, names: set[str], get: Get) -> MaskedBatchNorm:
    """As in the checkpoint; without an affine map of its own that of the layer stays the identity."""
    affine = {"weight", "bias"} if names & {f"{_NORM}weight", f"{_NORM}bias"} else set()
    for name in {"running_mean", "running_var"} | affine:
        value = getattr(norm, name)
        value.copy_(get(_NORM + name, len(value)))
    return norm

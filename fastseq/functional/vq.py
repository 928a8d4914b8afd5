"""``vq_*``: checks, dtypes and layout around the operators of vector quantization."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import _check
from fastseq.ops import vq as _ops
from fastseq.ops._triton import in_low_precision

_INDEX_DTYPES = {dtype: bits for bits, dtype in _ops.INDEX_BITS.items()}
_COMPUTED = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
METRICS = ("l2", "dot", "cosine")


class Nearest(NamedTuple):
    """What ``vq_nearest`` returns; with ``best`` > 1 each has a last dimension of that size."""

    index: Tensor  # type: ignore[assignment]  # [..., N]
    distance: Tensor | None  # [..., N], squared
    score: Tensor | None  # [..., N], what the index is the smallest of, see ``reference.vq_scores``


class Quantized(NamedTuple):
    """What ``vq_quantize`` returns, shaped as x without its last dimension unless said otherwise."""

    quantized: Tensor  # [..., N, D], the codes
    index: Tensor  # type: ignore[assignment]  # int64, -1 where the mask is False
    commitment: Tensor  # squared distance of row and code, gradient to x; 0 where the mask is False
    codebook_error: Tensor  # the same numbers, gradient to the codebook
    counts: Tensor | None  # [K] or [G, K], rows per code
    sums: Tensor | None  # [K, D] or [G, K, D], sum of the rows of each code


def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    best: int = 1,
    return_distance: bool = False,
    return_score: bool = False,
    index_dtype: torch.dtype = torch.int64,
    screen: bool | None = None,
) -> Nearest:
    """The nearest codes of each row, without a matrix of rows by codes. Definition: ``reference.vq_nearest``.

    The index of a row depends on this row and the codebook alone: not on other rows, threads or instruction sets.

    Args:
        x: [..., N, D], or [G, ..., N, D] where there are G codebooks; float32, float64, bfloat16 or float16 (computed
            in float32; on a GPU 16 bits are multiplied as they are, which is exact).
        codebook: [K, D], or [G, K, D]: one per head or group.
        metric: "l2"; "dot", the largest inner product; "cosine", the same after both are scaled to length 1.
        mask: bool, the shape of x without D (and without G, if it is the same for all): the rows that count.
        best: how many codes, 1..K.
        return_distance: also the squared distances (of the scaled vectors for "cosine").
        return_score: also the scores, by which lookups in parts of a codebook can be merged; +inf where the mask is
            False or the row is not finite. float32 or float64.
        index_dtype: int64, int32 or int16, which must hold K - 1.
        screen: look at all codes in 8-bit integers first, and in float32 at those that a proven bound leaves open;
            the index is the same. None means where that is faster; True where it is possible, False never.

    Returns:
        ``Nearest``; index is -1 where the mask is False. A row that is not finite gets index 0. Not differentiable.

    Raises:
        ArgumentError: naming the argument.
    """
    f = "vq_nearest"
    rows = _Rows(f, x, codebook, metric, mask)
    if isinstance(best, bool) or not isinstance(best, int) or not 1 <= best <= rows.K:
        _check.fail(f, "best", f"an integer in 1..K = 1..{rows.K}", repr(best))
    if index_dtype not in _INDEX_DTYPES:
        _check.fail(f, "index_dtype", "torch.int64, torch.int32 or torch.int16", index_dtype)
    if rows.K - 1 > torch.iinfo(index_dtype).max:
        _check.fail(f, "index_dtype", f"wide enough for K = {rows.K}", index_dtype)
    given = (rows.x.detach(), rows.codebook.detach(), rows.mask, rows.dot)
    if screen is not None and not isinstance(screen, bool):
        _check.fail(f, "screen", "True, False or None", repr(screen))
    bits = _INDEX_DTYPES[index_dtype]
    flags = (return_distance, return_score, _ops.SCREEN[screen])
    index, distance, score = torch.ops.fastseq.vq_nearest(*given, best, bits, *flags)
    shape = rows.lead if best == 1 else (*rows.lead, best)
    return Nearest(
        index.view(shape),
        distance.view(shape).to(rows.dtype) if return_distance else None,
        score.view(shape) if return_score else None,
    )


def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    gradient: str = "straight",
    sums: bool = False,
) -> Quantized:
    """The nearest code of each row, its squared distance, and sums of rows per code: one pass, and one backward.

    Args:
        x, codebook, metric, mask: as for ``vq_nearest``.
        gradient: where that of the codes goes: "straight", to x as it is; "rotation", to x turned and scaled as x must
            be to become its code (Fifty et al. 2024); "codes", to the chosen codes and not to x.
        sums: also count and add up the rows of each code (for k-means and moving averages; not differentiable).

    Returns:
        ``Quantized``. ``commitment`` is differentiable in x, ``codebook_error`` in the codebook; the loss of the
        VQ-VAE is the mean of the one over N*D, times beta, plus that of the other.

    Raises:
        ArgumentError: naming the argument.
    """
    _check.one_of("vq_quantize", "gradient", gradient, _ops.GRADIENTS)
    rows = _Rows("vq_quantize", x, codebook, metric, mask)
    out = _ops.vq(rows.x, rows.codebook, rows.mask, rows.dot, sums, gradient)
    quantized, index, commitment, error, counts, total = out
    if rows.lead != index.shape:
        quantized = quantized.view(x.shape)
        index, commitment, error = (t.view(rows.lead) for t in (index, commitment, error))
    if codebook.dim() == 2 and sums:
        counts, total = counts[0], total[0]
    quantized = quantized if quantized.dtype is rows.dtype else quantized.to(rows.dtype)
    return Quantized(quantized, index, commitment, error, counts if sums else None, total if sums else None)


def vq_sums(x: Tensor, index: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Number and sum of the rows of each code, always added up in the same order.

    Args:
        x: [N, D] or [G, N, D]. index: integers [N] or [G, N] in 0..K-1; rows of index -1 do not count.

    Returns:
        counts [K] or [G, K] and sums [K, D] or [G, K, D], of x's dtype (float32 for shorter ones).

    Raises:
        ArgumentError: naming the argument.
    """
    f = "vq_sums"
    if x.dim() not in (2, 3):
        _check.fail(f, "x", "[N, D] or [G, N, D]", list(x.shape))
    if x.dtype not in _COMPUTED:
        _check.fail(f, "x", "float32, float64, bfloat16 or float16", x.dtype)
    if index.dtype not in _INDEX_DTYPES:
        _check.fail(f, "index", "int64, int32 or int16", index.dtype)
    if index.shape != x.shape[:-1]:
        _check.fail(f, "index", f"x without D = {list(x.shape[:-1])}", list(index.shape))
    _check.device(f, "index", index, x.device)
    grouped = x.dim() == 3
    rows = (x.detach() if in_low_precision(x.device) else x.detach().to(_COMPUTED[x.dtype])).contiguous()
    place = index.to(torch.int64).contiguous()
    counts, sums = torch.ops.fastseq.vq_sums(rows if grouped else rows[None], place if grouped else place[None], K)
    return (counts, sums) if grouped else (counts[0], sums[0])


def _taken(dtype: torch.dtype, other: torch.dtype) -> torch.dtype:
    """As what the operators take a tensor beside another on a GPU: 16 bits as they are where the other has the same or
    float32."""
    if torch.float64 in (dtype, other):
        return torch.float64
    return dtype if other in (dtype, torch.float32) else torch.float32


class _Rows:
    """The arguments of a lookup, checked, and as the operators take them: x [G, N, D], codebook [G, K, D]."""

    def __init__(self, f: str, x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None) -> None:
        _check.one_of(f, "metric", metric, METRICS)
        if codebook.dim() not in (2, 3):
            _check.fail(f, "codebook", "[K, D] or [G, K, D]", list(codebook.shape))
        G, (K, D) = codebook.shape[0] if codebook.dim() == 3 else 1, codebook.shape[-2:]
        if K < 1 or D < 1 or G < 1:
            _check.fail(f, "codebook", "without empty dimensions", list(codebook.shape))
        if x.dim() < codebook.dim() - 1 or x.shape[-1] != D or (codebook.dim() == 3 and x.shape[0] != G):
            lead = f"G = {G}, ..., " if codebook.dim() == 3 else "..., "
            _check.fail(f, "x", f"[{lead}D = {D}]", list(x.shape))
        for name, t in (("x", x), ("codebook", codebook)):
            if t.dtype not in _COMPUTED:
                _check.fail(f, name, "float32, float64, bfloat16 or float16", t.dtype)
        _check.device(f, "codebook", codebook, x.device)
        self.dtype, self.lead, self.K, self.dot = x.dtype, x.shape[:-1], K, metric != "l2"
        if metric == "cosine" or not in_low_precision(x.device):
            computed = torch.promote_types(_COMPUTED[x.dtype], _COMPUTED[codebook.dtype])
            x, codebook = x.to(computed), codebook.to(computed)
        else:
            x, codebook = x.to(_taken(x.dtype, codebook.dtype)), codebook.to(_taken(codebook.dtype, x.dtype))
        if metric == "cosine":
            x, codebook = F.normalize(x, dim=-1), F.normalize(codebook, dim=-1)
        if codebook.dim() == 2 or x.dim() != 3:
            x = x.reshape(G, -1, D) if x.numel() else x.reshape(G, x.shape[:-1].numel() // G, D)
        self.x, self.codebook = x.contiguous(), codebook.reshape(G, K, D).contiguous()
        self.mask: Tensor | None = None
        if mask is not None:
            _check.dtype(f, "mask", mask, torch.bool)
            _check.device(f, "mask", mask, x.device)
            if mask.shape != self.lead and (codebook.dim() == 2 or mask.shape != self.lead[1:]):
                _check.fail(f, "mask", f"x without D = {list(self.lead)}", list(mask.shape))
            self.mask = mask.expand(self.lead).reshape(G, -1).contiguous()

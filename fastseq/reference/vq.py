"""Vector quantization (van den Oord et al. 2017): nearest codeword, its gradients, and the sums of k-means.

Sizes: G codebooks (heads or groups), N rows, K codes, D dimensions, M levels of a residual quantizer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 256  # scores are formed for so many rows at a time
_EPS = 1e-6  # least length that the rotation divides by


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c``; in float32 rounded once, as processors do it, in float64 rounded twice.

    The product of two float32 is exact in float64. Its sum with c, rounded to odd there, rounds to float32 as the
    exact sum would (Boldo and Melquiond 2008).
    """
    if c.dtype == torch.float64:
        return a * b + c
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)  # what the rounding of total lost (Knuth's two-sum)
    bits = total.view(torch.int64)
    away = (rest > 0) == (total > 0)  # the exact sum lies further from zero than total
    odd = torch.where((rest != 0) & total.isfinite() & (bits % 2 == 0), torch.where(away, bits + 1, bits - 1), bits)
    return odd.view(torch.float64).float()


def vq_scores(x: Tensor, codebook: Tensor, dot: bool = False) -> Tensor:
    """What ``vq_nearest`` takes the minimum of: c*c/2 - x*c, half the squared distance without the share of x alone.

    Each is one chain of fused multiply-adds over D in ascending order, beginning with c*c/2. That is the sum in
    ascending order in float64, halved and rounded. So a score depends on its row and its code alone. Where it is not
    finite the chain begins with +inf.

    Args:
        x: [G, N, D]. codebook: [G, K, D]. dot: leave out c*c/2 (begin with zero, or with +inf as above).

    Returns:
        [G, N, K].
    """
    c = codebook.double()
    start = torch.zeros_like(c[..., 0])
    for d in range(c.shape[-1]):
        start = start + c[..., d] * c[..., d]
    start = (0.5 * start).to(x.dtype)
    start = torch.where(start < torch.inf, torch.zeros_like(start) if dot else start, torch.inf)
    scores = start[:, None, :].expand(*x.shape[:2], codebook.shape[1])
    for d in range(x.shape[-1]):
        scores = fused(-x[..., d, None], codebook[:, None, :, d], scores)
    return scores


def vq_nearest(x: Tensor, codebook: Tensor, mask: Tensor | None = None, dot: bool = False, best: int = 1) -> Tensor:
    """The codes with the smallest scores, best first; among equals the lower index comes first.

    A code whose c*c/2 is not finite is never taken before another. A row that is not finite gets 0, 1, 2 and so on.

    Args:
        x: [G, N, D]. codebook: [G, K, D]. mask: bool [G, N], the rows that count. dot: see ``vq_scores``.
        best: how many, at most K.

    Returns:
        int64 [G, N, best]; -1 in the rows that do not count.
    """
    found = []
    for rows in x.detach().split(_ROWS, dim=1):
        scores = vq_scores(rows, codebook.detach(), dot)
        scores = torch.where(scores.isnan() | ~rows.isfinite().all(-1, keepdim=True), torch.inf, scores)
        found.append(scores.sort(dim=-1, stable=True).indices[..., :best])
    index = torch.cat(found, dim=1) if found else x.new_empty(*x.shape[:2], best, dtype=torch.int64)
    return index if mask is None else index.masked_fill(~mask[..., None], -1)


def vq_gather(codebook: Tensor, index: Tensor) -> Tensor:
    """Codes [G, N, D] of ``index`` [G, N]; zeros where it is -1."""
    codes = codebook.gather(1, index.long().clamp_min(0)[..., None].expand(*index.shape, codebook.shape[-1]))
    return torch.where((index >= 0)[..., None], codes, 0.0)


def vq_sums(x: Tensor, index: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Number and sum of the rows of each code: [G, K] and [G, K, D] of x's dtype; rows of index -1 do not count."""
    valid = (index >= 0)[..., None]
    places = index.long().clamp_min(0)[..., None]
    counts = x.new_zeros(x.shape[0], K).scatter_add(1, places[..., 0], valid[..., 0].to(x.dtype))
    rows = torch.where(valid, x, 0.0)
    return counts, x.new_zeros(x.shape[0], K, x.shape[-1]).scatter_add(1, places.expand_as(x), rows)


def vq_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, dot: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest codes of the rows.

    Args:
        x: [G, N, D]. codebook: [G, K, D]. mask: bool [G, N]. dot: see ``vq_scores``.

    Returns:
        The codes [G, N, D], zeros in rows that do not count; their index [G, N]; the squared distance of row and code
        [G, N], zero in rows that do not count. Codes and distances are differentiable in x and in the codebook.
    """
    index = vq_nearest(x, codebook, mask, dot)[..., 0]
    codes = vq_gather(codebook, index)
    return codes, index, torch.where(index >= 0, (x - codes).square().sum(-1), 0.0)


def vq_straight_through(x: Tensor, codes: Tensor, index: Tensor) -> Tensor:
    """The codes, whose gradient goes to x as it is (Bengio et al. 2013); rows of index -1 pass none."""
    return codes.detach() + torch.where((index >= 0)[..., None], x - x.detach(), 0.0)


def vq_rotation(x: Tensor, codes: Tensor, index: Tensor) -> Tensor:
    """The codes, whose gradient goes to x turned and scaled as x must be to become its code (Fifty et al. 2024)."""
    u, v, w, scale = _turn(x.detach(), codes.detach())
    moved = x - x.detach()  # zero, with the gradient of x
    turned = moved - 2 * w * (moved * w).sum(-1, keepdim=True) + 2 * v * (moved * u).sum(-1, keepdim=True)
    return codes.detach() + torch.where((index >= 0)[..., None], scale * turned, 0.0)


def _turn(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The directions of rows, of codes and between the two, [G, N, D], and the ratio of lengths [G, N, 1]."""
    long, short = codes.norm(dim=-1, keepdim=True), x.norm(dim=-1, keepdim=True).clamp_min(_EPS)
    u, v = x / short, codes / long.clamp_min(_EPS)
    return u, v, F.normalize(u + v, dim=-1, eps=_EPS), long / short


def vq_backward(
    dquantized: Tensor | None,
    dcommitment: Tensor | None,
    dcodebook_error: Tensor | None,
    x: Tensor,
    codes: Tensor,
    index: Tensor,
    K: int,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the codebook.

    Args:
        dquantized: [G, N, D], of what ``gradient`` made of the codes: "straight", "rotation", or "codes", where it
            goes to the chosen codes and not to x.
        dcommitment: [G, N], of the squared distance to a code that is held fixed.
        dcodebook_error: [G, N], of the squared distance to a row that is held fixed.
        x, codes: [G, N, D]. index: [G, N].

    Returns:
        dx [G, N, D] and dcodebook [G, K, D]; what is held fixed is so in their derivatives too.
    """
    dx, dcodes = torch.zeros_like(x), torch.zeros_like(x)
    valid = (index >= 0)[..., None]
    if dquantized is not None and gradient == "codes":
        dcodes = dcodes + dquantized
    elif dquantized is not None:
        d = dquantized
        if gradient == "rotation":
            u, v, w, scale = _turn(x.detach(), codes.detach())
            d = scale * (d - 2 * w * (d * w).sum(-1, keepdim=True) + 2 * u * (d * v).sum(-1, keepdim=True))
        dx = dx + torch.where(valid, d, 0.0)
    if dcommitment is not None:
        dx = dx + torch.where(valid, 2 * dcommitment[..., None] * (x - codes.detach()), 0.0)
    if dcodebook_error is not None:
        dcodes = dcodes + 2 * dcodebook_error[..., None] * (codes - x.detach())
    return dx, vq_sums(dcodes, index, K)[1]

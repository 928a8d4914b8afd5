"""Definitions of what compression makes of a matrix: rounding, integers with scales, and thin factors.

Rounding, clipping and the truncated SVD are those of G2-LSTM (Li et al., ICML 2018), where they change the matrices of
the input and forget gates alone, each on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(weight: Tensor, step: float, clip: float | None = None) -> Tensor:
    """``step * round(weight / step)``, ties to even, then what is beyond -clip .. clip moved to its end.

    step 0.2 and clip 0.4 leave five values, as in the paper's language model; 0.5 and 1 in its translation.
    """
    found = (weight / step).round() * step
    return found if clip is None else found.clamp(-clip, clip)


def integer_rows(weight: Tensor, bits: int = 8, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Integers of ``bits`` bits, and the scale of each row, or of each ``group`` neighbours in a row.

    Symmetric: a scale is the largest magnitude over 2**(bits - 1) - 1, so the least integer is not used and zero stays
    zero. The last group of a row may be shorter.

    Args:
        weight: [N, K]. bits: 2 .. 8.

    Returns:
        int8 [N, K], and scales [N, groups] in weight's dtype, 0 where all weights are 0.
    """
    N, K = weight.shape
    group = max(K, 1) if group is None else group
    most = 2 ** (bits - 1) - 1
    padded = torch.nn.functional.pad(weight, (0, -K % group)).view(N, -(-K // group), group)
    scale = padded.abs().amax(-1) / most
    found = (padded / torch.where(scale > 0, scale, 1)[..., None]).round().clamp(-most, most)
    return found.to(torch.int8).flatten(1)[:, :K], scale


def integer_values(integers: Tensor, scale: Tensor, group: int | None = None) -> Tensor:
    """The weights that ``integer_rows`` stands for, in the dtype of ``scale``."""
    K = integers.shape[1]
    group = max(K, 1) if group is None else group
    return integers.to(scale.dtype) * scale.repeat_interleave(group, 1)[:, :K]


def low_rank(weight: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The factors up [N, rank] and down [rank, K] whose product is nearest to weight [N, K].

    Nearest in the sum of squared differences, which is the truncated SVD; with ``moment`` in the mean squared
    difference of the products with inputs x of that second moment, E[x x^T] [K, K]. Columns of ``up`` are orthonormal,
    and the largest entry of each is positive. Computed in float64.
    """
    left = _left(weight, moment)[0][:, :rank]
    return left.to(weight.dtype), (left.mT @ weight.double()).to(weight.dtype)


def rank_of_energy(weight: Tensor, energy: float, moment: Tensor | None = None) -> int:
    """The least rank, 1 at the least, whose ``low_rank`` keeps this share of the sum of squares (that of products with
    inputs where there is a ``moment``)."""
    squares = _left(weight, moment)[1].square()
    kept = squares.cumsum(0)
    enough = kept >= energy * kept[-1:] * (1 - 1e-12)
    return int(enough.int().argmax()) + 1 if len(squares) else 1


def _left(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of weight, or of weight times the root of ``moment``."""
    wide = weight.double()
    if moment is not None:
        values, vectors = torch.linalg.eigh(moment.double())
        wide = wide @ (vectors * values.clamp_min(0).sqrt())
    left, found, _ = torch.linalg.svd(wide, full_matrices=False)
    largest = left.gather(0, left.abs().argmax(0, keepdim=True)) if left.numel() else left[:1]
    return left * torch.where(largest < 0, -1.0, 1.0), found

"""``CodebookUsage``: how evenly codes are used over an epoch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _check
from fastseq.nn._ranks import device, largest_, ranks, sum_

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MOST_DIMS = 8


class Usage(NamedTuple):
    """What ``CodebookUsage.compute`` returns: one number per codebook, shaped as the ``codebook_dims`` are sized."""

    usage: Tensor  # float64, entropy of the codes as a share of log K, in 0..1; 1 where K is 1, 0 without rows
    perplexity: Tensor  # float64, 2 to the power of the entropy in bits: as many evenly used codes would do; 1..K
    used: Tensor  # int64, codes that occurred
    dead: Tensor  # int64, the others
    rows: Tensor  # int64, indices counted


class CodebookUsage:
    """Counts codes over many batches; a single small batch would show too little use.

    Entropy as in Lancucki et al. 2020, whose "usage" is its share of log K.

    Args:
        codebook_dims: dimensions of the indices that number codebooks: () is one codebook for all; (-1,) for the
            levels of a ``ResidualVQ`` or separate codebooks per head; (0, -1) for a ``GroupedResidualVQ``.
    """

    def __init__(self, codebook_dims: tuple[int, ...] = ()) -> None:
        self.codebook_dims = tuple(codebook_dims)
        self.counts: Tensor | None = None  # [codebooks, K + 1], the last for indices that do not exist
        self._sizes: tuple[int, ...] = ()

    @torch.no_grad()
    def update(self, indices: Tensor, K: int) -> None:
        """Count one batch, without waiting for the device.

        Args:
            indices: integers in -1..K-1, any shape; -1 does not count.
            K: codes in each codebook, the same in every call.

        Raises:
            ArgumentError: for another dtype, sizes or K than before.
        """
        f = "CodebookUsage.update"
        if indices.dtype not in _INTEGERS:
            _check.fail(f, "indices", "integers", indices.dtype)
        if isinstance(K, bool) or not isinstance(K, int) or K < 1:
            _check.fail(f, "K", "an integer >= 1", repr(K))
        least = max(len(self.codebook_dims), *(d + 1 if d >= 0 else -d for d in self.codebook_dims), 0)
        if indices.dim() < least:
            _check.fail(f, "indices", f"of {least} dimensions at least", list(indices.shape))
        front = indices.movedim(self.codebook_dims, tuple(range(len(self.codebook_dims))))
        sizes = tuple(front.shape[: len(self.codebook_dims)])
        if self.counts is None:
            self._sizes = sizes
            self.counts = torch.zeros(math.prod(sizes), K + 1, dtype=torch.int64, device=indices.device)
        if K + 1 != self.counts.shape[1]:
            _check.fail(f, "K", f"{self.counts.shape[1] - 1} as before", K)
        if sizes != self._sizes:
            _check.fail(f, "indices", f"sized {list(self._sizes)} in dimensions {self.codebook_dims} as before", sizes)
        flat = front.reshape(len(self.counts), -1 if front.numel() else 0).long()
        exists = (flat >= -1) & (flat < K)
        place = torch.where(exists, flat.clamp_min(0), K)
        self.counts.scatter_add_(1, place, (flat != -1).long())

    @torch.no_grad()
    def compute(self) -> Usage:
        """The numbers of all updates since the last ``reset``, of all ranks: every rank must call it.

        A rank without updates takes part, if there is one with.

        Raises:
            ArgumentError: without any update, or when indices were out of range.
        """
        counts, sizes = self._of_all_ranks()
        if not counts.numel():
            _check.fail("CodebookUsage.compute", "indices", "given by update() before", "none")
        K, wrong = counts.shape[1] - 1, int(counts[:, -1].sum())
        if wrong:
            _check.fail("CodebookUsage", "indices", f"in -1..K-1 = -1..{K - 1}", f"{wrong} others")
        counts = counts[:, :K].reshape(*sizes, K)
        rows = counts.sum(-1)
        share = counts.double() / rows.clamp_min(1)[..., None]
        entropy = 0.0 - torch.special.xlogy(share, share).sum(-1)
        usage = entropy / math.log(K) if K > 1 else (rows > 0).double()
        used = (counts > 0).sum(-1)
        return Usage(usage, entropy.exp(), used, K - used, rows)

    def reset(self) -> None:
        """Forget everything, as at the start of an epoch."""
        self.counts, self._sizes = None, ()

    def _of_all_ranks(self) -> tuple[Tensor, tuple[int, ...]]:
        """Counts summed over the ranks, of which some may have none, and the sizes of ``codebook_dims``."""
        own = self.counts
        if ranks()[1] == 1:
            return (torch.zeros(0, 1, dtype=torch.int64), ()) if own is None else (own, self._sizes)
        shape = torch.zeros(_MOST_DIMS + 1, dtype=torch.int64, device=device() if own is None else own.device)
        if own is not None:
            shape[0] = own.shape[1]
            shape[1 : 1 + len(self._sizes)] = torch.tensor(self._sizes, dtype=torch.int64)
        width, *sizes = largest_(shape).tolist()
        sizes = sizes[: len(self.codebook_dims)]
        if own is None:
            own = torch.zeros(math.prod(sizes), width, dtype=torch.int64, device=shape.device)
        return sum_(own.clone()), tuple(sizes)


def bits_per_dimension(log_likelihood: float | Tensor, codes: int, K: int, dimensions: int) -> float | Tensor:
    """Bits that a VQ autoencoder needs per dimension of its input, every code at the full log K (Lancucki et al. 2020).

    Args:
        log_likelihood: log p(x | codes) of a sample, in nats, <= 0 for discrete x.
        codes: codes per sample: positions times codebooks, >= 0.
        K: codes in each codebook, >= 1.
        dimensions: of a sample, as 3 * 32 * 32 for CIFAR-10, >= 1.

    Returns:
        (codes * ln K - log_likelihood) / (dimensions * ln 2).

    Raises:
        ArgumentError: naming the argument.
    """
    for name, value, least in (("codes", codes, 0), ("K", K, 1), ("dimensions", dimensions, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            _check.fail("bits_per_dimension", name, f"an integer >= {least}", repr(value))
    return (codes * math.log(K) - log_likelihood) / (dimensions * math.log(2))

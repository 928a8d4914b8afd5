"""``ShardedCodebook``: a codebook too large for one device, each rank holding a part."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq import _check, functional
from fastseq.nn._rank_tensors import RankTensors
from fastseq.nn._ranks import gather, ranks, smallest_, sum_

_LAST = torch.iinfo(torch.int64).max
_WORD = 0xFFFFFFFF


class Sharded(NamedTuple):
    """What ``ShardedCodebook`` returns, shaped as x without its last dimension unless said otherwise."""

    quantized: Tensor  # [..., D], the codes (of length 1 for "cosine"), whose gradient goes to x as it is
    indices: Tensor  # int64, in the whole codebook; -1 where the mask is False
    commitment: Tensor  # squared distance of row and code, gradient to x; 0 where the mask is False


class ShardedCodebook(RankTensors):
    """K codes, of which each rank of ``torch.distributed`` holds K / ranks, learned there by moving averages.

    The index is that of ``functional.vq_nearest`` with the whole codebook: every rank finds the best of its own codes,
    and the least of the scores, with the index behind it in one int64, is found by one all-reduce. A second one
    brings the codes. Every rank must call it, and the same number of times.

    Its state_dict is that of the rank's own part, which no other rank loads. Codes and averages are no buffers, so
    ``DistributedDataParallel`` leaves them alone.

    Args:
        dim: D >= 1.
        codebook_size: K of the whole, 1..2**31.
        metric: "l2" or "cosine".
        decay: of the moving averages, in [0, 1].
        eps: smooths the counts, > 0.
        gather_rows: the rows differ from rank to rank and are gathered first (their numbers too, which the host waits
            for); else every rank must give the same rows.
        device: of the codes, which are float32.

    Raises:
        ArgumentError: naming the argument.
    """

    rank_tensors = ("embed", "embed_avg", "cluster_size", "part")
    embed: Tensor  # [own K, D]
    embed_avg: Tensor  # [own K, D]
    cluster_size: Tensor  # [own K]
    part: Tensor  # int64 [3]: first own code, one past the last, K

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        metric: str = "l2",
        decay: float = 0.8,
        eps: float = 1e-5,
        gather_rows: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__()
        f = "ShardedCodebook"
        for name, value in (("dim", dim), ("codebook_size", codebook_size)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**31:
                _check.fail(f, name, "an integer in 1..2**31", repr(value))
        _check.one_of(f, "metric", metric, ("l2", "cosine"))
        _check.probability(f, "decay", decay)
        _check.positive(f, "eps", eps)
        self.dim, self.codebook_size, self.metric = dim, codebook_size, metric
        self.decay, self.eps, self.gather_rows = decay, eps, gather_rows
        rank, size = ranks()
        least, more = divmod(codebook_size, size)  # the first ``more`` ranks hold one code more
        self.start = rank * least + min(rank, more)
        self.stop = self.start + least + (rank < more)
        self.most = least + (more > 0)
        # all codes are drawn, so that ranks with one seed get different ones
        whole = torch.empty(1, codebook_size, dim, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(whole)
        self.embed = self._scaled(whole[0, self.start : self.stop]).clone()
        self.embed_avg = self.embed.clone()
        self.cluster_size = torch.ones(len(self.embed), device=device, dtype=torch.float32)
        self.part = torch.tensor([self.start, self.stop, codebook_size])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Sharded:
        """The nearest codes; while training the moving averages learn from the rows.

        Args:
            x: [..., D], float32, bfloat16 or float16.
            mask: bool [...], the rows that count.

        Raises:
            ArgumentError: naming the argument.
        """
        f = "ShardedCodebook"
        if x.dim() < 1 or x.shape[-1] != self.dim:
            _check.fail(f, "x", f"[..., D = {self.dim}]", list(x.shape))
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            _check.fail(f, "x", "float32, bfloat16 or float16", x.dtype)
        _check.device(f, "x", x, self.embed.device)
        if mask is not None:
            _check.shape(f, "mask", mask, "x without D", *x.shape[:-1])
            _check.dtype(f, "mask", mask, torch.bool)
        rows, counted, own = self._rows(x.detach().reshape(-1, self.dim).float(), mask)
        index, codes = self._lookup(rows, counted)
        if self.training and len(rows):
            self._learn(rows, index)
        index, codes = index[own].view(x.shape[:-1]), codes[own].view(x.shape).to(x.dtype)
        valid = (index >= 0)[..., None]
        apart = self._scaled(x) - codes
        commitment = torch.where(valid, apart, 0.0).square().sum(-1)
        return Sharded(codes + torch.where(valid, x - x.detach(), 0.0), index, commitment)

    @torch.no_grad()
    def load_codes(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Overwrite all codes by ``codes`` [K, D] and the moving averages to match; each rank takes its part.

        Args:
            counts: [K], the rows per code that the averages begin with; None leaves them.

        Raises:
            ArgumentError: for another shape.
        """
        _check.shape("load_codes", "codes", codes, "K, D", self.codebook_size, self.dim)
        if counts is not None:
            _check.shape("load_codes", "counts", counts, "K", self.codebook_size)
            self.cluster_size.copy_(counts[self.start : self.stop])
        self.embed.copy_(self._scaled(codes[self.start : self.stop]))
        self.embed_avg.copy_(self.embed * self.cluster_size[:, None])

    @torch.no_grad()
    def all_codes(self) -> Tensor:
        """The whole codebook [K, D], on every rank; every rank must call it."""
        padded = self.embed.new_zeros(self.most, self.dim)
        padded[: len(self.embed)] = self.embed
        size = ranks()[1]
        more = self.codebook_size % size or size
        parts = [p[: self.most - (r >= more)] for r, p in enumerate(gather(padded))]
        return torch.cat(parts)

    def load_refused(self, tensors: dict[str, Tensor]) -> str | None:
        """Why these cannot be loaded, or None."""
        own = [self.start, self.stop, self.codebook_size]
        given = tensors["part"].tolist()
        if given != own:
            return f"part (first code, end, K) must be {own}, got {given}: saved by another rank or number of ranks"
        return super().load_refused(tensors)

    def extra_repr(self) -> str:
        """The sizes and this rank's part."""
        text = f"dim={self.dim}, codebook_size={self.codebook_size}, metric={self.metric!r}"
        return f"{text}, codes {self.start}..{self.stop - 1} here"

    def _scaled(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.metric == "cosine" else x

    def _rows(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, slice]:
        """The rows that all ranks quantize, which of them count, and where those of this rank are."""
        x, N = self._scaled(x), len(x)
        counted = x.new_ones(N, dtype=torch.bool) if mask is None else mask.reshape(-1)
        if not self.gather_rows or ranks()[1] == 1:
            return x, counted, slice(0, N)
        most = int(gather(torch.tensor(N, device=x.device)).max())
        padded = x.new_zeros(most, self.dim + 1)
        padded[:N, : self.dim], padded[:N, self.dim] = x, counted.to(x.dtype)
        if most:
            padded = gather(padded).flatten(0, 1)
        start = ranks()[0] * most
        return padded[:, : self.dim].contiguous(), padded[:, self.dim] > 0, slice(start, start + N)

    @torch.no_grad()
    def _lookup(self, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [N] in the whole codebook and the codes [N, D] of rows that all ranks share."""
        if not len(x):
            return x.new_zeros(0, dtype=torch.int64), x
        codes = self._scaled(self.embed.float())
        best = x.new_full((len(x),), _LAST, dtype=torch.int64)
        if len(codes):
            metric = "dot" if self.metric == "cosine" else "l2"
            found = functional.vq_nearest(x, codes, metric=metric, return_score=True)
            assert found.score is not None
            best = (_ordered(found.score) << 32) | (found.index + self.start)
        index = smallest_(best) & _WORD
        index = torch.where(counted, index, -1)
        mine = (index >= self.start) & (index < self.stop)
        quantized = x.new_zeros(x.shape)
        if len(codes):
            place = (index - self.start).clamp(0, len(codes) - 1)
            quantized = torch.where(mine[:, None], codes[place], 0.0)
        return index, sum_(quantized)

    @torch.no_grad()
    def _learn(self, x: Tensor, index: Tensor) -> None:
        """Moving averages of the own codes; all that is exchanged is the sum of their counts."""
        K = len(self.embed)
        if K:
            mine = (index >= self.start) & (index < self.stop)
            counts, sums = functional.vq_sums(x, torch.where(mine, index - self.start, -1), K)
            self.cluster_size.lerp_(counts.to(self.cluster_size), 1 - self.decay)
            self.embed_avg.lerp_(sums.to(self.embed_avg), 1 - self.decay)
        total = sum_(self.cluster_size.sum())
        if K:
            smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
            self.embed.copy_(self._scaled(self.embed_avg / smoothed[:, None]))


def _ordered(score: Tensor) -> Tensor:
    """int64 in the order of the float32 ``score``, in the range of int32; equal for both zeros."""
    bits = (score + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()

"""``AffineCodebook``: codes moved and scaled with the rows, so that they need not be relearned as these drift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.nn._ranks import sum_over_ranks
from fastseq.nn.codebook import Codebook

_LEAST = 1e-5  # least variance
_BATCH = ("batch_mean", "batch_variance")
_CODES = ("codebook_mean", "codebook_variance")


class AffineCodebook(Codebook):
    """A codebook whose codes take the mean and variance of the rows (Huh et al. 2023, section 4.1).

    A code c stands for ``(c - codebook_mean) * sqrt(batch_variance / codebook_variance) + batch_mean``. The four are
    moving averages, learned while training alone; until then a code stands for itself.

    Args:
        *args, **kwargs: as for ``Codebook``.
        sync_affine_param: average the rows of all ranks, by an all-reduce of its own.
        affine_param_batch_decay, affine_param_codebook_decay: of the averages, in [0, 1].
    """

    batch_mean: Tensor | None
    batch_variance: Tensor | None
    codebook_mean: Tensor
    codebook_variance: Tensor

    def __init__(
        self,
        *args: Any,
        sync_affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sync_affine_param = sync_affine_param
        self.affine_param_batch_decay = affine_param_batch_decay
        self.affine_param_codebook_decay = affine_param_codebook_decay
        G, _, D = self.embed.shape
        for name in _BATCH:
            self.register_buffer(name, None)  # no entry of the state_dict before the first batch
        for name, start in zip(_CODES, (torch.zeros(G, 1, D), torch.ones(G, 1, D)), strict=True):
            self.register_buffer(f"{name}_needs_init", torch.tensor(True))
            self.register_buffer(name, start)

    @torch.no_grad()
    def prepare(self, rows: Tensor, mask: Tensor | None) -> None:
        """Average mean and variance of rows [G, N, D] and codes; mask: bool [G, N], the rows that count."""
        if not self.training:
            return
        decay = self.affine_param_codebook_decay
        codes = self.embed.detach()
        found = (codes.mean(1, keepdim=True), codes.var(1, keepdim=True, correction=0))
        for name, new in zip(_CODES, found, strict=True):
            old, first = getattr(self, name), getattr(self, f"{name}_needs_init")
            old.copy_(torch.where(first, new, old * decay + new * (1 - decay)))
            first.fill_(False)
        self._average_rows(rows.detach(), mask)

    def _average_rows(self, rows: Tensor, mask: Tensor | None) -> None:
        shift = self.codebook_mean.to(rows)  # a common one, for differences of sums that do not cancel
        apart = rows - shift
        if mask is not None:
            apart = torch.where(mask[..., None], apart, 0.0)
        count = torch.full_like(shift, rows.shape[1]) if mask is None else mask.sum(1)[:, None, None].expand_as(shift)
        sums = [count.to(rows.dtype), apart.sum(1, keepdim=True), apart.square().sum(1, keepdim=True)]
        if self.sync_affine_param:
            sums = sum_over_ranks(sums)
        count, first, second = sums
        mean = first / count.clamp_min(1)
        variance = (second / count.clamp_min(1) - mean.square()).clamp_min(0)
        decay = self.affine_param_batch_decay
        for name, new in zip(_BATCH, (mean + shift, variance), strict=True):
            old = getattr(self, name)
            new = new.to(self.embed)
            if old is None:
                setattr(self, name, new.clone())
            else:
                old.copy_(torch.where(count > 0, old * decay + new * (1 - decay), old))

    def _map(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Means of codes and of rows, and the ratio of their deviations; None before the first batch."""
        if self.batch_mean is None or self.batch_variance is None:
            return None
        ratio = (self.batch_variance.clamp_min(_LEAST) / self.codebook_variance.clamp_min(_LEAST)).sqrt()
        return self.codebook_mean.clone(), self.batch_mean.clone(), ratio

    def codes(self, snapshot: bool = False) -> Tensor:
        """The codes [G, K, D] that rows are compared with, moved and scaled."""
        codes, found = super().codes(snapshot), self._map()
        return codes if found is None else (codes - found[0]) * found[2] + found[1]

    def to_codebook(self, rows: Tensor) -> Tensor:
        """Rows [G, N, D] moved and scaled back, as they are averaged into codes."""
        found = self._map()
        return rows if found is None else (rows - found[1]) / found[2] + found[0]

    def sums_to_codebook(self, counts: Tensor, sums: Tensor) -> Tensor:
        """``to_codebook`` of each of the rows whose numbers and sums these are, added up."""
        found = self._map()
        if found is None:
            return sums
        counts = counts[..., None]
        return (sums - counts * found[1]) / found[2] + counts * found[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in _BATCH:
            given = state_dict.get(prefix + name)
            setattr(self, name, None if given is None else torch.empty_like(given, device=self.embed.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

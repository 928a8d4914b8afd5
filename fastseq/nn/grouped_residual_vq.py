"""``GroupedResidualVQ``: as the class of this name in vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import _check
from fastseq.nn.residual_vq import ResidualVQ


class GroupedResidualVQ(nn.Module):
    """A ``ResidualVQ`` for each of several equal parts of the features (Yang et al. 2023, "HiFi-Codec").

    A drop-in for the class of this name in vector-quantize-pytorch. All groups use the same number of levels.

    Args:
        dim: of the input, a multiple of ``groups``.
        groups: number of parts.
        accept_image_fmap: the input is [B, dim, H, W].
        kwargs: of ``ResidualVQ``, for every group.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            _check.fail("GroupedResidualVQ", "groups", f"a divisor of dim = {dim}", groups)
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        options = {"dim": dim // groups, "accept_image_fmap": accept_image_fmap, **kwargs}
        self.rvqs = nn.ModuleList(ResidualVQ(**options) for _ in range(groups))

    def _groups(self) -> list[ResidualVQ]:
        return list(self.rvqs)  # type: ignore[arg-type]

    @property
    def codebooks(self) -> Tensor | tuple[tuple[Tensor, ...], ...]:
        """[G, M, K, D], or where the sizes of levels differ a tuple of G tuples."""
        codebooks: Any = tuple(rvq.codebooks for rvq in self._groups())
        return torch.stack(codebooks) if self._groups()[0].uniform_codebook_size else codebooks

    @property
    def split_dim(self) -> int:
        """The dimension of the features."""
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """The codes of each group and level: indices [G, B, ..., m] give [G, M, B, ..., codebook_dim]."""
        self._check_groups("get_codes_from_indices", indices)
        return torch.stack([rvq.get_codes_from_indices(own) for rvq, own in zip(self._groups(), indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """What ``forward`` at evaluation returned, channels last: indices [G, B, ..., m] give [B, ..., dim]."""
        self._check_groups("get_output_from_indices", indices)
        parts = [rvq.get_output_from_indices(own) for rvq, own in zip(self._groups(), indices, strict=True)]
        return torch.cat(parts, dim=-1)

    def _check_groups(self, function: str, indices: Tensor | Sequence[Tensor]) -> None:
        if len(indices) != self.groups:
            _check.fail(function, "indices", f"of groups = {self.groups}", f"of {len(indices)}")

    def forward(
        self,
        x: Tensor,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        mask: Tensor | None = None,
        n_quantizers: int | Tensor | None = None,
    ) -> tuple[Any, ...]:
        """
        Args:
            x: [B, N, dim], [B, dim], or with ``accept_image_fmap`` [B, dim, H, W].
            indices: [G, B, N, M], or one for each group; as in ``ResidualVQ``.
            return_all_codes, sample_codebook_temp, freeze_codebook, mask, n_quantizers: as in ``ResidualVQ``.

        Returns:
            quantized, shaped as x; indices [G, B, N, M]; losses [G, M]; with ``return_all_codes`` a tuple of the codes
            of each group. With ``indices``: quantized and the sum of the cross-entropies.

        Raises:
            ArgumentError: naming the argument.
        """
        axis = self.split_dim
        if x.dim() < 2 or x.shape[axis] != self.dim:
            _check.fail("GroupedResidualVQ", "x", f"of dim = {self.dim} features", list(x.shape))
        given: Sequence[Any] = (None,) * self.groups
        if indices is not None and len(indices):
            self._check_groups("GroupedResidualVQ", indices)
            given = list(indices)
        if n_quantizers is None and self.training and given[0] is None:
            n_quantizers = self._groups()[0].draw_levels(len(x), x.device)
        options = {
            "mask": mask,
            "return_all_codes": return_all_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "freeze_codebook": freeze_codebook,
            "n_quantizers": n_quantizers,
        }
        parts = zip(self._groups(), x.chunk(self.groups, dim=axis), given, strict=True)
        quantized, *rest = zip(*(rvq(part, indices=own, **options) for rvq, part, own in parts), strict=True)
        joined = torch.cat(quantized, dim=axis)
        if given[0] is not None:
            return joined, sum(rest[0])
        return joined, torch.stack(rest[0]), torch.stack(rest[1]), *rest[2:]

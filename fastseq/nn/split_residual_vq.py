"""``SplitResidualVQ``: two residual quantizers side by side, as in the Mimi codec."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastseq import _check
from fastseq.nn.residual_vq import ResidualVQ

_NAME = "SplitResidualVQ"


def projected(rvq: ResidualVQ) -> ResidualVQ:
    """``rvq`` with linear projections without biases around it, also where sizes are equal."""
    rvq.project_in = nn.Linear(rvq.dim, rvq.codebook_dim, bias=False)
    rvq.project_out = nn.Linear(rvq.codebook_dim, rvq.dim, bias=False)
    rvq.has_projections = True
    return rvq


class SplitResidualVQ(nn.Module):
    """Two residual quantizers that see the same input, and whose outputs are added (Defossez et al. 2024, "Moshi").

    In Mimi the first one has a single level, which learns the content of speech; the second one the rest of the sound.

    Args:
        dim: of the input.
        num_quantizers: levels of both together. num_semantic: of the first, >= 1 and below num_quantizers.
        codebook_size: codes of each level.
        codebook_dim: of the codes; None means ``dim``.
        projections: linear layers without biases before and after each of the two.
        kwargs: of ``ResidualVQ``, for both.
    """

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        num_semantic: int = 1,
        projections: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not 1 <= num_semantic < num_quantizers:
            expected = f"in 1..num_quantizers - 1 = 1..{num_quantizers - 1}"
            _check.fail(_NAME, "num_semantic", expected, num_semantic)
        if not projections and codebook_dim not in (None, dim):
            _check.fail(_NAME, "projections", f"True for codebook_dim = {codebook_dim} and dim = {dim}", projections)
        kwargs.update(dim=dim, codebook_size=codebook_size, codebook_dim=codebook_dim)
        self.dim, self.num_quantizers, self.num_semantic = dim, num_quantizers, num_semantic
        self.semantic = ResidualVQ(num_quantizers=num_semantic, **kwargs)
        self.acoustic = ResidualVQ(num_quantizers=num_quantizers - num_semantic, **kwargs)
        if projections:
            projected(self.semantic)
            projected(self.acoustic)

    def forward(self, x: Tensor, n_quantizers: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            x: [B, N, dim].
            n_quantizers: use only so many levels, 1..num_quantizers, those of the first quantizer first; None: all.

        Returns:
            quantized, shaped as x; indices [B, N, num_quantizers], -1 for levels that were not used; losses
            [num_quantizers].

        Raises:
            ArgumentError: naming the argument.
        """
        n, S = self.num_quantizers if n_quantizers is None else n_quantizers, self.num_semantic
        if not 1 <= n <= self.num_quantizers:
            _check.fail(_NAME, "n_quantizers", f"in 1..num_quantizers = 1..{self.num_quantizers}", n)
        quantized, indices, losses = self.semantic(x, n_quantizers=None if n_quantizers is None else min(n, S))
        if n <= S:
            rest = self.num_quantizers - S
            none = indices.new_full((*indices.shape[:-1], rest), -1)
            return quantized, torch.cat([indices, none], -1), torch.cat([losses, losses.new_zeros(rest)])
        more = self.acoustic(x, n_quantizers=None if n_quantizers is None else n - S)
        return quantized + more[0], torch.cat([indices, more[1]], -1), torch.cat([losses, more[2]])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` at evaluation returned with these indices, [B, N, dim].

        Args:
            indices: integers [B, N, m], the first m levels, m <= num_quantizers; -1 means no code.

        Raises:
            ArgumentError: more columns than levels; on the CPU also a number that is no code.
        """
        if indices.dim() < 2 or not 1 <= indices.shape[-1] <= self.num_quantizers:
            _check.fail(_NAME, "indices", f"[B, ..., 1 to {self.num_quantizers} levels]", list(indices.shape))
        first = self.semantic.get_output_from_indices(indices[..., : self.num_semantic])
        if indices.shape[-1] <= self.num_semantic:
            return first
        return first + self.acoustic.get_output_from_indices(indices[..., self.num_semantic :])

"""``SimVQ``: a fixed random codebook under a learned transform, as ``vector_quantize_pytorch.SimVQ``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastseq import _check
from fastseq.nn._indices import check_indices
from fastseq.nn.vq_lookup import nearest


class SimVQ(nn.Module):
    """A drop-in for ``vector_quantize_pytorch.SimVQ``: one linear layer learns all codes (Zhu et al., ICCV 2025).

    The lookup never forms a matrix of rows by codes, and what it returns while training are the codes themselves,
    which there are equal to them only up to rounding with the rotation trick.

    Args:
        dim: size of the input. codebook_size: number of codes, >= 1.
        codebook_transform: module that takes [K, frozen_codebook_dim] to [K, dim]; None: a linear layer without bias.
        init_fn: takes the normal draw [K, frozen_codebook_dim] to the fixed codebook.
        channel_first: the input is [B, dim, ...].
        rotation_trick: the gradient of the output goes to the input turned and scaled as the input must be to become
            its code (Fifty et al. 2024); otherwise as it is.
        input_to_quantize_commit_loss_weight: of the part of the loss that moves the input towards its code.
        commitment_weight: of the whole loss.
        frozen_codebook_dim: size of the fixed codes; None: dim.
    """

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] | None = None,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        frozen_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        for name, size in (("dim", dim), ("codebook_size", codebook_size), ("frozen_codebook_dim", frozen_dim)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                _check.fail("SimVQ", name, "an integer >= 1", repr(size))
        self.dim, self.codebook_size, self.channel_first = dim, codebook_size, channel_first
        self.rotation_trick, self.commitment_weight = rotation_trick, commitment_weight
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        codebook = torch.randn(codebook_size, frozen_dim) * frozen_dim**-0.5
        codebook = codebook if init_fn is None else init_fn(codebook)
        if codebook_transform is None:
            codebook_transform = nn.Linear(frozen_dim, dim, bias=False)
        self.code_transform = codebook_transform
        self.register_buffer("frozen_codebook", codebook)

    @property
    def codebook(self) -> Tensor:
        """The codes [K, dim], which are the fixed codebook, transformed."""
        codes: Tensor = self.code_transform(self.frozen_codebook)
        return codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            x: [B, ..., dim], or [B, dim, ...] with channel_first.

        Returns:
            The codes, laid out as x; their indices, int64 [B, ...]; and the loss, a scalar, in training and evaluation
            alike: the mean squared distance with its gradient to the codes, and, weighted, with that to x. It is zero
            where x is empty, and in a graph for ONNX.

        Raises:
            ArgumentError: wrong size or dtype.
        """
        given = x
        if self.channel_first and x.dim() > 1:
            x = x.movedim(1, -1)
        if x.dim() < 2 or x.shape[-1] != self.dim:
            layout = f"[B, dim = {self.dim}, ...]" if self.channel_first else f"[B, ..., dim = {self.dim}]"
            _check.fail("SimVQ", "x", layout, list(given.shape))
        gradient = "rotation" if self.rotation_trick else "straight"
        out = nearest(x.flatten(0, -2)[None], self.codebook[None], "l2", None, gradient, sums=False)
        commitment = self.input_to_quantize_commit_loss_weight * out.commitment.sum()
        loss = (out.codebook_error.sum() + commitment) / max(x.numel(), 1)
        quantized, index = out.quantized.view(x.shape), out.index.view(x.shape[:-1])
        return quantized.movedim(-1, 1) if self.channel_first else quantized, index, loss * self.commitment_weight

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """
        Args:
            indices: integers [B, ...] in 0..K-1.

        Returns:
            Their codes, laid out as the input of ``forward``.

        Raises:
            ArgumentError: no integers, or (on the CPU) not in 0..K-1.
        """
        check_indices("SimVQ", indices, self.codebook_size)
        codes: Tensor = self.code_transform(self.frozen_codebook[indices.long()])
        return codes.movedim(-1, 1) if self.channel_first else codes

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}"

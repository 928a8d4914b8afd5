"""``FactorizedResidualVQ``: a residual quantizer whose levels look up in a few dimensions of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq import _check, functional
from fastseq.nn import onnx
from fastseq.nn._indices import check_indices

_NAME = "FactorizedResidualVQ"


class FactorizedLevel(nn.Module):
    """One level: a linear map to a few dimensions, the code nearest by cosine, and a linear map back.

    Args:
        dim: of the rows. codebook_size: K. codebook_dim: of the codes.
    """

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(dim, codebook_dim)
        self.project_out = nn.Linear(codebook_dim, dim)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            rows: [..., dim]. mask: bool [...], the rows that count.

        Returns:
            The output [..., dim], its gradient straight through the lookup; indices [...], -1 where the mask is False;
            and the mean squared distance of row and code over all rows, masked ones as zero, once with its gradient to
            the rows and once to the codes.
        """
        latent = self.project_in(rows)
        index = self._nearest(latent, mask)
        codes = F.embedding(index.clamp_min(0), self.codebook.weight)
        to_rows, to_codes = latent - codes.detach(), codes - latent.detach()
        losses = []
        for difference in (to_rows, to_codes):
            squares = difference.float().square()
            squares = squares if mask is None else torch.where(mask[..., None], squares, 0.0)
            losses.append(squares.sum() / max(squares.numel(), 1))
        through = codes.detach() + (latent - latent.detach())
        return self.project_out(through), index, losses[0], losses[1]

    def _nearest(self, latent: Tensor, mask: Tensor | None) -> Tensor:
        if not onnx.exporting():
            return functional.vq_nearest(latent, self.codebook.weight, metric="cosine", mask=mask).index
        flat, codes = F.normalize(latent.flatten(0, -2), dim=-1), F.normalize(self.codebook.weight, dim=-1)
        return onnx.quantize(flat[None], codes[None], True, None).index.view(latent.shape[:-1])

    def decode(self, index: Tensor) -> Tensor:
        """The output [..., dim] of indices [...]; zeros where they are -1."""
        out: Tensor = self.project_out(F.embedding(index.long().clamp_min(0), self.codebook.weight))
        return torch.where((index >= 0)[..., None], out, 0.0)


class FactorizedResidualVQ(nn.Module):
    """Residual vector quantization as in the Descript audio codec (Kumar et al. 2023, section 3.2).

    Each level takes what the levels before it left, in all ``dim`` dimensions, to ``codebook_dim`` dimensions, finds
    the code of the smallest angle, and takes this code, with the length that it has, back to ``dim`` dimensions. Codes
    learn from the gradient.

    Args:
        dim: of the input.
        num_quantizers: levels.
        codebook_size: codes of each level.
        codebook_dim: of the codes, or of those of each level.
        quantize_dropout: in [0, 1]: share of the samples of a batch that use a random number of levels in training.
        commitment_weight: of the part of the loss whose gradient goes to the rows.
        codebook_weight: of the part whose gradient goes to the codes.
    """

    def __init__(
        self,
        dim: int,
        num_quantizers: int = 9,
        codebook_size: int = 1024,
        codebook_dim: int | Sequence[int] = 8,
        quantize_dropout: float = 0.0,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
    ) -> None:
        super().__init__()
        _check.probability(_NAME, "quantize_dropout", quantize_dropout)
        if num_quantizers < 1:
            _check.fail(_NAME, "num_quantizers", "an integer >= 1", num_quantizers)
        sizes = [codebook_dim] * num_quantizers if isinstance(codebook_dim, int) else list(codebook_dim)
        if len(sizes) != num_quantizers:
            _check.fail(_NAME, "codebook_dim", f"one integer, or num_quantizers = {num_quantizers} of them", sizes)
        self.dim, self.num_quantizers, self.codebook_size = dim, num_quantizers, codebook_size
        self.quantize_dropout = quantize_dropout
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.layers = nn.ModuleList(FactorizedLevel(dim, codebook_size, size) for size in sizes)

    def forward(self, x: Tensor, n_quantizers: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            x: [B, ..., dim].
            n_quantizers: use only so many levels, 1..num_quantizers, and draw no dropout; None: all.

        Returns:
            quantized, shaped as x; indices int64 [B, ..., num_quantizers], -1 for levels that were not used; losses
            [num_quantizers], the weighted mean squared distances, in training and evaluation alike.

        Raises:
            ArgumentError: naming the argument.
        """
        if x.dim() < 2 or x.shape[-1] != self.dim:
            _check.fail(_NAME, "x", f"[B, ..., dim = {self.dim}]", list(x.shape))
        n = self._levels(n_quantizers)
        counts = self._draw(x) if self.training and self.quantize_dropout and n_quantizers is None else None
        residual, quantized = x, torch.zeros_like(x)
        indices, losses = [], []
        for number, level in enumerate(self.layers[:n]):
            mask = None if counts is None else (counts > number).expand(x.shape[:-1])
            out, index, to_rows, to_codes = level(residual, mask)
            residual = residual - out
            quantized = quantized + (out if mask is None else torch.where(mask[..., None], out, 0.0))
            indices.append(index)
            losses.append(self.commitment_weight * to_rows + self.codebook_weight * to_codes)
        unused = self.num_quantizers - n
        places = F.pad(torch.stack(indices, dim=-1), (0, unused), value=-1)
        return quantized, places, F.pad(torch.stack(losses), (0, unused))

    def encode(self, x: Tensor, n_quantizers: int | None = None) -> Tensor:
        """Indices [B, ..., n_quantizers] of x [B, ..., dim], without dropout."""
        n = self._levels(n_quantizers)
        return self.forward(x, n)[1][..., :n]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The output of each level.

        Args:
            indices: integers [B, ..., m], the first m levels, m <= num_quantizers; -1 means no code.

        Returns:
            [m, B, ..., dim]; zeros where there is no code.

        Raises:
            ArgumentError: more columns than levels; on the CPU also a number that is no code.
        """
        if indices.dim() < 2 or not 1 <= indices.shape[-1] <= self.num_quantizers:
            _check.fail(_NAME, "indices", f"[B, ..., 1 to {self.num_quantizers} levels]", list(indices.shape))
        check_indices(_NAME, indices, self.codebook_size, least=-1)
        levels: Any = zip(self.layers, indices.unbind(-1), strict=False)
        return torch.stack([level.decode(index) for level, index in levels])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returned with these indices, [B, ..., dim]; ``indices`` as above."""
        codes = self.get_codes_from_indices(indices)
        total = torch.zeros_like(codes[0])
        for code in codes:
            total = total + code
        return total

    decode = get_output_from_indices

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_quantizers={self.num_quantizers}, codebook_size={self.codebook_size}"

    def _levels(self, n: int | None) -> int:
        if n is not None and not 1 <= n <= self.num_quantizers:
            _check.fail(_NAME, "n_quantizers", f"in 1..num_quantizers = 1..{self.num_quantizers}", n)
        return self.num_quantizers if n is None else n

    def _draw(self, x: Tensor) -> Tensor:
        """Levels of each sample [B, 1, ...]: random for the first ones of the batch, all for the rest."""
        B, M = x.shape[0], self.num_quantizers
        drawn = torch.randint(1, M + 1, (B,), device=x.device)
        counts = torch.where(torch.arange(1, B + 1, device=x.device) <= B * self.quantize_dropout, drawn, M)
        return counts.view(B, *[1] * (x.dim() - 2))

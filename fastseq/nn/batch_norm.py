"""``MaskedBatchNorm``: batch normalization of vectors, of which some are padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaskedBatchNorm(nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` of the last dimension, over the vectors that count (Ioffe and Szegedy 2015).

    Parameters, buffers and options are those of ``BatchNorm1d``, as is the result without a mask. Lancucki et al. 2020
    put one before the quantizer.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [..., D]. mask: bool [...], the vectors that count; others are taken as zeros. None means all.

        Returns:
            [..., D]; where nothing counts, statistics stay as they are.
        """
        flat = x.reshape(-1, x.shape[-1])
        if mask is not None:
            flat = flat.masked_fill(~mask.reshape(-1, 1), 0)
        if mask is None or not (self.training or self.running_mean is None):
            return super().forward(flat).view(x.shape)
        return self._masked(flat, mask.reshape(-1, 1)).view(x.shape)

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [N, D], zero where mask [N, 1] is False."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        number = mask.sum()
        count = number.clamp_min(1)
        mean = wide.sum(0) / count
        variance = torch.where(mask, wide - mean, 0.0).square().sum(0) / count
        if self.running_mean is not None and self.running_var is not None:
            self._track(mean.detach(), (variance * (count / (count - 1).clamp_min(1))).detach(), number > 0)
        unit = (wide - mean) * (variance + self.eps).rsqrt()
        return (unit if self.weight is None else torch.addcmul(self.bias, unit, self.weight)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, when: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        step: Tensor | float = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(when)
            if self.momentum is None:
                step = 1 / self.num_batches_tracked.clamp_min(1)
        for old, new in ((self.running_mean, mean), (self.running_var, variance)):
            old.copy_(torch.where(when, old + step * (new.to(old) - old), old))


def normalize(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """``norm`` of x [..., D], also where ``SyncBatchNorm.convert_sync_batchnorm`` has replaced it.

    Raises:
        NotImplementedError: for a mask beside a converted one, which would count padding.
    """
    if isinstance(norm, MaskedBatchNorm):
        normal: Tensor = norm(x, mask)
        return normal
    if mask is not None:
        name = type(norm).__name__
        raise NotImplementedError(f"batch_norm: a mask is not supported by {name}; keep MaskedBatchNorm or pass none")
    flat: Tensor = norm(x.reshape(-1, x.shape[-1]))
    return flat.view(x.shape)

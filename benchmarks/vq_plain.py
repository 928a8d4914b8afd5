"""Vector quantization as one writes it well in plain torch: scores in chunks, no one-hot. A rival of the layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCORES = 1 << 20  # of rows by codes that are formed at a time: 4 MB, about what stays in a core's caches


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index [N] of the codes [K, D] nearest to the rows [N, D]: smallest c*c/2 - x*c."""
    half = codebook.square().sum(1) / 2
    chunks = x.split(max(1, SCORES // len(codebook)))
    return torch.cat([torch.addmm(half, rows, codebook.mT, alpha=-1).argmin(1) for rows in chunks])


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, whose gradient goes to x as it is (Bengio et al. 2013)."""
    return x + (codes - x).detach()


def rotated(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, whose gradient goes to x turned and scaled as x must be to become its code (Fifty et al. 2024)."""
    u, v = F.normalize(x.detach(), dim=-1), F.normalize(codes, dim=-1)
    w = F.normalize(u + v, dim=-1)
    scale = codes.norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True)
    return scale * (x - 2 * w * (x * w).sum(-1, keepdim=True) + 2 * v * (x * u).sum(-1, keepdim=True))


class PlainVQ(nn.Module):
    """A codebook that follows the moving average of its rows (van den Oord et al. 2017, appendix A)."""

    def __init__(self, codebook: Tensor, decay: float, rotation: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook.clone())
        self.register_buffer("cluster_size", torch.ones(len(codebook)))
        self.register_buffer("embed_avg", codebook.clone())
        self.decay, self.eps, self.form = decay, eps, rotated if rotation else straight_through

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] to the codes [..., D], their index [...], and the commitment loss."""
        rows = x.reshape(-1, x.shape[-1])
        index = nearest(rows.detach(), self.codebook)
        codes = self.codebook[index]
        if not self.training:
            return codes.view_as(x), index.view(x.shape[:-1]), codes.new_zeros(())
        self._follow(rows.detach(), index)
        return self.form(rows, codes).view_as(x), index.view(x.shape[:-1]), F.mse_loss(rows, codes)

    @torch.no_grad()
    def _follow(self, rows: Tensor, index: Tensor) -> None:
        counts = torch.zeros_like(self.cluster_size).index_add_(0, index, torch.ones_like(rows[:, 0]))
        sums = torch.zeros_like(self.codebook).index_add_(0, index, rows)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_avg.lerp_(sums, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + len(counts) * self.eps) * total
        # a new tensor: under torch.compile backward gathers the codes again, from the codebook that forward read
        self.codebook = self.embed_avg / smoothed[:, None]

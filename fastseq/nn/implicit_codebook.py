"""``ImplicitCodebook``: the network that bends the codes of a level by what the levels before it made (QINCo)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ImplicitCodebook(nn.Module):
    """Codes as a function of the sum so far: a projection of both, then residual blocks of two layers.

    Huijben et al., ICML 2024, "Residual Quantization with Implicit Neural Codebooks". Parameters are named as those of
    the class ``MLP`` of vector-quantize-pytorch.

    Args:
        dim: of the codes.
        dim_hidden: of the blocks; None means ``dim``.
        depth: number of blocks.
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4) -> None:
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth)
        )

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Every code for every row.

        Args:
            codes: [1, K, D].
            condition: [B, N, D], the sum of the codes of the levels before.

        Returns:
            [1, B, N, K, D].
        """
        return self.chosen(codes[0], condition[None, :, :, None])

    def chosen(self, codes: Tensor, condition: Tensor) -> Tensor:
        """One code for each row: codes and condition, [..., D] each, are broadcast against each other."""
        D = codes.shape[-1]
        weight = self.proj_in.weight  # over condition and code side by side: two products, and no pair is ever joined
        x = F.linear(codes, weight[:, D:], self.proj_in.bias) + F.linear(condition, weight[:, :D])
        for layer in self.layers:
            x = x + layer(x)
        return x

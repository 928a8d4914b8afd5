"""One layer in one direction whose recurrent weights are factors, by the operator that serves its device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq.functional.lstm_arguments import Factors, Weights
from fastseq.ops._select import allowed
from fastseq.ops.gemm import gemm
from fastseq.ops.lstm_autograd import layer
from fastseq.ops.lstm_lowrank import lstm_lowrank
from fastseq.ops.lstm_mixed import lstm_mixed
from fastseq.reference import low_rank


def factored_layer(
    x: Tensor,
    weight_ih: Tensor | None,
    w: Weights,
    factors: Factors,
    bias: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    options: tuple[Any, ...],
    save: int,
) -> tuple[Tensor, ...]:
    """h, c, gates, h_n and c_n, as ``lstm_autograd.layer`` returns them. ``options`` begin with no projection. Without
    ``weight_ih`` x holds the pre-activations.

    The kernels for a GPU know one rank for all gates. A little less is filled up with zeros, which are no parameters;
    where this would not save anything, or a gate is full, the factors are multiplied together and the layer is dense.
    """
    by_core = x.is_cpu and allowed() in (None, "cpu", "reference")
    ranks, most = factors.ranks, max(factors.ranks)
    if not by_core and (-1 in ranks or 2 * most >= w.H):
        return layer(x, weight_ih, bias, dense_weight(w.weight_hh, factors), h0, c0, options, save)
    x_gates = x
    if weight_ih is not None:
        flat = gemm(x.reshape(-1, x.shape[-1]), weight_ih, bias, False, True)
        x_gates = flat.view(*x.shape[:-1], flat.shape[-1])
    if by_core:
        full = w.weight_hh if -1 in ranks else None
        return lstm_mixed(x_gates, (full, factors.up, factors.down), ranks, h0, c0, options[1:], save)
    up, down = factors.up.split(ranks, 1), factors.down.split(ranks)
    ups = torch.stack([F.pad(v, (0, most - v.shape[1])) for v in up])
    downs = torch.stack([F.pad(v, (0, 0, 0, most - v.shape[0])) for v in down])
    return lstm_lowrank(x_gates, ups, downs, h0, c0, options[1:], save)


def dense_weight(full: Tensor, factors: Factors) -> Tensor:
    """The matrix [4*H, H] that factors and full gates [D*H, H] stand for."""
    lows = [rank for rank in factors.ranks if rank >= 0]
    products = iter([a @ b for a, b in zip(factors.up.split(lows, 1), factors.down.split(lows), strict=True)])
    rest = iter(full.split(factors.up.shape[0]))
    return torch.cat([next(rest) if rank < 0 else next(products) for rank in factors.ranks])


def best_factors(weight: Tensor, ranks: tuple[int, int, int, int]) -> tuple[Tensor, Factors]:
    """The full gates [D*H, H] of a matrix [4*H, H], and the nearest factors of the others (truncated SVD).

    Both factors carry the same share of a singular value, so that they learn at one pace.

    Args:
        ranks: of each gate, -1 for a full one.
    """
    full, ups, downs = [weight[:0]], [weight[: weight.shape[1], :0]], [weight[:0]]
    for part, rank in zip(weight.chunk(4), ranks, strict=True):
        if rank < 0:
            full.append(part)
            continue
        up, down = (part[:, :rank], part[:rank]) if part.is_meta else low_rank(part, rank)
        root = down.norm(dim=1).sqrt()
        root = torch.where(root > 0, root, 1)
        ups.append(up * root)
        downs.append(down / root[:, None])
    return torch.cat(full), Factors(torch.cat(ups, 1), torch.cat(downs), ranks)

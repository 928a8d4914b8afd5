"""The ranks of ``torch.distributed``'s default group; one alone where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> tuple[int, int]:
    """Number of this rank and of all ranks: (0, 1) without ``torch.distributed``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def several() -> bool:
    """Whether this process is one of several."""
    return ranks()[1] > 1


def sum_(t: Tensor) -> Tensor:
    """``t``, summed over the ranks in place."""
    if ranks()[1] > 1:
        dist.all_reduce(t)
    return t


def largest_(t: Tensor) -> Tensor:
    """``t``, with the largest value of any rank in each place, in place."""
    if ranks()[1] > 1:
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t


def smallest_(t: Tensor) -> Tensor:
    """``t``, with the smallest value of any rank in each place, in place."""
    if ranks()[1] > 1:
        dist.all_reduce(t, op=dist.ReduceOp.MIN)
    return t


def gather(t: Tensor) -> Tensor:
    """``t`` of every rank, all of one shape, stacked: [ranks, ...]."""
    size = ranks()[1]
    if size == 1:
        return t[None]
    parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, t.contiguous())
    return torch.stack(parts)


def broadcast_(t: Tensor) -> Tensor:
    """``t`` of rank 0, in place."""
    if ranks()[1] > 1:
        dist.broadcast(t, 0)
    return t


def device() -> torch.device:
    """Where tensors must lie to be exchanged while no tensor tells."""
    if ranks()[1] > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of each tensor over all processes; the tensors themselves where there is one process.

    Args:
        tensors: floating-point, on one device, with the same shapes on every rank.

    Returns:
        Tensors of the shapes and dtypes given, with the same bits on every rank.
    """
    if not several():
        return list(tensors)
    wide = tensors[0].dtype
    for t in tensors:
        wide = torch.promote_types(wide, t.dtype)
    packed = sum_(torch.cat([t.detach().to(wide).flatten() for t in tensors]))
    parts = packed.split([t.numel() for t in tensors])
    return [p.view(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]

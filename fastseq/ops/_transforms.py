"""What ``torch.func`` may do with our operators: vmap runs them one by one, forward mode is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise where a tensor carries a forward-mode tangent: torch drops it silently on an operator without a rule.

    Raises:
        NotImplementedError: naming the operator.
    """
    if any(
        t is not None and torch.is_floating_point(t) and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(f"{op}: forward-mode differentiation (jvp) is not supported; use vjp or backward")


def one_by_one(run: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule that calls ``run`` once per element of the mapped dimension and stacks the results."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        outs = [
            run(*(a if d is None else a.select(d, n).contiguous() for a, d in zip(args, in_dims, strict=True)))
            for n in range(info.batch_size)
        ]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(torch.stack(v) for v in zip(*outs, strict=True)), (0,) * len(outs[0])

    return rule

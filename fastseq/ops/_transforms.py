"""Our operators under autograd and ``torch.func``: vmap runs them one by one, forward mode is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``, in eager mode without the search for default arguments.

    torch repeats ``inspect.signature(forward)`` on every call of a Function with setup_context, which takes longer than
    the operator itself on a short sequence.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


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
        def of(n: int, a: Any, d: Any) -> Any:
            if isinstance(a, (list, tuple)):
                return [of(n, *pair) for pair in zip(a, d or [None] * len(a), strict=True)]
            return a if d is None else a.select(d, n).contiguous()

        outs = [run(*(of(n, a, d) for a, d in zip(args, in_dims, strict=True))) for n in range(info.batch_size)]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(torch.stack(v) for v in zip(*outs, strict=True)), (0,) * len(outs[0])

    return rule


def wide(dtype: torch.dtype) -> torch.dtype:
    """What distances, losses, counts and sums have where their argument has this dtype: float32 for one of 16 bits."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def in_float32(run: Callable[..., Any], *like: int) -> Callable[..., Any]:
    """A definition that computes 16-bit arguments in float32.

    Args:
        like: for each result the position of the argument whose dtype it gets back.
    """

    def widened(*args: Any) -> Any:
        if not any(isinstance(a, Tensor) and a.dtype in (torch.bfloat16, torch.float16) for a in args):
            return run(*args)
        out = run(*(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
        return tuple(v.to(args[n].dtype) for v, n in zip(out, like, strict=True))

    return widened

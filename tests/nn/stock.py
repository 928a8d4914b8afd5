"""Modules run forward and backward, ours and those of torch.nn, so that the latter are the reference of the former."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastseq.ops._select import allowed
from tests.tolerance import GRADIENTS, OUTPUTS, assert_same_bits, assert_within_budget

LENGTHS = (2, 5, 3)  # of the packed rows; not sorted


def inputs(module: nn.Module, *sizes: int, state: Sequence[tuple[int, ...]] = ()) -> list[Any]:
    """Parameters, x and hx as plain tensors that require grad, in the dtype of the module."""
    dtype = next(module.parameters()).dtype
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = torch.randn(*sizes, dtype=dtype).requires_grad_()
    return [parameters, x, [torch.randn(*s, dtype=dtype).requires_grad_() for s in state]]


def run(
    make: Callable[..., nn.Module],
    parameters: list[Tensor],
    x: Tensor,
    hx: list[Tensor],
    kind: str = "padded",
    training: bool = True,
    seed: int = 7,
    **call: Any,
) -> list[Tensor]:
    """Outputs, final states, and the gradients of every input under random upstream gradients."""
    module = make(dtype=x.dtype).train(training)
    named = dict(zip((n for n, _ in module.named_parameters()), parameters, strict=True))
    given: Tensor | PackedSequence = x
    if kind in ("packed", "sorted"):
        lengths = torch.tensor(LENGTHS if kind == "packed" else sorted(LENGTHS, reverse=True))
        given = pack_padded_sequence(x, lengths, getattr(module, "batch_first", False), kind == "sorted")
    torch.manual_seed(seed)
    out = torch.func.functional_call(module, named, (given, tuple(hx) or None), call)
    first, rest = (out[0], out[1]) if isinstance(out[1], tuple) else (out[0], (out[1],))
    outs = [first.data if isinstance(first, PackedSequence) else first, *rest]
    torch.manual_seed(seed)
    upstream = [torch.randn(v.shape, dtype=torch.float64).to(v.dtype) for v in outs]
    grads = torch.autograd.grad(outs, [*parameters, x, *hx], upstream, allow_unused=True)
    return [*outs, *grads]


def assert_like(
    make: Callable[..., nn.Module], reference: Callable[..., nn.Module], given: list[Any], count: int, **options: Any
) -> None:
    """``make()`` computes what ``reference()`` does: ``count`` outputs, then all gradients."""
    got = run(make, *given, **options)
    ran: dict[Any, list[Tensor]] = {}

    def once(parameters: list[Tensor], x: Tensor, hx: list[Tensor]) -> list[Tensor]:
        key = x.dtype, x.detach().numpy().tobytes()
        if key not in ran:
            ran[key] = run(reference, parameters, x, hx, **options)
        return ran[key]

    def outputs(*args: Any) -> list[Tensor]:
        return once(*args)[:count]

    def gradients(*args: Any) -> list[Tensor]:
        return once(*args)[count:]

    assert_within_budget([f"output {n}" for n in range(count)], got[:count], outputs, given, OUTPUTS)
    assert_within_budget([f"gradient {n}" for n in range(len(got) - count)], got[count:], gradients, given, GRADIENTS)


def assert_same_rows(names: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """The same rows in other company: the same bits from our products, whose order of summation is fixed."""
    if allowed() == "reference":
        assert_same_sums(names.split(), got, want)
    else:
        assert_same_bits(names, list(got), list(want))


def assert_same_sums(names: Sequence[str], got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """The same products added up in another order: equal within 64 roundings of the largest value."""
    for name, g, w in zip(names, got, want, strict=True):
        assert (g - w).abs().max() <= 64 * torch.finfo(w.dtype).eps * w.abs().max(), name

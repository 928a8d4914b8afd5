"""MIMO layers beside plain wide ones of torch: what the tests of the modules share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastseq.nn import MIMOConv1d, MIMOConv2d, MIMOEmbedding, MIMOIndex, MIMOLinear
from fastseq.nn._mimo_fold import MIMOLayer
from tests.tolerance import GRADIENTS, assert_within_budget

M, B, R = 3, 6, 4


class Case(NamedTuple):
    """A layer, the plain one with the same parameters, and where examples and channels lie in x."""

    layer: Callable[..., Any]
    plain: Callable[..., Any]
    shape: tuple[int, ...]  # of x in the train mode
    batch: int = 0
    channel: int = -1


CASES = {
    "linear": Case(lambda **o: MIMOLinear(5, 7, M, **o), lambda **o: nn.Linear(5 * M, 7, **o), (B, 5)),
    "no_bias": Case(
        lambda **o: MIMOLinear(5, 7, M, False, **o), lambda **o: nn.Linear(5 * M, 7, False, **o), (B, 2, 5)
    ),
    "time_first": Case(
        lambda **o: MIMOLinear(1, 3, M, batch_dim=1, **o), lambda **o: nn.Linear(M, 3, **o), (4, B, 1), batch=1
    ),
    "conv1d": Case(
        lambda **o: MIMOConv1d(2, 5, 3, 2, 4, 2, M=M, padding_mode="circular", **o),
        lambda **o: nn.Conv1d(2 * M, 5, 3, 2, 4, 2, padding_mode="circular", **o),
        (B, 2, 11),
        channel=1,
    ),
    "conv2d": Case(
        lambda **o: MIMOConv2d(3, 4, (3, 2), padding=(1, 0), bias=False, M=M, padding_mode="reflect", **o),
        lambda **o: nn.Conv2d(3 * M, 4, (3, 2), padding=(1, 0), bias=False, padding_mode="reflect", **o),
        (B, 3, 5, 6),
        channel=1,
    ),
    "same": Case(
        lambda **o: MIMOConv2d(1, 2, 3, padding="same", M=M, **o),
        lambda **o: nn.Conv2d(M, 2, 3, padding="same", **o),
        (B, 1, 5, 4),
        channel=1,
    ),
}


def draw(batch: int = B, rows: int = R, rho: float = 0.3) -> Tensor:
    return MIMOIndex(batch, M, rows, rho).draw(torch.Generator().manual_seed(1))


def gathered(x: Tensor, index: Tensor, batch: int = 0, channel: int = -1) -> Tensor:
    """Rows of several examples, in torch's own words."""
    return torch.cat([x.index_select(batch, slot.long()) for slot in index], channel)


def slots_last(x: Tensor, channel: int) -> Tensor:
    """x of the multiplex mode [..., M, C, ...] as the wide layer takes it."""
    at = channel if channel >= 0 else x.dim() - 2
    return x.flatten(at, at + 1)


def compare(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, plain: Callable[..., Tensor]) -> None:
    """Output and all gradients of ``call`` against ``plain(parameters by name, x)``."""
    names, dx = [name for name, _ in layer.named_parameters()], x.is_floating_point()
    x = x.clone().requires_grad_(dx)
    out = call(x)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, [*([x] if dx else []), *layer.parameters()], upstream)

    def reference(x: Tensor, upstream: Tensor, *parameters: Tensor) -> list[Tensor]:
        out = plain(dict(zip(names, parameters, strict=True)), x)
        return [out, *torch.autograd.grad(out, [*([x] if dx else []), *parameters], upstream)]

    given = [x, upstream, *layer.parameters()]
    named = ["out", *(["dx"] if dx else []), *(f"d{n}" for n in names)]
    assert_within_budget(named, [out, *grads], reference, given, GRADIENTS)


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def all_of_lstm(out: Any) -> list[Tensor]:
    """Output, h and c."""
    return [out[0], out[1][0], out[1][1]]


def assert_agrees(
    names: str, got: Any, module: nn.Module, *args: Any, pick: Callable[[Any], Any] = first, **options: Any
) -> None:
    """``got`` is what ``module(*args, **options)`` gives where nothing is folded, to the budget of its dtype."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, MIMOLayer):
            layer.unfold()
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def reference(args: tuple[Any, ...], *values: Tensor) -> Any:
        return pick(functional_call(module, dict(zip(state, values, strict=True)), args, options))

    assert_within_budget(names, got, reference, [args, *state.values()])


def by(plain: nn.Module, prepare: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """``plain`` on the prepared x, with given parameters."""
    return lambda parameters, x: functional_call(plain, parameters, (prepare(x),))


def embedding(padding_idx: int | None = 2) -> MIMOEmbedding:
    return MIMOEmbedding(9, 4, M, padding_idx)


def tables(weight: Tensor, tokens: Tensor, padding_idx: int | None) -> Tensor:
    """The sum of what M tables have for tokens [..., M]."""
    parts = weight.chunk(M, 1)
    return sum(F.embedding(t, w, padding_idx) for t, w in zip(tokens.unbind(-1), parts, strict=True))  # type: ignore[return-value]

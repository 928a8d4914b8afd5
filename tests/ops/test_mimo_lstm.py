"""``functional.lstm`` with an index against rows of several examples made first, in float64 and with every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import functional
from fastseq.functional.lstm_arguments import Factors, Weights
from tests import tolerance
from tests.ops import vq_cases
from tests.tolerance import assert_same_bits, assert_within_budget

T, B, M, C, H = 6, 4, 3, 20, 7
pytestmark = vq_cases.needs_compiled()


def weights(layers: int, directions: int, dtype: torch.dtype, seed: int = 0, **special: Any) -> list[Weights]:
    """Of a net whose first layer takes M*C channels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4).to(dtype).requires_grad_()

    found = []
    P = special.get("P", H)
    for layer in range(layers):
        width = M * C if layer == 0 else P * directions
        for _ in range(directions):
            w = Weights(normal(4 * H, width), normal(4 * H, P), normal(4 * H), normal(4 * H))
            if P != H:
                w = w._replace(weight_hr=normal(P, H))
            if special.get("start"):
                w = w._replace(h_start=normal(P), c_start=normal(H))
            if special.get("factors"):
                w = w._replace(weight_hh=normal(0, H), factors=Factors(normal(H, 8), normal(8, H), (2, 2, 2, 2)))
            found.append(w)
    return found


def leaves_of(given: list[Weights]) -> list[Tensor]:
    found = [t for w in given for t in (*w[:7], *(w.factors[:2] if w.factors else ())) if t is not None]
    return [t for t in found if t.numel()]


def rows(N: int) -> dict[str, Tensor]:
    """What is of the rows, not of the examples."""
    generator = torch.Generator().manual_seed(N)
    lengths = torch.randint(0, T + 1, (N,), generator=generator)
    lengths[0] = T
    return {
        "lengths": lengths,
        "reset": torch.rand(T, N, generator=generator) < 0.3,
        "rows": torch.randperm(N, generator=generator),
    }


SEED = torch.tensor([1234567])
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the weights, and of the call
    "plain": ({}, {}),
    "two_layers": ({"layers": 2}, {}),
    "bidirectional": ({"directions": 2}, {"bidirectional": True}),
    "deep_bidirectional": ({"layers": 2, "directions": 2}, {"bidirectional": True}),
    "lengths": ({"directions": 2}, {"bidirectional": True, "lengths": ...}),
    "reset": ({"start": True}, {"reset": ...}),
    "noise": ({"layers": 2}, {"seed": SEED, "tau": 0.8, "rows": ..., "row_offset": 3}),
    "hard": ({}, {"seed": SEED, "noise_probability": 0.5, "hard": True}),
    "recompute": ({}, {"recompute": True}),
    "gates": ({}, {"return_gates": True}),
    "projection": ({"P": 3, "layers": 2}, {}),
    "factors": ({"factors": True, "directions": 2}, {"bidirectional": True}),
    "state": ({}, {"hx": ...}),
}


def results(
    x: Tensor, given: list[Weights], index: Tensor | None, options: dict[str, Any], upstream: list[Tensor]
) -> list[Tensor]:
    """Everything that is returned, and the gradients of x and of all weights."""
    out = functional.lstm(x, given, index=index, **options)
    values = [out.output, out.h_n, out.c_n, *(v for gates in out.gates for v in gates)]
    total = sum(((v * d).sum() for v, d in zip(values, upstream, strict=False)), torch.zeros((), dtype=x.dtype))
    found = torch.autograd.grad(total, [x, *leaves_of(given)], allow_unused=True, materialize_grads=True)
    return [*values, *found]


@pytest.mark.parametrize("N", [9, 60])  # products of the rows, and of the examples
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_layer_on_rows_made_first(name: str, N: int) -> None:
    special, options = OPTIONS[name]
    special = dict(special)
    given = weights(special.pop("layers", 1), special.pop("directions", 1), torch.float64, **special)
    x = torch.randn(T, B, C, dtype=torch.float64).requires_grad_()
    index = torch.randint(0, B, (M, N), dtype=torch.int32)
    of_rows = {**rows(N), "hx": tuple(torch.randn(1, N, H, dtype=torch.float64) for _ in range(2))}
    filled = {k: of_rows[k] if v is ... else v for k, v in options.items()}
    with torch.no_grad():
        out = functional.lstm(x, given, index=index, **filled)
    upstream = [torch.randn_like(v) for v in (out[:3] + tuple(v for gates in out.gates for v in gates))]

    got = results(x, given, index, filled, upstream)
    names = [f"{name} {n}" for n in range(len(got))]

    def by_rows(x: Tensor, *rest: Any) -> list[Tensor]:
        taken = torch.cat([x.index_select(1, slot.long()) for slot in index], -1)
        found = results(taken, rest[0], None, *rest[1:])
        found[len(upstream)] = torch.autograd.grad(taken, x, found[len(upstream)])[0]
        return found

    assert_within_budget(names, got, by_rows, (x, given, filled, upstream), tolerance.GRADIENTS)


def by_torch(x: Tensor, index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of torch's own layer on rows made by ``index_select``."""
    weights = [v.detach().requires_grad_() for v in values]
    lstm = torch.nn.LSTM(M * C, H).to(x.dtype)
    x = x.detach().requires_grad_()
    taken = torch.cat([x.index_select(1, slot.long()) for slot in index], -1)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    out = torch.func.functional_call(lstm, dict(zip(names, weights, strict=True)), (taken,))[0]
    return out, *torch.autograd.grad(out.sin().sum(), (x, *weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [1, 9, 60])
def test_equals_torch(N: int, dtype: torch.dtype) -> None:
    w = weights(1, 1, dtype)[0]
    x = torch.randn(T, B, C, dtype=dtype).requires_grad_()
    index = torch.randint(0, B, (M, N), dtype=torch.int32)
    out = functional.lstm(x, [w], index=index).output
    values = tuple(v for v in w[:4] if v is not None)
    grads = torch.autograd.grad(out.sin().sum(), (x, *values))
    names = "output dx dweight_ih dweight_hh dbias_ih dbias_hh"
    assert_within_budget(names, (out, *grads), by_torch, (x, index, *values), tolerance.GRADIENTS)


@pytest.mark.parametrize("N", [9, 60])
def test_bits_do_not_depend_on_threads(N: int) -> None:
    given = weights(1, 1, torch.float32)
    x, index = torch.randn(30, B, C), torch.randint(0, B, (M, N), dtype=torch.int32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = functional.lstm(x, given, index=index).output
        found.append([out, *torch.autograd.grad(out.sin().sum(), leaves_of(given))])
    names = "output dweight_ih dweight_hh dbias_ih dbias_hh"
    assert_same_bits(names, found[1], found[0])
    assert_same_bits(names, found[2], found[0])


def test_the_same_example_in_every_slot_is_the_folded_layer() -> None:
    """The slots' columns of the weight add up."""
    w = weights(1, 1, torch.float64)[0]
    x = torch.randn(T, B, C, dtype=torch.float64)
    same = torch.arange(B, dtype=torch.int32).expand(M, B)

    def folded(x: Tensor, w: Weights) -> Tensor:
        return functional.lstm(x, [w._replace(weight_ih=w.weight_ih.unflatten(1, (M, C)).sum(1))]).output

    assert_within_budget("output", functional.lstm(x, [w], index=same).output, folded, (x, w))


def test_packed_rows_and_wrong_sizes_are_refused() -> None:
    given = weights(1, 1, torch.float32)
    x, index = torch.randn(T, B, C), torch.zeros(M, 3, dtype=torch.int32)
    wrong: list[tuple[Any, str]] = [
        (
            lambda: functional.lstm(x[:, 0], given, batch_sizes=torch.ones(T).long(), index=index),
            r"lstm: index must be None for packed x, got \[3, 3\]",
        ),
        (lambda: functional.lstm(x[0], given, index=index), r"lstm: x must be \[T, B, C\] beside index, got \[4, 20\]"),
        (lambda: functional.lstm(x, given, index=index[0]), r"lstm: index must be \[M, N\] with M >= 1, got \[3\]"),
        (
            lambda: functional.lstm(x, given, index=index[:2]),
            r"lstm: .*weight_ih.* must be \[4\*H, I\] = \[28, 40\], got \[28, 60\]",
        ),
        (
            lambda: functional.lstm(x, given, index=index + B),
            r"mimo_project: index must lie in 0 .. B - 1 = 3, got index\[0, 0\] = 4",
        ),
        (
            lambda: functional.lstm(x, given, index=index.float()),
            "lstm: index must be int32 or int64, got torch.float32",
        ),
        (
            lambda: functional.lstm(x, given, lengths=torch.ones(B + 1).long(), index=index),
            r"lstm: lengths must .*\[3\]",
        ),
    ]
    for call, says in wrong:
        with pytest.raises(ValueError, match=says):
            call()

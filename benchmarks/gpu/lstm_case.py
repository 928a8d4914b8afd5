"""What the LSTM is measured on with a GPU: cases, their numbers, and the gate of a provider against float64."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import Budget, gate, relative_error
from benchmarks.lstm import GRADIENTS, SEED, TAU, WEIGHTS

GATE_ELEMENTS = 1 << 23  # steps by rows by units that the gate looks at, roughly
GATE_STEPS = 40, 100  # at the least: more than a captured graph holds; at the most


class Case(NamedTuple):
    """One layer of stock shape, T steps of B rows, H inputs and units. mode: "infer", or "train" with backward."""

    T: int
    B: int
    H: int
    dtype: torch.dtype
    mode: str

    @property
    def name(self) -> str:
        return f"T{self.T}_B{self.B}_H{self.H}"

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @property
    def flops(self) -> int:
        return self.T * self.B * 16 * self.H * self.H * (3 if self.trains else 1)

    @property
    def gate_steps(self) -> int:
        least, most = GATE_STEPS
        return min(self.T, max(least, min(most, GATE_ELEMENTS // (self.B * self.H))))


class Inputs(NamedTuple):
    """The same numbers for every provider of a case."""

    x: Tensor  # [T, B, H]
    dy: Tensor  # as x
    stock: nn.LSTM


class Work(NamedTuple):
    """A provider on a case: ``call(x)`` gives y, (h_n, c_n); weights in the order of WEIGHTS."""

    call: Callable[[Tensor], Any]
    weights: Sequence[Tensor]
    noise: Callable[[int], Tensor | None] = lambda steps: None  # of a call after manual_seed(SEED), [steps, B, 2*H]
    judged: str | None = None  # why the gate cannot look at it


@functools.lru_cache(maxsize=1)
def inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(case.T, case.B, case.H, device=device, generator=generator).to(case.dtype) for _ in range(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = nn.LSTM(case.H, case.H).to(device, case.dtype)
    return Inputs(x.requires_grad_(case.trains), dy, stock)


def run(case: Case, work: Work, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is timed."""
    if not case.trains:
        with torch.no_grad():
            y, (h_n, c_n) = work.call(x)
        return y, h_n, c_n
    for leaf in (x, *work.weights):
        leaf.grad = None
    y, (h_n, c_n) = work.call(x)
    y.backward(dy)
    return y, h_n, c_n


def judge(case: Case, work: Work, given: Inputs) -> tuple[str, float | None]:
    """The verdict of the gate on the first steps of the case, and the largest relative error."""
    if work.judged is not None:
        return f"not judged: {work.judged}", None
    steps = case.gate_steps
    x = given.x.detach()[:steps].clone().requires_grad_(case.trains)
    dy = given.dy[:steps]
    torch.manual_seed(SEED)
    outs = run(case, work, x, dy)
    got = _named(case, outs, [x, *work.weights])
    weights = [getattr(given.stock, f"{name}_l0") for name in WEIGHTS]
    noise = work.noise(steps)
    truth = _defined(case, x, dy, weights, noise, torch.float64)
    with _products_as_cudnn():
        naive = _defined(case, x, dy, weights, noise, case.dtype)
    budgets = {name: Budget(value, relative_error(naive[name], value)) for name, value in truth.items()}
    error = max(relative_error(got[name], value) for name, value in truth.items())
    return gate(got, budgets, GRADIENTS), float(f"{error:.3g}")


def _named(case: Case, outs: Sequence[Tensor], leaves: Sequence[Tensor]) -> dict[str, Tensor]:
    found = dict(zip(("y", "h_n", "c_n"), outs, strict=True))
    if case.trains:
        found |= {f"d{name}": leaf.grad for name, leaf in zip(("x", *WEIGHTS), leaves, strict=True)}
    return {name: value.detach().clone() for name, value in found.items()}


@contextlib.contextmanager
def _products_as_cudnn() -> Iterator[None]:
    """In float32 an LSTM may round to TF32 where cuDNN may: so may the plain computation that it is held against."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _defined(
    case: Case, x: Tensor, dy: Tensor, weights: Sequence[Tensor], noise: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    from fastseq import reference

    x = x.detach().to(dtype).requires_grad_(case.trains)
    leaves = [w.detach().to(dtype).requires_grad_(case.trains) for w in weights]
    weight_ih, weight_hh, bias_ih, bias_hh = leaves
    zeros = x.new_zeros(case.B, case.H)
    options: dict[str, Any] = {} if noise is None else {"tau": TAU, "noise": noise.to(dtype)}
    x_gates = x @ weight_ih.mT + (bias_ih + bias_hh)
    y, _, _, h_n, c_n = reference.lstm(x_gates, weight_hh, zeros, zeros, **options)
    if case.trains:
        y.backward(dy.to(dtype))
    return _named(case, (y, h_n[None], c_n[None]), [x, *leaves])

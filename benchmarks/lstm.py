"""The LSTM layer: cases, providers, and for each pair what to time and what to hold against the truth."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks import harness, lstm_onnx
from benchmarks.harness import Budget, relative_error

NAME = "lstm"
OURS = ("fastseq", "recompute")  # the other providers are rivals
PACKAGES = ("onnxruntime", "openvino")  # whose versions each row notes
TAU = 0.9
SEED = 7  # of torch's generator when outputs are collected for the gate
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
GRADIENTS = frozenset({"dx", *(f"d{name}" for name in WEIGHTS)})


class Case(NamedTuple):
    """One layer, T steps of B rows, H inputs and H units.

    mode: "train" (forward and backward), "infer", "stream" (one step with a state), "packed" (train, lengths 10..T).
    """

    T: int
    B: int
    H: int
    mode: str

    @property
    def name(self) -> str:
        return f"T{self.T}_B{self.B}_H{self.H}"

    @classmethod
    def parse(cls, name: str, mode: str) -> Case:
        """The case of a name such as T100_B1_H128."""
        found = re.fullmatch(r"T(\d+)_B(\d+)_H(\d+)", name)
        if found is None:
            raise ValueError(f"case must look like T100_B1_H128, got {name}")
        return cls(*map(int, found.groups()), mode)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.T, self.B, self.H

    @property
    def trains(self) -> bool:
        return self.mode in ("train", "packed")

    @property
    def lengths(self) -> Tensor:
        if self.mode != "packed":
            return torch.full((self.B,), self.T)
        return torch.randint(min(10, self.T), self.T + 1, (self.B,), generator=torch.Generator().manual_seed(1))

    @property
    def flops(self) -> int:
        """Of the matrix products: one forward, and two backward (of the input side and of the weights)."""
        return int(self.lengths.sum()) * 2 * 4 * self.H * (self.H + self.H) * (3 if self.trains else 1)

    @property
    def weight_bytes(self) -> int:
        """Of what is read again and again: weight_hh by every step, or all weights by every call."""
        return 16 * self.H * (2 * self.H if self.mode == "stream" else self.H)

    @property
    def bytes_read(self) -> int:
        """Of weights alone, at the least: weight_hh once per step, weight_ih once; the same again backward."""
        return 16 * self.H * self.H * (int(self.lengths.max()) + 1) * (2 if self.trains else 1)


class Provider(NamedTuple):
    """Who computes, and with which gates: noise_probability of binary gates, or None for plain sigmoid gates."""

    name: str
    noise_probability: float | None = None

    @property
    def label(self) -> str:
        return self.name if self.noise_probability is None else f"{self.name} p={self.noise_probability:g}"


class Work(NamedTuple):
    """What the harness times, and what the gate looks at."""

    run: Callable[[], object]
    outputs: Callable[[], dict[str, Tensor]]  # of one run, with the random generator at a fixed seed
    leaves: Sequence[Tensor]  # input and parameters
    noise: Callable[[], Tensor | None] = lambda: None  # that went into ``outputs``, in float64


class Inputs(NamedTuple):
    """The same numbers for every provider of a case."""

    x: Tensor | PackedSequence
    dy: Tensor
    state: tuple[Tensor, Tensor] | None
    stock: nn.LSTM


@functools.lru_cache(maxsize=2)
def inputs(case: Case) -> Inputs:
    """Random input (requires grad where the case trains), upstream gradient and weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.T, case.B, case.H, generator=generator)
    dy = torch.randn(case.T, case.B, case.H, generator=generator)
    state = None
    if case.mode == "stream":
        h, c = torch.randn(2, 1, case.B, case.H, generator=generator)
        state = h, c
    packed: Any = x
    if case.mode == "packed":
        packed = pack_padded_sequence(x, case.lengths, enforce_sorted=False)
        dy = pack_padded_sequence(dy, case.lengths, enforce_sorted=False).data
    (packed.data if case.mode == "packed" else x).requires_grad_(case.trains)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = nn.LSTM(case.H, case.H)
    return Inputs(packed, dy, state, stock)


def draw_noise(T: int, B: int, H: int, noise_probability: float) -> Tensor:
    """Noise of the input and forget gates as one writes it in plain torch: [T, B, 2*H]."""
    uniform = torch.rand(T, B, 2 * H).clamp(2.0**-25, 1 - 2.0**-24)
    noise = torch.log(uniform) - torch.log1p(-uniform)
    if noise_probability < 1:
        noise = noise * (torch.rand(T, B, 2 * H) < noise_probability)
    return noise


def loop(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor, noise_probability: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The LSTM as one writes it in plain torch: input product for all steps at once, then step by step."""
    (T, B, _), H = x.shape, weight_hh.shape[1]
    x_gates = F.linear(x, weight_ih, bias_ih + bias_hh)
    noise = None if noise_probability is None else draw_noise(T, B, H, noise_probability)
    h, c, outs = x.new_zeros(B, H), x.new_zeros(B, H), []
    for t in range(T):
        i, f, g, o = (x_gates[t] + h @ weight_hh.t()).chunk(4, 1)
        if noise is not None:
            i, f = (i + noise[t, :, :H]) / TAU, (f + noise[t, :, H:]) / TAU
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outs.append(h)
    return torch.stack(outs), h[None], c[None]


def _packed_or_dense(y: Tensor | PackedSequence) -> Tensor:
    return y.data if isinstance(y, PackedSequence) else y


def _weights(module: nn.Module) -> list[Tensor]:
    return [getattr(module, f"{name}_l0") for name in WEIGHTS]


def _collected(case: Case, y: Tensor, h_n: Tensor, c_n: Tensor, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
    found = {"y": y, "h_n": h_n, "c_n": c_n}
    if case.trains:
        found |= {f"d{name}": leaf.grad for name, leaf in zip(("x", *WEIGHTS), leaves, strict=True)}
    return {name: value.detach().clone() for name, value in found.items()}


def _work(case: Case, call: Callable[..., Any], weights: Sequence[Tensor], noise: Callable[[], Tensor | None]) -> Work:
    """Training step or evaluation of ``call(x, state) -> y, (h_n, c_n)``."""
    given = inputs(case)
    leaves = [_packed_or_dense(given.x), *weights]

    def train() -> tuple[Tensor, Tensor, Tensor]:
        for leaf in leaves:
            leaf.grad = None
        y, (h_n, c_n) = call(given.x)
        _packed_or_dense(y).backward(given.dy)
        return _packed_or_dense(y), h_n, c_n

    def evaluate() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            y, (h_n, c_n) = call(given.x, given.state)
        return y, h_n, c_n

    run = train if case.trains else evaluate

    def outputs() -> dict[str, Tensor]:
        torch.manual_seed(SEED)
        return _collected(case, *run(), leaves)

    return Work(run, outputs, leaves, noise)


def _stock(case: Case, provider: Provider, threads: int) -> Work:
    stock = inputs(case).stock.train(case.trains)
    return _work(case, stock, _weights(stock), lambda: None)


def _fastseq(case: Case, provider: Provider, threads: int, **options: Any) -> Work:
    import fastseq.nn

    if provider.noise_probability is not None:
        options |= {"gates": "binary", "tau": TAU, "noise_probability": provider.noise_probability}
    module = fastseq.nn.LSTM(case.H, case.H, **options)
    module.load_state_dict(inputs(case).stock.state_dict())
    return _work(case, module.train(case.trains), _weights(module), functools.partial(_fastseq_noise, case, provider))


def _fastseq_noise(case: Case, provider: Provider) -> Tensor | None:
    """The noise of a forward pass of fastseq after ``torch.manual_seed(SEED)``, by its definition."""
    import fastseq.functional
    from fastseq import reference

    if provider.noise_probability is None:
        return None
    torch.manual_seed(SEED)
    seed, x = fastseq.functional.draw_seed(), inputs(case).x
    rows = x.sorted_indices if isinstance(x, PackedSequence) else None
    rest = (case.T, case.B, case.H, rows, 0, 0, provider.noise_probability, torch.float64)
    noise = reference.gate_noise(seed, *rest)
    return noise if rows is None else pack_padded_sequence(noise, case.lengths[rows]).data


def _loop(case: Case, provider: Provider, threads: int, function: Callable[..., Any] = loop) -> Work:
    weights, p = _weights(inputs(case).stock), provider.noise_probability

    def call(x: Tensor, state: None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, h_n, c_n = function(x, *weights, p)
        return y, (h_n, c_n)

    def noise() -> Tensor | None:
        torch.manual_seed(SEED)
        return None if p is None else draw_noise(case.T, case.B, case.H, p).double()

    return _work(case, call, weights, noise)


def _compile(case: Case, provider: Provider, threads: int) -> Work:
    import torch._inductor.config as inductor

    inductor.fallback_random = True  # the draws of eager torch, so that the gate knows the noise
    inductor.compile_threads = 1
    return _loop(case, provider, threads, torch.compile(loop, fullgraph=True, dynamic=False))


def _onnx(
    make_call: Callable[..., Callable[[], list[np.ndarray]]], case: Case, provider: Provider, threads: int
) -> Work:
    given = inputs(case)
    data = lstm_onnx.model(given.stock, case.T, case.B, given.state is not None)
    named = {"x": given.x, **(dict(zip(("h0", "c0"), given.state, strict=True)) if given.state else {})}
    run = make_call(data, {name: value.numpy() for name, value in named.items()}, threads)
    return Work(run, lambda: _collected(case, *(torch.from_numpy(np.array(out)) for out in run()), []), [])


PROVIDERS: dict[str, Callable[[Case, Provider, int], Work]] = {
    "fastseq": _fastseq,
    "recompute": functools.partial(_fastseq, recompute=True),
    "stock": _stock,
    "loop": _loop,
    "compile": _compile,
    "onnxruntime": functools.partial(_onnx, lstm_onnx.onnxruntime_call),
    "openvino": functools.partial(_onnx, lstm_onnx.openvino_call),
}


def describe(provider: Provider) -> dict[str, Any]:
    """What a row says about its provider."""
    p = provider.noise_probability
    gates: dict[str, Any] = {"gates": "sigmoid"}
    if p is not None:
        gates = {"gates": "binary", "tau": TAU, "noise_probability": p}
    if provider.name == "recompute":
        gates["recompute"] = True
    return {"provider": f"fastseq/{backend()}" if provider.name in OURS else provider.name, **gates}


def every(case: Case, provider: Provider) -> int:
    """Slow rivals of the large cases run in every second round, which is enough to tell a factor of two or three."""
    return 2 if provider.name in ("loop", "compile") and case.flops > 1e10 else 1


def flops(case: Case, provider: Provider) -> int:
    return case.flops


def reads(case: Case, provider: Provider) -> harness.Reads:
    return harness.Reads(case.bytes_read, case.weight_bytes)


def backend() -> str:
    from fastseq.ops import lstm

    return harness.backend("lstm_forward", lstm.BACKENDS["lstm_forward"])


def setup(case: Case, provider: Provider, threads: int) -> Work:
    """The callable of one provider on one case.

    Raises:
        ModuleNotFoundError: when the provider's package is not installed.
    """
    return PROVIDERS[provider.name](case, provider, threads)


def judge(case: Case, provider: Provider, work: Work) -> tuple[str, dict[str, Any]]:
    """The verdict of the gate; there is nothing else to tell."""
    noise = work.noise()
    held_against = _budgets_without_noise(case) if noise is None else budgets(case, noise)
    return harness.gate(work.outputs(), held_against, GRADIENTS), {}


@functools.lru_cache(maxsize=1)
def _budgets_without_noise(case: Case) -> dict[str, Budget]:
    return budgets(case, None)


def budgets(case: Case, noise: Tensor | None) -> dict[str, Budget]:
    """What the outputs of the case must be with this noise: ``fastseq.reference`` in float64, and its float32 error."""
    truth, naive = (_defined(case, noise, dtype) for dtype in (torch.float64, torch.float32))
    return {name: Budget(value, relative_error(naive[name], value)) for name, value in truth.items()}


def _defined(case: Case, noise: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    from fastseq import reference

    given = inputs(case)
    x = _packed_or_dense(given.x).detach().to(dtype).requires_grad_(case.trains)
    weights = [w.detach().to(dtype).requires_grad_(case.trains) for w in _weights(given.stock)]
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    zeros = torch.zeros(1, case.B, case.H)
    h0, c0 = (value[0].to(dtype) for value in given.state or (zeros, zeros))
    options: dict[str, Any] = {} if noise is None else {"tau": TAU, "noise": noise.to(dtype)}
    if isinstance(given.x, PackedSequence):
        options["batch_sizes"] = given.x.batch_sizes
    y, _, _, h_n, c_n = reference.lstm(x @ weight_ih.mT + (bias_ih + bias_hh), weight_hh, h0, c0, **options)
    if case.trains:
        y.backward(given.dy.to(dtype))
    if isinstance(given.x, PackedSequence):
        h_n, c_n = h_n[given.x.unsorted_indices], c_n[given.x.unsorted_indices]
    return _collected(case, y, h_n[None], c_n[None], [x, *weights])

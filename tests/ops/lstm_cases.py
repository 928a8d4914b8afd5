"""Inputs of the LSTM operators for every layout and option, their definition as one function, and both doors."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from fastseq import reference
from fastseq.ops._triton import interpreted
from fastseq.ops.lstm import BACKENDS, Options
from tests.tolerance import one_thread

OUTPUTS = "h c gates h_n c_n"
GRADIENTS = "dx_gates dweight_hh dh0 dc0 dweight_hr dh_start dc_start"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels alone are tested then, 0.1 ms for each operation
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float64]  # no kernel takes float64


class Case(NamedTuple):
    """One call: sizes, layout and options. ``noise`` is noise_probability, None for no noise; P = 0 no projection."""

    T: int
    B: int
    H: int
    P: int = 0
    layout: str = "dense"  # dense, lengths or packed
    reset: bool = False
    start: bool = False
    noise: float | None = None
    rows: bool = False
    tau: float = 1.0
    hard: bool = False
    reverse: bool = False


SIZES = {
    "one": Case(1, 1, 1),
    "prime": Case(7, 5, 13),
    "narrow": Case(3, 4, 7),
    "vector": Case(3, 4, 8),
    "over_vector": Case(3, 4, 17),
    "tile": Case(2, 12, 32),
    "over_tile": Case(2, 13, 33),
    "row": Case(4, 1, 67),
    "long": Case(100, 2, 5),
    "deep": Case(2, 3, 521),
    "tall": Case(2, 101, 9),
    "no_steps": Case(0, 3, 5),
    "no_rows": Case(4, 0, 5),
}
if INTERPRETED:
    SIZES.update(long=Case(30, 2, 5), deep=Case(2, 3, 150))
ALL = dict(reset=True, start=True, noise=0.2, rows=True, tau=0.9)
OPTIONS = {
    "reverse": Case(6, 5, 11, reverse=True),
    "lengths": Case(6, 5, 11, layout="lengths"),
    "lengths_reverse": Case(6, 5, 11, layout="lengths", reverse=True),
    "packed": Case(6, 5, 11, layout="packed"),
    "packed_reverse": Case(6, 5, 11, layout="packed", reverse=True),
    "reset": Case(6, 5, 11, reset=True),
    "reset_reverse": Case(6, 5, 11, reset=True, reverse=True),
    "start": Case(6, 5, 11, reset=True, start=True),
    "projection": Case(6, 5, 11, P=7),
    "projection_wide": Case(3, 14, 37, P=33),
    "sharpened": Case(6, 5, 11, tau=0.2),
    "hard": Case(6, 5, 11, hard=True),
    "noise": Case(6, 5, 11, noise=1.0, tau=0.9),
    "noise_dropped": Case(6, 5, 11, noise=0.2, rows=True, tau=0.9),
    "all_dense": Case(5, 14, 19, P=10, **ALL),
    "all_reverse": Case(5, 14, 19, P=10, reverse=True, **ALL),
    "all_lengths": Case(5, 14, 19, P=10, layout="lengths", **ALL),
    "all_lengths_reverse": Case(5, 14, 19, P=10, layout="lengths", reverse=True, **ALL),
    "all_packed": Case(5, 14, 19, P=10, layout="packed", **ALL),
    "all_packed_reverse": Case(5, 14, 19, P=10, layout="packed", reverse=True, **ALL),
    "packed_no_steps": Case(0, 3, 5, layout="packed"),
    "lengths_no_rows": Case(3, 0, 5, layout="lengths", reset=True),
}
CASES = {**SIZES, **OPTIONS}
NO_PROJECTION = {
    "one": Case(1, 1, 1),
    "prime": Case(7, 5, 13),
    "over_tile": Case(2, 18, 33),
    "no_steps": Case(0, 3, 5),
    "no_rows": Case(4, 0, 5),
    "reverse": Case(5, 3, 11, reverse=True),
    "hard": Case(4, 3, 7, hard=True),
    "all_dense": Case(4, 3, 19, **ALL),
    "all_lengths": Case(5, 4, 19, layout="lengths", **ALL),
    "all_lengths_reverse": Case(5, 4, 19, layout="lengths", reverse=True, **ALL),
    "all_packed": Case(5, 4, 19, layout="packed", **ALL),
    "all_packed_reverse": Case(5, 4, 19, layout="packed", reverse=True, **ALL),
}


def shapes(T: Any, B: Any, H: Any, P: Any) -> st.SearchStrategy[Case]:
    """Cases of drawn sizes, with every combination of layout and options."""
    return st.builds(
        Case,
        T=T,
        B=B,
        H=H,
        P=st.just(0) | P,
        layout=st.sampled_from(["dense", "lengths", "packed"]),
        reset=st.booleans(),
        start=st.booleans(),
        noise=st.sampled_from([None, 0.2, 1.0]),
        rows=st.booleans(),
        tau=st.sampled_from([1.0, 0.9, 0.2]),
        hard=st.booleans(),
        reverse=st.booleans(),
    )


class Inputs(NamedTuple):
    """Tensors of one call, in the order of ``lstm_forward``."""

    x_gates: Tensor
    weight_hh: Tensor
    h0: Tensor
    c0: Tensor
    options: Options


def inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, requires_grad: bool = False) -> Inputs:
    """Random inputs of ``case``; every floating-point tensor requires grad if asked."""
    generator = torch.Generator().manual_seed(1000 * seed + 7)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).requires_grad_(requires_grad)

    T, B, H, P = case.T, case.B, case.H, case.P or case.H
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    lengths[: 1 if B else 0] = T
    mask = torch.arange(T)[:, None] < lengths.sort(descending=True).values
    batch_sizes = mask.sum(1) if case.layout == "packed" else None
    lead = (T, B) if batch_sizes is None else (int(mask.sum()),)
    options = Options(
        weight_hr=normal(P, H, scale=1 / math.sqrt(H)) if case.P else None,
        lengths=lengths if case.layout == "lengths" else None,
        batch_sizes=batch_sizes,
        reset=torch.rand(lead, generator=generator) < 0.3 if case.reset else None,
        h_start=normal(P) if case.start else None,
        c_start=normal(H) if case.start else None,
        seed=None if case.noise is None else torch.tensor([-0x0123456789ABCDEF + seed]),
        rows=torch.randperm(B, generator=generator) if case.rows else None,
        row_offset=5 if case.rows else 0,
        stream=3 if case.rows else 0,
        noise_probability=1.0 if case.noise is None else case.noise,
        tau=case.tau,
        hard=case.hard,
        reverse=case.reverse,
    )
    weight_hh = normal(4 * H, P, scale=1 / math.sqrt(P))
    return Inputs(normal(*lead, 4 * H, scale=1.5), weight_hh, normal(B, P), normal(B, H), options)


def upstream(outputs: tuple[Tensor, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """A random gradient for every output."""
    generator = torch.Generator().manual_seed(1000 * seed + 11)
    return tuple(torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype) for v in outputs)


def exact(args: Inputs) -> tuple[Any, ...]:
    """Arguments of ``definition``: those of the call and its noise in float64, an input like any other."""
    options = args.options
    if options.seed is None:
        return *args, None
    T = args.x_gates.shape[0] if options.batch_sizes is None else len(options.batch_sizes)
    B, H = args.c0.shape
    noise = reference.gate_noise(options.seed, T, B, H, *options[7:11], dtype=torch.float64)
    if options.batch_sizes is not None:
        noise = noise[reference.packed_index(options.batch_sizes, B)[1]]
    return *args, noise


def definition(
    x_gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, options: Options, noise: Tensor | None
) -> tuple[Tensor, ...]:
    """What ``lstm_forward`` means."""
    return reference.lstm(x_gates, weight_hh, h0, c0, *options.state, noise, *options.gate)


def definition_gates(*args: Any) -> Tensor:
    """The gates alone of ``definition``."""
    return definition(*args)[2]


def decided(args: Inputs) -> bool:
    """Whether no hard gate is so near its threshold that the roundings of float32 could turn it."""
    x_gates, *rest = (t.double() for t in args[:4])
    options = args.options._replace(**{n: None if v is None else v.double() for n, v in start_and_projection(args)})
    shift = torch.zeros(x_gates.shape[-1], dtype=torch.float64)
    shift[: x_gates.shape[-1] // 2] = 16 * math.sqrt(args.weight_hh.shape[1]) * torch.finfo(torch.float32).eps
    with one_thread():
        low, high = (definition(x_gates + d, *rest, options, exact(args)[5])[2] for d in (-shift, shift))
    H2 = x_gates.shape[-1] // 2
    return torch.equal(low[..., :H2], high[..., :H2])


def start_and_projection(args: Inputs) -> list[tuple[str, Tensor | None]]:
    """The optional floating-point tensors of one call, by name."""
    return [(name, getattr(args.options, name)) for name in ("weight_hr", "h_start", "c_start")]


def differentiable(args: Inputs) -> dict[str, Tensor]:
    """The inputs that can require grad, by name, in the order of GRADIENTS."""
    found = dict(zip(("x_gates", "weight_hh", "h0", "c0"), args[:4], strict=True)) | dict(start_and_projection(args))
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def definition_gradients(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of ``definition`` by autograd: its arguments, then the upstream gradients (None allowed). Returns one
    gradient per tensor of ``differentiable``."""
    call = Inputs(*args[:5])
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in differentiable(call).items()}
    options = call.options._replace(**{n: leaves.get(n) for n in ("weight_hr", "h_start", "c_start")})
    outputs = definition(*(leaves[n] for n in ("x_gates", "weight_hh", "h0", "c0")), options, args[5])
    # requires_grad: h of no steps does not
    pairs = [(v, d) for v, d in zip(outputs, args[6], strict=True) if d is not None and v.requires_grad]
    present, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(present, tuple(leaves.values()), grads, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if d is None else d for d, leaf in zip(found, leaves.values(), strict=True))


def backward_arguments(
    args: Inputs, outputs: tuple[Tensor, ...], grads: tuple[Any, ...], weights: bool = True
) -> list[Any]:
    """Arguments of ``lstm_backward`` after ``lstm_forward(*args, save=2)`` returned ``outputs``."""
    h, c, gates = outputs[:3]
    return [*grads, gates, h, c, *args[1:4], *args.options.state, *args.options.gate, weights]


def gradients(backend: Any, args: Inputs, grads: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Forward, then backward by one backend; the gradients that exist, as ``definition_gradients`` returns them."""
    outputs = run("lstm_forward", backend, *args[:4], *args.options, 2)
    found = run("lstm_backward", backend, *backward_arguments(args, outputs, grads))
    present = {f"d{name}" for name in differentiable(args)}
    return tuple(d for name, d in zip(GRADIENTS.split(), found, strict=True) if name in present)


def run(op: str, name: str, *args: Any, table: Any = BACKENDS) -> Any:
    """One operator by the backend of that name."""
    backend = next(b for b in table[op] if b.name == name)
    if name == "triton":
        reason = backend.why_not(*args)
        if reason is not None:
            pytest.skip(f"triton: {reason}")
    if name == "reference":
        with one_thread():
            return backend.run(*args)
    return backend.run(*args)


def assume_runs(backend: str, dtype: torch.dtype) -> None:
    """Draw again where the backend has no such dtype: a skip would end all draws."""
    assume(backend != "triton" or dtype != torch.float64)


def backends(op: str = "lstm_forward", table: Any = BACKENDS, dims: int = 1) -> list[Any]:
    """Every backend of an operator as a parameter. A compiled one that cannot run here is skipped with its reason;
    those for a GPU have tests of their own. Asked with a first argument of so many ``dims``."""
    entries = table[op] if isinstance(table, dict) else table
    found = []
    for backend in entries:
        reason = backend.why_not(torch.zeros([1] * dims))
        if reason is not None and backend.name in ("cuda", "triton", "torch"):
            continue
        marks = [] if reason is None else [pytest.mark.skip(reason=f"{backend.name}: {reason}")]
        found.append(pytest.param(backend.name, marks=marks))
    return found


def triton_alone(test: Any) -> Any:
    """What only the kernels have, in the process that interprets them."""
    reason = None if interpreted() else "kernels are interpreted with TRITON_INTERPRET=1"
    skip = pytest.mark.skipif(reason is not None, reason=f"triton: {reason}")
    return skip(pytest.mark.parametrize("backend", ["triton"])(test))


def compiled(op: str = "lstm_forward", table: Any = BACKENDS) -> list[Any]:
    """The compiled core, which has blocks and threads, whose edges large shapes are for, and bits to keep."""
    return [p for p in backends(op, table) if p.values[0] == "cpu"]


def arrays(values: Any) -> list[Any]:
    """Arguments of a torch operator as arguments of the numpy door: the seed tensor becomes an int."""

    def one(value: Any) -> Any:
        return value.detach().numpy() if isinstance(value, Tensor) else value

    flat = [v for value in values for v in (value if isinstance(value, Options) else [value])]
    return [one(v) for v in flat]


def numpy_forward(core: Any, args: Inputs, save: int = 2, threads: int = 1) -> list[np.ndarray]:
    """``lstm_forward`` through the numpy door."""
    options = args.options._replace(seed=None if args.options.seed is None else int(args.options.seed))
    return list(core.lstm_forward(*arrays(args[:4]), *arrays(options), save, threads=threads))


def numpy_backward(core: Any, args: list[Any], threads: int = 1) -> list[np.ndarray]:
    """``lstm_backward`` through the numpy door; ``args`` from ``backward_arguments``."""
    return list(core.lstm_backward(*arrays(args), threads=threads))


def numpy_gates(core: Any, args: Inputs, h: Tensor, c: Tensor, threads: int = 1) -> np.ndarray:
    """``lstm_gates`` through the numpy door."""
    options = args.options._replace(seed=None if args.options.seed is None else int(args.options.seed))
    return core.lstm_gates(*arrays([args.x_gates, h, c, *args[1:4]]), *arrays(options), threads=threads)


def needs_compiled() -> Any:
    """Mark for what only the compiled core promises: a skip with the reason where it does not run."""
    reason = BACKENDS["lstm_forward"][0].why_not(torch.zeros(1))
    return pytest.mark.skipif(reason is not None, reason=f"cpu: {reason}")


def numpy_door() -> Any:
    """``fastseq._core``, which every build has."""
    return pytest.importorskip("fastseq._core", reason="fastseq._core is not built")

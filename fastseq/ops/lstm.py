"""``fastseq::lstm_*`` for torch: schemas, fakes and backends. Meaning and shapes: ``fastseq.reference.lstm``.

``lstm_forward`` returns h, c, gates, h_n, c_n. ``save`` says what a later backward needs: 2 keeps c and gates, 1 keeps
c alone (gates are rebuilt by ``lstm_gates``), 0 keeps neither; what is not kept comes back with no elements.

On a GPU everything may be bfloat16 or float16 but c0, c, c_n, c_start and their gradients, which then are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq import reference
from fastseq.ops import lstm_persist
from fastseq.ops._library import backends, fake, library, register
from fastseq.ops._transforms import in_float32

STATE = (
    "Tensor weight_hh, Tensor h0, Tensor c0, Tensor? weight_hr, "
    "Tensor? lengths, Tensor? batch_sizes, Tensor? reset, Tensor? h_start, Tensor? c_start"
)
NOISE = "Tensor? seed, Tensor? rows, int row_offset, int stream, float noise_probability"
GATES = "float tau, bool hard, bool reverse"
GRADS = "Tensor? dh, Tensor? dc, Tensor? dgates, Tensor? dh_n, Tensor? dc_n"

library.define(
    f"lstm_forward(Tensor x_gates, {STATE}, {NOISE}, {GATES}, int save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(f"lstm_gates(Tensor x_gates, Tensor h, Tensor c, {STATE}, {NOISE}, {GATES}) -> Tensor")
library.define(
    f"lstm_backward({GRADS}, Tensor gates, Tensor h, Tensor c, {STATE}, {GATES}, bool weights)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(f"lstm_noise({NOISE.replace('Tensor? seed', 'Tensor seed, int T, int B, int H')}) -> Tensor")


class Options(NamedTuple):
    """Everything that ``lstm_forward`` takes after c0, in its order; see ``fastseq.reference.lstm``."""

    weight_hr: Tensor | None = None
    lengths: Tensor | None = None
    batch_sizes: Tensor | None = None
    reset: Tensor | None = None
    h_start: Tensor | None = None
    c_start: Tensor | None = None
    seed: Tensor | None = None  # int64, one element; None means no noise
    rows: Tensor | None = None
    row_offset: int = 0
    stream: int = 0
    noise_probability: float = 1.0
    tau: float = 1.0
    hard: bool = False
    reverse: bool = False

    @property
    def state(self) -> tuple[Any, ...]:
        return self[:6]

    @property
    def gate(self) -> tuple[Any, ...]:
        return self[11:]


PLAIN = Options()


@fake("lstm_forward")
def fake_forward(x_gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, *args: Any) -> tuple[Tensor, ...]:
    save, lead, (H, P) = args[-1], x_gates.shape[:-1], (c0.shape[1], h0.shape[1])
    return (
        x_gates.new_empty(*lead, P),
        c0.new_empty(*lead, H) if save >= 1 else c0.new_empty(0),
        x_gates.new_empty(*lead, 4 * H) if save >= 2 else x_gates.new_empty(0),
        torch.empty_like(h0, memory_format=torch.contiguous_format),
        torch.empty_like(c0, memory_format=torch.contiguous_format),
    )


@fake("lstm_gates")
def _(x_gates: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x_gates)


@fake("lstm_noise")
def _(seed: Tensor, T: int, B: int, H: int, *args: Any) -> Tensor:
    return torch.empty(T, B, 2 * H, device=seed.device)


@fake("lstm_backward")
def fake_backward(*args: Any) -> tuple[Tensor, ...]:
    gates, _h, _c, weight_hh, h0, c0, weight_hr = args[5:12]
    weights, start = args[-1], args[15] is not None or args[16] is not None
    none = gates.new_empty(0)
    return (
        torch.empty_like(gates),
        torch.empty_like(weight_hh) if weights else none,
        torch.empty_like(h0),
        torch.empty_like(c0),
        torch.empty_like(weight_hr) if weights and weight_hr is not None else none.clone(),
        h0.new_empty(h0.shape[1]) if start else none.clone(),
        c0.new_empty(c0.shape[1] if start else 0),
    )


def _reference_noise(x_gates: Tensor, options: Options, rows: int) -> Tensor | None:
    """The noise of one call, in the layout of its x_gates."""
    if options.seed is None:
        return None
    H = x_gates.shape[-1] // 4
    T = x_gates.shape[0] if options.batch_sizes is None else len(options.batch_sizes)
    noise = reference.gate_noise(options.seed, T, rows, H, *options[7:11], dtype=x_gates.dtype).to(x_gates.device)
    if options.batch_sizes is not None:
        noise = noise[reference.packed_index(options.batch_sizes, rows)[1]]
    return noise


def _check_values(options: Options, steps: int, rows: int) -> None:
    """What the doors find in lengths and batch_sizes; ``steps`` is T, or N of packed data."""
    if options.lengths is not None and ((options.lengths < 0) | (options.lengths > steps)).any():
        raise ValueError(f"lstm_forward: lengths must lie in 0 .. T = {steps}, got {options.lengths.tolist()}")
    if options.batch_sizes is not None:
        sizes = options.batch_sizes.tolist()
        if any(a < b for a, b in zip([rows, *sizes], [*sizes, 0], strict=True)):
            raise ValueError(f"lstm_forward: batch_sizes must not increase and lie in 0 .. B = {rows}, got {sizes}")
        if sum(sizes) != steps:
            raise ValueError(f"lstm_forward: batch_sizes must sum to the rows of data = {steps}, got {sum(sizes)}")


def by_definition(
    definition: Callable[..., Any], x_gates: Tensor, weights: Any, h0: Tensor, c0: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """``lstm_forward`` by ``reference.lstm`` or one like it, which takes ``weights`` where that takes weight_hh."""
    options, save = Options(*args[:-1]), args[-1]
    _check_values(options, x_gates.shape[0], len(h0))
    if options.lengths is not None:
        options = options._replace(lengths=options.lengths.to(h0.device))
    noise = _reference_noise(x_gates, options, len(h0))
    arguments: Any = (*options.state, noise, *options.gate)
    out = definition(x_gates, weights, h0, c0, *arguments)
    none = x_gates.new_empty(0)
    return (out[0], out[1] if save >= 1 else none, out[2] if save >= 2 else none.clone(), *out[3:])


def _forward(*args: Any) -> tuple[Tensor, ...]:
    return by_definition(reference.lstm, *args)


forward_reference = in_float32(_forward, 0, 3, 0, 2, 3)


def _gates_reference(
    x_gates: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, *args: Any
) -> Tensor:
    gates: Tensor = forward_reference(x_gates, weight_hh, h0, c0, *args, 2)[2]
    return gates


def _backward(*args: Any) -> tuple[Tensor, ...]:
    if args[12] is not None:
        args = (*args[:12], args[12].to(args[9].device), *args[13:])
    out: list[Any] = list(reference.lstm_backward(args[:5], *args[5:-1]))
    none = out[0].new_empty(0)
    if not args[-1]:
        out[1], out[4] = none, none.clone()
    if args[11] is None:
        out[4] = none.clone()
    if args[15] is None and args[16] is None:
        out[5], out[6] = none.clone(), none.clone()
    return tuple(out)


backward_reference = in_float32(_backward, 5, 8, 9, 10, 8, 9, 10)


def _noise_reference(seed: Tensor, *args: Any) -> Tensor:
    return reference.gate_noise(seed, *args).to(seed.device)


BACKENDS = {
    "lstm_forward": backends("lstm_forward", forward_reference, "lstm", lstm_persist.BACKEND["lstm_forward"]),
    "lstm_gates": backends("lstm_gates", _gates_reference, "lstm"),
    "lstm_backward": backends("lstm_backward", backward_reference, "lstm", lstm_persist.BACKEND["lstm_backward"]),
    "lstm_noise": backends("lstm_noise", _noise_reference, "lstm_noise"),
}


for _op in BACKENDS:
    register(_op, BACKENDS[_op])

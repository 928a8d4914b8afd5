"""``fastseq::lstm_*`` for torch: schemas, fakes, autograd and backends. Meaning and shapes: ``fastseq.reference.lstm``.

``lstm_forward`` returns h, c, gates, h_n, c_n. ``save`` says what a later backward needs: 2 keeps c and gates, 1 keeps
c alone (gates are rebuilt by ``lstm_gates``), 0 keeps neither; what is not kept comes back with no elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastseq import reference
from fastseq.ops._library import fake, library, no_autocast, why_not_compiled
from fastseq.ops._select import Backend, allowed, choose, once
from fastseq.ops._transforms import apply, one_by_one, refuse_forward_mode
from fastseq.ops.gemm import gemm

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


_PLAIN = Options()


@fake("lstm_forward")
def fake_forward(x_gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, *args: Any) -> tuple[Tensor, ...]:
    save, lead, (H, P) = args[-1], x_gates.shape[:-1], (c0.shape[1], h0.shape[1])
    return (
        x_gates.new_empty(*lead, P),
        x_gates.new_empty(*lead, H) if save >= 1 else x_gates.new_empty(0),
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
        c0.new_empty(c0.shape[1]) if start else none.clone(),
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


def forward_reference(x_gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, *args: Any) -> tuple[Tensor, ...]:
    options, save = Options(*args[:-1]), args[-1]
    _check_values(options, x_gates.shape[0], len(h0))
    noise = _reference_noise(x_gates, options, len(h0))
    arguments: Any = (*options.state, noise, *options.gate)
    out = reference.lstm(x_gates, weight_hh, h0, c0, *arguments)
    none = x_gates.new_empty(0)
    return (out[0], out[1] if save >= 1 else none, out[2] if save >= 2 else none.clone(), *out[3:])


def _gates_reference(
    x_gates: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, *args: Any
) -> Tensor:
    return forward_reference(x_gates, weight_hh, h0, c0, *args, 2)[2]


def backward_reference(*args: Any) -> tuple[Tensor, ...]:
    out: list[Any] = list(reference.lstm_backward(args[:5], *args[5:-1]))
    none = out[0].new_empty(0)
    if not args[-1]:
        out[1], out[4] = none, none.clone()
    if args[11] is None:
        out[4] = none.clone()
    if args[15] is None and args[16] is None:
        out[5], out[6] = none.clone(), none.clone()
    return tuple(out)


def _noise_reference(seed: Tensor, *args: Any) -> Tensor:
    return reference.gate_noise(seed, *args).to(seed.device)


def _cpu_why_not(*args: Any) -> str | None:
    if why_not_compiled:
        return why_not_compiled
    tensor = next(a for a in args if isinstance(a, Tensor))
    return None if tensor.device.type == "cpu" else f"input is on {tensor.device.type}"


def backends(op: str, definition: Any) -> tuple[Backend, ...]:
    return (
        Backend("cpu", getattr(torch.ops.fastseq, op), _cpu_why_not),
        Backend("reference", definition, lambda *args: None),
    )


BACKENDS = {
    "lstm_forward": backends("lstm_forward", forward_reference),
    "lstm_gates": backends("lstm_gates", _gates_reference),
    "lstm_backward": backends("lstm_backward", backward_reference),
    "lstm_noise": backends("lstm_noise", _noise_reference),
}


def register(op: str, backends: tuple[Backend, ...]) -> None:
    """Give torch the implementations that are not compiled ones."""

    def run(*args: Any) -> Any:
        with no_autocast():
            return choose(op, backends, *args).run(*args)

    library.impl(op, run, "CUDA")
    if why_not_compiled or allowed() == "reference":
        library.impl(op, run, "CPU", allow_override=True)


for _op in BACKENDS:
    register(_op, BACKENDS[_op])


class LSTM(Function):
    """Autograd of a layer: the input product, where there is a weight_ih, and the recurrence.

    x is [T, B, I] or packed [N, I] (the pre-activations themselves where weight_ih is None), bias [4*H] or None, save 2
    or 1 as in ``lstm_forward``. h, c and gates are all differentiable: double backward passes through them.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight_ih: Tensor | None,
        bias: Tensor | None,
        weight_hh: Tensor,
        h0: Tensor,
        c0: Tensor,
        weight_hr: Tensor | None,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        reset: Tensor | None,
        h_start: Tensor | None,
        c_start: Tensor | None,
        seed: Tensor | None,
        rows: Tensor | None,
        row_offset: int,
        stream: int,
        noise_probability: float,
        tau: float,
        hard: bool,
        reverse: bool,
        save: int,
    ) -> tuple[Tensor, ...]:
        product = () if weight_ih is None else (weight_ih, bias)
        run = torch.ops.fastseq.lstm_layer_forward if product else torch.ops.fastseq.lstm_forward
        out: tuple[Tensor, ...] = run.default(
            *(x, *product),
            *(weight_hh, h0, c0, weight_hr, lengths, batch_sizes, reset, h_start, c_start),
            *(seed, rows, row_offset, stream, noise_probability, tau, hard, reverse, save),
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight_ih, bias, weight_hh, h0, c0, weight_hr, *sizes, h_start, c_start, seed, rows = inputs[:14]
        ctx.set_materialize_grads(False)
        h, c, gates, _, _ = output
        rebuild = inputs[20] < 2
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            x if rebuild or (weight_ih is not None and needs[1]) else None,
            weight_ih,
            bias if rebuild else None,
            None if rebuild else gates,
            *(h, c, weight_hh, h0, c0, weight_hr, *sizes, h_start, c_start),
            *((seed, rows) if rebuild else (None, None)),
        )
        ctx.rest = inputs[14:20]

    @staticmethod
    def backward(
        ctx: Any,
        dh: Tensor | None,
        dc: Tensor | None,
        dgates: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if dh is None and dc is None and dgates is None and dh_n is None and dc_n is None:
            return (None,) * 21
        needs = ctx.needs_input_grad
        x, weight_ih, bias, gates, h, c, weight_hh, h0, c0, *state, seed, rows = ctx.saved_tensors
        row_offset, stream, noise_probability, *gate = ctx.rest
        noise = (seed, rows, row_offset, stream, noise_probability)
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        dgates = None if gates is None else dgates  # the forward returned none
        grads = [d if d is None else d.contiguous() for d in (dh, dc, dgates, dh_n, dc_n)]
        weights = needs[3] or needs[6]
        if x is not None and weight_ih is not None and not differentiable:
            given = (*grads, x, weight_ih, bias, gates, h, c, weight_hh, h0, c0, *state, *noise, *gate)
            return _kept(needs, *torch.ops.fastseq.lstm_layer_backward.default(*given, *needs[:3], weights))
        if gates is None and differentiable:
            gates = apply(LSTM, x, weight_ih, bias, weight_hh, h0, c0, *state, *noise, *gate, 2)[2]
        elif gates is None:
            gates = torch.ops.fastseq.lstm_gates.default(x, h, c, weight_hh, h0, c0, *state, *noise, *gate)
        args = (*grads, gates, h, c, weight_hh, h0, c0, *state, *gate, weights)
        d, *rest = apply(LSTMBackward, *args) if differentiable else torch.ops.fastseq.lstm_backward.default(*args)
        dx, dweight_ih, dbias = d, None, None
        if weight_ih is not None or needs[1] or needs[2]:
            dx, dweight_ih, dbias = _input_product_backward(d, x, weight_ih, needs, differentiable)
        return _kept(needs, dx, dweight_ih, dbias, *rest)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(LSTM.apply)(info, in_dims, *args)


def _kept(needs: tuple[bool, ...], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight_ih, bias, weight_hh, h0, c0, weight_hr, h_start and c_start as backward returns them."""
    in_order = (*grads[:7], None, None, None, *grads[7:])
    return (*(d if n else None for d, n in zip(in_order, needs, strict=False)), *(None,) * 9)


def _input_product_backward(
    d: Tensor, x: Tensor | None, weight_ih: Tensor | None, needs: tuple[bool, ...], differentiable: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight_ih and bias from that of the pre-activations; each one only where it is needed."""
    product = gemm if differentiable else torch.ops.fastseq.gemm.default
    flat = d if d.dim() == 2 else d.view(d.shape[0] * d.shape[1], d.shape[2])
    dx = dweight_ih = dbias = None
    if needs[0] and weight_ih is not None:
        dx = product(flat, weight_ih, None, False, False)
        dx = dx if d.dim() == 2 else dx.view(d.shape[0], d.shape[1], weight_ih.shape[1])
    if needs[1] and x is not None:
        dweight_ih = product(flat, x if x.dim() == 2 else x.view(flat.shape[0], x.shape[2]), None, True, False)
    if needs[2]:
        dbias = flat.sum(0)
    return dx, dweight_ih, dbias


class LSTMBackward(Function):
    """Autograd of ``lstm_backward``: its derivative goes through the definition, step by step."""

    @staticmethod
    def forward(
        dh: Tensor | None,
        dc: Tensor | None,
        dgates: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        gates: Tensor,
        *args: Any,
    ) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = torch.ops.fastseq.lstm_backward.default(dh, dc, dgates, dh_n, dc_n, gates, *args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:17])
        ctx.rest = inputs[17:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        once("lstm: double backward runs step by step in plain torch; no kernel for second derivatives")
        args = ctx.saved_tensors
        wanted = [n for n, need in enumerate(ctx.needs_input_grad[:17]) if need]

        def definition(*values: Tensor) -> tuple[Tensor, ...]:
            filled = list(args)
            for n, value in zip(wanted, values, strict=True):
                filled[n] = value
            return backward_reference(*filled, *ctx.rest)

        pulled: Any = torch.func.vjp(definition, *(args[n] for n in wanted))
        found = dict(zip(wanted, pulled[1](tuple(grads)), strict=True))
        return tuple(found.get(n) for n in range(17 + len(ctx.rest)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return one_by_one(LSTMBackward.apply)(info, in_dims, *args)


def lstm(
    x_gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, options: Options = _PLAIN, save: int = 0
) -> tuple[Tensor, ...]:
    """h, c, gates, h_n, c_n of the recurrence; differentiable where an input requires grad.

    Without gradients c and gates come back empty unless ``save`` asks for them.
    """
    return layer(x_gates, None, None, weight_hh, h0, c0, options, save)


def layer(
    x: Tensor,
    weight_ih: Tensor | None,
    bias: Tensor | None,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    options: tuple[Any, ...] = _PLAIN,
    save: int = 0,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """``lstm`` of ``x @ weight_ih.T + bias``, with x [T, B, I] or packed [N, I] (bias: the sum of both biases).

    ``recompute``: between forward and backward hold x, h and c and rebuild the gates, instead of holding the gates.
    """
    tensors = (x, weight_ih, bias, weight_hh, h0, c0, options[0], options[4], options[5])
    if forward_ad._current_level >= 0:
        refuse_forward_mode("lstm", *tensors)
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                saved = 1 if recompute and save < 2 else 2
                out: tuple[Tensor, ...] = apply(LSTM, x, weight_ih, bias, weight_hh, h0, c0, *options, saved)
                return out
    if weight_ih is None:
        out = torch.ops.fastseq.lstm_forward.default(x, weight_hh, h0, c0, *options, save)
    else:
        out = torch.ops.fastseq.lstm_layer_forward.default(x, weight_ih, bias, weight_hh, h0, c0, *options, save)
    return out


from fastseq.ops import lstm_layer as _layer  # noqa: E402, F401  (gives torch the operators that LSTM calls)

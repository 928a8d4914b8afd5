"""Calls of the LSTM operators and of the matrix product: sizes that take another route, dtypes and options."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from tests.kernels._call import BF16, CALLS, DTYPES, FP32, Call, call, new


def noise(T: int = 5, B: int = 7, H: int = 64, rows: bool = False) -> tuple[Any, ...]:
    numbers = new(B, dtype=torch.int64) if rows else None
    return (new(1, dtype=torch.int64), T, B, H, numbers, 5, 3, 0.2)


call("lstm_noise", "lstm_noise", "plain", noise)
call("lstm_noise", "lstm_noise", "rows", noise, rows=True)
call("lstm_noise", "lstm_noise", "odd", noise, H=13)
call("lstm_noise", "lstm_noise", "wide", noise, H=1024)


def gemm(
    N: int = 100, width: int = 192, out: int = 256, dtype: torch.dtype = FP32, bias: bool = True, tb: bool = True
) -> tuple[Any, ...]:
    """N rows, as in a forward and in the gradient of the input."""
    b = new(*((out, width) if tb else (width, out)), dtype=dtype)
    return (new(N, width, dtype=dtype), b, new(out, dtype=dtype) if bias else None, False, tb)


def gemm_of_gradients(N: int = 100, width: int = 192, out: int = 256, dtype: torch.dtype = FP32) -> tuple[Any, ...]:
    """Sums over N rows, as in the gradient of a weight."""
    return (new(N, out, dtype=dtype), new(N, width, dtype=dtype), None, True, False)


for _name, _dtype in DTYPES.items():
    call("gemm", "gemm", f"{_name}", gemm, dtype=_dtype)
    call("gemm", "gemm", f"{_name} plain", gemm, dtype=_dtype, bias=False, tb=False)
    call("gemm", "gemm", f"{_name} transposed", gemm_of_gradients, dtype=_dtype)
call("gemm", "gemm", "fp32 odd", gemm, out=13, width=7)


# -- recurrence


class Recurrence(NamedTuple):
    """Tensors of one LSTM call."""

    lead: tuple[int, ...]
    weight_hh: Tensor
    h0: Tensor
    c0: Tensor
    state: tuple[Any, ...]  # weight_hr .. c_start
    noise: tuple[Any, ...]
    gate: tuple[Any, ...]
    words: str


def _batch_sizes(T: int, B: int) -> Tensor:
    """Of packed data, on the CPU and with values: the last row has one step, the others all."""
    return torch.tensor([B] + [max(1, B - 1)] * (T - 1))


def recurrence(T: int, B: int, H: int, P: int | None, dtype: torch.dtype, words: str) -> Recurrence:
    """Options are words: lengths, packed, reset, start, noise, rows, hard, reverse."""
    on = set(words.split())
    sizes = _batch_sizes(T, B) if "packed" in on else None
    lead = (T, B) if sizes is None else (B + max(1, B - 1) * (T - 1),)
    width = P or H
    state = (
        new(P, H, dtype=dtype) if P else None,
        new(B, dtype=torch.int64) if "lengths" in on else None,
        sizes,
        new(*lead, dtype=torch.bool) if "reset" in on else None,
        new(width, dtype=dtype) if "start" in on else None,
        new(H) if "start" in on else None,
    )
    seed = new(1, dtype=torch.int64) if "noise" in on else None
    rows = new(B, dtype=torch.int64) if "rows" in on else None
    return Recurrence(
        lead,
        new(4 * H, width, dtype=dtype),
        new(B, width, dtype=dtype),
        new(B, H),
        state,
        (seed, rows, 0, 0, 1.0),
        (0.9 if seed is not None else 1.0, "hard" in on, "reverse" in on),
        words,
    )


Make = Callable[..., tuple[Any, ...]]


def recurrent(make: Callable[..., tuple[Any, ...]]) -> Make:
    """From a function of a recurrence, which gives a call's arguments, to one of its sizes and options."""

    def of_sizes(
        T: int = 5,
        B: int = 20,
        H: int = 128,
        P: int | None = None,
        dtype: torch.dtype = BF16,
        words: str = "",
        **more: Any,
    ) -> tuple[Any, ...]:
        return make(recurrence(T, B, H, P, dtype, words), **more)

    return of_sizes


def _gates(r: Recurrence) -> Tensor:
    """Of every element; its pre-activations too."""
    return new(*r.lead, r.weight_hh.shape[0], dtype=r.h0.dtype)


def _h(r: Recurrence) -> Tensor:
    return new(*r.lead, r.h0.shape[1], dtype=r.h0.dtype)


def _c(r: Recurrence) -> Tensor:
    return new(*r.lead, r.c0.shape[1])


def _inputs(r: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight_ih and bias."""
    rows = r.weight_hh.shape[0]
    return tuple(new(*shape, dtype=r.h0.dtype) for shape in ((*r.lead, 80), (rows, 80), (rows,)))


def _grads(r: Recurrence) -> tuple[Tensor | None, ...]:
    """Gradients of h, c, gates, h_n and c_n: that of h alone, or with ``all_grads`` all."""
    if "all_grads" not in r.words:
        return (_h(r), None, None, None, None)
    return (_h(r), _c(r), _gates(r), torch.empty_like(r.h0), torch.empty_like(r.c0))


@recurrent
def forward(r: Recurrence, save: int = 2) -> tuple[Any, ...]:
    return (_gates(r), r.weight_hh, r.h0, r.c0, *r.state, *r.noise, *r.gate, save)


@recurrent
def rebuilt(r: Recurrence) -> tuple[Any, ...]:
    return (_gates(r), _h(r), _c(r), r.weight_hh, r.h0, r.c0, *r.state, *r.noise, *r.gate)


@recurrent
def backward(r: Recurrence, weights: bool = True) -> tuple[Any, ...]:
    return (*_grads(r), _gates(r), _h(r), _c(r), r.weight_hh, r.h0, r.c0, *r.state, *r.gate, weights)


@recurrent
def layer_forward(r: Recurrence, save: int = 2) -> tuple[Any, ...]:
    return (*_inputs(r), r.weight_hh, r.h0, r.c0, *r.state, *r.noise, *r.gate, save)


@recurrent
def layer_backward(r: Recurrence, rebuild: bool = False) -> tuple[Any, ...]:
    kept = (None if rebuild else _gates(r), _h(r), _c(r))
    given = (*_grads(r), *_inputs(r), *kept, r.weight_hh, r.h0, r.c0)
    return (*given, *r.state, *r.noise, *r.gate, True, True, True, True)


ROUTES: dict[str, dict[str, Any]] = {  # sizes and options that take another way through the kernels
    "small": dict(H=64),
    "": dict(H=128),
    "odd": dict(H=37),
    "large": dict(H=512),
    "one row": dict(H=512, B=1),
    "one step": dict(H=512, T=1),
    "projection": dict(H=128, P=48),
}
OPTIONS: dict[str, str] = {
    "lengths": "lengths reset start reverse",
    "packed": "packed reset start",
    "hard": "hard noise rows",
    "noise packed": "noise packed reverse",
}


def _recurrent(op: str, make: Make, grads: bool) -> None:
    for name, dtype in DTYPES.items():
        for route, sizes in ROUTES.items():
            if name == "fp16" and route not in ("", "large"):
                continue
            call("lstm", op, f"{name} {route}".strip(), make, dtype=dtype, **sizes)
    for route in ("", "large"):
        for option, words in OPTIONS.items():
            every = f"{words} all_grads" if grads else words
            call("lstm", op, f"bf16 {route} {option}".replace("  ", " "), make, words=every, **ROUTES[route])
    call("lstm", op, "fp32 large lengths", make, dtype=FP32, words=OPTIONS["lengths"], H=512)
    for name in ("bf16", "fp32"):  # rows enough for taller tiles
        call("lstm", op, f"{name} many", make, dtype=DTYPES[name], words="lengths reset start", B=100, H=512)
        call("lstm", op, f"{name} most", make, dtype=DTYPES[name], B=200, H=512)
    call("lstm", op, "bf16 many projection", make, B=100, H=512, P=128)


_recurrent("lstm_forward", forward, False)
_recurrent("lstm_backward", backward, True)
for _save in (0, 1):
    call("lstm", "lstm_forward", f"bf16 save {_save}", forward, save=_save)
    call("lstm", "lstm_forward", f"bf16 large save {_save}", forward, save=_save, H=512)
call("lstm", "lstm_backward", "bf16 frozen", backward, weights=False)
for _name, _dtype in DTYPES.items():
    call("lstm", "lstm_gates", _name, rebuilt, dtype=_dtype)
call("lstm", "lstm_gates", "bf16 projection", rebuilt, P=48)
for _option, _words in OPTIONS.items():
    call("lstm", "lstm_gates", f"bf16 {_option}", rebuilt, words=_words)
for _name, _dtype in DTYPES.items():
    for _H in (128, 512):
        call("lstm_layer", "lstm_layer_forward", f"{_name} {_H}", layer_forward, dtype=_dtype, H=_H)
        call("lstm_layer", "lstm_layer_backward", f"{_name} {_H}", layer_backward, dtype=_dtype, H=_H)
call("lstm_layer", "lstm_layer_forward", "bf16 noise", layer_forward, words="noise lengths")
call("lstm_layer", "lstm_layer_backward", "bf16 rebuild", layer_backward, rebuild=True, words="noise lengths")


def _both(r: Recurrence) -> tuple[Tensor, list[list[Tensor]]]:
    """x, and per direction weight_ih, bias, weight_hh, h0, c0, h_start and c_start."""
    x, *inputs = _inputs(r)
    own = (*inputs, r.weight_hh, r.h0, r.c0, *r.state[4:])
    return x, [[] if t is None else [t, torch.empty_like(t)] for t in own]


@recurrent
def both_forward(r: Recurrence, save: int = 2) -> tuple[Any, ...]:
    x, lists = _both(r)
    return (x, *lists[:5], *r.state[1:4], *lists[5:], *r.noise, *r.gate[:2], save)


@recurrent
def both_backward(r: Recurrence, rebuild: bool = False) -> tuple[Any, ...]:
    x, lists = _both(r)
    grads = [d for pair in zip(_grads(r), _grads(r), strict=True) for d in pair]
    kept = ([] if rebuild else [_gates(r), _gates(r)], [_h(r), _h(r)], [_c(r), _c(r)])
    given = (grads, x, *lists[:2], *kept, *lists[2:5], *r.state[1:4], *lists[5:])
    return (*given, *r.noise, *r.gate[:2], True, True, True, True)


for _H in (128, 512):
    call("lstm_layer", "lstm_layer_both_forward", f"bf16 {_H}", both_forward, H=_H)
    call("lstm_layer", "lstm_layer_both_backward", f"bf16 {_H}", both_backward, H=_H)
call(
    "lstm_layer", "lstm_layer_both_forward", "fp32 lengths", both_forward, dtype=FP32, words="noise lengths reset start"
)
call("lstm_layer", "lstm_layer_both_backward", "bf16 rebuild", both_backward, rebuild=True, words="noise packed")


class GraphCall(Call):
    """By CUDA graphs, which choose themselves only where they were seen to be right; here none is captured."""

    def run(self, **sizes: int) -> Any:
        graph = importlib.import_module("fastseq_kernels.lstm_graph")
        with (
            mock.patch.object(graph, "wanted", lambda call: True),
            mock.patch.object(graph, "_key", lambda loop: object()),
            mock.patch.object(graph, "_capture", lambda loop, table: None),
        ):
            return super().run(**sizes)


for _name, _make, _dtype, _words in (
    ("lstm_forward", forward, BF16, ""),
    ("lstm_forward", forward, FP32, "lengths reset start reverse"),
    ("lstm_backward", backward, BF16, ""),
    ("lstm_backward", backward, FP32, "packed reset start all_grads"),
):
    _given = functools.partial(_make, T=64, H=512, dtype=_dtype, words=_words)
    CALLS["lstm"].append(GraphCall("lstm", _name, f"{'bf16' if _dtype == BF16 else 'fp32'} graph", _given))

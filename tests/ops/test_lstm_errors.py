"""Wrong arguments of the LSTM operators: both doors answer in words that name the argument, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.ops._select import Backend, choose
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import Case, Inputs

pytestmark = cases.needs_compiled()
LENGTHS, PACKED = Case(4, 3, 5, P=2, layout="lengths", **cases.ALL), Case(4, 3, 5, P=2, layout="packed", **cases.ALL)
DENSE = Case(4, 3, 5, P=2, **cases.ALL)
Change = Callable[[Any], Any]


def strided(tensor: Tensor) -> Tensor:
    """The same values with a stride of two."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def wider(tensor: Tensor) -> Tensor:
    return torch.cat((tensor, tensor[..., :1]), -1).contiguous()


def double(tensor: Tensor) -> Tensor:
    return tensor.double()


def set_first(value: int) -> Change:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[0] = value
        return tensor

    return change


# name: (case, argument, change, what the message says after the operator's name)
FORWARD: dict[str, tuple[Case, str, Change, str]] = {
    "x_gates_rank": (DENSE, "x_gates", lambda t: t[0], r"x_gates must be \[T, B, 4\*H\], got \[3, 20\]"),
    "x_gates_packed_rank": (
        PACKED,
        "x_gates",
        lambda t: t[None],
        r"x_gates must be \[N, 4\*H\] with batch_sizes, got \[1, 7, 20\]",
    ),
    "x_gates_size": (DENSE, "x_gates", wider, r"x_gates must be \[T, B, 4\*H\] = \[4, 3, 20\], got \[4, 3, 21\]"),
    "x_gates_stride": (DENSE, "x_gates", strided, "x_gates must be contiguous"),
    "x_gates_dtype": (DENSE, "x_gates", lambda t: t.half(), "x_gates must be float32 or float64, got"),
    "weight_hh_size": (DENSE, "weight_hh", wider, r"weight_hh must be \[4\*H, P\] = \[20, 2\], got \[20, 3\]"),
    "weight_hh_rank": (DENSE, "weight_hh", lambda t: t[0], r"weight_hh must be \[4\*H, P\] = \[20, 2\], got \[2\]"),
    "weight_hh_stride": (DENSE, "weight_hh", strided, "weight_hh must be contiguous"),
    "weight_hh_dtype": (DENSE, "weight_hh", double, "weight_hh must be float32, got float64"),
    "h0_size": (DENSE, "h0", lambda t: t[:2], r"h0 must be \[B, P\] = \[3, 2\], got \[2, 2\]"),
    "h0_dtype": (DENSE, "h0", double, "h0 must be float32, got float64"),
    "h0_stride": (DENSE, "h0", strided, "h0 must be contiguous"),
    "c0_size": (DENSE, "c0", lambda t: t[:2], r"c0 must be \[B, H\] = \[3, 5\], got \[2, 5\]"),
    "c0_dtype": (DENSE, "c0", double, "c0 must be float32, got float64"),
    "c0_stride": (DENSE, "c0", strided, "c0 must be contiguous"),
    "weight_hr_size": (DENSE, "weight_hr", wider, r"weight_hr must be \[P, H\] = \[2, 5\], got \[2, 6\]"),
    "weight_hr_dtype": (DENSE, "weight_hr", double, "weight_hr must be float32, got float64"),
    "weight_hr_stride": (DENSE, "weight_hr", strided, "weight_hr must be contiguous"),
    "lengths_size": (LENGTHS, "lengths", wider, r"lengths must be \[B\] = \[3\], got \[4\]"),
    "lengths_dtype": (LENGTHS, "lengths", lambda t: t.int(), "lengths must be int64, got"),
    "lengths_stride": (LENGTHS, "lengths", strided, "lengths must be contiguous"),
    "lengths_beyond": (LENGTHS, "lengths", set_first(5), r"lengths must lie in 0 .. T = 4, got lengths\[0\] = 5"),
    "lengths_negative": (LENGTHS, "lengths", set_first(-1), r"lengths must lie in 0 .. T = 4, got lengths\[0\] = -1"),
    "batch_sizes_dtype": (PACKED, "batch_sizes", lambda t: t.int(), "batch_sizes must be int64, got"),
    "batch_sizes_rank": (PACKED, "batch_sizes", lambda t: t[None], r"batch_sizes must be \[T\], got \[1, 4\]"),
    "batch_sizes_sum": (PACKED, "batch_sizes", set_first(2), "batch_sizes must sum to the rows of data = 7, got 6"),
    "batch_sizes_order": (
        PACKED,
        "batch_sizes",
        lambda t: t.flip(0).contiguous(),
        r"batch_sizes must not increase and lie in 0 .. B = 3, got batch_sizes\[2\] = 2 after 1",
    ),
    "batch_sizes_rows": (
        PACKED,
        "batch_sizes",
        set_first(4),
        r"batch_sizes must not increase and lie in 0 .. B = 3, got batch_sizes\[0\] = 4",
    ),
    "batch_sizes_negative": (
        PACKED,
        "batch_sizes",
        lambda t: torch.cat((t, -t[-1:])),
        r"batch_sizes must not increase and lie in 0 .. B = 3, got batch_sizes\[4\] = -1 after 1",
    ),
    "reset_size": (DENSE, "reset", lambda t: t[1:], r"reset must be \[T, B\] = \[4, 3\], got \[3, 3\]"),
    "reset_packed_size": (PACKED, "reset", lambda t: t[1:], r"reset must be \[N\] = \[7\], got \[6\]"),
    "reset_dtype": (DENSE, "reset", lambda t: t.int(), "reset must be bool, got"),
    "reset_stride": (DENSE, "reset", strided, "reset must be contiguous"),
    "h_start_size": (DENSE, "h_start", wider, r"h_start must be \[P\] = \[2\], got \[3\]"),
    "h_start_dtype": (DENSE, "h_start", double, "h_start must be float32, got float64"),
    "c_start_size": (DENSE, "c_start", wider, r"c_start must be \[H\] = \[5\], got \[6\]"),
    "c_start_stride": (DENSE, "c_start", strided, "c_start must be contiguous"),
    "rows_size": (DENSE, "rows", wider, r"rows must be \[B\] = \[3\], got \[4\]"),
    "rows_dtype": (DENSE, "rows", lambda t: t.int(), "rows must be int64, got"),
    "noise_probability": (
        DENSE,
        "noise_probability",
        lambda _: 1.5,
        r"noise_probability must lie in \[0, 1\], got 1.5",
    ),
    "noise_probability_nan": (
        DENSE,
        "noise_probability",
        lambda _: float("nan"),
        r"noise_probability must lie in \[0, 1\], got nan",
    ),
    "tau": (DENSE, "tau", lambda _: 0.0, "tau must be greater than 0, got 0"),
    "tau_nan": (DENSE, "tau", lambda _: float("nan"), "tau must be greater than 0, got nan"),
    "save": (DENSE, "save", lambda _: 3, "save must be 0, 1 or 2, got 3"),
}
SAVED: dict[str, tuple[Case, str, Change, str]] = {
    "h_size": (DENSE, "h", lambda t: t[1:], r"h must be \[T, B, P\] = \[4, 3, 2\], got \[3, 3, 2\]"),
    "h_dtype": (DENSE, "h", double, "h must be float32, got float64"),
    "c_size": (PACKED, "c", wider, r"c must be \[N, H\] = \[7, 5\], got \[7, 6\]"),
    "c_stride": (DENSE, "c", strided, "c must be contiguous"),
}
BACKWARD: dict[str, tuple[Case, str, Change, str]] = SAVED | {
    "gates_rank": (DENSE, "gates", lambda t: t[0], r"gates must be \[T, B, 4\*H\], got \[3, 20\]"),
    "gates_stride": (DENSE, "gates", strided, "gates must be contiguous"),
    "gates_none_kept": (DENSE, "gates", lambda t: t.new_empty(0), r"gates must be \[T, B, 4\*H\], got \[0\]"),
    "c_none_kept": (DENSE, "c", lambda t: t.new_empty(0), r"c must be \[T, B, H\] = \[4, 3, 5\], got \[0\]"),
    "dh_size": (DENSE, "dh", wider, r"dh must be \[T, B, P\] = \[4, 3, 2\], got \[4, 3, 3\]"),
    "dh_stride": (DENSE, "dh", strided, "dh must be contiguous"),
    "dc_dtype": (DENSE, "dc", double, "dc must be float32, got float64"),
    "dgates_size": (PACKED, "dgates", lambda t: t[1:], r"dgates must be \[N, 4\*H\] = \[7, 20\], got \[6, 20\]"),
    "dh_n_size": (DENSE, "dh_n", wider, r"dh_n must be \[B, P\] = \[3, 2\], got \[3, 3\]"),
    "dc_n_size": (DENSE, "dc_n", lambda t: t[1:], r"dc_n must be \[B, H\] = \[3, 5\], got \[2, 5\]"),
    "weight_hh_size": FORWARD["weight_hh_size"],
    "h0_size": FORWARD["h0_size"],
    "c0_size": FORWARD["c0_size"],
    "lengths_beyond": FORWARD["lengths_beyond"],
    "lengths_size": FORWARD["lengths_size"],
    "batch_sizes_sum": FORWARD["batch_sizes_sum"],
    "reset_size": FORWARD["reset_size"],
    "h_start_size": FORWARD["h_start_size"],
    "tau": FORWARD["tau"],
}
NAMES = {
    "lstm_forward": [*Inputs._fields[:4], *cases.Options._fields, "save"],
    "lstm_gates": ["x_gates", "h", "c", "weight_hh", "h0", "c0", *cases.Options._fields],
    "lstm_backward": [
        *("dh", "dc", "dgates", "dh_n", "dc_n", "gates", "h", "c", "weight_hh", "h0", "c0"),
        *(*cases.Options._fields[:6], "tau", "hard", "reverse", "weights"),
    ],
}


def arguments(op: str, case: Case) -> dict[str, Any]:
    """The right arguments of one call, by name."""
    args = cases.inputs(case)
    outputs = torch.ops.fastseq.lstm_forward(*args[:4], *args.options, 2)
    calls = {
        "lstm_forward": [*args[:4], *args.options, 2],
        "lstm_gates": [args.x_gates, *outputs[:2], *args[1:4], *args.options],
        "lstm_backward": cases.backward_arguments(args, outputs, cases.upstream(outputs)),
    }
    return dict(zip(NAMES[op], calls[op], strict=True))


CHANGES = [("lstm_forward", n, FORWARD[n]) for n in FORWARD]
CHANGES += [("lstm_gates", n, FORWARD[n]) for n in FORWARD if n != "save"] + [
    ("lstm_gates", n, SAVED[n]) for n in SAVED
]
CHANGES += [("lstm_backward", n, BACKWARD[n]) for n in BACKWARD]


@pytest.mark.parametrize("door", ["torch", "numpy"])
@pytest.mark.parametrize("op, name, change", CHANGES, ids=[f"{op}-{n}" for op, n, _ in CHANGES])
def test_wrong_argument(op: str, name: str, change: tuple[Case, str, Change, str], door: str) -> None:
    case, argument, wrong, says = change
    args = arguments(op, case)
    values = [wrong(v) if n == argument else v for n, v in args.items()]
    message = f"{op}: {says}"
    if door == "torch":
        with pytest.raises(ValueError, match=message):
            getattr(torch.ops.fastseq, op)(*values)
    else:
        core = cases.numpy_door()
        values = [int(v) if n == "seed" else v for n, v in zip(args, values, strict=True)]
        with pytest.raises(ValueError, match=message):
            getattr(core, op)(*cases.arrays(values))


@pytest.mark.parametrize("wrong", [torch.tensor([1, 2]), torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32)])
def test_wrong_seed(wrong: Tensor) -> None:
    args = arguments("lstm_forward", DENSE) | {"seed": wrong}
    with pytest.raises(ValueError, match="lstm_forward: seed must be one int64"):
        torch.ops.fastseq.lstm_forward(*args.values())
    with pytest.raises(ValueError, match="lstm_noise: seed must be one int64"):
        torch.ops.fastseq.lstm_noise(wrong, 2, 3, 4, None, 0, 0, 1.0)


def test_lengths_and_batch_sizes() -> None:
    args = arguments("lstm_forward", PACKED)
    args["lengths"] = torch.tensor([4, 2, 1])
    with pytest.raises(ValueError, match="lstm_forward: lengths and batch_sizes exclude each other"):
        torch.ops.fastseq.lstm_forward(*args.values())


NOISE = {
    "T": ((3, -1, 2, 4, None, 0, 0, 1.0), "T, B and H must not be negative, got -1, 2, 4"),
    "B": ((3, 2, -1, 4, None, 0, 0, 1.0), "T, B and H must not be negative, got 2, -1, 4"),
    "H": ((3, 2, 2, -4, None, 0, 0, 1.0), "T, B and H must not be negative, got 2, 2, -4"),
    "rows_size": ((3, 2, 2, 4, torch.tensor([1, 2, 3]), 0, 0, 1.0), r"rows must be \[B\] = \[2\], got \[3\]"),
    "rows_dtype": ((3, 2, 2, 4, torch.tensor([1.0, 2.0]), 0, 0, 1.0), "rows must be int64, got float32"),
    "probability": ((3, 2, 2, 4, None, 0, 0, -0.1), r"noise_probability must lie in \[0, 1\], got -0.1"),
}


@pytest.mark.parametrize("call, says", NOISE.values(), ids=NOISE.keys())
def test_wrong_noise(call: tuple[Any, ...], says: str) -> None:
    message = f"lstm_noise: {says}"
    with pytest.raises(ValueError, match=message):
        torch.ops.fastseq.lstm_noise(torch.tensor([call[0]]), *call[1:])
    with pytest.raises(ValueError, match=message):
        cases.numpy_door().lstm_noise(*cases.arrays(call))


def test_wrong_threads() -> None:
    args = arguments("lstm_forward", DENSE)
    values = cases.arrays([int(v) if n == "seed" else v for n, v in args.items()])
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"lstm_forward: threads must be at least 1, got {threads}"):
            cases.numpy_door().lstm_forward(*values, threads=threads)


def test_no_backend_says_why() -> None:
    """When nothing can run a call, the message holds every backend's reason."""
    tried = (Backend("first", print, lambda *_: "not built"), Backend("second", print, lambda *_: "input is on meta"))
    message = "op: no backend can run this call (first: not built; second: input is on meta)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        choose("op", tried, torch.zeros(1, device="meta"))


def test_another_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="cpu: input is on meta; cuda: FASTSEQ_BACKEND=cpu; triton: FASTSEQ"):
        choose("lstm_forward", cases.BACKENDS["lstm_forward"], torch.zeros(2, 3, 4, device="meta"))

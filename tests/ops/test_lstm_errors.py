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


# name: (case, argument, change, what the message says besides the argument)
FORWARD: dict[str, tuple[Case, str, Change, str]] = {
    "x_gates_rank": (DENSE, "x_gates", lambda t: t[0], r"\[T, B, 4\*H\]"),
    "x_gates_packed_rank": (PACKED, "x_gates", lambda t: t[None], r"\[N, 4\*H\]"),
    "x_gates_size": (DENSE, "x_gates", wider, "got"),
    "x_gates_stride": (DENSE, "x_gates", strided, "contiguous"),
    "x_gates_dtype": (DENSE, "x_gates", lambda t: t.half(), "float"),
    "weight_hh_size": (DENSE, "weight_hh", wider, r"= \[20, 2\], got \[20, 3\]"),
    "weight_hh_rank": (DENSE, "weight_hh", lambda t: t[0], "got"),
    "weight_hh_stride": (DENSE, "weight_hh", strided, "contiguous"),
    "weight_hh_dtype": (DENSE, "weight_hh", double, "float32"),
    "h0_size": (DENSE, "h0", lambda t: t[:2], "got"),
    "h0_dtype": (DENSE, "h0", double, "float32"),
    "h0_stride": (DENSE, "h0", strided, "contiguous"),
    "c0_size": (DENSE, "c0", lambda t: t[:2], r"= \[3, 5\], got \[2, 5\]"),
    "c0_dtype": (DENSE, "c0", double, "float32"),
    "c0_stride": (DENSE, "c0", strided, "contiguous"),
    "weight_hr_size": (DENSE, "weight_hr", wider, r"= \[2, 5\], got \[2, 6\]"),
    "weight_hr_dtype": (DENSE, "weight_hr", double, "float32"),
    "weight_hr_stride": (DENSE, "weight_hr", strided, "contiguous"),
    "lengths_size": (LENGTHS, "lengths", wider, r"= \[3\], got \[4\]"),
    "lengths_dtype": (LENGTHS, "lengths", lambda t: t.int(), "int64"),
    "lengths_stride": (LENGTHS, "lengths", strided, "contiguous"),
    "lengths_beyond": (LENGTHS, "lengths", set_first(5), "5"),
    "lengths_negative": (LENGTHS, "lengths", set_first(-1), "-1"),
    "batch_sizes_dtype": (PACKED, "batch_sizes", lambda t: t.int(), "int64"),
    "batch_sizes_rank": (PACKED, "batch_sizes", lambda t: t[None], "got"),
    "batch_sizes_sum": (PACKED, "batch_sizes", set_first(2), "sum"),
    "batch_sizes_order": (PACKED, "batch_sizes", lambda t: t.flip(0).contiguous(), "increas"),
    "batch_sizes_rows": (PACKED, "batch_sizes", set_first(4), "3"),
    "batch_sizes_negative": (PACKED, "batch_sizes", lambda t: torch.cat((t, -t[-1:])), "-"),
    "reset_size": (DENSE, "reset", lambda t: t[1:], r"= \[4, 3\], got \[3, 3\]"),
    "reset_packed_size": (PACKED, "reset", lambda t: t[1:], "got"),
    "reset_dtype": (DENSE, "reset", lambda t: t.int(), "bool"),
    "reset_stride": (DENSE, "reset", strided, "contiguous"),
    "h_start_size": (DENSE, "h_start", wider, r"= \[2\], got \[3\]"),
    "h_start_dtype": (DENSE, "h_start", double, "float32"),
    "c_start_size": (DENSE, "c_start", wider, r"= \[5\], got \[6\]"),
    "c_start_stride": (DENSE, "c_start", strided, "contiguous"),
    "rows_size": (DENSE, "rows", wider, r"= \[3\], got \[4\]"),
    "rows_dtype": (DENSE, "rows", lambda t: t.int(), "int64"),
    "noise_probability": (DENSE, "noise_probability", lambda _: 1.5, "1.5"),
    "noise_probability_nan": (DENSE, "noise_probability", lambda _: float("nan"), "nan"),
    "tau": (DENSE, "tau", lambda _: 0.0, "0"),
    "tau_nan": (DENSE, "tau", lambda _: float("nan"), "nan"),
    "save": (DENSE, "save", lambda _: 3, "3"),
}
SAVED: dict[str, tuple[Case, str, Change, str]] = {
    "h_size": (DENSE, "h", lambda t: t[1:], r"= \[4, 3, 2\], got \[3, 3, 2\]"),
    "h_dtype": (DENSE, "h", double, "float32"),
    "c_size": (PACKED, "c", wider, "got"),
    "c_stride": (DENSE, "c", strided, "contiguous"),
}
BACKWARD: dict[str, tuple[Case, str, Change, str]] = SAVED | {
    "gates_rank": (DENSE, "gates", lambda t: t[0], "got"),
    "gates_stride": (DENSE, "gates", strided, "contiguous"),
    "gates_none_kept": (DENSE, "gates", lambda t: t.new_empty(0), "got"),
    "c_none_kept": (DENSE, "c", lambda t: t.new_empty(0), r"got \[0\]"),
    "dh_size": (DENSE, "dh", wider, "got"),
    "dh_stride": (DENSE, "dh", strided, "contiguous"),
    "dc_dtype": (DENSE, "dc", double, "float32"),
    "dgates_size": (PACKED, "dgates", lambda t: t[1:], "got"),
    "dh_n_size": (DENSE, "dh_n", wider, r"= \[3, 2\], got \[3, 3\]"),
    "dc_n_size": (DENSE, "dc_n", lambda t: t[1:], r"= \[3, 5\], got \[2, 5\]"),
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
    message = f"{op}: {argument} must be .*{says}"
    if door == "torch":
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.fastseq, op)(*values)
    else:
        core = cases.numpy_door()
        values = [int(v) if n == "seed" else v for n, v in zip(args, values, strict=True)]
        with pytest.raises((ValueError, TypeError), match=message):
            getattr(core, op)(*cases.arrays(values))


@pytest.mark.parametrize("wrong", [torch.tensor([1, 2]), torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32)])
def test_wrong_seed(wrong: Tensor) -> None:
    args = arguments("lstm_forward", DENSE) | {"seed": wrong}
    with pytest.raises(RuntimeError, match="lstm_forward: seed must be .*got"):
        torch.ops.fastseq.lstm_forward(*args.values())
    with pytest.raises(RuntimeError, match="lstm_noise: seed must be .*got"):
        torch.ops.fastseq.lstm_noise(wrong, 2, 3, 4, None, 0, 0, 1.0)


def test_lengths_and_batch_sizes() -> None:
    args = arguments("lstm_forward", PACKED)
    args["lengths"] = torch.tensor([4, 2, 1])
    with pytest.raises(RuntimeError, match="lstm_forward: .*lengths.*batch_sizes"):
        torch.ops.fastseq.lstm_forward(*args.values())


NOISE = {
    "T": ((3, -1, 2, 4, None, 0, 0, 1.0), "T"),
    "B": ((3, 2, -1, 4, None, 0, 0, 1.0), "B"),
    "H": ((3, 2, 2, -4, None, 0, 0, 1.0), "H"),
    "rows_size": ((3, 2, 2, 4, torch.tensor([1, 2, 3]), 0, 0, 1.0), "rows"),
    "rows_dtype": ((3, 2, 2, 4, torch.tensor([1.0, 2.0]), 0, 0, 1.0), "rows"),
    "probability": ((3, 2, 2, 4, None, 0, 0, -0.1), "noise_probability"),
}


@pytest.mark.parametrize("call, argument", NOISE.values(), ids=NOISE.keys())
def test_wrong_noise(call: tuple[Any, ...], argument: str) -> None:
    message = f"lstm_noise: {argument} must be .*got"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastseq.lstm_noise(torch.tensor([call[0]]), *call[1:])
    with pytest.raises((ValueError, TypeError), match=message):
        cases.numpy_door().lstm_noise(*cases.arrays(call))


def test_wrong_threads() -> None:
    args = arguments("lstm_forward", DENSE)
    values = cases.arrays([int(v) if n == "seed" else v for n, v in args.items()])
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"lstm_forward: threads must be .*got {threads}"):
            cases.numpy_door().lstm_forward(*values, threads=threads)


def test_no_backend_says_why() -> None:
    """When nothing can run a call, the message holds every backend's reason."""
    tried = (Backend("first", print, lambda *_: "not built"), Backend("second", print, lambda *_: "input is on meta"))
    message = "op: no backend can run this call (first: not built; second: input is on meta)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        choose("op", tried, torch.zeros(1, device="meta"))


def test_another_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="cpu: input is on meta; reference: FASTSEQ_BACKEND=cpu"):
        choose("lstm_forward", cases.BACKENDS["lstm_forward"], torch.zeros(2, 3, 4, device="meta"))

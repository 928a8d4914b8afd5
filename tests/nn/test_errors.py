"""Every message that a user of the modules and of ``fastseq.functional`` can get, and its type."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastseq import functional
from fastseq._check import ArgumentError
from fastseq.functional import Weights
from fastseq.nn import LSTM, LSTMCell
from fastseq.ops._library import backends as backends_of
from fastseq.ops._select import choose
from fastseq.ops.lstm import BACKENDS

T, B, I, H = 5, 3, 4, 6  # noqa: E741
X = torch.zeros(T, B, I)


def zeros(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*sizes, dtype=dtype)


def packed(x: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, torch.tensor([5, 4, 2]))


# as (call, words of stock's message); stock raises ValueError or RuntimeError, ours is both
LIKE_STOCK: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one dimension": (lambda m: m(zeros(I)), "Expected input to be 2D or 3D, got 1D instead"),
    "four dimensions": (lambda m: m(zeros(1, T, B, I)), "Expected input to be 2D or 3D, got 4D instead"),
    "features": (lambda m: m(zeros(T, B, 6)), "input.size(-1) must be equal to input_size. Expected 4, got 6"),
    "no features": (lambda m: m(zeros(T, B, 0)), "input.size(-1) must be equal to input_size. Expected 4, got 0"),
    "dtype": (
        lambda m: m(X.double()),
        "RNN input dtype (torch.float64) does not match weight dtype (torch.float32)",
    ),
    "integers": (lambda m: m(X.long()), "RNN input dtype (torch.int64) does not match weight dtype (torch.float32)"),
    "h_0": (lambda m: m(X, (zeros(1, 2, H), zeros(1, B, H))), "Expected hidden[0] size (1, 3, 6), got [1, 2, 6]"),
    "c_0": (lambda m: m(X, (zeros(1, B, H), zeros(2, B, H))), "Expected hidden[1] size (1, 3, 6), got [2, 3, 6]"),
    "state dims": (
        lambda m: m(X, (zeros(1, H), zeros(1, H))),
        "For batched 3-D input, hx and cx should also be 3-D but got (2-D, 2-D) tensors",
    ),
    "unbatched state dims": (
        lambda m: m(X[:, 0], (zeros(1, B, H), zeros(1, B, H))),
        "For unbatched 2-D input, hx and cx should also be 2-D but got (3-D, 3-D) tensors",
    ),
    "no steps": (lambda m: m(zeros(0, B, I)), "Expected sequence length to be larger than 0 in RNN"),
    "state_dict": (lambda m: m.load_state_dict({"weight": X}), "Missing key(s) in state_dict"),
}

OURS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "packed features": (
        lambda m: m(packed(zeros(T, B, 6))),
        "LSTM: input.size(-1) must be equal to input_size. Expected 4, got 6",
    ),
    "packed dtype": (lambda m: m(packed(X.double())), "RNN input dtype (torch.float64) does not match weight dtype"),
    "packed dims": (lambda m: m(packed(zeros(T, B, I, 1))), "input must have 2 dimensions, got 3"),
    "packed state": (
        lambda m: m(packed(X), (zeros(1, 2, H), zeros(1, 2, H))),
        "Expected hidden[0] size (1, 3, 6), got [1, 2, 6]",
    ),
    "packed state dims": (lambda m: m(packed(X), (zeros(B, H), zeros(B, H))), "should also be 3-D but got (2-D, 2-D)"),
    "state dtype": (
        lambda m: m(X, (zeros(1, B, H), zeros(1, B, H, dtype=torch.float64))),
        "LSTM: hidden[1] must be of the input's dtype torch.float32, got torch.float64",
    ),
    "state device": (
        lambda m: m(X, (zeros(1, B, H).to("meta"), zeros(1, B, H))),
        "LSTM: hidden[0] must be on the input's device cpu, got meta",
    ),
    "input device": (lambda m: m(X.to("meta")), "weight_ih must be on meta, got one on cpu"),
    "lengths size": (lambda m: m(X, lengths=torch.tensor([1, 2])), "lstm: lengths must be [B] = [3], got [2]"),
    "lengths dtype": (lambda m: m(X, lengths=zeros(B)), "lstm: lengths must be integers, got torch.float32"),
    "lengths too long": (lambda m: m(X, lengths=torch.tensor([5, 6, 1])), "lengths must lie in 0 .. T = 5"),
    "lengths negative": (lambda m: m(X, lengths=torch.tensor([5, -1, 1])), "lengths must lie in 0 .. T = 5"),
    "lengths of a pack": (
        lambda m: m(packed(X), lengths=torch.tensor([5, 4, 2])),
        "LSTM: lengths must be None for a PackedSequence",
    ),
    "batch sizes rise": (
        lambda m: m(PackedSequence(zeros(6, I), torch.tensor([2, 3, 1])), (zeros(1, 2, H), zeros(1, 2, H))),
        "batch_sizes must not increase",
    ),
    "batch sizes sum": (lambda m: m(PackedSequence(zeros(7, I), torch.tensor([3, 2, 1]))), "batch_sizes must sum"),
    "reset size": (lambda m: m(X, reset=zeros(B, T).bool()), "LSTM: reset must be [T, B] = [5, 3], got [3, 5]"),
    "reset dtype": (lambda m: m(X, reset=zeros(T, B)), "LSTM: reset must be torch.bool, got torch.float32"),
    "reset type": (
        lambda m: m(X, reset=packed(zeros(T, B).bool())),
        "LSTM: reset must be a bool tensor [T, B], got PackedSequence",
    ),
    "unbatched reset size": (lambda m: m(X[:, 0], reset=zeros(T, 1).bool()), "reset must be [T] = [5], got [5, 1]"),
    "packed reset size": (
        lambda m: m(packed(X), reset=zeros(B, T).bool()),
        "LSTM: reset must be [T, B] = [5, 3], got [3, 5]",
    ),
    "packed reset of other lengths": (
        lambda m: m(packed(X), reset=pack_padded_sequence(zeros(T, B).bool(), torch.tensor([5, 3, 3]))),
        "LSTM: reset must be packed as the input is",
    ),
    "packed reset of another order": (
        lambda m: m(
            pack_padded_sequence(X, torch.tensor([2, 5, 4]), enforce_sorted=False),
            reset=pack_padded_sequence(zeros(T, B).bool(), torch.tensor([5, 2, 4]), enforce_sorted=False),
        ),
        "LSTM: reset must be packed as the input is",
    ),
}

CONSTRUCTION: dict[str, tuple[dict[str, Any], str]] = {
    "gates": ({"gates": "hard"}, "gates must be one of 'sigmoid', 'binary', 'sharpened', got 'hard'"),
    "tau": ({"gates": "binary", "tau": 0.0}, "tau must be a finite number > 0, got 0.0"),
    "tau nan": ({"gates": "binary", "tau": float("nan")}, "tau must be a finite number > 0, got nan"),
    "tau of sigmoid": ({"tau": 0.5}, "tau must be 1 for gates='sigmoid'"),
    "noise": ({"noise_probability": 1.2}, "noise_probability must be a number in [0, 1], got 1.2"),
    "noise bool": ({"noise_probability": True}, "noise_probability must be a number in [0, 1], got True"),
    "hard_eval": ({"hard_eval": True}, "hard_eval must be False for gates='sigmoid', got True"),
    "forget_bias": ({"forget_bias": 1.0, "bias": False}, "forget_bias must be None where bias=False, got 1.0"),
}

LAYER_CONSTRUCTION: dict[str, tuple[dict[str, Any], str]] = {
    "weight_dropout": ({"weight_dropout": -0.1}, "weight_dropout must be a number in [0, 1], got -0.1"),
    "variational_dropout": ({"variational_dropout": 2}, "variational_dropout must be a number in [0, 1], got 2"),
    "both dropouts": (
        {"num_layers": 2, "dropout": 0.1, "variational_dropout": 0.2},
        "variational_dropout must be 0 beside dropout=0.1, got 0.2",
    ),
}


@pytest.mark.parametrize("case", LIKE_STOCK)
def test_like_stock(case: str) -> None:
    call, words = LIKE_STOCK[case]
    with pytest.raises((ValueError, RuntimeError), match=re.escape(words)) as stock:
        call(nn.LSTM(I, H))
    with pytest.raises(stock.type, match=re.escape(words)):
        call(LSTM(I, H))


@pytest.mark.parametrize("case", OURS)
def test_ours(case: str) -> None:
    call, words = OURS[case]
    with pytest.raises((ValueError, RuntimeError), match=re.escape(words)) as caught:
        call(LSTM(I, H))
    if "must lie" not in words and "batch_sizes" not in words:  # values are checked in the door, which raises one type
        assert isinstance(caught.value, ArgumentError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("make", [LSTM, LSTMCell])
@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(make: Any, case: str) -> None:
    options, words = CONSTRUCTION[case]
    with pytest.raises(ArgumentError, match=f"^{make.__name__}: " + re.escape(words)):
        make(I, H, **options)


@pytest.mark.parametrize("case", LAYER_CONSTRUCTION)
def test_layer_construction(case: str) -> None:
    options, words = LAYER_CONSTRUCTION[case]
    with pytest.raises(ArgumentError, match="^LSTM: " + re.escape(words)):
        LSTM(I, H, **options)


@pytest.mark.parametrize(
    "make, option", [(LSTM, "learnable_state"), (LSTM, "recompute"), (LSTMCell, "learnable_state")]
)
def test_flags_are_bool(make: Any, option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} should be of type bool, got: int"):
        make(I, H, **{option: 1})
    with pytest.raises(TypeError, match="hard_eval should be of type bool, got: int"):
        make(I, H, gates="binary", hard_eval=1)


@pytest.mark.parametrize(
    "hx, got", [(zeros(1, B, H), "Tensor"), ((zeros(1, B, H),), "1 of them"), ((zeros(1, B, H), None), "2 of them")]
)
def test_state_is_a_pair(hx: Any, got: str) -> None:
    for module, x in ((LSTM(I, H), X), (LSTM(I, H), packed(X)), (LSTMCell(I, H), X[0])):
        with pytest.raises(TypeError, match=re.escape(f"hx must be a tuple of two tensors (h_0, c_0), got {got}")):
            module(x, hx)


def test_options_changed_later_are_checked() -> None:
    module = LSTM(I, H, 2, gates="binary")
    for name, value, words in (
        ("tau", -1.0, "tau must be a finite number > 0, got -1.0"),
        ("noise_probability", 7.0, "noise_probability must be a number in [0, 1], got 7.0"),
        ("dropout", 1.5, "dropout must be a number in [0, 1], got 1.5"),
    ):
        kept = getattr(module, name)
        setattr(module, name, value)
        with pytest.raises(ArgumentError, match=re.escape(words)):
            module(X)
        setattr(module, name, kept)
    module(X)


CELL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "input dims": (lambda m: m(X), "LSTMCell: Expected input to be 1D or 2D, got 3D instead"),
    "state dims": (lambda m: m(X[0], (X, X)), "LSTMCell: Expected hx[0] to be 1D or 2D, got 3D instead"),
    "features": (lambda m: m(zeros(B, 6)), "input has inconsistent input_size: got 6 expected 4"),
    "rows": (
        lambda m: m(zeros(2, I), (zeros(3, H), zeros(3, H))),
        "Input batch size 2 doesn't match hidden0 batch size 3",
    ),
    "h": (lambda m: m(X[0], (zeros(B, 5), zeros(B, H))), "hidden0 has inconsistent hidden_size: got 5, expected 6"),
    "c": (lambda m: m(X[0], (zeros(B, H), zeros(B, 7))), "hidden1 has inconsistent hidden_size: got 7, expected 6"),
}


@pytest.mark.parametrize("case", CELL)
def test_cell_like_stock(case: str) -> None:
    call, words = CELL[case]
    with pytest.raises((ValueError, RuntimeError), match=re.escape(words)) as stock:
        call(nn.LSTMCell(I, H))
    with pytest.raises(stock.type, match=re.escape(words)):
        call(LSTMCell(I, H))


def test_cell_ours() -> None:
    cell = LSTMCell(I, H)
    for call, words in (
        (lambda: cell(X[0].double()), "RNN input dtype (torch.float64) does not match weight dtype (torch.float32)"),
        (
            lambda: cell(X[0], (zeros(B, H, dtype=torch.float64),) * 2),
            "hx[0] must be of the input's dtype torch.float32",
        ),
        (lambda: cell(X[0], (zeros(B, H).to("meta"),) * 2), "hx[0] must be on the input's device cpu, got meta"),
        (lambda: cell(X[0], (zeros(H), zeros(H))), "hx[0] must be 2D as the input is, got 1D"),
    ):
        with pytest.raises(ArgumentError, match=re.escape(words)):
            call()


@pytest.mark.parametrize("make", [LSTM, LSTMCell])
def test_complex_is_refused(make: Any) -> None:
    module = make(I, H).to(torch.complex64)
    with pytest.raises(ArgumentError, match="must be float32, float64, bfloat16 or float16, got torch.complex64"):
        module((X if make is LSTM else X[0]).to(torch.complex64))


def weights(**changes: Tensor | None) -> Weights:
    good = Weights(zeros(4 * H, I), zeros(4 * H, H), zeros(4 * H), zeros(4 * H))
    return good._replace(**changes)  # type: ignore[arg-type]


FUNCTIONAL: dict[str, tuple[Callable[[], Any], str]] = {
    "no weights": (lambda: functional.lstm(X, []), "lstm: weights must be one entry per layer and direction, got 0"),
    "odd weights": (
        lambda: functional.lstm(X, [weights()], bidirectional=True),
        "lstm: weights must be one entry per layer and direction, got 1",
    ),
    "x": (lambda: functional.lstm(X[0], [weights()]), "lstm: x must be [T, B, I], got [3, 4]"),
    "packed x": (
        lambda: functional.lstm(X, [weights()], batch_sizes=torch.tensor([3])),
        "lstm: x must be packed [N, I], got [5, 3, 4]",
    ),
    "weight_ih": (
        lambda: functional.lstm(X, [weights(weight_ih=zeros(4 * H, 9))]),
        "lstm: weights[0].weight_ih must be [4*H, I] = [24, 4], got [24, 9]",
    ),
    "weight_hh": (
        lambda: functional.lstm(X, [weights(weight_hh=zeros(4 * H, 5))]),
        "lstm: weights[0].weight_hh must be [4*H, H] = [20, 5], got [24, 5]",
    ),
    "bias_ih": (
        lambda: functional.lstm(X, [weights(bias_ih=zeros(H))]),
        "lstm: weights[0].bias_ih must be [4*H] = [24], got [6]",
    ),
    "bias_hh": (
        lambda: functional.lstm(X, [weights(bias_hh=zeros(1))]),
        "lstm: weights[0].bias_hh must be [4*H] = [24], got [1]",
    ),
    "weight_hr": (
        lambda: functional.lstm(X, [weights(weight_hh=zeros(24, 2), weight_hr=zeros(3, H))]),
        "lstm: weights[0].weight_hr must be [P, H] = [2, 6], got [3, 6]",
    ),
    "h_start": (
        lambda: functional.lstm(X, [weights(h_start=zeros(5))]),
        "lstm: weights[0].h_start must be [P] = [6], got [5]",
    ),
    "c_start": (
        lambda: functional.lstm(X, [weights(c_start=zeros(5))]),
        "lstm: weights[0].c_start must be [H] = [6], got [5]",
    ),
    "h_0": (
        lambda: functional.lstm(X, [weights()], (zeros(1, B, 5), zeros(1, B, H))),
        "lstm: h_0[0] must be [B, P] = [3, 6], got [3, 5]",
    ),
    "c_0": (
        lambda: functional.lstm(X, [weights()], (zeros(1, B, H), zeros(2, B, H))),
        "lstm: c_0 must be [L*D, B, ...] = [1, 3, ...], got [2, 3, 6]",
    ),
    "state dtype": (
        lambda: functional.lstm(X, [weights()], (zeros(1, B, H).double(), zeros(1, B, H))),
        "lstm: hidden[0] must be of the input's dtype torch.float32, got torch.float64",
    ),
    "lengths and batch_sizes": (
        lambda: functional.lstm(zeros(4, I), [weights()], batch_sizes=torch.tensor([3, 1]), lengths=torch.ones(3)),
        "lstm: lengths must be None where batch_sizes say how long each row is, got [3]",
    ),
    "batch_sizes": (
        lambda: functional.lstm(zeros(4, I), [weights()], batch_sizes=torch.tensor([3.0, 1.0])),
        "lstm: batch_sizes must be int64 [T] on the CPU, got [2] of torch.float32 on cpu",
    ),
    "rows": (
        lambda: functional.lstm(X, [weights()], rows=torch.zeros(4, dtype=torch.int64)),
        "lstm: rows must be int64 [B] = [3] on the CPU, got [4] of torch.int64 on cpu",
    ),
    "packed reset": (
        lambda: functional.lstm(zeros(4, I), [weights()], batch_sizes=torch.tensor([3, 1]), reset=zeros(3).bool()),
        "lstm: reset must be [N] = [4], got [3]",
    ),
    "tau": (lambda: functional.lstm(X, [weights()], tau=0), "lstm: tau must be a finite number > 0, got 0"),
    "noise_probability": (
        lambda: functional.lstm(X, [weights()], noise_probability=-1),
        "lstm: noise_probability must be a number in [0, 1], got -1",
    ),
    "cell x": (lambda: functional.lstm_cell(X, None, weights()), "lstm_cell: x must be [B, I], got [5, 3, 4]"),
    "cell state": (
        lambda: functional.lstm_cell(X[0], (zeros(2, H), zeros(B, H)), weights()),
        "lstm_cell: h_0[0] must be [B, P] = [3, 6], got [2, 6]",
    ),
    "cell weights": (
        lambda: functional.lstm_cell(X[0], None, weights(weight_ih=zeros(24, 5))),
        "lstm_cell: weights[0].weight_ih must be [4*H, I] = [24, 4], got [24, 5]",
    ),
}


@pytest.mark.parametrize("case", FUNCTIONAL)
def test_functional(case: str) -> None:
    call, words = FUNCTIONAL[case]
    with pytest.raises(ArgumentError, match=f"^{re.escape(words)}"):
        call()


def test_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import fastseq._check; import fastseq.nn"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("ImportError: fastseq.nn needs torch: install it, then fastseq with")


def test_without_the_compiled_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that says how to build them; the definition runs in their place only where asked for."""
    monkeypatch.setattr("fastseq.ops._library.why_not_compiled", "not built (here comes how to)")
    monkeypatch.delenv("FASTSEQ_BACKEND", raising=False)
    backends = backends_of("lstm_forward", BACKENDS["lstm_forward"][-1].run, "lstm")
    words = "lstm_forward: no backend can run this call (cpu: not built (here comes how to); triton: input is on cpu; "
    with pytest.raises(RuntimeError, match=f"^{re.escape(words)}"):
        choose("lstm_forward", backends, X)
    monkeypatch.setenv("FASTSEQ_BACKEND", "reference")
    assert choose("lstm_forward", backends, X).name == "reference"


def test_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The definition runs in its place and says so once; a backend that was asked for by name is not replaced."""
    monkeypatch.setattr("fastseq.ops._select._told", set())
    monkeypatch.delenv("FASTSEQ_BACKEND", raising=False)
    backends, elsewhere = BACKENDS["lstm_forward"], X.to("meta")
    with caplog.at_level(logging.WARNING, "fastseq"):
        assert [choose("lstm_forward", backends, elsewhere).name for _ in range(2)] == ["reference", "reference"]
    reasons = "; ".join(f"{name}: input is on meta" for name in ("cpu", "cuda", "triton"))
    assert [r.getMessage() for r in caplog.records] == [f"lstm_forward: using reference, because {reasons}"]
    monkeypatch.setenv("FASTSEQ_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="no backend can run this call \\(cpu: input is on meta"):
        choose("lstm_forward", backends, elsewhere)


def test_only_good_weights_pass() -> None:
    assert functional.lstm(X, [weights()]).output.shape == (T, B, H)
    wide = weights(weight_hh=zeros(24, 2), weight_hr=zeros(2, H), h_start=zeros(2), c_start=zeros(H))
    assert functional.lstm(X, [wide]).h_n.shape == (1, B, 2)

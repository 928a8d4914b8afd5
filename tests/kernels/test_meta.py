"""What torch is told about an operator, what the kernels' host function makes and what the CPU returns are alike."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

pytest.importorskip("triton", reason="triton is not installed")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing runs here", allow_module_level=True)

from fastseq_kernels import _launch  # noqa: E402

from fastseq import nn  # noqa: E402
from tests.kernels.cases import CALLS, Call  # noqa: E402
from tests.kernels.no_device import OnGPU, pretending  # noqa: E402

EVERY = [call for calls in CALLS.values() for call in calls]
each_call = pytest.mark.parametrize("call", EVERY, ids=lambda call: call.name)


def operator(call: Call) -> Any:
    return getattr(torch.ops.fastseq, call.op).default


def kind(results: Any) -> list[tuple[Any, ...]]:
    """What a fake has to say of each result; strides of what has elements."""
    results = [results] if isinstance(results, Tensor) else results
    return [(list(t.shape), t.dtype, t.stride() if t.numel() else None) for t in results]


def moved(args: Any, device: str) -> Any:
    """The same arguments without values on another device; index tensors on the CPU stay, they have values."""
    return pytree.tree_map_only(OnGPU, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), args)


@pytest.fixture(autouse=True)
def _no_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@each_call
def test_host_functions_make_what_the_fakes_say(call: Call) -> None:
    with pretending():
        args = call.make()
        with _launch.recording(_launch.TARGETS[90]):
            made = kind(call.run())
    assert made == kind(operator(call)(*moved(args, "meta")))


@each_call
def test_fakes_stay_on_the_device(call: Call) -> None:
    """Under FakeTensorMode, which is how torch.compile and export see them; a GPU need not be there."""
    with pretending():
        args = call.make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        results = operator(call)(*moved(args, "cuda"))
    results = [results] if isinstance(results, Tensor) else results
    assert {t.device.type for t in results} == {"cuda"}
    assert kind(results) == kind(operator(call)(*moved(args, "meta")))


@pytest.mark.parametrize("call", [c for c in EVERY if "fp32" in c.variant], ids=lambda call: call.name)
def test_the_cpu_returns_what_the_fakes_say(call: Call) -> None:
    sizes = {name: 9 for name in call.sizes & {"B", "N", "K"}}
    with pretending():
        args = call.make(**sizes)

    def zeros(t: Tensor) -> Tensor:
        return torch.zeros(t.shape, dtype=t.dtype)

    assert kind(operator(call)(*pytree.tree_map_only(OnGPU, zeros, args))) == kind(operator(call)(*moved(args, "meta")))


LAYERS = {
    "lstm": lambda: nn.LSTM(16, 32, num_layers=2, bidirectional=True),
    "binary": lambda: nn.LSTM(16, 32, gates="binary"),
    "quantizer": lambda: nn.VectorQuantize(dim=16, codebook_size=64),
    "residual": lambda: nn.ResidualVQ(dim=16, codebook_size=64, num_quantizers=3),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_train_without_values(layer: str, compiled: bool) -> None:
    """A whole step on ``meta``: nothing asks for a value, on a GPU nothing would wait."""
    with torch.device("meta"):
        module = LAYERS[layer]()
        x = torch.randn(5, 3, 16, requires_grad=True)
    run = torch.compile(module, backend="aot_eager", fullgraph=layer in ("lstm", "binary")) if compiled else module
    y = run(x)[0]
    y.sum().backward()
    assert y.device.type == "meta" and y.shape[:2] == x.shape[:2]
    assert x.grad is not None and x.grad.shape == x.shape

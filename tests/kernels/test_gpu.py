"""What only a GPU can show: that nothing waits for it, that CUDA graphs and streams work, and equal bits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from fastseq import nn
from tests.kernels.cases import CALLS, Call
from tests.ops import lstm_cases, vq_cases
from tests.tolerance import assert_same_bits, assert_within_budget

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNS = 20
WAITS = {"vq_unpack"}  # says so in its docstring
EVERY = [call for calls in CALLS.values() for call in calls if call.op not in WAITS]
FEW = [
    call for call in EVERY if call.variant in ("bf16", "fp32", "plain", "bf16 small", "fp32 straight", "10", "mixed")
]
each_call = pytest.mark.parametrize("call", EVERY, ids=lambda call: call.name)
few_calls = pytest.mark.parametrize("call", FEW, ids=lambda call: call.name)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_BACKEND", "triton")


def filled(args: Any) -> Any:
    """Values that are valid for every operator: small normal numbers, and 2 for whole ones."""
    generator = torch.Generator("cuda").manual_seed(3)

    def one(t: Tensor) -> Tensor:
        if t.device.type == "cpu":
            return t
        if t.is_floating_point():
            return t.normal_(generator=generator).mul_(0.3)
        return t.fill_(0 if t.dtype in (torch.uint8, torch.bool) else 2)

    return pytree.tree_map_only(Tensor, one, args)


def runner(call: Call) -> Callable[[], tuple[Tensor, ...]]:
    args = filled(call.make())
    operator = getattr(torch.ops.fastseq, call.op).default

    def run() -> tuple[Tensor, ...]:
        results = operator(*args)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    return run


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    names = [f"result_{n}" for n in range(len(got))]
    as_bytes = [[t.detach().cpu().contiguous().view(torch.uint8) for t in v if t.numel()] for v in (got, expected)]
    assert_same_bits(names[: len(as_bytes[0])], *as_bytes)


@each_call
def test_operators_do_not_wait(call: Call) -> None:
    run = runner(call)
    run()  # compiles
    with no_waiting():
        run()


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "lstm": lambda: nn.LSTM(24, 96, num_layers=2, bidirectional=True),
    "wide": lambda: nn.LSTM(24, 512),
    "binary": lambda: nn.LSTM(24, 96, gates="binary"),
    "quantizer": lambda: nn.VectorQuantize(dim=24, codebook_size=300),
    "learned": lambda: nn.VectorQuantize(dim=24, codebook_size=300, learnable_codebook=True, ema_update=False),
    "residual": lambda: nn.ResidualVQ(dim=24, codebook_size=300, num_quantizers=3),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def step(layer: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], Tensor], torch.nn.Module]:
    """A training step of one layer on static memory: its output, with gradients left in the parameters and x."""
    torch.manual_seed(1)
    quantizes = layer in ("quantizer", "learned", "residual")
    dtype = torch.float32 if quantizes else dtype
    module = LAYERS[layer]().cuda().to(dtype)
    x = torch.randn(17, 20, 24, device="cuda", dtype=dtype, requires_grad=True)

    def run() -> Tensor:
        for t in (x, *module.parameters()):
            t.grad = None
        y = module(x)[0]
        y.float().square().sum().backward()
        return y

    return run, module


@each_layer
def test_training_does_not_wait(layer: str) -> None:
    run, _ = step(layer)
    for _ in range(2):  # the first call of a quantizer starts its codebook
        run()
    with no_waiting():
        run()


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@each_call
def test_operators_in_a_graph(call: Call) -> None:
    if any(isinstance(a, Tensor) and a.device.type == "cpu" for a in pytree.tree_leaves(call.make())):
        pytest.skip("sizes of packed data come from the host, and change from call to call")
    run = runner(call)
    expected = run()
    graph, got = captured(run)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        same(got, expected)


@each_layer
def test_training_in_a_graph(layer: str) -> None:
    run, module = step(layer)
    graph, y = captured(run)
    graph.replay()
    torch.cuda.synchronize()
    assert y.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_every_replay_has_fresh_noise() -> None:
    graph, y = captured(step("binary")[0])
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        seen.append(y.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@few_calls
def test_two_streams_at_once(call: Call) -> None:
    runs, streams = [runner(call), runner(call)], [torch.cuda.Stream(), torch.cuda.Stream()]
    expected = runs[0]()
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(10):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[n].append(runs[n]())
    torch.cuda.synchronize()
    for got in (*results[0], *results[1]):
        same(got, expected)


@few_calls
def test_equal_bits_from_run_to_run(call: Call) -> None:
    run = runner(call)
    expected = run()
    for _ in range(RUNS - 1):
        same(run(), expected)


@pytest.mark.parametrize("layer", ["lstm", "quantizer", "residual"])
def test_tensors_of_two_devices(layer: str) -> None:
    module = LAYERS[layer]()
    with pytest.raises((RuntimeError, ValueError), match="cpu|cuda|device"):
        module(torch.randn(17, 20, 24, device="cuda"))


@pytest.mark.parametrize("name", ["one", "over_tile", "deep", "all_dense", "all_lengths_reverse", "all_packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lstm_against_float64(dtype: torch.dtype, name: str) -> None:
    args = lstm_cases.inputs(lstm_cases.CASES[name])
    exact = lstm_cases.exact(args)
    on_cpu = {id(args.options.batch_sizes)}

    def moved(t: Tensor, place: int) -> Tensor:
        if id(t) in on_cpu:
            return t
        wide = place in (3, 9)  # c0 and c_start
        return t.cuda() if wide or not t.is_floating_point() else t.to("cuda", dtype)

    flat = [*args[:4], *args.options]
    given = [moved(t, n) if isinstance(t, Tensor) else t for n, t in enumerate(flat)]
    got = [t.cpu().to(dtype) for t in torch.ops.fastseq.lstm_forward(*given, 2)]
    assert_within_budget(lstm_cases.OUTPUTS, got, lstm_cases.definition, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [8, 64])
@pytest.mark.parametrize("kind", ["normal", "mean", "duplicates", "magnitudes", "strange"])
def test_lookup_is_the_definition(kind: str, D: int, dtype: torch.dtype) -> None:
    x, codebook, mask = vq_cases.inputs(vq_cases.Case(300, 700, D, kind=kind, masked=True))
    x, codebook = x.to(dtype), codebook.to(dtype)
    got = torch.ops.fastseq.vq_nearest(x.cuda(), codebook.cuda(), mask.cuda(), False, 1, 64, False, False, 2)[0]
    expected = vq_cases.reference.vq_nearest(x.float(), codebook.float(), mask, False, 1)
    assert torch.equal(got.cpu(), expected)

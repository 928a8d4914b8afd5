"""Modules on the Triton kernels: on a GPU, or interpreted on the CPU with TRITON_INTERPRET=1 FASTSEQ_BACKEND=triton."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq
from fastseq import reference
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("FASTSEQ_BACKEND") == "triton"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="no GPU, and no kernels interpreted"),
]

T, B, I, H = 4, 3, 5, 10  # noqa: E741
LENGTHS = torch.tensor([2, 4, 3])
NETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "projection": {"proj_size": 4, "bias": False},
    "batch_first": {"batch_first": True, "bidirectional": True},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _by_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU too: sigmoid gates would go to torch's own LSTM."""
    monkeypatch.setenv("FASTSEQ_BACKEND", "triton")
    yield


def parameters(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in module.parameters()]


def run(module: nn.Module, values: Sequence[Tensor], x: Tensor, packed: bool, **call: Any) -> list[Tensor]:
    """Output and final states of ``module`` with other parameters."""
    named = dict(zip((n for n, _ in module.named_parameters()), values, strict=True))
    given = pack_padded_sequence(x, LENGTHS, getattr(module, "batch_first", False), False) if packed else x
    out, (h, c) = torch.func.functional_call(module, named, (given,), call)
    return [out.data if isinstance(out, PackedSequence) else out, h, c]


def gradients(module: nn.Module, values: Sequence[Tensor], x: Tensor, packed: bool, **call: Any) -> list[Tensor]:
    """Gradients of x and all parameters, from upstream gradients that are the same for every dtype."""
    outs = run(module, values, x, packed, **call)
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(v.shape, generator=generator).to(v) for v in outs]
    return list(torch.autograd.grad(outs, [x, *values], upstream))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("net", NETS)
@each_dtype
def test_lstm(dtype: torch.dtype, net: str, packed: bool) -> None:
    ours = fastseq.nn.LSTM(I, H, **NETS[net]).to(DEVICE, dtype)
    stock = nn.LSTM(I, H, **NETS[net])
    size = (B, T, I) if NETS[net].get("batch_first") else (T, B, I)
    values, x = parameters(ours), torch.randn(size).to(DEVICE, dtype).requires_grad_()

    def moved(of: Any) -> Any:
        return lambda values, x: of(stock.to(DEVICE, x.dtype), values, x, packed)

    assert_within_budget("out h c", run(ours, values, x, packed), moved(run), (values, x))
    names = ["dx", *(f"d{n}" for n, _ in ours.named_parameters())]
    assert_within_budget(names, gradients(ours, values, x, packed), moved(gradients), (values, x), GRADIENTS)


@pytest.mark.parametrize("recompute", [False, True])
def test_binary_gates_draw_the_noise_of_the_definition(recompute: bool) -> None:
    module = fastseq.nn.LSTM(I, H, gates="binary", recompute=recompute).to(DEVICE)
    values, x = parameters(module), torch.randn(T, B, I, device=DEVICE, requires_grad=True)
    torch.manual_seed(3)
    seed = fastseq.functional.draw_seed(DEVICE)

    def definition(values: list[Tensor], x: Tensor) -> list[Tensor]:
        weight_ih, weight_hh, bias_ih, bias_hh = values
        noise = reference.gate_noise(seed.cpu(), T, B, H, None, 0, 0, 0.2, dtype=x.dtype).to(DEVICE)
        start = x.new_zeros(B, H)
        x_gates = x @ weight_ih.mT + bias_ih + bias_hh
        out = reference.lstm(x_gates, weight_hh, start, start, noise=noise, tau=0.9)
        return [out[0], out[3][None], out[4][None]]

    def of_definition(values: list[Tensor], x: Tensor) -> list[Tensor]:
        outs = definition(values, x)
        generator = torch.Generator().manual_seed(5)
        upstream = [torch.randn(v.shape, generator=generator).to(v) for v in outs]
        return list(torch.autograd.grad(outs, [x, *values], upstream))

    for of, expected, factor in ((run, definition, 2), (gradients, of_definition, GRADIENTS)):
        torch.manual_seed(3)
        got = of(module, values, x, False)
        assert_within_budget([f"result {n}" for n in range(len(got))], got, expected, (values, x), factor)


def test_lengths_on_the_device_and_resets() -> None:
    module = fastseq.nn.LSTM(I, H, bidirectional=True).to(DEVICE)
    x, reset = torch.randn(T, B, I, device=DEVICE), torch.zeros(T, B, dtype=torch.bool, device=DEVICE)
    reset[2, 1] = True
    here = module(x, lengths=LENGTHS.to(DEVICE), reset=reset)
    there = module(x, lengths=LENGTHS, reset=reset)
    assert_same_bits(
        "out h c", [here[0].cpu(), *(v.cpu() for v in here[1])], [there[0].cpu(), *(v.cpu() for v in there[1])]
    )
    wrong = torch.tensor([9, -3, T])
    with pytest.raises(ValueError, match=r"lengths must lie in 0 .. T = 4, got \[9, -3, 4\]"):
        module(x, lengths=wrong)
    if DEVICE == "cuda":  # a check would wait for the device; they are bounded there
        beyond = module(x, lengths=wrong.to(DEVICE))[0]
        assert beyond.isfinite().all() and not beyond[:, 1].any()


def test_cell() -> None:
    ours, stock = fastseq.nn.LSTMCell(I, H).to(DEVICE), nn.LSTMCell(I, H)
    values, x = parameters(ours), torch.randn(B, I, device=DEVICE)
    hx = [torch.randn(B, H, device=DEVICE) for _ in range(2)]

    def call(module: nn.Module, values: list[Tensor], x: Tensor, hx: list[Tensor]) -> Any:
        named = dict(zip((n for n, _ in module.named_parameters()), values, strict=True))
        return torch.func.functional_call(module.to(DEVICE, x.dtype), named, (x, tuple(hx)))

    got = call(ours, values, x, hx)
    assert_within_budget("h c", got, lambda *a: call(stock, *a), (values, x, hx))


def test_compiled_without_a_break() -> None:
    module = fastseq.nn.LSTM(I, H, gates="binary").to(DEVICE)
    x = torch.randn(T, B, I, device=DEVICE)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    expected = module(x)[0]
    torch.manual_seed(1)
    assert_same_bits("out", compiled(x)[0].cpu(), expected.cpu())


@each_dtype
def test_quantizer_learns_what_the_definition_does(dtype: torch.dtype) -> None:
    """A training step: indices, codes, gradient, and the codebook's moving averages."""
    D, K = 20, 24
    module = fastseq.nn.VectorQuantize(D, codebook_size=K, decay=0.5, rotation_trick=False).to(DEVICE)
    x = torch.randn(2, 15, D, device=DEVICE).to(dtype).requires_grad_()
    codes = module.codebook.clone()
    quantized, index, loss = module(x)
    expected = reference.vq_nearest(x.float().reshape(1, -1, D).cpu(), codes[None].cpu())[..., 0]
    assert torch.equal(index.reshape(1, -1).cpu(), expected)
    assert quantized.dtype == dtype
    assert torch.equal(quantized.detach().cpu(), codes.cpu()[index.cpu()].to(dtype))
    counts = torch.bincount(expected.flatten(), minlength=K).float()
    assert_same_bits("size", module._codebook.cluster_size[0].cpu(), torch.lerp(torch.ones(K), counts, 0.5))
    (dx,) = torch.autograd.grad(quantized.float().sum() + loss.sum(), x)
    error = x.detach().double() - codes[index].double()
    right = 1 + 2 * error / error.numel()
    assert ((dx.double() - right).abs() <= 8 * torch.finfo(dtype).eps).all()


def test_residual_quantizer() -> None:
    D, K = 9, 17
    module = fastseq.nn.ResidualVQ(dim=D, num_quantizers=3, codebook_size=K).to(DEVICE).eval()
    x = torch.randn(2, 11, D, device=DEVICE)
    quantized, index, _ = module(x)
    found = reference.vq_residual(x.reshape(-1, D).cpu(), list(module.codebooks.cpu()))
    assert torch.equal(index.reshape(-1, 3).cpu(), found[1])
    assert_same_bits("quantized", quantized.reshape(-1, D).detach().cpu(), found[0])
    packed = fastseq.functional.vq_pack(index.movedim(-1, 0), bits=5)
    assert torch.equal(fastseq.functional.vq_unpack(packed, 5, 11), index.movedim(-1, 0))

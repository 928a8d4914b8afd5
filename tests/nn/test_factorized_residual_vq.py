"""FactorizedResidualVQ and SplitResidualVQ beyond what checkpoints of other libraries show: training and errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export
from torch.nn import functional as F

from fastseq._check import ArgumentError
from fastseq.nn.factorized_residual_vq import FactorizedResidualVQ
from fastseq.nn.split_residual_vq import SplitResidualVQ
from tests.tolerance import GRADIENTS, OUTPUTS, assert_same_bits, assert_within_budget

B, N, DIM, D, K, M = 4, 7, 10, 3, 16, 3


def definition(
    x: Tensor, levels: list[int], parameters: list[Tensor], indices: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Kumar et al. 2023 for given indices [B, N, M]: output and losses [M]; each sample has a number of levels."""
    counts, total, rest, losses = torch.tensor(levels), torch.zeros_like(x), x, []
    for m, (w_in, b_in, w_out, b_out, codes) in enumerate(zip(*[iter(parameters)] * 5, strict=True)):
        kept = (counts > m).to(x.dtype)
        latent, chosen = F.linear(rest, w_in, b_in), codes[indices[..., m].clamp_min(0)]
        to_rows, to_codes = (latent - chosen.detach()).square(), (chosen - latent.detach()).square()
        losses.append(((0.25 * to_rows + to_codes).mean((1, 2)) * kept).mean())
        out = F.linear(latent + (chosen - latent).detach(), w_out, b_out)
        total, rest = total + out * kept[:, None, None], rest - out
    return total, torch.stack(losses)


@pytest.mark.parametrize("dropout", [0.0, 0.75])
def test_training(dropout: float) -> None:
    module = FactorizedResidualVQ(DIM, M, K, D, quantize_dropout=dropout)
    x = torch.randn(B, N, DIM, requires_grad=True)
    out, indices, losses = module(x)
    levels = (indices[:, 0] >= 0).sum(-1).tolist()
    assert torch.equal((indices >= 0).sum(-1), torch.tensor(levels)[:, None].expand(B, N))
    assert (levels == [M] * B) if not dropout else (levels[3] == M and min(levels) < M)
    parameters = list(module.parameters())
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum() + losses.sum(), [x, *parameters])

    def plain(x: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        return definition(x, levels, list(given), indices)

    def gradients(x: Tensor, weights: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        out, losses = definition(x, levels, list(given), indices)
        return torch.autograd.grad((out * weights).sum() + losses.sum(), [x, *given])

    assert_within_budget("out losses", (out.detach(), losses.detach()), plain, (x, *parameters), OUTPUTS)
    names = ["dx", *(name for name, _ in module.named_parameters())]
    assert_within_budget(names, grads, gradients, (x, weights, *parameters), GRADIENTS)
    assert_same_bits("eval", module.eval()(x)[1][levels.index(M)], indices[levels.index(M)])


def test_dropout_draws_every_number_of_levels() -> None:
    module = FactorizedResidualVQ(DIM, M, K, D, quantize_dropout=0.5)
    indices = module(torch.randn(200, 1, DIM))[1]
    levels = (indices[:, 0] >= 0).sum(-1)
    assert levels[:100].unique().tolist() == [1, 2, 3] and levels[100:].unique().tolist() == [3]
    assert bool((module(torch.randn(8, 1, DIM), n_quantizers=2)[1][..., 2:] == -1).all())
    assert bool((module.encode(torch.randn(8, 1, DIM)) >= 0).all())


def test_sizes_and_layouts() -> None:
    module = FactorizedResidualVQ(DIM, 2, K, (3, 5))
    assert [m.codebook.weight.shape[1] for m in module.layers] == [3, 5]
    for shape in ((4, DIM), (2, 3, 4, DIM), (2, 0, DIM)):
        out, indices, losses = module(torch.randn(shape))
        assert out.shape == shape and indices.shape == (*shape[:-1], 2) and bool(losses.isfinite().all())
        assert module.decode(indices).shape == shape
    indices[..., 1] = -1
    codes = module.get_codes_from_indices(torch.tensor([[3, -1]]))
    assert codes.shape == (2, 1, DIM) and not codes[1].any() and codes[0].any()
    half = FactorizedResidualVQ(DIM, 2, K, D).to(torch.bfloat16)
    out, indices, losses = half(torch.randn(2, 5, DIM, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and losses.dtype == torch.float32
    assert torch.equal(half.decode(indices), out)
    assert repr(module).startswith("FactorizedResidualVQ(\n  dim=10, num_quantizers=2, codebook_size=16\n")


def modules() -> dict[str, Any]:
    return {
        "factorized": FactorizedResidualVQ(DIM, M, K, D).eval(),
        "split": SplitResidualVQ(DIM, M, K, D, rotation_trick=False).eval(),
    }


@pytest.mark.parametrize("name", ["factorized", "split"])
def test_compile_and_export(name: str) -> None:
    module = modules()[name]
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = export(module, (torch.randn(B, 5, DIM),), dynamic_shapes={"x": {1: Dim("n", min=2, max=500)}}).module()
    for n in (5, 12):
        x = torch.randn(B, n, DIM)
        assert_same_bits("out indices losses", compiled(x), module(x))
        assert_same_bits("out indices losses", exported(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["factorized", "split"])
def test_onnx(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    module, file = modules()[name], str(tmp_path / "vq.onnx")
    names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {1: "n"}}}
    torch.onnx.export(module, (torch.randn(2, 5, DIM),), file, dynamo=False, **names)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    x = torch.randn(2, 23, DIM)
    out, indices, *_ = runtime.InferenceSession(file, options).run(None, {"x": x.numpy()})
    want = module(x)
    assert torch.equal(torch.from_numpy(indices), want[1])
    assert (torch.from_numpy(out) - want[0]).abs().max() <= 64 * torch.finfo(torch.float32).eps  # other matmuls


def test_split_training() -> None:
    module = SplitResidualVQ(DIM, M, K, D, num_semantic=2)
    x = torch.randn(B, N, DIM, requires_grad=True)
    out, indices, losses = module(x)
    semantic, acoustic = module.semantic(x), module.acoustic(x)
    assert out.shape == x.shape and indices.shape == (B, N, M) and losses.shape == (M,)
    assert semantic[1].shape[-1] == 2 and acoustic[1].shape[-1] == 1
    torch.autograd.grad(out.sum() + losses.sum(), [x, *module.parameters()])
    same = SplitResidualVQ(DIM, M, K, projections=False)
    assert [n for n, _ in same.named_parameters()] == []
    assert same(x)[0].shape == x.shape


def test_errors() -> None:
    module, split = modules().values()
    x = torch.zeros(B, N, DIM)
    calls: list[tuple[Any, str]] = [
        (lambda: FactorizedResidualVQ(DIM, 0), "FactorizedResidualVQ: num_quantizers must be an integer >= 1, got 0"),
        (
            lambda: FactorizedResidualVQ(DIM, 3, codebook_dim=(1, 2)),
            "FactorizedResidualVQ: codebook_dim must be one integer, or num_quantizers = 3 of them, got [1, 2]",
        ),
        (
            lambda: FactorizedResidualVQ(DIM, quantize_dropout=2.0),
            "FactorizedResidualVQ: quantize_dropout must be a number in [0, 1], got 2.0",
        ),
        (lambda: module(x[..., 1:]), "FactorizedResidualVQ: x must be [B, ..., dim = 10], got [4, 7, 9]"),
        (lambda: module(x, 4), "FactorizedResidualVQ: n_quantizers must be in 1..num_quantizers = 1..3, got 4"),
        (lambda: module.encode(x, 0), "FactorizedResidualVQ: n_quantizers must be in 1..num_quantizers = 1..3, got 0"),
        (
            lambda: module.decode(torch.zeros(B, 4).long()),
            "FactorizedResidualVQ: indices must be [B, ..., 1 to 3 levels], got [4, 4]",
        ),
        (
            lambda: module.decode(torch.full((B, 2), K)),
            "FactorizedResidualVQ: indices must be in -1..15, got values in 16..16",
        ),
        (lambda: SplitResidualVQ(DIM, 1, K), "SplitResidualVQ: num_semantic must be in 1..num_quantizers - 1 = 1..0"),
        (
            lambda: SplitResidualVQ(DIM, 2, K, D, projections=False),
            "SplitResidualVQ: projections must be True for codebook_dim = 3 and dim = 10, got False",
        ),
        (lambda: split(x, 4), "SplitResidualVQ: n_quantizers must be in 1..num_quantizers = 1..3, got 4"),
        (
            lambda: split.get_output_from_indices(torch.zeros(B, 4).long()),
            "SplitResidualVQ: indices must be [B, ..., 1 to 3 levels], got [4, 4]",
        ),
    ]
    for call, words in calls:
        with pytest.raises(ArgumentError, match=f"^{re.escape(words)}"):
            call()

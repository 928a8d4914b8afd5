"""SimVQ: what vector_quantize_pytorch's computes, up to the roundings of float32, without a matrix of rows by codes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from fastseq._check import ArgumentError
from fastseq.nn.sim_vq import SimVQ
from tests.tolerance import assert_same_bits

# The rival sums losses and distances, and turns by the rotation, in another order: tens of roundings of the largest
# value, where D and K are as small as here.
ROUNDINGS = 64 * torch.finfo(torch.float32).eps
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "straight": {"rotation_trick": False},
    "channel first": {"channel_first": True},
    "weights": {"commitment_weight": 0.3, "input_to_quantize_commit_loss_weight": 0.7},
    "frozen dim": {"frozen_codebook_dim": 9},
    "init": {"init_fn": lambda codes: 3 * codes.flip(0)},
    "transform": {"codebook_transform": lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))},
}


def pair(case: str) -> tuple[Any, SimVQ]:
    """The rival and ours, drawn from the same seed."""
    rival = pytest.importorskip("vector_quantize_pytorch", reason="the rival is not installed")
    options = dict(CASES[case])
    transform = options.pop("codebook_transform", lambda: None)
    made = []
    for kind in (rival.SimVQ, SimVQ):
        torch.manual_seed(1)
        made.append(kind(6, 20, codebook_transform=transform(), **options))
    return made[0], made[1]


def results(module: Any, x: Tensor) -> list[Tensor]:
    """Codes, loss, the gradients of x and of the parameters, and the indices last."""
    x = x.clone().requires_grad_()
    out, indices, loss = module(x)
    weights = torch.linspace(-1.0, 1.0, out.numel()).view(out.shape)
    grads = torch.autograd.grad((out * weights).sum() + 3 * loss, [x, *module.parameters()])
    return [out, loss, *grads, indices]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        assert (g - w).abs().max() <= ROUNDINGS * w.abs().max()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_rival(case: str, training: bool) -> None:
    theirs, ours = (module.train(training) for module in pair(case))
    shapes = [(2, 6, 15), (2, 6, 3, 4)] if ours.channel_first else [(2, 15, 6), (5, 6), (2, 3, 4, 6)]
    for shape in shapes:
        x = torch.randn(shape)
        got, want = results(ours, x), results(theirs, x)
        assert torch.equal(got[-1], want[-1])
        assert_close(got[:-1], want[:-1])
        codes = ours.indices_to_codes(got[-1])
        assert_close([codes], [theirs.indices_to_codes(want[-1])])
        assert_close([codes], [got[0]])
    assert_close([ours.codebook], [theirs.codebook])


@pytest.mark.parametrize("case", CASES)
def test_state_goes_both_ways(case: str) -> None:
    theirs, ours = pair(case)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_bits(list(theirs.state_dict()), list(ours.state_dict().values()), list(theirs.state_dict().values()))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_output_is_the_codes() -> None:
    """Bit for bit, with the rotation trick too; the loss is that of the definition."""
    module = SimVQ(6, 20)
    x = torch.randn(3, 8, 6)
    out, indices, loss = module(x)
    assert_same_bits("codes", out, module.codebook[indices])
    want = (1 + 0.25) * (x.double() - out.double()).square().mean()
    assert abs(loss.item() - want.item()) <= ROUNDINGS * want.item()
    distances = torch.cdist(x.double(), module.codebook.double())
    assert torch.equal(indices, distances.argmin(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    module = SimVQ(6, 20).to(dtype)
    x = torch.randn(3, 8, 6, dtype=dtype)
    out, indices, loss = module(x)
    assert out.dtype == dtype and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(out, module.codebook[indices])
    with torch.autocast("cpu", torch.bfloat16):
        assert SimVQ(6, 20)(x.float())[0].dtype == torch.float32


def test_extreme_sizes() -> None:
    module = SimVQ(6, 20)
    out, indices, loss = module(torch.zeros(2, 0, 6))
    assert out.shape == (2, 0, 6) and indices.shape == (2, 0) and loss == 0
    loss.backward()
    assert not module.code_transform.weight.grad.any()
    assert module.indices_to_codes(indices).shape == (2, 0, 6)
    out, indices, _ = SimVQ(1, 1)(torch.randn(2, 3, 1))
    assert not indices.any() and out.shape == (2, 3, 1)
    x = torch.randn(2, 3, 6)
    x[0, 1] = float("nan")
    out, indices, loss = module(x)
    assert indices[0, 1] == 0 and out.isfinite().all() and loss.isnan()
    assert repr(module).startswith("SimVQ(\n  dim=6, codebook_size=20\n")


def test_compile_and_export() -> None:
    module = SimVQ(6, 20)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 9):
        x = torch.randn(2, n, 6)
        names = [f"value {i}" for i in range(5)]
        assert_same_bits(names, results(compiled, x), results(module, x))
    module.eval()
    x = torch.randn(2, 5, 6)
    exported = export(module, (x,), dynamic_shapes={"x": {1: Dim("n", min=2, max=500)}}).module()
    x = torch.randn(2, 17, 6)
    assert_same_bits("codes indices loss", exported(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    module, file = SimVQ(6, 20).eval(), str(tmp_path / "sim_vq.onnx")
    names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {1: "n"}}}
    torch.onnx.export(module, (torch.randn(2, 5, 6),), file, dynamo=False, **names)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    x = torch.randn(2, 23, 6)
    out, indices, *_ = runtime.InferenceSession(file, options).run(None, {"x": x.numpy()})
    want = module(x)
    assert torch.equal(torch.from_numpy(indices), want[1])
    assert (torch.from_numpy(out) - want[0]).abs().max() <= ROUNDINGS


def test_errors() -> None:
    module = SimVQ(6, 20)
    calls: list[tuple[Any, str]] = [
        (lambda: module(torch.zeros(2, 3, 5)), "x must be [B, ..., dim = 6], got [2, 3, 5]"),
        (lambda: module(torch.zeros(6)), "x must be [B, ..., dim = 6], got [6]"),
        (
            lambda: SimVQ(6, 20, channel_first=True)(torch.zeros(2, 3, 6)),
            "x must be [B, dim = 6, ...], got [2, 3, 6]",
        ),
        (lambda: module.indices_to_codes(torch.tensor([0, 20])), "indices must be in 0..19, got values in 0..20"),
        (lambda: module.indices_to_codes(torch.tensor([-1])), "indices must be in 0..19, got values in -1..-1"),
        (lambda: module.indices_to_codes(torch.zeros(2)), "indices must be integers, got torch.float32"),
        (lambda: SimVQ(0, 20), "dim must be an integer >= 1, got 0"),
        (lambda: SimVQ(6, 0), "codebook_size must be an integer >= 1, got 0"),
        (lambda: SimVQ(6, 3, frozen_codebook_dim=1.5), "frozen_codebook_dim must be an integer >= 1, got 1.5"),
    ]
    for call, words in calls:
        with pytest.raises(ArgumentError, match=f"^SimVQ: {re.escape(words)}$"):
            call()

"""FSQ: numerically vector_quantize_pytorch's, exact in 16 bits, and indices that are always in range."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

from fastseq._check import ArgumentError
from fastseq.nn.fsq import FSQ
from tests.tolerance import assert_same_bits

CASES: dict[str, dict[str, Any]] = {
    "plain": {"levels": [8, 5, 5, 5]},
    "tuple": {"levels": (3, 4)},
    "projected": {"levels": [8, 5, 5], "dim": 7},
    "no bias": {"levels": [8, 5, 5], "dim": 7, "projection_has_bias": False},
    "codebooks": {"levels": [4, 3], "num_codebooks": 3},
    "kept": {"levels": [4, 3], "keep_num_codebooks_dim": True},
    "channel first": {"levels": [8, 5], "channel_first": True},
    "symmetric": {"levels": [4, 2, 3], "preserve_symmetry": True},
    "clamped": {"levels": [8, 5], "bound_hard_clamp": True},
    "symmetric clamped": {"levels": [8, 5], "bound_hard_clamp": True, "preserve_symmetry": True},
    "rotated": {"levels": [5, 5, 5], "orthogonal_rotation": True, "dim": 6},
    "not forced": {"levels": [6, 7], "force_quantization_f32": False},
}


def pair(case: str) -> tuple[Any, FSQ]:
    """The rival and ours, drawn from the same seed."""
    rival = pytest.importorskip("vector_quantize_pytorch", reason="the rival is not installed")
    torch.manual_seed(1)
    theirs = rival.FSQ(**CASES[case])
    torch.manual_seed(1)
    return theirs, FSQ(**CASES[case])


def results(module: Any, x: Tensor) -> list[Tensor]:
    """Codes, indices, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    out, indices = module(x)
    weights = torch.linspace(-1.0, 1.0, out.numel()).view(out.shape)
    return [out, indices, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_rival(case: str) -> None:
    """Bit for bit: the same few operations on the same numbers."""
    theirs, ours = pair(case)
    shapes = [(2, ours.dim, 9)] if ours.channel_first else [(3, 11, ours.dim)]
    for shape in (*shapes, (2, ours.dim, 3, 4), (2, ours.dim, 2, 1, 3)):
        x = 2 * torch.randn(shape)
        got, want = results(ours, x), results(theirs, x)
        assert_same_bits([f"value {n}" for n in range(len(want))], got, want)
        assert_same_bits("decoded", ours.indices_to_codes(got[1]), theirs.indices_to_codes(want[1]))
        assert torch.equal(ours.indices_to_codes(got[1]), got[0])
    assert_same_bits("codebook", ours.implicit_codebook, theirs.implicit_codebook)
    digits = torch.arange(ours.codebook_size)
    assert_same_bits("digits", ours.indices_to_level_indices(digits), theirs.indices_to_level_indices(digits))
    assert_same_bits("indices", ours.codes_to_indices(ours.implicit_codebook), digits.int())
    z = torch.randn(5, ours.codebook_dim)
    assert_same_bits("quantize", ours.quantize(z), theirs.quantize(z))


@pytest.mark.parametrize("case", CASES)
def test_state_goes_both_ways(case: str) -> None:
    theirs, ours = pair(case)
    assert_same_bits(list(theirs.state_dict()), list(ours.state_dict().values()), list(theirs.state_dict().values()))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def preimages(module: FSQ) -> Tensor:
    """A vector per index that is quantized to it, with bound_hard_clamp."""
    levels = module._levels
    digits = module.indices_to_level_indices(torch.arange(module.codebook_size)).double()
    if module.preserve_symmetry:
        return 2 * digits / (levels - 1) - 1
    half, offset = (levels - 1) * 1.001 / 2, torch.where(levels % 2 == 0, 0.5, 0.0)
    return (digits - levels // 2 + offset) / half - offset / half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric, forced", [(False, True), (False, False), (True, True), (True, False)])
def test_every_code_is_reached(dtype: torch.dtype, symmetric: bool, forced: bool) -> None:
    """Indices above 256 are no bfloat16 numbers: lucidrains/vector-quantize-pytorch#114."""
    module = FSQ([8, 6, 5, 7], preserve_symmetry=symmetric, bound_hard_clamp=True, force_quantization_f32=forced)
    module = module.to(dtype)
    codes, indices = module(preimages(module).to(dtype)[None])
    assert codes.dtype == dtype and indices.dtype == torch.int32
    assert torch.equal(indices[0], torch.arange(module.codebook_size))
    assert torch.equal(module.codes_to_indices(codes), indices)


def test_sixteen_bits_with_projections() -> None:
    module = FSQ([5, 5, 5], dim=8, orthogonal_rotation=True)
    x = torch.randn(2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, indices = module(x)
    assert out.dtype == torch.bfloat16 and bool((indices < 125).all())
    module = module.to(torch.bfloat16)
    out, indices = module(x.bfloat16())
    decoded = module.indices_to_codes(indices)
    assert out.dtype == decoded.dtype == torch.bfloat16 and torch.equal(out, decoded)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clamped", [False, True])
def test_indices_are_in_range(symmetric: bool, clamped: bool) -> None:
    """Also with so many levels that the bounds lie a whole level outside, and for what is no number."""
    module = FSQ([2001, 3, 1200], preserve_symmetry=symmetric, bound_hard_clamp=clamped)
    assert module.codebook_size == 2001 * 3 * 1200
    x = torch.randn(1, 400, 3) * torch.logspace(-2, 6, 400)[:, None]
    x[0, :3] = torch.tensor([math.inf, -math.inf, math.nan])[:, None]
    codes, indices = module(x)
    assert indices.min() >= 0 and indices.max() == module.codebook_size - 1
    assert indices[0, :3].tolist() == [module.codebook_size - 1, 0, 0] and codes[0, 2].isnan().all()
    for found in (codes, codes + 7 * torch.randn_like(codes)):
        again = module.codes_to_indices(found)
        assert again.min() >= 0 and again.max() < module.codebook_size
    rest = codes[0, 3:]
    assert torch.equal(module.codes_to_indices(rest), indices[0, 3:])
    assert torch.equal(module.indices_to_codes(indices)[0, 3:], rest)


def test_more_codes_than_memory() -> None:
    """2**48 of them: nothing of that size is made, and indices are int64."""
    module = FSQ([2**16] * 3)
    codes, indices = module(torch.randn(1, 50, 3, dtype=torch.float64))
    assert indices.dtype == torch.int64 and indices.max() > 2**31
    assert torch.equal(module.codes_to_indices(codes), indices)
    assert (module.indices_to_codes(indices) - codes).abs().max() <= torch.finfo(torch.float32).eps
    assert sum(b.numel() for b in module.buffers()) == 6
    assert [FSQ([2**k, 2**15])(torch.zeros(1, 1, 2))[1].dtype for k in (16, 17)] == [torch.int32, torch.int64]


def test_noise_leaves_indices_alone() -> None:
    """lucidrains/vector-quantize-pytorch#207 and #240: noisy codes once gave indices out of range."""
    module = FSQ([5, 4, 3], preserve_symmetry=True, noise_dropout=0.25)
    x = 2 * torch.randn(1, 2000, 3)
    clean, indices = module.eval()(x)
    noisy, same = module.train()(x)
    assert torch.equal(indices, same)
    moved = (noisy != clean) & (clean.abs() < 1)  # at the ends half of the noise is cut off
    share = moved.sum() / (clean.abs() < 1).sum()
    assert 0.22 < share < 0.28 and noisy.abs().max() <= 1 and (noisy - clean).abs().max() <= 0.5
    again = module.codes_to_indices(noisy)
    assert again.min() >= 0 and again.max() < module.codebook_size
    assert torch.equal(FSQ([5, 3], preserve_symmetry=True, noise_dropout=0.0)(x[..., [0, 2]])[0], clean[..., [0, 2]])


def test_without_indices_and_other_layouts() -> None:
    x = torch.randn(4, 2)
    out, indices = FSQ([5, 5], return_indices=False)(x)
    assert indices is None and out.shape == (4, 2)
    assert FSQ([5, 5])(x)[1].shape == (4,) and FSQ([5, 5], channel_first=True)(x)[1].shape == (4,)
    assert FSQ([5, 5])(torch.zeros(2, 0, 2))[1].shape == (2, 0)
    assert FSQ([5, 5]).indices_to_codes(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 2)
    assert FSQ([5, 5], orthogonal_rotation=True).to("meta")(x.to("meta"))[0].shape == (4, 2)
    assert repr(FSQ([5, 3], 4)).startswith("FSQ(\n  levels=[5, 3], dim=4, num_codebooks=1\n")


def test_compile_and_export() -> None:
    module = FSQ(**CASES["rotated"]).eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(2, 5, module.dim)
    exported = export(module, (x,), dynamic_shapes={"z": {1: Dim("n", min=2, max=500)}}).module()
    for n in (5, 12, 31):
        x = torch.randn(2, n, module.dim)
        assert_same_bits("codes indices", compiled(x), module(x))
        assert_same_bits("codes indices", exported(x), module(x))
    decode = torch.compile(module.indices_to_codes, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same_bits("decoded", decode(module(x)[1]), module.indices_to_codes(module(x)[1]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", ["plain", "projected", "symmetric"])
def test_onnx(case: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    module, file = FSQ(**CASES[case]).eval(), str(tmp_path / "fsq.onnx")
    names: dict[str, Any] = {"input_names": ["z"], "dynamic_axes": {"z": {1: "n"}}}
    torch.onnx.export(module, (torch.randn(2, 5, module.dim),), file, dynamo=False, **names)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    x = torch.randn(2, 23, module.dim)
    codes, indices = runtime.InferenceSession(file, options).run(None, {"z": x.numpy()})
    want = module(x)
    assert torch.equal(torch.from_numpy(indices), want[1])
    assert (torch.from_numpy(codes) - want[0]).abs().max() <= 8 * torch.finfo(torch.float32).eps  # another matmul


CONSTRUCTION: dict[str, tuple[dict[str, Any], str]] = {
    "levels": ({"levels": [2, 5]}, "levels must be integers >= 3 (2 with preserve_symmetry=True), got [2, 5]"),
    "one level": (
        {"levels": [1], "preserve_symmetry": True},
        "levels must be integers >= 2, got [1]",
    ),
    "no levels": ({"levels": []}, "levels must be integers >= 3"),
    "kind of levels": ({"levels": [5.0]}, "levels must be integers >= 3"),
    "too many": ({"levels": [2**16] * 4}, "levels must be with a product below 2**63"),
    "noise": ({"levels": [5], "noise_dropout": 0.5}, "noise_dropout must be 0 without preserve_symmetry=True, got 0.5"),
    "noise range": (
        {"levels": [5], "noise_dropout": 2.0, "preserve_symmetry": True},
        "noise_dropout must be a number in [0, 1], got 2.0",
    ),
    "scale": ({"levels": [5], "scale": 2.0}, "scale must be None (it has no effect in vector_quantize_pytorch either)"),
    "codebooks": ({"levels": [5], "num_codebooks": 0}, "num_codebooks must be an integer >= 1, got 0"),
    "not kept": (
        {"levels": [5], "num_codebooks": 2, "keep_num_codebooks_dim": False},
        "keep_num_codebooks_dim must be True for num_codebooks = 2, got False",
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_wrong_construction(case: str) -> None:
    options, words = CONSTRUCTION[case]
    with pytest.raises(ArgumentError, match=f"^FSQ: {re.escape(words)}"):
        FSQ(**options)


def test_wrong_calls() -> None:
    module = FSQ([5, 5])
    for call, words in (
        (lambda: module(torch.zeros(2, 3, 4)), "z must be [B, N, dim = 2], got [2, 3, 4]"),
        (lambda: module(torch.zeros(2, 3, 4, 4)), "z must be [B, dim = 2, ...], got [2, 3, 4, 4]"),
        (lambda: module(torch.zeros(2)), "z must be [B, N, dim = 2], got [2]"),
        (lambda: module(torch.zeros(3, 2).long()), "z must be float32, float64, bfloat16 or float16, got torch.int64"),
        (lambda: module.codes_to_indices(torch.zeros(3)), "codes must be [..., d = 2], got [3]"),
        (lambda: module.indices_to_codes(torch.zeros(3)), "indices must be integers, got torch.float32"),
        (lambda: module.indices_to_codes(torch.tensor([0, 25])), "indices must be in 0..24, got values in 0..25"),
        (lambda: module.indices_to_codes(torch.tensor([[-1, 3]])), "indices must be in 0..24, got values in -1..3"),
    ):
        with pytest.raises(ArgumentError, match=f"^FSQ: {re.escape(words)}$"):
            call()
    with pytest.warns(UserWarning, match="orthogonal_rotation mixes dimensions, but levels differ"):
        FSQ([5, 3], orthogonal_rotation=True)

"""``ResidualVQ`` and ``GroupedResidualVQ``: layouts, groups, graphs and errors."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from fastseq._check import ArgumentError
from fastseq.nn.grouped_residual_vq import GroupedResidualVQ
from fastseq.nn.residual_vq import ResidualVQ
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

B, N, D, K, M = 3, 10, 8, 16, 4
MASK = torch.arange(B * N).view(B, N) % 7 % 3 > 0
LEVELS = torch.tensor([1, 4, 2])
DROPOUT: dict[str, Any] = {"quantize_dropout": True}
PER_SAMPLE: dict[str, Any] = {**DROPOUT, "quantize_dropout_per_sample": True}
QINCO: dict[str, Any] = {"implicit_neural_codebook": True, "mlp_kwargs": {"dim_hidden": 5, "depth": 2}}


def make(**options: Any) -> ResidualVQ:
    torch.manual_seed(0)
    return ResidualVQ(**{"dim": D, "num_quantizers": M, "codebook_size": K, **options})


def grouped(**options: Any) -> GroupedResidualVQ:
    torch.manual_seed(0)
    return GroupedResidualVQ(**{"dim": D, "groups": 2, "num_quantizers": M, "codebook_size": K, **options})


def levels_of(indices: Tensor) -> Tensor:
    """How many levels each row uses."""
    return (indices >= 0).sum(-1)


# --- layouts and groups


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"beam_size": 2}, PER_SAMPLE], ids=str)
def test_images(options: dict[str, Any]) -> None:
    rvq, rows = make(accept_image_fmap=True, **options), make(**options)
    x = torch.randn(B, D, 2, 5)
    seed = {"rand_quantize_dropout_fixed_seed": 1}
    quantized, indices, losses, codes = rvq(x, return_all_codes=True, **seed)
    want = rows(x.flatten(2).mT, return_all_codes=True, **seed)
    got = [quantized.flatten(2).mT, indices.flatten(1, 2), losses, codes.flatten(2, 3)]
    assert_same_bits("quantized indices losses codes", got, want)
    assert rvq.get_output_from_indices(indices).shape == (B, 2, 5, D)
    assert rvq(x, indices=rvq.eval()(x)[1])[0].shape == x.shape


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("options", [{}, DROPOUT, PER_SAMPLE], ids=str)
def test_groups(options: dict[str, Any], image: bool) -> None:
    """Each a quantizer of its own part, with the same numbers of levels."""
    module = grouped(accept_image_fmap=image, **options)
    parts = copy.deepcopy(module).rvqs
    x = torch.randn(B, D, 2, 5) if image else torch.randn(B, N, D)
    torch.manual_seed(1)
    quantized, indices, losses, codes = module(x, return_all_codes=True)
    assert torch.equal(indices[0] >= 0, indices[1] >= 0)
    assert len(codes) == 2 and indices.shape == (2, *((B, 2, 5) if image else (B, N)), M) and losses.shape == (2, M)
    axis = 1 if image else -1
    torch.manual_seed(1)
    drawn = parts[0].draw_levels(B)
    want = [part(half, n_quantizers=drawn) for part, half in zip(parts, x.chunk(2, axis), strict=True)]
    assert_same_bits("quantized", quantized, torch.cat([w[0] for w in want], axis))
    assert_same_bits("indices losses", [indices, losses], [torch.stack([w[n] for w in want]) for n in (1, 2)])
    output = module.eval().get_output_from_indices(module(x)[1])
    assert_same_bits("output", output.movedim(-1, 1) if image else output, module(x)[0])


def test_groups_of_levels_of_different_sizes() -> None:
    module = grouped(num_quantizers=None, codebook_size=(3, 5))
    assert [[c.shape for c in group] for group in module.codebooks] == [[(3, 4), (5, 4)]] * 2
    assert module.get_codes_from_indices(module(torch.randn(B, N, D))[1]).shape == (2, 2, B, N, 4)


# --- graphs

GRAPHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "projected": {"codebook_dim": 4},
    "cosine": {"use_cosine_sim": True},
    "sizes": {"num_quantizers": None, "codebook_size": (3, 16)},
    "implicit": QINCO,
    "groups": {"groups": 2},
}


def graph_case(case: str) -> nn.Module:
    options = {"num_quantizers": 2, **GRAPHS[case]}
    return grouped(**options) if "groups" in options else make(**options)


@pytest.mark.parametrize(
    ("options", "mask"), [({}, MASK), (DROPOUT, None), (PER_SAMPLE, None)], ids=["plain", "drop", "each"]
)
def test_compiled_training(options: dict[str, Any], mask: Tensor | None) -> None:
    """One graph for all lengths; with dropout each call draws anew."""
    eager = make(num_quantizers=2, threshold_ema_dead_code=0.1 if mask is None else 0, **options)
    rvq = copy.deepcopy(eager)
    torch.compiler.reset()
    compiled = torch.compile(rvq, fullgraph=True, dynamic=True, backend="aot_eager" if mask is not None else "eager")
    for length in (N, N - 3):
        x = torch.randn(B, length, D, requires_grad=True)
        arguments = {} if mask is None else {"mask": mask[:, :length]}
        quantized, indices, losses = compiled(x, **arguments)
        (quantized.sum() + losses.sum()).backward()
        used = levels_of(indices)
        if mask is None:
            assert (used == (used[:, :1] if options is PER_SAMPLE else used[0, 0])).all()
        else:
            want = eager(x.detach(), **arguments)
            assert torch.equal(indices, want[1])
            got = [quantized.detach(), losses.detach()]
            assert_within_budget("quantized losses", got, lambda *w: w, (want[0], want[2].detach()), GRADIENTS)


@pytest.mark.parametrize("case", GRAPHS)
def test_export(case: str) -> None:
    module = graph_case(case).eval()
    x = torch.randn(B, N, D)
    exported = export(module, (x,), dynamic_shapes=({0: Dim("B"), 1: Dim("N")},)).module()
    longer = torch.randn(B + 1, N + 5, D)
    assert_same_bits("quantized indices losses", exported(longer), module(longer))


@pytest.mark.parametrize("case", GRAPHS)
def test_onnx(case: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    module, file = graph_case(case).eval(), str(tmp_path / "rvq.onnx")
    names = {"input_names": ["x"], "output_names": ["quantized", "indices", "losses"]}
    torch.onnx.export(
        module, (torch.randn(B, N, D),), file, dynamo=False, dynamic_axes={"x": {0: "B", 1: "N"}}, **names
    )
    x = torch.randn(B + 1, N + 5, D)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    got = [torch.from_numpy(t) for t in session.run(None, {"x": x.numpy()})]
    want = [t.detach() for t in module(x)]
    assert torch.equal(got[1], want[1])
    assert_within_budget("quantized", got[0], lambda w: w, (want[0],), GRADIENTS)


# --- errors

X = torch.zeros(B, N, D)
ERRORS: dict[str, tuple[Any, str]] = {
    "sizes": (lambda: make(num_quantizers=None), "num_quantizers must be an integer >= 1 where codebook_size is one"),
    "no levels": (lambda: make(num_quantizers=0), "num_quantizers must be an integer >= 1 where codebook_size is one"),
    "other sizes": (lambda: make(codebook_size=(3, 4)), "codebook_size must be num_quantizers = 4 numbers, got (3, 4)"),
    "shared sizes": (
        lambda: make(num_quantizers=None, codebook_size=(3, 4), shared_codebook=True),
        "codebook_size must be one number where shared_codebook=True, got (3, 4)",
    ),
    "heads": (lambda: make(heads=2), "heads must be 1 (use GroupedResidualVQ with groups), got 2"),
    "channel_last": (lambda: make(channel_last=False), "channel_last must be True (transpose the input"),
    "3d": (lambda: make(accept_3d_fmap=True), "accept_3d_fmap must be False (flatten depth"),
    "norm": (lambda: make(layernorm_after_project_in=True), "layernorm_after_project_in must be False (put a"),
    "batch norm": (lambda: make(batch_norm="codes"), "batch_norm must be None (put a torch.nn.BatchNorm1d in front"),
    "reinit": (lambda: make(reinit=nn.Identity()), "reinit must be None (give each of .layers a Reinit of its own)"),
    "share": (lambda: make(quant_grad_frac=1.5), "quant_grad_frac must be a number in [0, 1], got 1.5"),
    "cutoff": (
        lambda: make(**DROPOUT, quantize_dropout_cutoff_index=4),
        "quantize_dropout_cutoff_index must be in 0..num_quantizers - 1 = 0..3, got 4",
    ),
    "multiple": (
        lambda: make(quantize_dropout_multiple_of=0),
        "quantize_dropout_multiple_of must be an integer >= 1, got 0",
    ),
    "per sample": (
        lambda: make(quantize_dropout_per_sample=True),
        "quantize_dropout_per_sample must be False where quantize_dropout=False, got True",
    ),
    "beam": (lambda: make(beam_size=0), "beam_size must be an integer >= 1, or None, got 0"),
    "eval beam": (lambda: make(eval_beam_size=2), "eval_beam_size must be None where beam_size is None, got 2"),
    "weights": (
        lambda: make(beam_score_quantizer_weights=[1.0]),
        "beam_score_quantizer_weights must be num_quantizers = 4 numbers, got 1",
    ),
    "x": (lambda: make()(X[..., :5]), "x must be [B, T, D] or [B, D] with D = 8, got [3, 10, 5]"),
    "image": (lambda: make(accept_image_fmap=True)(X), "x must be [B, D, H, W], got [3, 10, 8]"),
    "mask": (lambda: make()(X, mask=MASK[:2]), "mask must be [B, T] = [3, 10], got [2, 10]"),
    "mask of an image": (
        lambda: make(accept_image_fmap=True)(torch.zeros(B, D, 2, 2), mask=MASK),
        "mask must be None for maps",
    ),
    "beam of the call": (lambda: make()(X, beam_size=0), "beam_size must be an integer >= 1, or None, got 0"),
    "levels": (lambda: make()(X, n_quantizers=5), "n_quantizers must be in 1..num_quantizers = 1..4, got 5"),
    "no level": (lambda: make()(X, n_quantizers=0), "n_quantizers must be in 1..num_quantizers = 1..4, got 0"),
    "true": (lambda: make()(X, n_quantizers=True), "n_quantizers must be in 1..num_quantizers = 1..4, got True"),
    "levels of two": (
        lambda: make()(X, n_quantizers=LEVELS[:2]),
        "n_quantizers must be an integer, or integers [B] = [3], got torch.int64 [2]",
    ),
    "levels in halves": (
        lambda: make()(X, n_quantizers=LEVELS / 2),
        "n_quantizers must be an integer, or integers [B] = [3], got torch.float32 [3]",
    ),
    "elsewhere": (lambda: make()(X, n_quantizers=LEVELS.to("meta")), "n_quantizers must be on cpu, got one on meta"),
    "targets": (
        lambda: make()(X, indices=torch.zeros(B, N, 3, dtype=torch.int64)),
        "indices must be [B, N, levels] = [3, 10, 4], got [3, 10, 3]",
    ),
    "dropped targets": (
        lambda: make()(X, indices=torch.full((B, N, M), -1)),
        "indices must be of a forward without dropout (none is -1), got -1",
    ),
    "group": (lambda: grouped(groups=3), "groups must be a divisor of dim = 8, got 3"),
    "features": (lambda: grouped()(X[..., :5]), "x must be of dim = 8 features, got [3, 10, 5]"),
    "targets of groups": (
        lambda: grouped()(X, indices=torch.zeros(3, B, N, M, dtype=torch.int64)),
        "indices must be of groups = 2, got of 3",
    ),
    "decoded groups": (
        lambda: grouped().get_codes_from_indices(torch.zeros(1, B, N, M, dtype=torch.int64)),
        "indices must be of groups = 2, got of 1",
    ),
    "decoded": (
        lambda: make().get_codes_from_indices(torch.zeros(B, N, 5, dtype=torch.int64)),
        "indices must be [B, ..., 1 to 4 levels], got [3, 10, 5]",
    ),
    "code": (
        lambda: make().get_output_from_indices(torch.full((B, N, M), K)),
        "indices must be in -1..15, got values in 16..16",
    ),
    "float": (
        lambda: make().get_output_from_indices(torch.zeros(B, N, M)),
        "indices must be integers, got torch.float32",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, words = ERRORS[case]
    with pytest.raises(ArgumentError, match=f": {re.escape(words)}"):
        call()

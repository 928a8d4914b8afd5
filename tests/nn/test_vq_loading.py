"""load_codebooks: small checkpoints in the layouts of other libraries, and the codes that these libraries find.

Each lookup is written down here as its library defines it, in plain torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fastseq._check import ArgumentError
from fastseq.nn.factorized_residual_vq import FactorizedResidualVQ
from fastseq.nn.residual_vq import ResidualVQ
from fastseq.nn.split_residual_vq import SplitResidualVQ
from fastseq.nn.vector_quantize import VectorQuantize
from fastseq.nn.vq_loading import load_codebooks
from tests.tolerance import assert_same_bits

B, N, D, K, M = 2, 9, 6, 16, 4
ROUNDINGS = 32 * torch.finfo(torch.float32).eps  # sums of M outputs, and products with D or dim terms, of order one
State = dict[str, Tensor]


def expanded(x: Tensor, codes: Tensor) -> Tensor:
    """The nearest code as EnCodec, SpeechTokenizer and taming-transformers find it."""
    return (x.square().sum(-1, keepdim=True) - 2 * x @ codes.T + codes.square().sum(-1)).argmin(-1)


def by_cdist(x: Tensor, codes: Tensor) -> Tensor:
    """As moshi, transformers' Mimi and vqtorch find it."""
    return torch.cdist(x.flatten(0, -2), codes).argmin(-1).view(x.shape[:-1])


def residual(x: Tensor, codebooks: list[Tensor], lookup: Any) -> tuple[Tensor, Tensor]:
    """Sum of the codes, and indices [B, N, M]."""
    total, indices = torch.zeros_like(x), []
    for codes in codebooks:
        index = lookup(x, codes)
        total, x = total + codes[index], x - codes[index]
        indices.append(index)
    return total, torch.stack(indices, -1)


def encodec(front: str = "", book: str = "_codebook", levels: int = M, sizes: tuple[int, ...] = (K,) * M) -> State:
    state = {}
    for m in range(levels):
        name = f"{front}layers.{m}.{book}."
        state[f"{name}inited"] = torch.ones(1)
        state[f"{name}cluster_size"] = torch.rand(sizes[m]) + 1
        state[f"{name}embed"] = torch.randn(sizes[m], D) / (m + 1)
        state[f"{name}embed_avg"] = state[f"{name}embed"] * state[f"{name}cluster_size"][:, None]
    return state


def codebooks(state: State, field: str = "embed") -> list[Tensor]:
    return [value for name, value in state.items() if name.endswith(f".{field}")]


@pytest.mark.parametrize(
    "front, book", [("", "_codebook"), ("quantizer.vq.", "_codebook"), ("model.layers.3.quantizer.", "codebook")]
)
@pytest.mark.parametrize("kind", [None, "encodec", "speechtokenizer"])
def test_encodec(front: str, book: str, kind: str | None) -> None:
    state = encodec(front, book, sizes=(K, K, 11, K))
    others = {"encoder.layers.0.conv.weight": torch.zeros(3), f"{front}layers.0.other": torch.zeros(1)}
    module = load_codebooks({**others, **state}, kind=kind)
    assert isinstance(module, ResidualVQ) and not module.training
    x = torch.randn(B, N, D)
    total, indices = residual(x, codebooks(state), expanded)
    out, found, losses = module(x)
    assert torch.equal(found, indices) and losses.tolist() == [0.0] * M
    assert (out - total).abs().max() <= ROUNDINGS
    assert_same_bits("decoded", module.get_output_from_indices(found), out)
    for m, layer in enumerate(module.layers):
        kept = layer._codebook
        names = ("cluster_size", "embed_avg", "embed")
        want = [state[f"{front}layers.{m}.{book}.{name}"] for name in names]
        assert_same_bits(names, [getattr(kept, name)[0] for name in names], want)
        assert bool(kept.initted)


def test_training_goes_on() -> None:
    """One step of EnCodec's moving averages from the loaded ones."""
    state = encodec(levels=1)
    module = load_codebooks(state, threshold_ema_dead_code=0).train()
    x = torch.randn(B, N, D, requires_grad=True)
    index = expanded(x.detach(), state["layers.0._codebook.embed"]).flatten()
    hits = F.one_hot(index, K).float()
    counts = 0.99 * state["layers.0._codebook.cluster_size"] + 0.01 * hits.sum(0)
    sums = 0.99 * state["layers.0._codebook.embed_avg"] + 0.01 * hits.T @ x.detach().flatten(0, 1)
    smoothed = (counts + 1e-5) / (counts.sum() + K * 1e-5) * counts.sum()
    out, _, losses = module(x)
    assert (module.layers[0]._codebook.embed[0] - sums / smoothed[:, None]).abs().max() <= ROUNDINGS
    assert (out.detach() - codebooks(state)[0][index].view(B, N, D)).abs().max() == 0
    assert torch.autograd.grad(out.sum(), x)[0].unique().tolist() == [1.0] and losses.shape == (1,)


MIMI = {
    "moshi": ("rvq_first.vq.", "rvq_rest.vq.", "_codebook", ("_initialized", "cluster_usage", "embedding_sum")),
    "old moshi": ("rvq_first.vq.", "rvq_rest.vq.", "_codebook", ("inited", "cluster_size", "embed_avg")),
    "transformers": (
        "semantic_residual_vector_quantizer.",
        "acoustic_residual_vector_quantizer.",
        "codebook",
        ("initialized", "cluster_usage", "embed_sum"),
    ),
}


def mimi(layout: str, dim: int | None, front: str = "quantizer.") -> State:
    state = {}
    first, rest, book, (flag, usage, total) = MIMI[layout]
    for place, levels in ((first, 1), (rest, M - 1)):
        for m in range(levels):
            name = f"{front}{place}layers.{m}.{book}."
            state[name + flag] = torch.ones(1)
            state[name + usage] = 3 * torch.rand(K)
            state[name + usage][2] = 0  # a code without rows, which is divided by 1e-5
            state[name + total] = torch.randn(K, D) * state[name + usage].clamp_min(1e-5)[:, None]
        if dim is not None:
            place = place.removesuffix("vq.")
            state[f"{front}{place}input_proj.weight"] = torch.randn(D, dim, 1) / dim**0.5
            state[f"{front}{place}output_proj.weight"] = torch.randn(dim, D, 1) / D**0.5
    return state


def mimi_codes(state: State, place: str, x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Output and indices of one of the two quantizers, from ``levels`` of it."""
    mine = {name: value for name, value in state.items() if place in name}
    sums = [value for name, value in mine.items() if name.endswith(("_sum", "_avg"))][:levels]
    usages = [value for name, value in mine.items() if name.endswith(("_usage", "_size"))]
    books = [total / usage.clamp(min=1e-5)[:, None] for total, usage in zip(sums, usages, strict=False)]
    proj = [value for name, value in mine.items() if "put_proj" in name]
    inner = F.conv1d(x.mT, proj[0]).mT if proj else x
    total, indices = residual(inner, books, by_cdist)
    return F.conv1d(total.mT, proj[1]).mT if proj else total, indices


@pytest.mark.parametrize("dim", [None, D, 10])
@pytest.mark.parametrize("layout", MIMI)
def test_mimi(layout: str, dim: int | None) -> None:
    first, rest = MIMI[layout][:2]
    state = mimi(layout, dim)
    module = load_codebooks(state)
    assert isinstance(module, SplitResidualVQ) and not module.training
    x = torch.randn(B, N, D if dim is None else dim)
    semantic, acoustic = mimi_codes(state, first[:8], x, 1), mimi_codes(state, rest[:8], x, M - 1)
    out, indices, losses = module(x)
    assert torch.equal(indices, torch.cat([semantic[1], acoustic[1]], -1)) and losses.shape == (M,)
    assert (out - semantic[0] - acoustic[0]).abs().max() <= ROUNDINGS
    assert_same_bits("decoded", module.get_output_from_indices(indices), out)
    for n in (1, 3):
        part, some, _ = module(x, n_quantizers=n)
        assert torch.equal(some[..., :n], indices[..., :n]) and bool((some[..., n:] == -1).all())
        assert_same_bits("decoded", module.get_output_from_indices(indices[..., :n]), part)
    if layout != "old moshi":  # the names of one of its two quantizers are those of EnCodec
        one = load_codebooks(state, prefix=f"quantizer.{rest.removesuffix('vq.')}")
        assert isinstance(one, ResidualVQ)
        assert torch.equal(one(x)[1], acoustic[1]) and (one(x)[0] - acoustic[0]).abs().max() <= ROUNDINGS


def dac(spelling: str, dim: int = 10, front: str = "quantizer.", sizes: tuple[int, ...] = (D,) * M) -> State:
    state = {}
    for m, size in enumerate(sizes):
        name = f"{front}quantizers.{m}."
        state[f"{name}codebook.weight"] = torch.randn(K, size) * torch.rand(K, 1)
        for layer, shape in (("in_proj", (size, dim, 1)), ("out_proj", (dim, size, 1))):
            state[f"{name}{layer}.bias"] = 0.1 * torch.randn(shape[0])
            v, g = torch.randn(shape), torch.rand(shape[0], 1, 1) + 0.5
            if spelling == "plain":
                state[f"{name}{layer}.weight"] = v / shape[1] ** 0.5
            elif spelling == "old norm":
                state.update({f"{name}{layer}.weight_g": g, f"{name}{layer}.weight_v": v})
            else:
                norm = f"{name}{layer}.parametrizations.weight.original"
                state.update({f"{norm}0": g, f"{norm}1": v})
    return state


def dac_codes(state: State, spelling: str, x: Tensor, levels: int = M) -> tuple[Tensor, Tensor]:
    def conv(rows: Tensor, name: str) -> Tensor:
        if spelling == "plain":
            weight = state[f"{name}.weight"]
        else:
            ends = (
                ("weight_g", "weight_v")
                if spelling == "old norm"
                else tuple(f"parametrizations.weight.original{i}" for i in (0, 1))
            )
            weight = torch._weight_norm(state[f"{name}.{ends[1]}"], state[f"{name}.{ends[0]}"], 0)
        return F.conv1d(rows.mT, weight, state[f"{name}.bias"]).mT

    total, rest, indices = torch.zeros_like(x), x, []
    for m in range(levels):
        name = f"quantizer.quantizers.{m}."
        codes = state[f"{name}codebook.weight"]
        index = expanded(F.normalize(conv(rest, f"{name}in_proj"), dim=-1), F.normalize(codes, dim=-1))
        out = conv(codes[index], f"{name}out_proj")
        total, rest = total + out, rest - out
        indices.append(index)
    return total, torch.stack(indices, -1)


@pytest.mark.parametrize("spelling", ["plain", "old norm", "parametrized"])
@pytest.mark.parametrize("sizes", [(D,) * M, (3, 8, 5)])
def test_dac(spelling: str, sizes: tuple[int, ...]) -> None:
    state = dac(spelling, sizes=sizes)
    module = load_codebooks(state)
    assert isinstance(module, FactorizedResidualVQ) and not module.training
    x = torch.randn(B, N, 10)
    for n in range(1, len(sizes) + 1):
        total, indices = dac_codes(state, spelling, x, n)
        out, found, _ = module(x, n_quantizers=n)
        assert torch.equal(found[..., :n], indices) and bool((found[..., n:] == -1).all())
        assert torch.equal(module.encode(x, n), indices)
        assert (out - total).abs().max() <= 4 * ROUNDINGS  # weights reach 1.5 here, over several levels
        assert_same_bits("decoded again", [module.decode(indices), module.decode(found)], [out, out])


def test_taming() -> None:
    state = {"quantize.embedding.weight": torch.randn(K, D), "quant_conv.weight": torch.zeros(3, 3, 1, 1)}
    x = torch.randn(B, D, 3, 4)
    want = expanded(x.movedim(1, -1), state["quantize.embedding.weight"])
    for module in (
        load_codebooks(state),
        load_codebooks(state, prefix="quantize."),
        load_codebooks({f"first_stage.{k}": v for k, v in state.items()}, kind="taming"),
    ):
        assert isinstance(module, VectorQuantize) and not module.training
        out, indices, _ = module(x)
        assert torch.equal(indices, want)
        assert_same_bits("codes", out, state["quantize.embedding.weight"][want].movedim(-1, 1))
        assert isinstance(module._codebook.embed, torch.nn.Parameter)
    rows = load_codebooks(state, accept_image_fmap=False, commitment_weight=0.25)
    assert torch.equal(rows(x.movedim(1, -1).flatten(1, 2))[1], want.flatten(1)) and rows.commitment_weight == 0.25


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("affine", ["none", "learned", "running"])
def test_vqtorch(affine: str, groups: int) -> None:
    codes = torch.randn(K, D)
    state = {"vq.codebook.weight": codes, "vq._counts": torch.ones(K)}
    scale, bias, lr = torch.ones(groups, 1, D), torch.zeros(groups, 1, D), None
    if affine == "learned":
        lr = 2.0
        for name in ("scale", "bias"):
            state[f"vq.affine_transform.{name}"] = torch.randn(groups, D)
        scale = 1 + lr * state["vq.affine_transform.scale"][:, None]
        bias = lr * state["vq.affine_transform.bias"][:, None]
    elif affine == "running":
        for name in ("ze_mean", "ze_var", "c_mean", "c_var"):
            state[f"vq.affine_transform.running_{name}"] = torch.rand(groups, D) + 0.5
        s = {
            name: state[f"vq.affine_transform.running_{name}"][:, None]
            for name in ("ze_mean", "ze_var", "c_mean", "c_var")
        }
        scale = (s["ze_var"] / (s["c_var"] + 1e-8)).sqrt()
        bias = s["ze_mean"] - scale * s["c_mean"]
    codes = (scale * codes.view(groups, -1, D) + bias).reshape(K, D)
    module = load_codebooks(state, affine_lr=lr)
    x = torch.randn(B, N, D)
    out, indices, _ = module(x)
    assert isinstance(module, VectorQuantize) and torch.equal(indices, by_cdist(x, codes))
    assert (out - codes[indices]).abs().max() <= ROUNDINGS


def test_from_a_file(tmp_path: Path) -> None:
    state = {**encodec("quantizer.vq."), "decoder.weight": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors")
    x = torch.randn(B, N, D)
    want = load_codebooks(state)(x)
    for path in (tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        assert_same_bits("quantized indices losses", load_codebooks(path, prefix="quantizer.")(x), want)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"\xff" * 50):
        (tmp_path / "broken.safetensors").write_bytes(broken)
        with pytest.raises(ArgumentError, match=r"load_codebooks: .*broken\.safetensors is no whole safetensors file"):
            load_codebooks(tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError):
        load_codebooks(tmp_path / "none.safetensors")


def test_half_precision_checkpoints() -> None:
    state = {name: value.bfloat16() for name, value in encodec().items()}
    module = load_codebooks(state)
    assert all(b.dtype == torch.float32 for b in module.buffers() if b.is_floating_point())
    assert torch.equal(module.layers[1]._codebook.embed[0], state["layers.1._codebook.embed"].float())


FIRST = "layers.0._codebook."
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing": ({}, {}, "source must be a checkpoint with known codebooks at one place, got no names"),
    "something else": (
        {"a.weight": torch.zeros(1), "b": torch.zeros(1)},
        {"prefix": "a"},
        "a checkpoint with known codebooks at one place, got 1 names with prefix 'a': .weight",
    ),
    "kind": (encodec(), {"kind": "hubert"}, "kind must be None or one of 'encodec', 'speechtokenizer', 'mimi'"),
    "other kind": (
        encodec("q."),
        {"kind": "dac"},
        "a checkpoint with dac codebooks at one place, got encodec at 'q.': choose by kind and prefix",
    ),
    "two": (
        {**encodec("a."), **encodec("b.")},
        {},
        "known codebooks at one place, got encodec at 'a.', encodec at 'b.': choose by kind and prefix",
    ),
    "pickle": ("model.pt", {}, "(pickles are not opened: give torch.load(path, weights_only=True)), got model.pt"),
    "list": ([1], {}, "source must be a mapping of names to tensors or the path of a .safetensors file"),
    "missing level": (
        {k: v for k, v in encodec("q.").items() if ".1." not in k},
        {},
        "load_codebooks: q.: level 1 of 4 has no cluster_size (there is nothing)",
    ),
    "missing codes": (
        {k: v for k, v in encodec().items() if k != "layers.2._codebook.embed"},
        {},
        "level 2 of 4 has no embed (there is layers.2._codebook.inited, layers.2._codebook.cluster_size",
    ),
    "missing counts": (
        {
            k: v
            for k, v in mimi("moshi", None).items()
            if not k.endswith("rvq_rest.vq.layers.0._codebook.cluster_usage")
        },
        {},
        "quantizer.rvq_rest.vq.: level 0 of 3 has no cluster_size (there is quantizer.rvq_rest",
    ),
    "sizes": (
        {**encodec(), f"{FIRST}embed": torch.zeros(K, D + 1)},
        {},
        f"{FIRST}embed must be [16, 6] of floating point, got [16, 7] of torch.float32",
    ),
    "widths": (
        {**encodec(), "layers.1._codebook.embed_avg": torch.zeros(K, D + 1)},
        {},
        "layers.1._codebook.embed_avg must be [any, 6] of floating point, got [16, 7] of torch.float32",
    ),
    "integers": (
        {f"a.{k}": v for k, v in {**encodec(), f"{FIRST}embed": torch.zeros(K, D, dtype=torch.int64)}.items()},
        {"prefix": "a."},
        f"a.{FIRST}embed must be [16, 6] of floating point, got [16, 6] of torch.int64",
    ),
    "not finite": (
        {**encodec(), f"{FIRST}embed": torch.full((K, D), float("nan"))},
        {},
        f"{FIRST}embed must be finite, got NaN or infinite values",
    ),
    "not made yet": (
        {**encodec(), "layers.3._codebook.inited": torch.zeros(1)},
        {},
        "layers.3._codebook.inited says that it holds no codes yet",
    ),
    "projections": (
        {**encodec(), "layers.0.project_in.weight": torch.zeros(D, 10)},
        {},
        "source must be without projections inside a level, got layers.0.project_in.weight",
    ),
    "half a split": (
        {k: v for k, v in mimi("moshi", 10).items() if "rvq_first.input" not in k and "rvq_first.output" not in k},
        {},
        "source must be the same projections around both quantizers, got inputs of size [6, 10]",
    ),
    "sizes of a split": (
        {k: v[:5] if "rvq_first.vq" in k else v for k, v in mimi("moshi", None).items()},
        {},
        "source must be codebooks of one size, got [5, 6] and [16, 6]",
    ),
    "no way back": (
        {k: v for k, v in dac("plain").items() if not k.endswith("2.out_proj.weight")},
        {},
        "there is no out_proj.weight, nor weight_g and weight_v of it (there is quantizer.quantizers.2.codebook.weight",
    ),
    "half a norm": (
        {k: v for k, v in dac("old norm").items() if not k.endswith("0.in_proj.weight_g")},
        {},
        "there is no in_proj.weight, nor weight_g and weight_v of it",
    ),
    "no bias": (
        {k: v for k, v in dac("plain").items() if not k.endswith("1.in_proj.bias")},
        {},
        "quantizer.: level 1 of 4 has no in_proj.bias (there is quantizer.quantizers.1.codebook.weight",
    ),
    "other codebook": (
        {**dac("plain"), "quantizer.quantizers.1.codebook.weight": torch.zeros(K + 1, D)},
        {},
        "quantizer.quantizers.1.codebook.weight must be [16, 6], got [17, 6]",
    ),
    "remapped": (
        {"quantize.embedding.weight": torch.zeros(K, D), "quantize.used": torch.zeros(3)},
        {},
        "source must be without remapped indices, got quantize.used",
    ),
    "no rate": (
        {"codebook.weight": torch.zeros(K, D), "affine_transform.scale": torch.zeros(1, D)},
        {},
        "affine_lr must be given where the checkpoint has affine_transform.scale, got None",
    ),
    "a rate too many": (
        {"codebook.weight": torch.zeros(K, D)},
        {"affine_lr": 1.0},
        "affine_lr must be None where the checkpoint has no affine_transform.scale, got 1.0",
    ),
    "rate of others": (encodec(), {"affine_lr": 1.0}, "affine_lr must be None for encodec, got 1.0"),
    "affine": (
        {"codebook.weight": torch.zeros(K, D), "affine_transform.scale": torch.zeros(1, D)},
        {"affine_lr": 1.0},
        "affine_transform. must be scale, bias of [groups, 6], groups of 16 codes",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case: str) -> None:
    source, options, words = WRONG[case]
    with pytest.raises(ArgumentError, match=re.escape(words)) as caught:
        load_codebooks(source, **options)
    assert str(caught.value).startswith("load_codebooks: ")


def test_wrong_types_and_options() -> None:
    with pytest.raises(
        TypeError, match=re.escape("load_codebooks: layers.0._codebook.embed should be a tensor, got: list")
    ):
        load_codebooks({**encodec(), f"{FIRST}embed": [1.0]})
    with pytest.raises(TypeError, match="unexpected keyword argument 'bits'"):
        load_codebooks(encodec(), bits=8)
    assert load_codebooks(encodec(), decay=0.5).layers[0]._codebook.decay == 0.5

"""replace(model) with layers of vector-quantize-pytorch in it."""

from __future__ import annotations

import copy
import io
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq.nn.fsq import FSQ
from fastseq.nn.grouped_residual_vq import GroupedResidualVQ
from fastseq.nn.residual_vq import ResidualVQ
from fastseq.nn.sim_vq import SimVQ
from fastseq.nn.vector_quantize import VectorQuantize
from tests.tolerance import assert_same_bits

rival = pytest.importorskip("vector_quantize_pytorch", reason="the rival is not installed")

B, N, D, K = 2, 12, 6, 16
# The rival sums distances, losses, averages and the rotation in another order: tens of roundings of the largest value.
ROUNDINGS = 128 * torch.finfo(torch.float32).eps
RVQ: dict[str, Any] = {"dim": D, "num_quantizers": 3, "codebook_size": K}

VQ: dict[str, dict[str, Any]] = {
    "plain": {},
    "projected": {"codebook_dim": 4},
    "cosine": {"use_cosine_sim": True, "codebook_dim": 4},
    "heads": {"heads": 2, "codebook_dim": 3},
    "separate heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "straight": {"rotation_trick": False, "commitment_weight": 0.25, "decay": 0.9, "eps": 1e-3},
    "layernorm": {"codebook_dim": 4, "layernorm_after_project_in": True},
    "channel first": {"channel_last": False},
    "image": {"accept_image_fmap": True},
    "volume": {"accept_3d_fmap": True},
    "frozen": {"freeze_codebook": True},
    "orthogonal": {"orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True},
    # Frozen: the rival moves the codes in place before backward, and its gradients of distances are those of the new.
    "diversity": {
        "codebook_diversity_loss_weight": 0.1,
        "codebook_diversity_temperature": 3.0,
        "freeze_codebook": True,
    },
    "cross entropy": {"commitment_use_cross_entropy_loss": True, "freeze_codebook": True},
    "manual": {"manual_ema_update": True},
    "affine": {"affine_param": True},
    "synchronous": {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.3},
    "unrouted": {"learnable_codebook": True, "ema_update": False, "route_gradients_to_input": False},
    "k-means": {"kmeans_init": True, "kmeans_iters": 3},
}
RANDOM: dict[str, dict[str, Any]] = {  # training draws numbers, in another order than there
    "sampled": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.5},
    "gumbel": {"stochastic_sample_codes": True, "straight_through": True, "rotation_trick": False},
    "expiring": {"threshold_ema_dead_code": 2},
    "directional": {"directional_reparam": True, "directional_reparam_variance": 0.1, "threshold_ema_dead_code": 2},
}
SHAPES = {"channel first": (B, D, N), "image": (B, D, 3, 4), "volume": (B, D, 3, 2, 2)}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: rival.ResidualVQ(**RVQ),
    "residual projected": lambda: rival.ResidualVQ(codebook_dim=4, commitment_weight=0.3, **RVQ),
    "residual sizes": lambda: rival.ResidualVQ(dim=D, codebook_size=(5, 9, 7), rotation_trick=False),
    "residual shared": lambda: rival.ResidualVQ(shared_codebook=True, **RVQ),
    "residual beam": lambda: rival.ResidualVQ(beam_size=3, beam_score_quantizer_weights=[1.0, 0.5, 2.0], **RVQ),
    "residual implicit": lambda: rival.ResidualVQ(
        implicit_neural_codebook=True, mlp_kwargs={"dim_hidden": 5, "depth": 2}, **RVQ
    ),
    "residual gradient": lambda: rival.ResidualVQ(quant_grad_frac=0.5, use_cosine_sim=True, **RVQ),
    "residual image": lambda: rival.ResidualVQ(accept_image_fmap=True, **RVQ),
    "grouped": lambda: rival.GroupedResidualVQ(groups=2, decay=0.9, **RVQ),
    "scalar": lambda: rival.FSQ([5, 4, 3], dim=D, num_codebooks=2),
    "scalar without bias": lambda: rival.FSQ(
        [5, 5, 5], dim=D, projection_has_bias=False, orthogonal_rotation=True, bound_hard_clamp=True
    ),
    "scalar symmetric": lambda: rival.FSQ([5, 4], dim=D, preserve_symmetry=True, return_indices=False),
    "simple": lambda: rival.SimVQ(D, K, commitment_weight=0.3),
    "simple transform": lambda: rival.SimVQ(
        D, K, codebook_transform=nn.Sequential(nn.Linear(3, 8), nn.Linear(8, D)), frozen_codebook_dim=3
    ),
}
OURS = (VectorQuantize, ResidualVQ, GroupedResidualVQ, FSQ, SimVQ)


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients, and the state afterwards."""
    x = x.clone().requires_grad_()
    out = {f"output {n}": t for n, t in enumerate(module(x)) if t is not None}
    floats = [t for t in out.values() if t.is_floating_point()]
    loss = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in floats)
    named = {"x": x, **{n: p for n, p in module.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True) if loss.requires_grad else [None] * 99
    for (name, tensor), grad in zip(named.items(), grads, strict=False):
        out[f"gradient of {name}"] = torch.zeros_like(tensor) if grad is None else grad
    return out | {n: t.detach().clone() for n, t in module.state_dict().items()}


def assert_equal_results(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, w in want.items():
        g = got[name]
        assert (g.shape, g.dtype) == (w.shape, w.dtype), name
        if w.is_floating_point():
            assert (g - w).abs().max() <= ROUNDINGS * w.abs().max().clamp_min(1.0), name
        else:
            assert torch.equal(g, w), name


def assert_replaced(theirs: nn.Module, x: Tensor, training: bool = True) -> None:
    """Outputs stay, at evaluation and while training; so do all tensors."""
    model = nn.Sequential(copy.deepcopy(theirs))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    keys = list(model.state_dict())
    assert fastseq.replaced(model, left_alone=True) == []
    assert fastseq.replace(model) is model
    ours = model[0]
    assert isinstance(ours, OURS) and type(ours).__name__ == type(theirs).__name__
    assert [(r.name, r.was) for r in fastseq.replaced(model)] == [
        ("0", f"vector_quantize_pytorch.{type(ours).__name__}")
    ]
    assert list(model.state_dict()) == keys
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        assert tensor is tensors[name], name
    assert not any(type(part).__module__.startswith("vector_quantize_pytorch") for part in model.modules())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for train in (False, True) if training else (False,):
        torch.manual_seed(5)
        want = results(theirs.train(train), x)
        torch.manual_seed(5)
        got = results(ours.train(train), x)
        assert_equal_results(got, want)


@pytest.mark.parametrize("case", [*VQ, *RANDOM])
def test_vector_quantize(case: str) -> None:
    theirs = rival.VectorQuantize(D, K, **(VQ | RANDOM)[case])
    x = torch.randn(SHAPES.get(case, (B, N, D)))
    if case in ("affine", "k-means"):
        theirs(x)
    assert_replaced(theirs, x, training=case in VQ)


@pytest.mark.parametrize("case", OTHERS)
def test_others(case: str) -> None:
    x = torch.randn((B, D, D, D) if "image" in case else (B, N, D))  # the rival takes images of D by D alone
    assert_replaced(OTHERS[case](), x, training="beam" not in case)  # with beams it updates the first codebook alone


def test_options_that_show_only_inside() -> None:
    options: dict[str, Any] = {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "eval_beam_size": 4}
    theirs = rival.ResidualVQ(beam_size=2, quantize_dropout_multiple_of=2, threshold_ema_dead_code=3, **options, **RVQ)
    ours = fastseq.replace(theirs)
    assert (ours.quantize_dropout, ours.quantize_dropout_cutoff_index, ours.quantize_dropout_multiple_of) == (
        True,
        1,
        2,
    )
    assert (ours.beam_size, ours.eval_beam_size, ours.layers[0]._codebook.threshold_ema_dead_code) == (2, 4, 3)
    ours = fastseq.replace(rival.ResidualVQ(diveq=True, sample_codebook_temp=0.5, **RVQ))
    assert ours.diveq and not ours.layers[0].ema_update and ours.layers[0].sample_codebook_temp == 0.5
    ours = fastseq.replace(
        rival.VectorQuantize(D, K, kmeans_init=True, kmeans_iters=7, decay=0.7, freeze_codebook=True)
    )
    assert (ours._codebook.kmeans_iters, ours._codebook.decay, ours.freeze_codebook) == (7, 0.7, True)
    assert not ours._codebook.initted and not ours._codebook.ready
    x = torch.randn(B, 40, D)
    ours(x)
    assert bool(ours._codebook.initted) and ours.codebook.any()
    noisy = fastseq.replace(rival.FSQ([5, 5], preserve_symmetry=True, noise_dropout=0.1))
    assert noisy.noise_dropout == 0.5  # what it amounts to there, for any number
    theirs = rival.VectorQuantize(
        D, K, learnable_codebook=True, ema_update=False, return_zeros_for_masked_padding=False
    )
    theirs.commitment_weight = 0.125  # changed after construction
    ours = fastseq.replace(theirs)
    assert ours.commitment_weight == 0.125 and not ours.return_zeros_for_masked_padding


def test_an_optimizer_in_place_goes_on() -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.5)

    theirs = rival.VectorQuantize(
        D, K, learnable_codebook=True, ema_update=False, in_place_codebook_optimizer=make, commitment_weight=0.5
    )
    other = copy.deepcopy(theirs)
    other.in_place_codebook_optimizer = make(other._codebook.parameters())
    ours = fastseq.replace(theirs)
    assert ours.in_place_codebook_optimizer is theirs.in_place_codebook_optimizer
    x = torch.randn(B, N, D)
    ours(x), other(x)
    assert (ours.codebook - other.codebook).abs().max() <= ROUNDINGS


def test_a_bridge_is_kept() -> None:
    bridge = nn.Linear(D, D)
    theirs = rival.VectorQuantize(D, K, vq_bridge=bridge)
    x = torch.randn(B, N, D)
    want = theirs.eval()(x)
    ours = fastseq.replace(theirs)
    assert ours._codebook.vq_bridge is bridge
    assert torch.equal(ours(x)[1], want[1]) and (ours(x)[0] - want[0]).abs().max() <= ROUNDINGS


class Model(nn.Module):
    """Quantizers in several places, one of them twice, one also under the name of a part of it, and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Identity()
        self.encoder = nn.LSTM(D, D)
        self.vq = rival.VectorQuantize(D, K, codebook_dim=4)
        self.rvq = rival.ResidualVQ(**RVQ)
        self.level = self.rvq.layers[1]
        self.parts = nn.ModuleDict({"again": self.vq, "fsq": rival.FSQ([5, 5, 3], dim=D)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.vq(self.encoder(x)[0])[0]
        out: Tensor = self.rvq(x)[0] + self.parts["again"](x)[0] + self.parts["fsq"](x)[0]
        return out


def test_a_model() -> None:
    model = Model().eval()
    x = torch.randn(B, N, D)
    want, parameters = model(x), list(model.parameters())
    fastseq.replace(model)
    assert (model(x) - want).abs().max() <= ROUNDINGS
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert model.parts["again"] is model.vq and model.level is model.rvq.layers[1]
    assert {(r.name, r.was) for r in fastseq.replaced(model)} == {
        ("encoder", "torch.nn.LSTM"),
        ("vq", "vector_quantize_pytorch.VectorQuantize"),
        ("rvq", "vector_quantize_pytorch.ResidualVQ"),
        ("parts.fsq", "vector_quantize_pytorch.FSQ"),
    }
    modules = list(model.modules())
    assert list(fastseq.replace(model).modules()) == modules  # twice is once
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_same_bits("copied loaded", [copy.deepcopy(model)(x), again(x)], [model(x)] * 2)


def test_settings_and_hooks_survive() -> None:
    theirs = rival.VectorQuantize(D, K, codebook_dim=4, learnable_codebook=True, ema_update=False).double().eval()
    theirs.project_in.requires_grad_(False)
    theirs.note = "kept"
    seen: list[Any] = []
    handle = theirs.register_forward_hook(lambda module, args, out: seen.append(("forward", type(module))))
    theirs._codebook.register_forward_pre_hook(lambda module, args: seen.append(("inside", None)))
    theirs.project_in.register_forward_hook(lambda module, args, out: seen.append(("project", type(module))))
    theirs.register_load_state_dict_pre_hook(lambda module, *args: seen.append(("load", type(module))))
    theirs.register_state_dict_post_hook(lambda module, *args: seen.append(("state", type(module))))
    ours = fastseq.replace(nn.Sequential(theirs))[0]
    del theirs
    assert not ours.training and not ours._codebook.training and ours.note == "kept"
    assert ours.codebook.dtype == torch.float64 and not ours.project_in.weight.requires_grad
    assert ours._codebook.embed.requires_grad
    ours(torch.randn(B, N, D, dtype=torch.float64))
    assert seen[0] == ("project", nn.Linear) and seen[-1] == ("forward", VectorQuantize)
    handle.remove()
    del seen[:]
    ours(torch.randn(B, N, D, dtype=torch.float64))
    ours.load_state_dict(ours.state_dict())
    assert ("forward", VectorQuantize) not in seen
    assert ("load", VectorQuantize) in seen and ("state", VectorQuantize) in seen
    meta = fastseq.replace(rival.VectorQuantize(D, K, codebook_dim=4).to("meta"))
    assert {t.device.type for t in [*meta.parameters(), *meta.buffers()]} == {"meta"}


class Mine(rival.VectorQuantize):  # type: ignore[misc]
    """A user's subclass."""


def test_what_is_left_alone_and_why(caplog: pytest.LogCaptureFixture) -> None:
    patched, compiled = rival.FSQ([5, 5]), rival.SimVQ(D, K)
    patched.forward = lambda x: x
    compiled.compile()
    waiting = rival.VectorQuantize(D, K)
    waiting(torch.randn(B, N, D), accum_ema_update=True)
    older, mixed = rival.FSQ([5, 5]), rival.ResidualVQ(**RVQ)
    del older.bound_hard_clamp
    mixed.layers[1].freeze_codebook = True
    odd, extra = rival.VectorQuantize(D, K), rival.VectorQuantize(D, K)
    odd._codebook.decay = 1.5
    extra.more = nn.Linear(2, 2)
    other, inner = rival.VectorQuantize(D, K), rival.ResidualVQ(**RVQ)
    other._codebook.__class__ = type("MyCodebook", (type(other._codebook),), {})
    inner.layers[2].forward = lambda x: x
    groups = rival.GroupedResidualVQ(groups=2, **RVQ)
    groups.rvqs[1].beam_size = 3
    model = nn.ModuleDict(
        {
            "mine": Mine(D, K),
            "patched": patched,
            "compiled": compiled,
            "waiting": waiting,
            "older": older,
            "mixed": mixed,
            "odd": odd,
            "extra": extra,
            "other": other,
            "inner": inner,
            "groups": groups,
            "lfq": rival.LFQ(dim=4, codebook_size=16),
            "latent": rival.LatentQuantize(levels=[5, 5], dim=D),
            "residual": rival.ResidualFSQ(dim=D, levels=[5, 5], num_quantizers=2),
            "good": rival.VectorQuantize(D, K),
        }
    )
    kept = dict(model.items())
    before = fastseq.replaced(model, left_alone=True)
    with caplog.at_level(logging.INFO, "fastseq"):
        fastseq.replace(model)
    assert [name for name, module in model.items() if module is not kept[name]] == ["good"]
    reasons = {
        "mine": "tests.nn.test_replacement_vq.Mine is a subclass of VectorQuantize and may do more",
        "patched": "its forward was replaced on the instance",
        "compiled": "it was compiled in place; replace first, then compile",
        "waiting": "it holds updates of its codebook that were accumulated and not applied",
        "older": "it is not as vector_quantize_pytorch 1.32 makes it "
        "('FSQ' object has no attribute 'bound_hard_clamp')",
        "mixed": "its levels differ in freeze_codebook",
        "odd": "VectorQuantize: decay must be a number in [0, 1], got 1.5",
        "extra": "its modules are not as vector_quantize_pytorch 1.32 makes them (more)",
        "other": "_codebook in it is not as vector_quantize_pytorch 1.32 makes it "
        "(<class 'tests.nn.test_replacement_vq.MyCodebook'>)",
        "inner": "layers in it is not as vector_quantize_pytorch 1.32 makes it "
        "(its forward was replaced on the instance)",
        "groups": "its groups differ",
        "lfq": "there is none of ours for vector_quantize_pytorch.LFQ",
        "latent": "there is none of ours for vector_quantize_pytorch.LatentQuantize",
        "residual": "there is none of ours for vector_quantize_pytorch.ResidualFSQ",
    }
    messages = [(r.levelno, r.getMessage()) for r in caplog.records if r.getMessage().startswith("replace: ")]
    assert messages == [
        *((logging.WARNING, f"replace: {name}: left alone, because {why}") for name, why in reasons.items()),
        (logging.INFO, "replace: good: VectorQuantize swapped"),
    ]
    for found in (before, fastseq.replaced(model, left_alone=True)):
        assert {r.name: r.reason for r in found} == reasons and all(r.module is kept[r.name] for r in found)
    assert found[0].was == "vector_quantize_pytorch.VectorQuantize"
    assert [r.name for r in fastseq.replaced(model)] == ["good"]
    assert type(model["residual"].layers[0]) is rival.FSQ  # what is inside stays as well


def test_lstms_that_are_left_alone_are_listed() -> None:
    model = nn.Sequential(nn.LSTM(3, 3), type("Peephole", (nn.LSTM,), {})(3, 3))
    (found,) = fastseq.replaced(model, left_alone=True)
    assert found.name == "1" and found.was == "torch.nn.LSTM"
    assert re.fullmatch(r".*Peephole is a subclass of LSTM and may do more", str(found.reason))


def test_the_package_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)  # importing it raises
    model = Model()
    fastseq.replace(model)
    assert len(fastseq.replaced(model)) == 4 and not fastseq.replaced(model, left_alone=True)
    names = [name for name in sys.modules if name.startswith("fastseq.replacement")]
    assert names and not any(hasattr(sys.modules[name], "vector_quantize_pytorch") for name in names)

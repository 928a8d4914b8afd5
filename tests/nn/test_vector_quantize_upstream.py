"""``VectorQuantize`` against the class that it stands in for: results, gradients, losses and buffers of three steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseq.nn.vector_quantize import LossBreakdown, VectorQuantize

rival = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")

B, T, D, K = 3, 9, 8, 16
# Float32 sums of up to 30 terms in another order, through three steps; measured at 2e-6 of the largest value.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

LEARNED: dict[str, Any] = {"learnable_codebook": True, "ema_update": False}
FROZEN: dict[str, Any] = {"freeze_codebook": True}  # theirs reads the updated codes in backward
HEADS: dict[str, Any] = {"heads": 2, "codebook_dim": 4}


def bend(codes: Tensor) -> Tensor:
    """Other codes for each vector: [1, K, D] -> [1, B, T, K, D]."""
    return codes[:, None, None] * torch.linspace(0.5, 1.5, B * T).view(1, B, T, 1, 1)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# name -> options, arguments of the call
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "straight": ({"rotation_trick": False}, {}),
    "cosine": ({"use_cosine_sim": True}, {}),
    "separate heads": ({**HEADS, "separate_codebook_per_head": True}, {}),
    "separate heads, no projection": (
        {"dim": 16, "heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True},
        {},
    ),
    "shared heads": (HEADS, {}),
    "projection": ({"codebook_dim": 5}, {}),
    "projection and norm": ({"codebook_dim": 5, "layernorm_after_project_in": True}, {}),
    "no norm without projection": ({"layernorm_after_project_in": True}, {}),
    "one dimension": ({"codebook_dim": 1}, {}),
    "decay and eps": ({"decay": 0.99, "eps": 0.1}, {}),
    "learned": (LEARNED, {}),
    "sync_update_v": ({**LEARNED, "sync_update_v": 0.3}, {}),
    "no gradient to the input": ({**LEARNED, "route_gradients_to_input": False}, {}),
    "orthogonal": ({"orthogonal_reg_weight": 10.0}, {}),
    "orthogonal, some": ({"orthogonal_reg_weight": 10.0, "orthogonal_reg_max_codes": 7}, {}),
    "orthogonal, active": ({"orthogonal_reg_weight": 10.0, "orthogonal_reg_active_codes_only": True}, {}),
    "orthogonal, heads": ({**HEADS, "separate_codebook_per_head": True, "orthogonal_reg_weight": 10.0}, {}),
    "cross-entropy": ({"commitment_use_cross_entropy_loss": True, **LEARNED}, {}),
    "cross-entropy, heads": ({"commitment_use_cross_entropy_loss": True, **HEADS, **FROZEN}, {}),
    "diversity": ({"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 3.0, **FROZEN}, {}),
    "diversity, heads": (
        {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 3.0, **HEADS, **FROZEN},
        {},
    ),
    "sampled": ({"stochastic_sample_codes": True}, {}),
    "sampled, temperature": ({"stochastic_sample_codes": True, "sample_codebook_temp": 0.3}, {}),
    "sampled, temperature of the call": ({"stochastic_sample_codes": True}, {"sample_codebook_temp": 0.3}),
    "sampled, temperature 0": ({"stochastic_sample_codes": True}, {"sample_codebook_temp": 0.0}),
    "sampled, cosine": ({"stochastic_sample_codes": True, "use_cosine_sim": True}, {}),
    "softmax": ({"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False, **FROZEN}, {}),
    "straight_through": ({"straight_through": True, "rotation_trick": False}, {}),
    "directional": ({"directional_reparam": True, "threshold_ema_dead_code": 1e-9}, {}),
    "topk": ({}, {"topk": 3}),
    "topk 1": ({}, {"topk": 1}),
    "topk of all": ({}, {"topk": 99}),
    "topk, learned": ({**LEARNED, "rotation_trick": False}, {"topk": 3}),
    "topk, cosine": ({"use_cosine_sim": True}, {"topk": 3}),
    "weight": ({}, {"ema_update_weight": torch.arange(K) / K}),
    "weight of both": (
        {**HEADS, "separate_codebook_per_head": True},
        {"ema_update_weight": torch.arange(2 * K).view(2, K) / K},
    ),
    "weight function": ({}, {"ema_update_weight": lambda sums, counts: (counts > 1) * sums[..., 0].abs().clamp(max=1)}),
    "no update": ({}, {"ema_update": False}),
    "frozen": (FROZEN, {}),
    "frozen by the call": ({}, FROZEN),
    "thawed by the call": (FROZEN, {"freeze_codebook": False}),
    "manual": ({"manual_ema_update": True}, {}),
    "in place": ({**LEARNED, "in_place_codebook_optimizer": sgd}, {}),
    "in place, by hand": (
        {**LEARNED, "in_place_codebook_optimizer": sgd, "manual_in_place_optimizer_update": True},
        {},
    ),
    "transform": (LEARNED, {"codebook_transform_fn": bend}),
    "transform, cosine": ({"use_cosine_sim": True}, {"codebook_transform_fn": bend}),
    "transform, topk": (LEARNED, {"codebook_transform_fn": bend, "topk": 2}),
    "transform, sampled": ({**LEARNED, "stochastic_sample_codes": True}, {"codebook_transform_fn": bend}),
    "bridge": ({"vq_bridge": nn.Linear(D, D)}, {}),
    "commitment": ({"commitment_weight": 0.3}, {}),
    "no commitment": ({"commitment_weight": 0.0}, {}),
}


def pair(options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours, drawn from one seed."""
    made = []
    for kind in (rival.VectorQuantize, VectorQuantize):
        torch.manual_seed(0)
        given = {"dim": D, "codebook_size": K, **options}
        made.append(kind(**{n: copied(v) for n, v in given.items()}))
    return made[0], made[1]


def copied(value: Any) -> Any:
    """A module of its own for each."""
    if isinstance(value, nn.Linear):
        module = nn.Linear(value.in_features, value.out_features)
        module.load_state_dict(value.state_dict())
        return module
    return value


def results(module: nn.Module, call: dict[str, Any], sizes: tuple[int, ...] = (B, T)) -> list[tuple[str, Tensor]]:
    """What three steps of training and one evaluation return, with gradients and the state at the end."""
    channels = module.dim if isinstance(module.dim, int) else D
    found: list[tuple[str, Tensor]] = []
    for step in range(3):
        torch.manual_seed(100 + step)
        x = torch.randn(*sizes, channels).requires_grad_()
        quantized, index, loss, terms = module(x, return_loss_breakdown=True, **call)
        torch.manual_seed(200 + step)
        total = (quantized * torch.randn_like(quantized)).sum() + 3 * loss.sum()
        leaves = [x, *module.parameters()]
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        found += [(f"quantized {step}", quantized), (f"index {step}", index), (f"loss {step}", loss)]
        found += [(f"{name} {step}", term) for name, term in terms._asdict().items()]
        found += [(f"gradient {n} {step}", torch.zeros(()) if g is None else g) for n, g in enumerate(grads)]
    module.eval()
    found += zip(("quantized", "index", "loss"), module(x, **call), strict=True)
    module.train()
    return found + sorted(module.state_dict().items())


def assert_alike(theirs: list[tuple[str, Tensor]], ours: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in theirs] == [name for name, _ in ours]
    for (name, their), (_, our) in zip(theirs, ours, strict=True):
        assert their.dtype == our.dtype, name
        torch.testing.assert_close(our, their, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(case: str) -> None:
    options, call = CASES[case]
    theirs, ours = pair(options)
    for (name, value), (own, drawn) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == own and torch.equal(value, drawn), f"initial {name}"
    assert_alike(results(theirs, call), results(ours, call))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, (5, D)),
        ({"channel_last": False}, (B, D, T)),
        ({"accept_image_fmap": True}, (B, D, 4, 5)),
        ({"accept_3d_fmap": True}, (B, D, 2, 3, 4)),
        ({"channel_last": False, **HEADS}, (B, D, T)),
        ({"accept_image_fmap": True, **HEADS, "separate_codebook_per_head": True}, (B, D, 4, 5)),
    ],
)
@pytest.mark.parametrize("call", [{}, {"topk": 2}])
def test_the_same_layouts(options: dict[str, Any], sizes: tuple[int, ...], call: dict[str, Any]) -> None:
    if call and "heads" in options:
        call = {}
    theirs, ours = pair(options)
    for training in (True, False):
        x = torch.randn(*sizes)
        both = [m.train(training)(x, **call) for m in (theirs, ours)]
        assert_alike(*([*zip(("quantized", "index", "loss"), out, strict=True)] for out in both))


@pytest.mark.parametrize(
    "options", [{}, LEARNED, {"return_zeros_for_masked_padding": False}, {"commitment_weight": 0.0}]
)
@pytest.mark.parametrize("call", [{}, {"topk": 2}])
def test_the_same_with_padding(options: dict[str, Any], call: dict[str, Any]) -> None:
    theirs, ours = pair(options)
    mask = torch.rand(B, T) > 0.4
    assert_alike(results(theirs, {"mask": mask, **call}), results(ours, {"mask": mask, **call}))
    lens = torch.tensor([9, 0, 4])
    assert_alike(results(theirs, {"lens": lens, **call}), results(ours, {"lens": lens, **call}))


@pytest.mark.parametrize(
    "options", [{}, HEADS, {**HEADS, "separate_codebook_per_head": True}, {"use_cosine_sim": True}]
)
def test_the_same_cross_entropy_of_given_indices(options: dict[str, Any]) -> None:
    theirs, ours = pair({**options, **FROZEN})
    x = torch.randn(B, T, D)
    indices = torch.randint(-1, K, (B, T, 2) if "heads" in options else (B, T))
    losses, grads = [], []
    for module in (theirs, ours):
        given = x.clone().requires_grad_()
        loss = module(given, indices=indices)[1]
        losses.append(loss)
        grads.append(torch.autograd.grad(loss, given)[0])
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    torch.testing.assert_close(grads[1], grads[0], **CLOSE)


def test_the_same_accumulated_updates() -> None:
    theirs, ours = pair({})
    x = torch.randn(3, B, T, D)
    for module in (theirs, ours):
        module(x[0], accum_ema_update=True)
        module(x[1], accum_ema_update=True)
        module(x[2])
    assert_alike(sorted(theirs.state_dict().items()), sorted(ours.state_dict().items()))


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"codebook_dim": 5}])
def test_the_same_updates_from_outside(options: dict[str, Any]) -> None:
    theirs, ours = pair(options)
    x, mask = torch.randn(B, T, D), torch.rand(B, T) > 0.4
    index = torch.randint(0, K, (B, T))
    for module in (theirs, ours):
        module.update_indices(x, index)
        module.update_ema_indices(x, index, mask=mask)
        module._codebook.update_ema()
    assert_alike(sorted(theirs.state_dict().items()), sorted(ours.state_dict().items()))


def test_the_same_decoding() -> None:
    for options in ({}, {"codebook_dim": 5}, {**HEADS, "separate_codebook_per_head": True}, {"channel_last": False}):
        theirs, ours = pair(options)
        index = torch.randint(0, K, (B, T, 2) if "heads" in options else (B, T))
        torch.testing.assert_close(ours.codebook, theirs.codebook, rtol=0, atol=0)
        want, got = theirs.get_codes_from_indices(index), ours.get_codes_from_indices(index)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        if "channel_last" not in options:
            want, got = theirs.get_output_from_indices(index), ours.get_output_from_indices(index)
            torch.testing.assert_close(got, want, **CLOSE)


def test_affine_in_training() -> None:
    for more in ({}, LEARNED):
        theirs, ours = pair({"affine_param": True, **more})
        for step in range(3):
            torch.manual_seed(step)
            x = torch.randn(B, T, D) * (2 + step) + 1
            outs = [[*zip(("quantized", "index", "loss"), m(x), strict=True)] for m in (theirs, ours)]
            assert_alike(*outs)
        names = {k: v for k, v in theirs.state_dict().items() if not k.endswith("needs_init")}
        assert_alike(sorted(names.items()), sorted((k, v) for k, v in ours.state_dict().items() if k in names))


@pytest.mark.parametrize("options", [{}, LEARNED, HEADS, {"kmeans_init": True}, {"codebook_dim": 5}])
def test_state_dicts_load_both_ways(options: dict[str, Any]) -> None:
    theirs, ours = pair(options)
    with torch.no_grad():
        for value in theirs.state_dict().values():
            value.copy_(torch.rand(value.shape) < 0.5 if value.dtype == torch.bool else torch.randn(value.shape))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    fresh = rival.VectorQuantize(D, K, **options)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_affine_state_dict_loads() -> None:
    theirs, ours = pair({"affine_param": True})
    theirs(torch.randn(B, T, D))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours._codebook.batch_mean, theirs._codebook.batch_mean)
    trained = rival.VectorQuantize(D, K, affine_param=True)
    trained(torch.randn(B, T, D))
    trained.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("kind", ["__init__", "forward"])
def test_the_same_arguments(kind: str) -> None:
    def arguments(f: Callable[..., Any]) -> list[tuple[str, Any]]:
        shown = inspect.signature(f).parameters.values()
        return [(p.name, p.default) for p in shown if p.kind is not p.KEYWORD_ONLY]

    assert arguments(getattr(VectorQuantize, kind)) == arguments(getattr(rival.VectorQuantize, kind))


def test_the_same_terms_of_the_loss() -> None:
    assert LossBreakdown._fields == rival.vector_quantize_pytorch.LossBreakdown._fields


def test_kmeans_is_as_good() -> None:
    theirs, ours = pair({"kmeans_init": True, "kmeans_iters": 20})
    x = torch.randn(1, 400, D)
    errors = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        module(x, freeze_codebook=True)
        assert module._codebook.initted and module._codebook.cluster_size.sum() == 400
        errors.append(((x[:, :, None] - module.codebook) ** 2).sum(-1).min(-1).values.mean())
    assert errors[1] < 1.1 * errors[0]  # other random rows: 8 seeds stay within 3 %

"""``ResidualVQ``: what a step computes on either way through the levels, dropout, beams, and what is kept of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq import functional
from fastseq.nn import residual_levels, residual_vq
from fastseq.nn.reinit import Reinit, Spaced
from fastseq.nn.residual_vq import ResidualVQ
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

B, N, D, K, M = 3, 10, 8, 16, 4
MASK = torch.arange(B * N).view(B, N) % 7 % 3 > 0
LEVELS = torch.tensor([1, 4, 2])
LEARNED: dict[str, Any] = {"learnable_codebook": True, "ema_update": False}
DROPOUT: dict[str, Any] = {"quantize_dropout": True}
PER_SAMPLE: dict[str, Any] = {**DROPOUT, "quantize_dropout_per_sample": True}


def make(**options: Any) -> ResidualVQ:
    torch.manual_seed(0)
    return ResidualVQ(**{"dim": D, "num_quantizers": M, "codebook_size": K, **options})


def names_of(module: nn.Module) -> list[str]:
    return sorted(module.state_dict())


def state(module: nn.Module) -> list[Tensor]:
    """A copy of parameters and buffers, in a fixed order."""
    return [v.clone() for _, v in sorted(module.state_dict().items())]


@pytest.fixture(params=["at once", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through the levels, for options that can go either."""
    if request.param == "one by one":
        monkeypatch.setattr(residual_vq, "why_not_at_once", lambda *_: "asked for")
    return str(request.param)


def used(x: Tensor, mask: Tensor | None, levels: Tensor | None) -> Tensor:
    """Which rows use each level: bool [M, B, N]."""
    rows = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    count = torch.full(x.shape[:1], M) if levels is None else levels
    return torch.stack([rows & (count > m)[:, None] for m in range(M)])


def plain_step(
    x: Tensor,
    weights: Tensor,
    codebooks: Tensor,
    mask: Tensor | None = None,
    levels: Tensor | None = None,
    gradient: str = "straight",
) -> tuple[Tensor, ...]:
    """Output, losses and dx of (output * weights + losses).sum(), and averages and codes after it, in plain torch."""
    rest, total, losses, after = x, torch.zeros_like(x), [], []
    for codes, counted in zip(codebooks, used(x, mask, levels), strict=True):
        index = torch.cdist(rest.detach(), codes).argmin(-1)
        found = torch.where(counted[..., None], codes[index], 0.0)
        d = torch.where(counted[..., None], rest - rest.detach(), 0.0)
        if gradient == "rotation":
            u, v = F.normalize(rest.detach(), dim=-1), F.normalize(codes[index], dim=-1)
            w = F.normalize(u + v, dim=-1)
            d = d - 2 * w * (d * w).sum(-1, keepdim=True) + 2 * v * (d * u).sum(-1, keepdim=True)
            d = d * codes[index].norm(dim=-1, keepdim=True) / rest.detach().norm(dim=-1, keepdim=True)
        total = total + found + d
        left = torch.where(counted[..., None], rest - found, 0.0)
        losses.append(left.square().sum() / (counted.sum().clamp_min(1) * D))
        chosen = F.one_hot(index[counted], K).to(x.dtype)
        size = 0.8 + 0.2 * chosen.sum(0)
        average = 0.8 * codes + 0.2 * chosen.T @ rest.detach()[counted]
        smoothed = (size + 1e-5) / (size.sum() + K * 1e-5) * size.sum()
        one = [average, size, average / smoothed[:, None]]
        after += one if counted.any() else [codes, torch.ones_like(size), codes]
        rest = rest - found
    loss = torch.stack(losses)
    (dx,) = torch.autograd.grad((total * weights).sum() + loss.sum(), x)
    return total, loss, dx, *after


STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"mask": MASK},
    "levels of each sample": {"levels": LEVELS},
    "both": {"mask": MASK, "levels": LEVELS},
    "first level only": {"levels": torch.ones(B, dtype=torch.int32)},
}


@pytest.mark.parametrize("gradient", ["straight", "rotation"])
@pytest.mark.parametrize("case", STEPS)
def test_a_step(case: str, gradient: str, way: str) -> None:
    rvq = make(rotation_trick=gradient == "rotation")
    x, weights = torch.randn(B, N, D, requires_grad=True), torch.randn(B, N, D)
    mask, levels = STEPS[case].get("mask"), STEPS[case].get("levels")
    before = rvq.codebooks.clone()
    quantized, indices, losses = rvq(x, mask=mask, n_quantizers=levels)
    ((quantized * weights).sum() + losses.sum()).backward()
    books = [layer._codebook for layer in rvq.layers]
    after = [t[0] for book in books for t in (book.embed_avg, book.cluster_size, book.embed)]
    names = ["quantized", "losses", "dx", *(f"{name} {m}" for m in range(M) for name in ("average", "size", "codes"))]
    inputs = (x, weights, before, mask, levels, gradient)
    assert_within_budget(names, [quantized.detach(), losses.detach(), x.grad, *after], plain_step, inputs, GRADIENTS)
    assert torch.equal(indices >= 0, used(x, mask, levels).movedim(0, -1))


# options and arguments of a call that can go either way
EITHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "straight": ({"rotation_trick": False}, {}),
    "masked": ({}, {"mask": MASK}),
    "projected": ({"codebook_dim": 4}, {"mask": MASK}),
    "sizes": ({"num_quantizers": None, "codebook_size": (3, 16, 8)}, {}),
    "commitment": ({"commitment_weight": 0.25}, {}),
    "no commitment": ({"commitment_weight": 0.0}, {}),
    "frozen": ({"freeze_codebook": True}, {}),
    "averages by hand": ({"manual_ema_update": True}, {}),
    "nothing learned": ({"ema_update": False}, {}),
    "dropout": (DROPOUT, {}),
    "dropout per sample": (PER_SAMPLE, {"mask": MASK}),
    "two levels": ({}, {"n_quantizers": 2}),
    "levels of each sample": ({}, {"n_quantizers": LEVELS}),
    "padding returned": ({"return_zeros_for_masked_padding": False}, {"mask": MASK}),
    "temperature 0": ({"stochastic_sample_codes": True, "sample_codebook_temp": 0.0}, {}),
    "int32": ({"index_dtype": torch.int32}, {}),
}


def told(function: Any, runs: list[str]) -> Any:
    """``function``, which leaves its name in ``runs``."""

    def call(*args: Any) -> Any:
        runs.append(function.__name__)
        return function(*args)

    return call


def walked(case: str, training: bool) -> tuple[list[Tensor], ResidualVQ]:
    """Results of two steps, and the gradient of the last in training."""
    options, arguments = EITHER[case]
    rvq = make(**options).train(training)
    for t in range(2):
        torch.manual_seed(t)
        x = torch.randn(B, N, D, requires_grad=True)
        quantized, indices, losses = rvq(x, **arguments)
    if not training:
        return [quantized, indices, losses], rvq
    (quantized.square().sum() + losses.sum()).backward()
    assert x.grad is not None
    return [quantized, indices, losses, x.grad], rvq


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EITHER)
def test_both_ways_agree(case: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and what was learned bit for bit; sums over rows and levels are added up in another order."""
    runs: list[str] = []
    monkeypatch.setattr(residual_vq, "all_at_once", told(residual_levels.all_at_once, runs))
    got, rvq = walked(case, training)
    assert len(runs) == 2
    monkeypatch.setattr(residual_vq, "why_not_at_once", lambda *_: "asked for")
    want, other = walked(case, training)
    assert len(runs) == 2
    assert_same_bits("quantized indices", got[:2], want[:2])
    assert_same_bits(names_of(rvq), state(rvq), state(other))
    for name, g, w in zip(("losses", "dx"), got[2:], want[2:], strict=False):
        assert_within_budget(name, g, lambda w: w, (w,), GRADIENTS)
    assert training == got[2].requires_grad == want[2].requires_grad
    assert training or not got[2].any()


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "implicit_neural_codebook": ({"implicit_neural_codebook": True}, "learnable_codebook"),
    "use_cosine_sim": ({"use_cosine_sim": True}, "use_cosine_sim"),
    "kmeans_init": ({"kmeans_init": True}, "k-means on the first batch"),
    "learnable_codebook": (LEARNED, "learnable_codebook"),
    "quant_grad_frac": ({"quant_grad_frac": 0.5}, "quant_grad_frac"),
    "shared_codebook": ({"shared_codebook": True}, "shared_codebook"),
    "stochastic_sample_codes": ({"stochastic_sample_codes": True}, "stochastic_sample_codes"),
    "directional_reparam": (
        {"directional_reparam": True, "learnable_codebook": False, "threshold_ema_dead_code": 1},
        "directional_reparam",
    ),
    "route_gradients_to_input": ({"route_gradients_to_input": False}, "route_gradients_to_input=False"),
    "cross-entropy": ({"commitment_use_cross_entropy_loss": True}, "commitment_use_cross_entropy_loss"),
    "diversity": ({"codebook_diversity_loss_weight": 1.0}, "codebook_diversity_loss_weight"),
    "orthogonal": ({"orthogonal_reg_weight": 1.0}, "learnable_codebook"),
    "affine_param": ({"affine_param": True}, "affine_param"),
}
EVALUATED = ("implicit_neural_codebook", "use_cosine_sim", "kmeans_init", "learnable_codebook", "orthogonal")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", REASONS)
def test_what_goes_one_by_one(case: str, training: bool) -> None:
    options, reason = REASONS[case]
    rvq = make(**options).train(training)
    given = (rvq._levels(M), residual_levels.Request(None, None, None, None), rvq.quant_grad_frac, rvq.shared_codebook)
    assert residual_levels.why_not_at_once(*given) == (reason if training or case in EVALUATED else None)
    if case == "implicit_neural_codebook":
        with torch.no_grad():
            assert residual_levels.why_not_at_once(*given) == case
    x = torch.randn(B, N, D)
    quantized, indices, _ = rvq(x)
    rvq.eval()
    quantized, indices, _ = rvq(x)
    if case != "use_cosine_sim" and case != "affine_param":
        assert torch.equal(indices[..., 0], functional.vq_nearest(x, rvq.codebooks[0]).index)
    decoded = rvq.get_output_from_indices(indices)
    assert_within_budget("decoded", decoded.detach(), lambda q: q, (quantized.detach(),))


def test_learned_codebooks_without_gradient_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rvq, x = make(**LEARNED).eval(), torch.randn(B, N, D)
    expected = rvq(x)
    with torch.no_grad():
        runs: list[str] = []
        monkeypatch.setattr(residual_vq, "all_at_once", told(residual_levels.all_at_once, runs))
        assert_same_bits("quantized indices losses", rvq(x), expected)
    assert runs


@pytest.mark.parametrize("options", [{}, {"beam_size": 2}, {"use_cosine_sim": True}], ids=str)
def test_levels_can_be_frozen_each(options: dict[str, Any]) -> None:
    rvq, x = make(**options), torch.randn(B, N, D)
    rvq.layers[0].freeze_codebook = True
    rvq.layers[2].eval()
    before = rvq.codebooks.clone()
    _, _, losses = rvq(x)
    assert [not torch.equal(a, b) for a, b in zip(rvq.codebooks, before, strict=True)] == [False, True, False, True]
    assert losses[0] and losses[1]
    rvq.layers[0].freeze_codebook = False
    rvq.layers.eval()
    before = rvq.codebooks.clone()
    assert not rvq(x, beam_size=1)[2].any()
    assert torch.equal(rvq.codebooks, before)


def test_each_level_can_be_made_anew() -> None:
    rvq, x = make(codebook_size=3, ema_update=False), torch.randn(B, N, D)
    for layer in rvq.layers:
        layer.reinit = Reinit(Spaced(every_iterations=1), reservoir_size=20)
    before = rvq.codebooks.clone()
    for _ in range(3):
        rvq(x)
    assert all(not torch.equal(a, b) for a, b in zip(rvq.codebooks, before, strict=True))


def test_hooks_of_a_level_are_called() -> None:
    rvq, seen = make(), []
    rvq.layers[1].register_forward_hook(lambda *_: seen.append(1))
    rvq(torch.randn(B, N, D))
    assert seen == [1]


class Watch(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}


@pytest.mark.parametrize(
    "options", [{}, {"threshold_ema_dead_code": 2}, PER_SAMPLE, {"beam_size": 2}, {"use_cosine_sim": True}], ids=str
)
def test_no_step_waits_for_the_device(options: dict[str, Any]) -> None:
    rvq, x = make(**options), torch.randn(B, N, D, requires_grad=True)
    with Watch() as watch:
        quantized, _, losses = rvq(x, mask=MASK)
        (quantized.sum() + losses.sum()).backward()
    assert not WAITS & set(watch.ran)
    assert ("vq_residual" in watch.ran) == (not {"beam_size", "use_cosine_sim"} & set(options))


@pytest.mark.parametrize("case", ["plain", "masked", "levels of each sample", "wide"])
def test_dead_codes_become_residuals_of_their_level(case: str, way: str) -> None:
    """Of rows that count and use the level; no row twice; codes without a row of their own wait."""
    codes = 7 if case == "wide" else 5
    rvq = make(threshold_ema_dead_code=1e6, codebook_size=codes)
    before = rvq.codebooks.clone()
    x = torch.randn(1, 3, D) if case == "wide" else torch.randn(B, N, D)
    mask, levels = (MASK if case == "masked" else None), (LEVELS if case == "levels of each sample" else None)
    _, indices, _ = rvq(x, mask=mask, n_quantizers=levels)
    rest = x
    for m, layer in enumerate(rvq.layers):
        index = indices[..., m]
        counted = index >= 0
        matches = (layer._codebook.embed[0][:, None] == rest[counted]).all(-1)
        taken = matches.any(-1)
        assert (matches.sum(0) <= 1).all()
        assert int(taken.sum()) == min(codes, int(counted.sum())) or (way == "at once" and levels is not None)
        assert taken.any() == counted.any()
        assert torch.equal(layer._codebook.cluster_size[0] == 1e6, taken)
        rest = rest - before[m][index.clamp_min(0)]

"""``ResidualVQ`` and ``GroupedResidualVQ`` against the classes that they stand in for: two steps, and evaluation."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseq.nn.grouped_residual_vq import GroupedResidualVQ
from fastseq.nn.residual_vq import ResidualVQ

rival = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")

B, N, D, K, M = 3, 10, 8, 16, 4
# Float32 sums of up to 30 terms in another order, through four levels and two steps; measured at 4e-6 of the
# largest value, and 2e-5 for the gradients of the networks of an implicit codebook, which pass 12 products.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CLOSE_GRADIENTS = {"rtol": 5e-5, "atol": 5e-5}

MASK = torch.arange(B * N).view(B, N) % 7 % 3 > 0
LEARNED: dict[str, Any] = {"learnable_codebook": True, "ema_update": False}
QINCO: dict[str, Any] = {"implicit_neural_codebook": True, "mlp_kwargs": {"dim_hidden": 5, "depth": 2}}
FROZEN: dict[str, Any] = {"freeze_codebook": True}
MASKED: dict[str, Any] = {"mask": MASK}
SIZES: dict[str, Any] = {"num_quantizers": None, "codebook_size": (4, 16, 8)}
DROPOUT: dict[str, Any] = {"quantize_dropout": True}
BEAM: dict[str, Any] = {"beam_size": 3, "ema_update": False}  # theirs updates the first level alone, frozen or not

# name -> options, arguments of the call
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "straight": ({"rotation_trick": False}, {}),
    "projected": ({"codebook_dim": 4}, {}),
    "one dimension": ({"codebook_dim": 1}, {}),
    "sizes": (SIZES, {}),
    "sizes, number": ({**SIZES, "num_quantizers": 3}, {}),
    "one level": ({"num_quantizers": 1, "quantize_dropout": True}, {}),
    "masked": ({}, MASKED),
    "masked, projected": ({"codebook_dim": 4}, MASKED),
    "masked, input returned": ({"return_zeros_for_masked_padding": False}, MASKED),
    "all codes": ({}, {"return_all_codes": True}),
    "all codes, sizes": (SIZES, {"return_all_codes": True}),
    "frozen": ({}, FROZEN),
    "thawed": (FROZEN, {"freeze_codebook": False}),
    "commitment": ({"commitment_weight": 0.25}, {}),
    "no commitment": ({"commitment_weight": 0.0}, {}),
    "averages": ({"decay": 0.99, "eps": 1e-3}, {}),
    "averages by hand": ({"manual_ema_update": True}, {}),
    "cosine": ({"use_cosine_sim": True}, {}),
    "learned": (LEARNED, {}),
    "learned, share": ({**LEARNED, "quant_grad_frac": 0.3}, {}),
    "learned, all": ({**LEARNED, "quant_grad_frac": 1.0}, {}),
    "share": ({"quant_grad_frac": 0.3}, {}),
    "shared": ({"shared_codebook": True}, {}),
    "shared, masked": ({"shared_codebook": True}, MASKED),
    "shared, learned": ({"shared_codebook": True, **LEARNED}, {}),
    "shared, frozen": ({"shared_codebook": True}, FROZEN),
    "orthogonal": ({"orthogonal_reg_weight": 1.0}, {}),
    "diversity": ({"codebook_diversity_loss_weight": 1.0}, FROZEN),  # theirs reads updated codes in backward
    "cross-entropy commitment": ({"commitment_use_cross_entropy_loss": True}, FROZEN),
    "sampled": ({"stochastic_sample_codes": True}, {}),
    "sampled, temperature": ({"stochastic_sample_codes": True}, {"sample_codebook_temp": 0.3}),
    "sampled, temperature 0": ({"stochastic_sample_codes": True, "sample_codebook_temp": 0.0}, {}),
    "directional": ({"num_quantizers": 1, "directional_reparam": True, "threshold_ema_dead_code": 1e-9}, {}),
    "in place": ({**LEARNED, "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}, {}),
    "implicit": (QINCO, {}),
    "implicit, defaults": ({"implicit_neural_codebook": True}, {}),
    "implicit, masked": (QINCO, MASKED),
    "implicit, sizes": ({**QINCO, **SIZES}, {}),
    "dropout": (DROPOUT, {}),
    "dropout, masked": (DROPOUT, MASKED),
    "dropout, seed": (DROPOUT, {"rand_quantize_dropout_fixed_seed": 5}),
    "dropout, cutoff": ({**DROPOUT, "quantize_dropout_cutoff_index": 2}, {}),
    "dropout, multiple": ({**DROPOUT, "quantize_dropout_multiple_of": 3}, {}),
    "dropout, shared": ({**DROPOUT, "shared_codebook": True}, {}),
    "dropout, cosine": ({**DROPOUT, "use_cosine_sim": True}, {}),
    "beam": (BEAM, {}),
    "beam, masked": (BEAM, MASKED),
    "beam, projected": ({**BEAM, "codebook_dim": 4}, {}),
    "beam, weights": ({**BEAM, "beam_score_quantizer_weights": [1.0, 0.5, 0.2, 0.1]}, {}),
    "beam of the call": ({"ema_update": False}, {"beam_size": 2}),
    "beam, dropout": ({**BEAM, **DROPOUT}, {}),
    "beam, all codes": (BEAM, {"return_all_codes": True}),
    "beam, learned": ({**BEAM, **LEARNED}, {}),
    "beam, share": ({**BEAM, "quant_grad_frac": 0.4}, {}),
    "beam at evaluation": ({**BEAM, "eval_beam_size": 2}, {}),
    "beam of one": ({"beam_size": 1}, {}),
}
EVALUATED = (  # those that evaluation does not take as another one
    *(
        "plain",
        "projected",
        "one dimension",
        "sizes",
        "masked, projected",
        "masked, input returned",
        "all codes, sizes",
    ),
    *("cosine", "learned, share", "shared, masked", "sampled", "implicit, masked", "implicit, sizes", "dropout"),
    *("beam", "beam, masked", "beam, weights", "beam of the call", "beam at evaluation", "beam of one"),
)
SHAPES = {"rows": (B, N, D), "single": (B, D), "image": (B, D, D, D)}  # theirs takes images of these sizes alone
GROUPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "masked": ({}, MASKED),
    "all codes": ({}, {"return_all_codes": True}),
    "dropout": (DROPOUT, {}),
    "frozen": ({}, FROZEN),
    "projected": ({"codebook_dim": 3}, {}),
    "beam": (BEAM, {}),
}


def pair(ours: type[nn.Module], training: bool, **options: Any) -> tuple[Any, Any]:
    """Theirs and ours, drawn from the same seed."""
    made = []
    for kind in (getattr(rival, ours.__name__), ours):
        torch.manual_seed(1)
        made.append(kind(**{"dim": D, "codebook_size": K, "num_quantizers": M, **options}).train(training))
    return made[0], made[1]


def flat(out: tuple[Any, ...]) -> list[Tensor]:
    return [t for value in out for t in (value if isinstance(value, tuple) else (value,))]


def step(module: Any, x: Tensor, seed: int, arguments: dict[str, Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results, and in training the gradients of the input and of the parameters."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    out = module(x, **arguments)
    if not module.training:
        return flat(out), []
    weights = torch.linspace(-1.0, 1.0, out[0].numel()).view(out[0].shape)
    ((out[0] * weights).sum() + 3 * out[2].sum()).backward()
    return flat(out), [x.grad, *(p.grad for p in module.parameters())]


def assert_equal_states(theirs: nn.Module, ours: nn.Module) -> None:
    want, got = theirs.state_dict(), ours.state_dict()
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == want[name].dtype
        torch.testing.assert_close(got[name], want[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def assert_equal_steps(theirs: Any, ours: Any, shape: tuple[int, ...], arguments: dict[str, Any]) -> None:
    for t in range(2):
        torch.manual_seed(10 + t)
        x = torch.randn(shape)
        (want, dwant), (got, dgot) = (step(module, x, t, arguments) for module in (theirs, ours))
        assert [(g.shape, g.dtype) for g in got] == [(w.shape, w.dtype) for w in want]
        torch.testing.assert_close(got, want, **CLOSE)
        for g, w in zip(dgot, dwant, strict=True):
            if g is None or w is None:
                assert (g is None or not g.any()) and (w is None or not w.any())
            else:
                torch.testing.assert_close(g, w, **CLOSE_GRADIENTS)
        assert_equal_states(theirs, ours)
    torch.testing.assert_close(ours.codebooks, theirs.codebooks, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_training(case: str) -> None:
    options, arguments = CASES[case]
    theirs, ours = pair(ResidualVQ, True, **options)
    assert_equal_states(theirs, ours)
    assert_equal_steps(theirs, ours, SHAPES["rows"], arguments)


@pytest.mark.parametrize("case", EVALUATED)
def test_evaluation(case: str) -> None:
    options, arguments = CASES[case]
    assert_equal_steps(*pair(ResidualVQ, False, **options), SHAPES["rows"], arguments)


def test_diveq() -> None:
    """In training; at evaluation theirs adds noise too."""
    assert_equal_steps(*pair(ResidualVQ, True, diveq=True), SHAPES["rows"], {})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", GROUPED)
def test_grouped(case: str, training: bool) -> None:
    options, arguments = GROUPED[case]
    theirs, ours = pair(GroupedResidualVQ, training, groups=2, **options)
    assert_equal_states(theirs, ours)
    assert_equal_steps(theirs, ours, SHAPES["rows"], arguments)


@pytest.mark.parametrize(
    ("shape", "options"),
    [("single", {}), ("single", DROPOUT), ("single", BEAM), ("image", {}), ("image", DROPOUT)],
    ids=str,
)
def test_layouts(shape: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(ResidualVQ, True, accept_image_fmap=shape == "image", **options)
    assert_equal_steps(theirs, ours, SHAPES[shape], {})


@pytest.mark.parametrize("levels", [M, 2])
@pytest.mark.parametrize("case", ["plain", "projected", "implicit", "shared", "sizes"])
def test_decoding(case: str, levels: int) -> None:
    """Codes and outputs of indices with gaps, of all levels and of the first."""
    theirs, ours = pair(ResidualVQ, False, quantize_dropout=True, **CASES[case][0])
    levels = min(levels, ours.num_quantizers)
    indices = torch.randint(-1, 4, (B, N, levels), generator=torch.Generator().manual_seed(0))
    if "implicit" in case:
        indices = indices.clamp_min(0)  # theirs bends later codes by a code that is not there
    for shaped in (indices, indices.view(B, 2, N // 2, levels), indices[:, 0]):
        got, want = (module.get_codes_from_indices(shaped) for module in (ours, theirs))
        torch.testing.assert_close(got, want, **CLOSE)
        got, want = (module.get_output_from_indices(shaped) for module in (ours, theirs))
        torch.testing.assert_close(got, want, **CLOSE)


def test_grouped_decoding() -> None:
    theirs, ours = pair(GroupedResidualVQ, False, groups=2)
    indices = torch.randint(0, K, (2, B, N, M))
    for name in ("get_codes_from_indices", "get_output_from_indices"):
        torch.testing.assert_close(getattr(ours, name)(indices), getattr(theirs, name)(indices), **CLOSE)


@pytest.mark.parametrize("case", ["plain", "projected", "sizes", "shared", "learned", "implicit", "cosine"])
def test_state_dict_both_ways(case: str) -> None:
    theirs, ours = pair(ResidualVQ, True, **CASES[case][0])
    other, _ = pair(ResidualVQ, True, **CASES[case][0])
    step(theirs, torch.randn(B, N, D), 0, {})
    ours.load_state_dict(theirs.state_dict())
    other.load_state_dict(ours.state_dict())
    assert_equal_states(other, ours)
    assert_equal_states(theirs, ours)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("ours", [ResidualVQ, GroupedResidualVQ])
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures(ours: type[nn.Module], method: str) -> None:
    """Their arguments in their order with their defaults, then ours."""
    want = inspect.signature(getattr(getattr(rival, ours.__name__), method)).parameters
    got = inspect.signature(getattr(ours, method)).parameters
    kept = [name for name, p in want.items() if p.kind != p.VAR_KEYWORD]
    assert [name for name in got if name in kept] == kept
    other = {"mlp_kwargs": None, "freeze_codebook": None}  # {} and False, which mean the same
    for name in kept:
        assert got[name].default == other.get(name, want[name].default)
        assert got[name].kind == want[name].kind


def test_implicit_codebook() -> None:
    """The network alone, every code for every row, and one code for each."""
    theirs, ours = (pair(ResidualVQ, False, **QINCO)[n].mlps[1] for n in (0, 1))
    codes, condition = torch.randn(1, K, D), torch.randn(B, N, D)
    want = theirs(codes, condition=condition)
    torch.testing.assert_close(ours(codes, condition), want, **CLOSE)
    index = torch.randint(K, (B, N))
    chosen = want[0].gather(2, index[..., None, None].expand(B, N, 1, D))[:, :, 0]
    torch.testing.assert_close(ours.chosen(codes[0, index], condition), chosen, **CLOSE)


def test_attributes() -> None:
    theirs, ours = pair(ResidualVQ, True, codebook_dim=4, beam_size=3, eval_beam_size=2, quantize_dropout=True)
    skipped = {"layers", "mlps", "training"}
    for name in (n for n in vars(theirs) if not n.startswith("_") and n not in skipped):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.codebook_size == theirs.codebook_size
    assert not set(theirs.state_dict()) - set(ours.state_dict())
    assert torch.equal(ours.beam_score_weights, theirs.beam_score_weights)

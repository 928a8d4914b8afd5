"""``ResidualVQ``: numbers of levels, beams, cross-entropy of given indices, what stays and what moves."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.nn.grouped_residual_vq import GroupedResidualVQ
from fastseq.nn.residual_vq import ResidualVQ
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

B, N, D, K, M = 3, 10, 8, 16, 4
MASK = torch.arange(B * N).view(B, N) % 7 % 3 > 0
LEVELS = torch.tensor([1, 4, 2])
LEARNED: dict[str, Any] = {"learnable_codebook": True, "ema_update": False}
DROPOUT: dict[str, Any] = {"quantize_dropout": True}
PER_SAMPLE: dict[str, Any] = {**DROPOUT, "quantize_dropout_per_sample": True}
QINCO: dict[str, Any] = {"implicit_neural_codebook": True, "mlp_kwargs": {"dim_hidden": 5, "depth": 2}}


def make(**options: Any) -> ResidualVQ:
    torch.manual_seed(0)
    return ResidualVQ(**{"dim": D, "num_quantizers": M, "codebook_size": K, **options})


def grouped(**options: Any) -> GroupedResidualVQ:
    torch.manual_seed(0)
    return GroupedResidualVQ(**{"dim": D, "groups": 2, "num_quantizers": M, "codebook_size": K, **options})


def state(module: nn.Module) -> list[Tensor]:
    return [v.clone() for _, v in sorted(module.state_dict().items())]


def levels_of(indices: Tensor) -> Tensor:
    """How many levels each row uses."""
    return (indices >= 0).sum(-1)


# --- numbers of levels


@pytest.mark.parametrize(("cutoff", "multiple", "possible"), [(0, 1, {1, 2, 3, 4}), (2, 1, {3, 4}), (0, 3, {3, 4})])
def test_drawn_numbers_of_levels(cutoff: int, multiple: int, possible: set[int]) -> None:
    options = {"quantize_dropout_cutoff_index": cutoff, "quantize_dropout_multiple_of": multiple}
    rvq = make(**DROPOUT, **options)
    assert {rvq.draw_levels(5) for _ in range(60)} == possible
    assert {rvq.draw_levels(5, seed=s) for s in range(60)} == possible
    assert rvq.draw_levels(5, seed=3) == rvq.draw_levels(5, seed=3)
    each = make(**PER_SAMPLE, **options).draw_levels(500)
    assert isinstance(each, Tensor) and set(each.tolist()) == possible
    assert make().draw_levels(5) is None


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"beam_size": 2}, QINCO], ids=str)
def test_each_sample_draws_its_own_number(options: dict[str, Any]) -> None:
    """As the same samples one by one with these numbers; levels that a sample does not use have no share in it."""
    rvq = make(**PER_SAMPLE, **options)
    x = torch.randn(B, N, D)
    _, indices, losses = copy.deepcopy(rvq)(x, rand_quantize_dropout_fixed_seed=4)
    drawn = rvq.draw_levels(B, seed=4)
    assert isinstance(drawn, Tensor) and len(set(drawn.tolist())) > 1
    assert torch.equal(levels_of(indices), drawn[:, None].expand(B, N))
    quantized, again, losses = copy.deepcopy(rvq)(x, n_quantizers=drawn)
    assert torch.equal(again, indices)
    alone = [copy.deepcopy(rvq)(x[b : b + 1], n_quantizers=int(n)) for b, n in enumerate(drawn)]
    assert_same_bits("indices", indices, torch.cat([a[1] for a in alone]))
    assert_within_budget("quantized", quantized.detach(), lambda q: q, (torch.cat([a[0] for a in alone]).detach(),))
    each = torch.stack([a[2] for a in alone]).detach()
    mean = each.sum(0) / (torch.arange(M)[:, None] < drawn).sum(-1).clamp_min(1)
    assert_within_budget("losses", losses.detach(), lambda v: v, (mean,), GRADIENTS)


def test_dropout_is_for_training_alone() -> None:
    rvq, x = make(**DROPOUT), torch.randn(B, N, D)
    assert {int(levels_of(rvq(x)[1])[0, 0]) for _ in range(40)} == {1, 2, 3, 4}
    assert (rvq.eval()(x, rand_quantize_dropout_fixed_seed=0)[1] >= 0).all()


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}], ids=str)
def test_levels_without_rows_do_not_learn(options: dict[str, Any]) -> None:
    rvq = make(**options, **PER_SAMPLE, threshold_ema_dead_code=0.5)
    before = [[t.clone() for t in layer._codebook.buffers()] for layer in rvq.layers]
    rvq(torch.randn(B, N, D), n_quantizers=torch.tensor([2, 1, 2]))
    for m, (layer, old) in enumerate(zip(rvq.layers, before, strict=True)):
        if m < 2:
            assert not torch.equal(layer._codebook.embed_avg, old[2])
        else:
            for t, o in zip(layer._codebook.buffers(), old, strict=True):
                assert_within_budget("buffer", t.float(), lambda o: o, (o.float(),))  # up to rounding


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"beam_size": 2}, QINCO], ids=str)
@pytest.mark.parametrize("n", [1, 3, LEVELS])
def test_first_levels(n: int | Tensor, options: dict[str, Any]) -> None:
    rvq, x = make(**options, codebook_dim=4).eval(), torch.randn(B, N, D)
    quantized, indices, losses = rvq(x, n_quantizers=n, mask=MASK)
    count = n[:, None] if isinstance(n, Tensor) else torch.tensor(n)
    assert torch.equal(levels_of(indices), torch.where(MASK, count, 0))
    assert indices.shape == (B, N, M) and losses.shape == (M,)
    if "beam_size" not in options:  # the best path of fewer levels is another
        full = rvq(x, mask=MASK)[1]
        assert torch.equal(indices, torch.where(torch.arange(M) < count[..., None], full, -1))
    decoded = torch.where(MASK[..., None], rvq.get_output_from_indices(indices), 0.0)
    assert_within_budget("decoded", decoded.detach(), lambda q: q, (quantized.detach(),))


def test_prefix_of_indices() -> None:
    rvq = make(codebook_dim=4).eval()
    indices = rvq(torch.randn(B, N, D))[1]
    padded = torch.cat([indices[..., :2], torch.full((B, N, 2), -1)], dim=-1)
    for decode in (rvq.get_codes_from_indices, rvq.get_output_from_indices):
        assert_same_bits("decoded", decode(indices[..., :2]), decode(padded))
    codes = rvq.get_codes_from_indices(indices)
    assert_same_bits("codes", codes, torch.stack([rvq.codebooks[m][indices[..., m]] for m in range(M)]))


# --- beams


def test_a_beam_of_all_paths_finds_the_best() -> None:
    rvq = make(num_quantizers=3, codebook_size=3, beam_size=27).eval()
    x = torch.randn(B, N, D)
    quantized, indices, _ = rvq(x)
    paths = torch.tensor(list(itertools.product(range(3), repeat=3)))
    steps = torch.stack([rvq.codebooks[m][paths[:, m]] for m in range(3)]).cumsum(0)  # [M, paths, D]
    score = (x[None, :, :, None] - steps[:, None, None]).square().mean(-1).sum(0)  # of all levels
    assert torch.equal(indices, paths[score.argmin(-1)])
    assert_within_budget("quantized", quantized, lambda q: q, (rvq.get_output_from_indices(indices),))


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"shared_codebook": True}], ids=str)
def test_every_level_learns_from_the_best_path(options: dict[str, Any]) -> None:
    rvq = make(beam_size=3, **options)
    other = copy.deepcopy(rvq)
    x = torch.randn(B, N, D)
    _, indices, _ = rvq(x, mask=MASK)
    rest = x
    before = other.codebooks.clone()
    for m, layer in enumerate(other.layers):
        layer.update_indices(rest, indices[..., m], mask=MASK)
        rest = rest - before[m][indices[..., m].clamp_min(0)]
    if "shared_codebook" in options:
        other.layers[0]._codebook.update_ema()
    names = [n for n in sorted(rvq.state_dict()) if "initted" not in n]
    got, want = ([module.state_dict()[n] for n in names] for module in (rvq, other))
    assert_within_budget(names, got, lambda *w: w, want, GRADIENTS)
    assert not torch.equal(rvq.codebooks, before)


def test_a_beam_can_be_frozen_and_freed_of_its_loss() -> None:
    x = torch.randn(B, N, D)
    rvq = make(beam_size=3)
    before = state(rvq)
    rvq(x, freeze_codebook=True)
    assert_same_bits(sorted(rvq.state_dict()), state(rvq), before)
    without = make(beam_size=3, commitment_weight=0.0)
    assert torch.equal(rvq(x)[1], without(x)[1])
    assert not without(x)[2].any()


def test_beams_of_an_implicit_codebook() -> None:
    """The codes of each path are bent by this path; in batches too."""
    rvq, x = make(beam_size=3, **QINCO).eval(), torch.randn(B, N, D)
    quantized, indices, _ = rvq(x)
    decoded = rvq.get_output_from_indices(indices)
    assert_within_budget("decoded", decoded.detach(), lambda q: q, (quantized.detach(),), GRADIENTS)
    greedy = rvq(x, beam_size=1)[0]
    assert (x - quantized).square().sum() < (x - greedy).square().sum()


# --- cross-entropy of given indices


@pytest.mark.parametrize("given", ["tensor", "list"])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy(masked: bool, given: str) -> None:
    rvq, x = make(codebook_dim=4).eval(), torch.randn(B, N, D)
    targets = torch.randint(K, (B, N, M))
    arguments = {"mask": MASK} if masked else {}
    quantized, loss = rvq(x, indices=list(targets) if given == "list" else targets, **arguments)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, codebooks: Tensor) -> Tensor:
        rest, total = F.linear(x, weight, bias), torch.zeros((), dtype=x.dtype)
        for m, codes in enumerate(codebooks):
            logits = -torch.cdist(rest, codes)
            wanted = targets[..., m].masked_fill(~MASK, -1) if masked else targets[..., m]
            total = total + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1)
            rest = rest - codes[logits.argmax(-1)]
        return total

    inputs = (x, rvq.project_in.weight.detach(), rvq.project_in.bias.detach(), rvq.codebooks)
    assert_within_budget("loss", loss.detach(), plain, inputs, GRADIENTS)
    assert_same_bits("quantized", quantized, rvq(x, **arguments)[0])


def test_cross_entropy_moves_the_encoder() -> None:
    rvq, x = make(codebook_dim=4), torch.randn(B, N, D, requires_grad=True)
    targets = make(codebook_dim=4).eval()(x)[1]
    rvq(x, indices=targets, freeze_codebook=True)[1].backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert grouped().eval()(x.detach(), indices=torch.randint(K, (2, B, N, M)))[1].dim() == 0


# --- what stays and what moves


def test_diveq_at_evaluation_returns_the_codes() -> None:
    rvq, x = make(diveq=True), torch.randn(B, N, D)
    quantized, _, losses = rvq(x)
    quantized.square().sum().backward()
    assert not losses.any() and all(layer._codebook.embed.grad.any() for layer in rvq.layers)
    quantized, indices, _ = rvq.eval()(x)
    assert_same_bits("quantized", quantized.detach(), rvq.get_output_from_indices(indices).detach())


def test_the_first_batch_makes_the_codes() -> None:
    rvq, x = make(kmeans_init=True, codebook_size=5), torch.randn(B, N, D)
    rvq(x)
    assert all(layer._codebook.initted and layer._codebook.embed.any() for layer in rvq.layers)
    other = make(kmeans_init=True, codebook_size=5)
    other.load_state_dict(rvq.state_dict())
    assert_same_bits("quantized indices losses", other.eval()(x), rvq.eval()(x))


def test_the_option_freezes() -> None:
    rvq, x = make(freeze_codebook=True, threshold_ema_dead_code=2), torch.randn(B, N, D)
    before = rvq.codebooks.clone()
    rvq(x)
    assert torch.equal(rvq.codebooks, before)
    rvq(x, freeze_codebook=False)
    assert not torch.equal(rvq.codebooks, before)


def test_a_shared_codebook_stays_shared() -> None:
    rvq = make(shared_codebook=True, threshold_ema_dead_code=1e6, codebook_size=3)
    rvq = pickle.loads(pickle.dumps(copy.deepcopy(rvq)))
    x = torch.randn(B, N, D)
    rvq(x, mask=MASK)
    assert len({id(layer._codebook) for layer in rvq.layers}) == 1
    assert (rvq.codebooks == rvq.codebooks[0]).all()
    before = rvq.codebooks.clone()
    rvq(x, indices=torch.zeros(B, N, M, dtype=torch.int64))
    assert not torch.equal(rvq.codebooks, before)
    optimizer = make(shared_codebook=True, **LEARNED, in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    before = optimizer.codebooks.detach().clone()
    optimizer(x)
    assert not torch.equal(optimizer.codebooks, before)


@pytest.mark.parametrize(
    "options", [{}, {"codebook_dim": 4}, {"use_cosine_sim": True}, PER_SAMPLE, {"beam_size": 2}], ids=str
)
def test_padding_has_no_share(options: dict[str, Any]) -> None:
    """Whatever it holds: results, gradients and what is learned are the same bits."""
    found = []
    for filling in (0.0, torch.nan):
        rvq = make(**options)
        x = torch.randn(B, N, D).masked_fill(~MASK[..., None], filling).requires_grad_()
        quantized, indices, losses = rvq(x, mask=MASK, rand_quantize_dropout_fixed_seed=0)
        (quantized.square().sum() + losses.sum()).backward()
        parameters = [p.grad for p in rvq.parameters()]
        found.append([quantized, indices, losses, x.grad, *parameters, *state(rvq)])
    assert_same_bits([str(n) for n in range(len(found[0]))], *found)
    assert not found[0][0][~MASK].any() and (found[0][1][~MASK] == -1).all() and not found[0][3][~MASK].any()


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"beam_size": 2}], ids=str)
def test_nothing_to_quantize(options: dict[str, Any]) -> None:
    rvq = make(**options, threshold_ema_dead_code=0.5)
    quantized, indices, losses = rvq(torch.randn(B, 0, D))
    assert quantized.shape == (B, 0, D) and indices.shape == (B, 0, M) and not losses.any()
    _, indices, losses = rvq(torch.randn(B, N, D), mask=torch.zeros(B, N, dtype=torch.bool))
    assert (indices == -1).all() and not losses.any()
    assert all(t.isfinite().all() for t in state(rvq))


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"beam_size": 2}], ids=str)
def test_short_floats_are_computed_in_float32(options: dict[str, Any]) -> None:
    rvq, x = make(**options).eval(), torch.randn(B, N, D).bfloat16()
    quantized, indices, losses = rvq(x)
    assert (quantized.dtype, losses.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(indices, rvq(x.float())[1])


def test_losses_can_always_be_differentiated() -> None:
    for options in ({}, {"commitment_weight": 0.0}, {"use_cosine_sim": True}):
        make(**options)(torch.randn(B, N, D))[2].sum().backward()
        assert not make(**options).eval()(torch.randn(B, N, D))[2].requires_grad

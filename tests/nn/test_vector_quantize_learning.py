"""How the codebook of ``VectorQuantize`` is learned, set, kept and shown."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from fastseq import functional
from fastseq.nn.reinit import AfterWarmup, Reinit
from tests.nn.quantizers import LEARNED, OPTIONS, SEPARATE, B, D, K, T, make, names_of, state
from tests.tolerance import assert_same_bits, assert_within_budget


@pytest.mark.parametrize("options", [{}, {"threshold_ema_dead_code": 2}, LEARNED, {"orthogonal_reg_weight": 1.0}])
def test_a_frozen_codebook_stays(options: dict[str, Any]) -> None:
    for construct, call in ((True, None), (False, True)):
        vq = make(freeze_codebook=construct, **options)
        before = state(vq)
        vq(torch.randn(B, T, D), freeze_codebook=call)
        assert_same_bits(names_of(vq), state(vq), before)
    vq = make(freeze_codebook=True, **options)
    vq(torch.randn(B, T, D, requires_grad=True), freeze_codebook=False)
    changed = any(not torch.equal(a, b) for a, b in zip(state(vq), before, strict=True))
    assert changed == (vq.ema_update or "threshold_ema_dead_code" in options)


def test_a_frozen_codebook_gets_no_gradient() -> None:
    for options in ({}, {"route_gradients_to_input": False}):
        vq = make(**LEARNED, **options)
        for frozen in (True, False):
            quantized, _, loss = vq(torch.randn(B, T, D, requires_grad=True), freeze_codebook=frozen)
            (quantized.sum() + loss).backward()
            assert (vq._codebook.embed.grad is None) == frozen


def test_evaluation_changes_nothing() -> None:
    for name, options in OPTIONS.items():
        if name != "k-means":
            vq = make(**options).eval()
            before = state(vq)
            vq(torch.randn(B, T, D))
            assert_same_bits(names_of(vq), state(vq), before)


def test_two_runs_are_equal() -> None:
    for options in OPTIONS.values():
        ends = []
        for _ in range(2):
            vq = make(**options)
            for _ in range(2):
                out = vq(torch.randn(B, T, D))
            ends.append([*out, *state(vq)])
        assert_same_bits([str(n) for n in range(len(ends[0]))], *ends)


def test_kmeans_happens_once() -> None:
    vq = make(kmeans_init=True)
    assert not vq.codebook.any() and not vq._codebook.ready
    vq(torch.randn(B, T, D), mask=torch.zeros(B, T, dtype=torch.bool))
    assert not vq._codebook.initted  # no row counted
    x = torch.cat([torch.zeros(40, D) + 5, torch.zeros(60, D) - 5]) + 0.1 * torch.randn(100, D)
    vq(x[None], freeze_codebook=True)
    assert vq._codebook.initted and vq._codebook.ready and vq._codebook.cluster_size.sum() == 100
    assert ((vq.codebook.abs() - 5).abs() < 1).all()
    before = state(vq)
    vq(torch.randn(1, 50, D), freeze_codebook=True)
    assert_same_bits(names_of(vq), state(vq), before)
    other = make(kmeans_init=True)
    other.load_state_dict(vq.state_dict())
    other(torch.randn(1, 50, D), freeze_codebook=True)
    assert_same_bits(names_of(vq), state(other), before)
    vq.load_state_dict(make(kmeans_init=True).state_dict())
    assert not vq._codebook.ready and not vq.codebook.any()
    vq(x[None])
    assert vq._codebook.initted and vq.codebook.any()
    set_from_outside = make(kmeans_init=True)
    set_from_outside._codebook.initted.fill_(True)
    set_from_outside(x[None], freeze_codebook=True)
    assert not set_from_outside.codebook.any()


def test_assigned_codes_stay() -> None:
    for options in ({}, SEPARATE, LEARNED):
        vq = make(decay=1.0, **options)
        codes = torch.randn_like(vq.codebook)
        vq.codebook = codes
        assert_same_bits("codebook", vq.codebook.detach(), codes)
        vq(torch.randn(B, T, D))
        assert ((vq.codebook - codes).abs() <= 1e-4 * codes.abs()).all()  # counts are smoothed by eps = 1e-5


def test_a_level_that_is_switched_off_stays() -> None:
    book = make(threshold_ema_dead_code=2)._codebook
    before = state(book)
    rows = torch.randn(1, 50, D)
    counts, sums = functional.vq_sums(rows, torch.randint(0, K, (1, 50)), K)
    for when in (False, True):
        book.update(counts, sums, book.draw(rows, None), when=torch.tensor(when))
        same = all(torch.equal(a, b) for a, b in zip(state(book), before, strict=True))
        assert same != when


def test_moving_averages_by_hand() -> None:
    vq, manual = make(), make(manual_ema_update=True)
    x = torch.randn(B, T, D)
    vq(x), manual(x)
    assert not torch.equal(vq.codebook, manual.codebook)
    manual._codebook.update_ema()
    assert_same_bits("codebook", manual.codebook, vq.codebook)


def test_an_optimizer_in_place_by_hand() -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5)

    vq = make(in_place_codebook_optimizer=sgd, **LEARNED)
    manual = make(in_place_codebook_optimizer=sgd, manual_in_place_optimizer_update=True, **LEARNED)
    x = torch.randn(B, T, D)
    with torch.no_grad():  # it learns even here
        *_, terms = vq(x, return_loss_breakdown=True)
    before = manual.codebook.clone()
    manual(x)
    assert torch.equal(manual.codebook, before) and terms.inplace_optimize > 0
    manual.update_in_place_optimizer()
    assert_same_bits("codebook", manual.codebook.detach(), vq.codebook.detach())
    make().update_in_place_optimizer()  # nothing to do


def test_warm_up_without_quantization() -> None:
    vq = make(codebook_dim=5, reinit=Reinit(AfterWarmup(from_epoch=2), reservoir_size=64, iterations=2))
    x = torch.randn(B, 20, D, requires_grad=True)
    mask = torch.rand(B, 20) > 0.3
    for training in (True, False):
        quantized, index, loss = vq.train(training)(x, mask=mask)
        want = vq.project_out(vq.project_in(x)) * mask[..., None]
        assert_within_budget("quantized", quantized, lambda q: q, (want,))
        assert_same_bits("index", index, torch.where(mask, 0, -1))
        assert loss == 0
    assert vq(x, topk=2)[1].shape == (B, 20, 2) and vq(x, indices=index)[1] == 0
    assert vq.reinit is not None
    vq.train()(x, mask=mask)
    vq.reinit.next_epoch()
    before = vq.codebook.clone()
    quantized, index, loss = vq(x, mask=mask)
    assert loss > 0 and index.max() > 0 and not torch.equal(before, vq.codebook)
    loaded = make(codebook_dim=5, reinit=Reinit(AfterWarmup(from_epoch=2), reservoir_size=64, iterations=2))
    loaded.load_state_dict(vq.state_dict())
    assert_same_bits(names_of(vq), state(loaded), state(vq))


def test_index_dtype() -> None:
    x = torch.randn(B, T, D)
    want = make().eval()(x)[1]
    for dtype in (torch.int32, torch.int16):
        vq = make(index_dtype=dtype).eval()
        index = vq(x)[1]
        assert index.dtype == dtype
        assert_same_bits("index", index.long(), want)
        assert_same_bits("decoded", vq.get_output_from_indices(index), vq(x)[0])


def test_copies_and_pickles() -> None:
    vq = make(codebook_dim=5, threshold_ema_dead_code=2, batch_norm="codes")
    vq(torch.randn(B, T, D), accum_ema_update=True)
    x = torch.randn(B, T, D)
    ends = []
    for module in (vq, copy.deepcopy(vq), pickle.loads(pickle.dumps(vq))):
        torch.manual_seed(1)
        ends.append([*module(x), *state(module)])
    for end in ends[1:]:
        assert_same_bits([str(n) for n in range(len(end))], end, ends[0])


def test_what_is_shown() -> None:
    shown = repr(make(use_cosine_sim=True, heads=2, batch_norm="codes", index_dtype=torch.int32))
    assert (
        "dim=8, codebook_size=16, heads=2, use_cosine_sim=True, batch_norm_at=codes, index_dtype=torch.int32" in shown
    )
    assert "num_codebooks=1, codebook_size=16, dim=8, learned by moving average" in shown
    assert "learned by gradient" in repr(make(**LEARNED))

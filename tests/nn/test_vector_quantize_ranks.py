"""Sums over ranks, emulated by two ranks that see the same rows; real processes are in ``test_distributed_vq``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.nn import _ranks, codebook, row_quantizer
from fastseq.nn.vector_quantize import VectorQuantize
from tests.tolerance import assert_same_bits

D, K = 8, 16
LEARNED: dict[str, Any] = {"learnable_codebook": True, "ema_update": False}


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Two equal ranks, of which this is the first; the tensors that were summed."""
    seen: list[Tensor] = []

    def double(t: Tensor) -> Tensor:
        seen.append(t.clone())
        return t.mul_(2)

    for module in (codebook, _ranks, row_quantizer):
        monkeypatch.setattr(module, "ranks", lambda: (0, 2))
    for module in (codebook, _ranks):
        monkeypatch.setattr(module, "sum_", double)
    yield seen


def step(x: Tensor, **options: Any) -> VectorQuantize:
    torch.manual_seed(0)
    vq = VectorQuantize(D, K, **options)
    vq(x)
    return vq


def test_one_sum_for_each_step(sums: list[Tensor]) -> None:
    torch.manual_seed(0)
    for options, size in (
        ({}, K + K * D),
        ({"use_cosine_sim": True}, K + K * D),
        ({"threshold_ema_dead_code": 2}, K + K * D + K * D + K + 1),  # and rows for dead codes
        ({**LEARNED, "threshold_ema_dead_code": 2}, K + K * D + K * D + K + 1),
        ({**LEARNED}, 0),
        ({"freeze_codebook": True}, 0),
        ({"sync_codebook": False}, 0),
    ):
        step(torch.randn(3, 7, D), **options)
        assert [t.numel() for t in sums] == ([size] if size else [])
        sums.clear()
    vq = VectorQuantize(D, K).eval()
    vq(torch.randn(3, 7, D))
    assert not sums


def test_the_rows_of_all_ranks_count(sums: list[Tensor]) -> None:
    x = torch.randn(3, 7, D)
    twice = step(x)
    assert len(sums) == 1
    once = step(torch.cat([x, x]), sync_codebook=False)
    for name, value in once.state_dict().items():
        assert ((twice.state_dict()[name].float() - value.float()).abs() <= 1e-6).all(), (
            name
        )  # sums of 7 rows, added up twice


def test_an_optimizer_in_place_takes_the_mean_gradient(sums: list[Tensor]) -> None:
    x = torch.randn(3, 7, D)
    options = {**LEARNED, "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.25)}
    together, alone = step(x, **options), step(x, sync_codebook=False, **options)
    assert [t.numel() for t in sums] == [K * D]
    assert_same_bits("codebook", together.codebook.detach(), alone.codebook.detach())


@pytest.mark.parametrize("sync", [True, False])
def test_affine_statistics_of_all_ranks(sums: list[Tensor], sync: bool) -> None:
    vq = step(torch.randn(3, 7, D), affine_param=True, sync_affine_param=sync)
    alone = step(torch.randn(0, 7, D), affine_param=True, sync_affine_param=sync)
    assert len(sums) == (4 if sync else 2)
    assert vq._codebook.batch_mean is not None and vq._codebook.batch_mean.any()
    assert alone._codebook.batch_mean is not None and not alone._codebook.batch_mean.isnan().any()


def test_kmeans_waits_for_rows_of_any_rank(sums: list[Tensor]) -> None:
    vq = step(torch.randn(1, 0, D), kmeans_init=True)
    assert not vq._codebook.initted and sums[0].numel() == 1

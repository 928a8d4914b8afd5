"""Batch normalization before the quantizer: with all vectors as torch's, with padding as if it were not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseq.nn.batch_norm import MaskedBatchNorm, normalize
from fastseq.nn.vector_quantize import VectorQuantize
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

B, T, D = 4, 9, 6


def made(cls: type[nn.BatchNorm1d], dtype: torch.dtype = torch.float32, **options: Any) -> nn.BatchNorm1d:
    torch.manual_seed(0)
    norm = cls(D, **options).to(dtype)
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_as_if_it_were_not_there(options: dict[str, Any], training: bool) -> None:
    mask = torch.rand(B, T) > 0.4
    x = torch.randn(B, T, D) * 3 + 2
    upstream = torch.randn(int(mask.sum()), D)

    def plain(x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        norm = made(nn.BatchNorm1d, x.dtype, **options)
        x = x.detach().requires_grad_()
        for _ in range(2):
            out = norm.train(training)(x)
        grads = torch.autograd.grad(out, [x, *norm.parameters()], upstream)
        return out, *grads, *(b for b in norm.buffers() if b.is_floating_point())

    norm = made(MaskedBatchNorm, **options).train(training)
    given = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    for _ in range(2):
        out = norm(given, mask)[mask]
    dx, *grads = torch.autograd.grad(out, [given, *norm.parameters()], upstream)
    got = (out, dx[mask], *grads, *(b for b in norm.buffers() if b.is_floating_point()))
    names = [f"{n}" for n in range(len(got))]
    assert_within_budget(names, got, plain, (x[mask], upstream), GRADIENTS)


def test_without_a_mask_it_is_torch() -> None:
    x = torch.randn(B, T, D)
    for training in (True, False):
        ours, theirs = made(MaskedBatchNorm).train(training), made(nn.BatchNorm1d).train(training)
        assert_same_bits("out", ours(x), theirs(x.flatten(0, 1)).view(x.shape))
        assert_same_bits("mean var n", [*ours.buffers()], [*theirs.buffers()])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_of_nothing_stay(momentum: float | None) -> None:
    norm = MaskedBatchNorm(D, momentum=momentum)
    before = [b.clone() for b in norm.buffers()]
    out = norm(torch.full((B, T, D), torch.nan), torch.zeros(B, T, dtype=torch.bool))
    assert not out.isnan().any()
    assert_same_bits("mean var n", [*norm.buffers()], before)


def test_half_precision_keeps_its_dtype() -> None:
    norm = made(MaskedBatchNorm)
    x = torch.randn(B, T, D)
    out = norm(x.bfloat16(), torch.ones(B, T, dtype=torch.bool))
    assert out.dtype == torch.bfloat16
    assert ((out.float() - norm(x)).abs() <= 0.05).all()  # values of up to 4 with 8 bits


def test_where_it_is_put() -> None:
    x = torch.randn(B, T, D) * 5 + 3
    before = VectorQuantize(D, 16, codebook_dim=4, batch_norm="input")
    assert before.batch_norm.num_features == D
    before(x)
    assert ((before.batch_norm.running_mean - 0.1 * x.mean((0, 1))).abs() <= 1e-5).all()
    codes = VectorQuantize(D, 16, heads=3, codebook_dim=2, separate_codebook_per_head=True, batch_norm="codes")
    assert codes.batch_norm.num_features == 2  # shared over heads
    codes(x)
    assert ((codes.batch_norm.running_mean - 0.1 * x.view(-1, 2).mean(0)).abs() <= 1e-5).all()
    assert all(p.grad is None for p in codes.batch_norm.parameters())
    quantized, _, loss = codes(x)
    (quantized.sum() + loss).backward()
    assert all(p.grad is not None and p.grad.any() for p in codes.batch_norm.parameters())


def test_a_converted_one_takes_no_padding() -> None:
    vq = nn.SyncBatchNorm.convert_sync_batchnorm(VectorQuantize(D, 16, batch_norm="codes"))
    assert isinstance(vq.batch_norm, nn.SyncBatchNorm)
    x = torch.randn(B, T, D)
    with pytest.raises(NotImplementedError, match="batch_norm: a mask is not supported by SyncBatchNorm"):
        vq.eval()(x, mask=torch.ones(B, T, dtype=torch.bool))
    assert_same_bits("out", normalize(vq.batch_norm.eval(), x, None), vq.batch_norm(x.flatten(0, 1)).view(x.shape))

"""What compression makes of a matrix: the paper's rounding, integers with scales, and the best factors of a rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastseq import reference


def matrix(N: int = 12, K: int = 9, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_rounding_and_clipping_of_the_paper() -> None:
    weight = torch.tensor([0.0, 0.09, 0.11, -0.29, -0.31, 0.5, 3.0, -3.0], dtype=torch.float64)
    assert torch.allclose(
        reference.rounded(weight, 0.2), torch.tensor([0, 0, 0.2, -0.2, -0.4, 0.4, 3.0, -3.0]).double()
    )
    five = reference.rounded(matrix(50, 50), 0.2, 0.4)
    assert set(five.unique().mul(10).round().tolist()) == {-4, -2, 0, 2, 4}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, 1, 4, 9, 32])
def test_integers_are_those_of_numpy(bits: int, group: int | None) -> None:
    weight, most = matrix(), 2 ** (bits - 1) - 1
    integers, scale = reference.integer_rows(weight, bits, group)
    assert integers.dtype == torch.int8 and integers.shape == weight.shape
    size = 9 if group is None else group
    for row, found, scales in zip(weight.numpy(), integers.numpy(), scale.numpy(), strict=True):
        for n, first in enumerate(range(0, 9, size)):
            part = row[first : first + size]
            assert scales[n] == np.abs(part).max() / np.float32(most)
            assert (found[first : first + size] == np.rint(part / scales[n])).all()
    values = reference.integer_values(integers, scale, group)
    assert ((values - weight).abs() <= 0.5001 * scale.repeat_interleave(size, 1)[:, :9]).all()


def test_zeros_stay_zeros() -> None:
    integers, scale = reference.integer_rows(torch.zeros(2, 3))
    assert not integers.any() and not scale.any() and not reference.integer_values(integers, scale).any()
    assert reference.integer_rows(torch.zeros(0, 3))[0].shape == (0, 3)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (5, 5), (1, 7)])
def test_factors_are_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = matrix(*shape, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    for rank in range(1, min(shape) + 1):
        up, down = reference.low_rank(weight, rank)
        assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
        error = (up @ down - weight).square().sum()
        assert torch.allclose(error, values[rank:].square().sum(), atol=1e-12)
        assert torch.allclose(up.mT @ up, torch.eye(rank, dtype=torch.float64))
        assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all()


def test_inputs_weigh_what_they_use() -> None:
    """No factors of this rank have a smaller error on the inputs, and those of the plain SVD have a larger one."""
    weight, inputs = matrix(12, 9, dtype=torch.float64), matrix(200, 9, 1, torch.float64) * torch.logspace(-2, 1, 9)
    moment = inputs.mT @ inputs / len(inputs)

    def error(up: Tensor, down: Tensor) -> float:
        return float((inputs @ (up @ down - weight).mT).square().mean())

    weighted = error(*reference.low_rank(weight, 3, moment))
    assert weighted < 0.5 * error(*reference.low_rank(weight, 3))
    up, down = (t.clone().requires_grad_() for t in reference.low_rank(weight, 3, moment))
    loss = (inputs @ (up @ down - weight).mT).square().sum()
    loss.backward()  # at the least error nothing is to be gained
    assert up.grad.norm() < 1e-9 * loss and down.grad.norm() < 1e-9 * loss  # type: ignore[union-attr]


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("with_moment", [False, True])
def test_rank_of_an_energy(energy: float, with_moment: bool) -> None:
    weight = matrix(dtype=torch.float64)
    inputs = matrix(50, 9, 2, torch.float64)
    moment = inputs.mT @ inputs if with_moment else None
    size = weight if moment is None else weight @ inputs.mT
    rank = reference.rank_of_energy(weight, energy, moment)

    def kept(rank: int) -> float:
        up, down = reference.low_rank(weight, rank, moment)
        rest = up @ down - weight if moment is None else (up @ down - weight) @ inputs.mT
        return 1 - float(rest.square().sum() / size.square().sum())

    assert kept(rank) >= energy - 1e-9
    assert rank == 1 or kept(rank - 1) < energy

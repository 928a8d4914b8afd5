"""MIMOIndex: counts, repetition, buckets, generators and errors."""

from __future__ import annotations

import pytest
import torch

from fastseq.nn import MIMOIndex


@pytest.mark.parametrize(("batch", "M", "R", "rho"), [(1, 2, 1, 0.0), (5, 3, 4, 0.3), (32, 2, 1, 1.0), (7, 4, 3, 0.5)])
def test_every_example_lies_r_times_in_every_slot(batch: int, M: int, R: int, rho: float) -> None:
    source = MIMOIndex(batch, M, R, rho)
    index = source.draw()
    assert index.shape == (M, source.rows) == (M, batch * R) and index.dtype == torch.int32 and index.is_contiguous()
    for slot in index:
        assert slot.bincount(minlength=batch).tolist() == [R] * batch
    same = int((index == index[0]).all(0).sum())
    assert same >= batch * R - int(torch.tensor(float(batch * R)) * torch.tensor(1 - rho))  # more by chance only


def test_slots_are_shuffled_apart() -> None:
    index = MIMOIndex(200, 3).draw()
    assert (index[0] == index[1]).double().mean() < 0.05 and (index[1] == index[2]).double().mean() < 0.05


def test_generator_and_device() -> None:
    source = MIMOIndex(8, 2, 2)
    one, two = (source.draw(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, source.draw(torch.Generator().manual_seed(6)))
    torch.manual_seed(5)
    assert torch.equal(source.draw(device="cpu"), one)
    assert source.draw(device="meta").shape == (2, 16)


def test_a_smaller_last_batch() -> None:
    index = MIMOIndex(8, 2, 3).draw(batch=5)
    assert index.shape == (2, 15) and int(index.max()) == 4


@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize("buckets", [1, 3, 5])
def test_buckets(buckets: int, rho: float) -> None:
    lengths = torch.randint(1, 100, (10,))
    index = MIMOIndex(10, 3, 2, rho).draw(lengths=lengths, buckets=buckets)
    for slot in index:
        assert slot.bincount(minlength=10).tolist() == [2] * 10
    parts = lengths.sort().values.tensor_split(buckets)
    found = lengths[index.long()]  # [M, N]
    fits = torch.stack([((found >= p[0]) & (found <= p[-1])).all(0) for p in parts])
    assert fits.any(0).all()  # each row from one part


def test_buckets_leave_little_padding_and_shuffle_rows() -> None:
    lengths = torch.arange(1, 65)
    source, generator = MIMOIndex(64, 3, 2), torch.Generator().manual_seed(0)

    def padding(index: torch.Tensor) -> float:
        found = lengths[index.long()].double()
        return float(1 - found.mean() / found.amax(0).mean())

    bucketed = source.draw(generator, lengths=lengths, buckets=8)
    assert padding(bucketed) < 0.1 < padding(source.draw(generator))
    assert not torch.equal(bucketed[0].sort().values, bucketed[0])
    equal = MIMOIndex(6, 2).draw(lengths=torch.full((6,), 3), buckets=3)
    again = [MIMOIndex(6, 2).draw(lengths=torch.full((6,), 3), buckets=3) for _ in range(8)]
    pairs = {frozenset(map(int, column)) for index in (equal, *again) for column in index.T if column[0] != column[1]}
    assert len(pairs) > 3  # examples of one length do not meet the same partners each time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "MIMOIndex: batch must be an integer >= 1, got 0"),
        ((8, 1), "MIMOIndex: M must be an integer >= 2, got 1"),
        ((8, 2, 0), "MIMOIndex: R must be an integer >= 1, got 0"),
        ((8, 2, 1.5), "MIMOIndex: R must be an integer >= 1, got 1.5"),
        ((8, 2, 1, 1.1), r"MIMOIndex: rho must be a number in \[0, 1\], got 1.1"),
        ((8, 2, 1, float("nan")), r"MIMOIndex: rho must be a number in \[0, 1\], got nan"),
    ],
)
def test_errors(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIMOIndex(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 9}, "MIMOIndex.draw: batch must be at most that of the index, 8, got 9"),
        ({"batch": 0}, "batch must be an integer >= 1, got 0"),
        ({"buckets": 2}, "MIMOIndex.draw: lengths must be given, as both or none are, got None"),
        ({"lengths": torch.ones(8)}, "MIMOIndex.draw: buckets must be given, as both or none are, got None"),
        ({"lengths": torch.ones(7), "buckets": 2}, r"lengths must be \[batch\] = \[8\], got \[7\]"),
        ({"lengths": torch.ones(8), "buckets": 5}, r"buckets must be an integer in 1 .. batch // 2 = 4, got 5"),
    ],
)
def test_errors_of_draw(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIMOIndex(8, 2).draw(**options)  # type: ignore[arg-type]


def test_repr() -> None:
    assert repr(MIMOIndex(8, 2, 4, 0.5)) == "MIMOIndex(batch=8, M=2, R=4, rho=0.5)"

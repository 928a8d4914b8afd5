"""The reservoir: an even sample, exactly restored, merged without counting a row twice."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq._check import ArgumentError
from fastseq.nn import reservoir as module
from fastseq.nn.reservoir import Reservoir
from tests.tolerance import assert_same_bits


def numbered(first: int, n: int, groups: int = 1) -> Tensor:
    """Rows [G, n, 2] that say which they are."""
    count = torch.arange(first, first + n, dtype=torch.float32)
    return torch.stack([count, -count], dim=-1).expand(groups, n, 2)


def held(reservoir: Reservoir, g: int = 0) -> list[float]:
    """The numbers of the rows in it."""
    rows, filled = reservoir.merge()
    assert (rows[..., 0] == -rows[..., 1]).all()
    return sorted(rows[g, filled[g], 0].tolist())


def test_until_it_is_full_everything_stays() -> None:
    reservoir = Reservoir(10, 2)
    assert held(reservoir) == []
    for first, n in ((0, 3), (3, 0), (3, 6)):
        reservoir.add(numbered(first, n))
        assert held(reservoir) == list(range(first + n))
    reservoir.add(numbered(9, 40))
    assert len(set(held(reservoir))) == 10
    reservoir.empty()
    assert held(reservoir) == []


@pytest.mark.parametrize("batches", [[60], [1] * 60, [7, 0, 20, 3, 30]])
def test_every_row_has_the_same_odds(batches: list[int]) -> None:
    """Also each pair of rows, and all of them whatever the batches."""
    groups, size, total = 4000, 6, sum(batches)
    reservoir, first = Reservoir(size, 2, groups), 0
    for n in batches:
        reservoir.add(numbered(first, n, groups))
        first += n
    inside = torch.zeros(groups, total).scatter_(1, reservoir.rows[..., 0].long(), 1.0)
    assert (inside.sum(1) == size).all()
    p = size / total  # of a row: the count is binomial over groups; six deviations are 2e-9
    assert (inside.sum(0) - groups * p).abs().max() < 6 * math.sqrt(groups * p * (1 - p))
    q = p * (size - 1) / (total - 1)  # of a pair: 1770 of them
    pairs = (inside.T @ inside).triu(1)[torch.ones(total, total).triu(1) > 0]
    assert (pairs - groups * q).abs().max() < 6 * math.sqrt(groups * q * (1 - q))


def test_groups_draw_apart() -> None:
    reservoir = Reservoir(5, 2, groups=2)
    reservoir.add(numbered(0, 100, 2))
    assert held(reservoir, 0) != held(reservoir, 1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_never_enter(bad: float) -> None:
    reservoir = Reservoir(8, 2)
    rows = numbered(0, 40).clone()
    rows[0, ::2, 1] = bad
    for _ in range(5):
        reservoir.add(rows)
    assert reservoir.rows.isfinite().all() and len(held(reservoir)) == 8
    reservoir.empty()
    reservoir.add(torch.full((1, 3, 2), bad))
    assert held(reservoir) == []


def test_mask() -> None:
    reservoir = Reservoir(30, 2, groups=2)
    mask = torch.arange(40).expand(2, 40) % torch.tensor([[2], [4]]) == 0
    reservoir.add(numbered(0, 40, 2), mask)
    assert held(reservoir, 0) == list(range(0, 40, 2)) and held(reservoir, 1) == list(range(0, 40, 4))
    reservoir.add(numbered(40, 9, 2), torch.zeros(2, 9, dtype=torch.bool))
    assert held(reservoir, 0) == list(range(0, 40, 2))


def test_same_seed_same_sample_and_the_state_goes_on_exactly() -> None:
    def run(save_at: int | None) -> Reservoir:
        torch.manual_seed(5)
        reservoir = Reservoir(7, 2)
        for i in range(6):
            reservoir.add(numbered(10 * i, 10))
            if i == save_at:
                state = copy.deepcopy(reservoir.state_dict())
                reservoir = Reservoir(7, 2)
                reservoir.load_state_dict(state)
        return reservoir

    want = run(None)
    for other in (run(None), run(2), copy.deepcopy(want)):
        assert_same_bits("rows keys", [other.rows, other.keys], [want.rows, want.keys])
    assert_same_bits("merged filled", run(3).merge(), want.merge())


def test_state_dict_holds_tensors_alone_and_no_buffers() -> None:
    reservoir = Reservoir(4, 3, groups=2)
    assert {k: v.shape for k, v in reservoir.state_dict().items()} == {"rows": (2, 4, 3), "keys": (2, 4)}
    assert not list(reservoir.buffers())
    moved = reservoir.to(torch.float64)
    assert moved is reservoir and moved.rows.dtype == torch.float64 and moved.keys.dtype == torch.int64
    assert Reservoir(4, 3).to("meta").keys.is_meta


def test_dropped_it_keeps_nothing_and_is_saved_so() -> None:
    reservoir = Reservoir(4, 2)
    reservoir.drop()
    reservoir.add(numbered(0, 9))
    assert reservoir.dropped and reservoir.rows.untyped_storage().nbytes() == 0
    assert "dropped" in repr(reservoir) and held(reservoir) == []
    other = Reservoir(4, 2)
    other.load_state_dict(reservoir.state_dict())
    assert other.dropped
    reservoir.load_state_dict(Reservoir(4, 2).state_dict())
    reservoir.add(numbered(0, 3))
    assert held(reservoir) == [0, 1, 2]


def test_merging_takes_the_smallest_keys_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks by hand: the merged sample is that of one reservoir that saw the keys of both."""
    parts = []
    for rank in range(2):
        monkeypatch.setattr(module, "ranks", lambda rank=rank: (rank, 2))
        torch.manual_seed(0)  # the ranks do not draw the same, though they have one seed
        parts.append(Reservoir(6, 2))
        parts[rank].add(numbered(100 * rank, 50))
    assert not set(parts[0].keys.flatten().tolist()) & set(parts[1].keys.flatten().tolist())
    monkeypatch.setattr(module, "gather", lambda t: torch.stack([t, packed(parts[1])]))
    rows, filled = parts[0].merge()
    keys, order = torch.cat([p.keys for p in parts], 1).sort()
    assert filled.all()
    assert_same_bits("rows", rows, torch.cat([p.rows for p in parts], 1)[:, order[0, :6]])
    own, _ = parts[0].merge(together=False)
    assert_same_bits("own", own[0].sort(0).values, parts[0].rows[0].sort(0).values)

    monkeypatch.setattr(module, "gather", lambda t: torch.stack([t, t]))  # both have loaded one checkpoint
    assert_same_bits("again", parts[0].merge()[0], own)
    assert len(set(held(parts[0]))) == 6


def packed(reservoir: Reservoir) -> Tensor:
    return torch.cat([reservoir.rows, reservoir.keys[..., None].view(torch.float32)], dim=-1)


@pytest.mark.parametrize("rank", [1, 2, 5, 1000])
def test_keys_of_another_rank_are_as_even_and_as_free_of_the_first(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 20000

    def keys(of: int) -> Tensor:
        monkeypatch.setattr(module, "ranks", lambda: (of, 2000))
        torch.manual_seed(1)
        return module._keys(torch.Size([n]), torch.device("cpu"))

    a, b = keys(0), keys(rank)
    assert ((b >= 0) & (b < torch.iinfo(torch.int64).max)).all()
    table = torch.zeros(8, 8).index_put_((a >> 60, b >> 60), torch.tensor(1.0), accumulate=True)
    assert (table - n / 64).abs().max() < 5 * math.sqrt(n / 64)  # 64 even and independent cells


def test_it_compiles_whole_with_any_number_of_rows() -> None:
    """And then looks at all rows, as on a device that the host must not wait for, with the same sample."""
    reservoirs = Reservoir(16, 2), Reservoir(16, 2)
    compiled = torch.compile(reservoirs[0].add, fullgraph=True, dynamic=True, backend="eager")
    for add in (compiled, reservoirs[1].add):
        torch.manual_seed(0)
        for first, n in ((0, 5), (5, 30), (35, 9), (44, 100)):
            add(numbered(first, n))
    assert_same_bits("rows keys", *([r.rows, r.keys] for r in reservoirs))
    assert len(set(held(reservoirs[0]))) == 16


RESERVOIR = Reservoir(4, 3)
X = torch.zeros(1, 5, 3)
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "size": (lambda: Reservoir(0, 3), "Reservoir: size must be an integer >= 1, got 0"),
    "dim": (lambda: Reservoir(4, 2.0), "Reservoir: dim must be an integer >= 1, got 2.0"),
    "groups": (lambda: Reservoir(4, 2, True), "Reservoir: groups must be an integer >= 1, got True"),
    "D": (lambda: RESERVOIR.add(X[..., :2]), "Reservoir.add: x must be [G = 1, N, D = 3], got [1, 5, 2]"),
    "G": (lambda: RESERVOIR.add(X.expand(2, 5, 3)), "Reservoir.add: x must be [G = 1, N, D = 3], got [2, 5, 3]"),
    "device": (lambda: RESERVOIR.add(X.to("meta")), "Reservoir.add: x must be on cpu, got one on meta"),
    "mask": (lambda: RESERVOIR.add(X, torch.ones(5).bool()), "Reservoir.add: mask must be [G, N] = [1, 5], got [5]"),
    "mask dtype": (lambda: RESERVOIR.add(X, torch.ones(1, 5)), "mask must be torch.bool, got torch.float32"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_messages(name: str) -> None:
    call, words = ERRORS[name]
    with pytest.raises(ArgumentError, match=re.escape(words)):
        call()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (Reservoir(5, 3).state_dict(), "Reservoir: rows must be [G, size, D] = [1, 4, 3], got [1, 5, 3]"),
        ({"rows": torch.zeros(1, 4, 3), "keys": torch.zeros(1, 3).long()}, "Reservoir: rows must be [G, size, D]"),
        ({"rows": torch.zeros(1, 4, 3)}, 'Missing key(s) in state_dict: "keys"'),
        ({**RESERVOIR.state_dict(), "more": X}, 'Unexpected key(s) in state_dict: "more"'),
    ],
)
def test_a_state_that_does_not_fit(state: dict[str, Tensor], words: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(words)):
        Reservoir(4, 3).load_state_dict(state)

"""``ResidualVQ`` in two processes of torch.distributed: against each other, and against one process on all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.nn import residual_ranks as cases
from tests.nn import two_ranks
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no torch.distributed with gloo"
)


@pytest.fixture(scope="module")
def both(both: list[dict[str, Any]]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What each rank returned, of every case."""
    return two_ranks.of(both, "residual")


@pytest.mark.parametrize("case", cases.OPTIONS)
def test_all_ranks_learn_the_same(case: str, both: tuple[dict[Any, Any], dict[Any, Any]]) -> None:
    first, second = (rank[case]["state"] for rank in both)
    assert_same_bits(list(first), list(first.values()), list(second.values()))
    assert not torch.equal(both[0][case]["before"][0], first["layers.0._codebook.embed"][0])


@pytest.mark.parametrize("case", ["plain", "cosine", "sizes", "masked"])
def test_as_one_process_on_all_rows(case: str, both: tuple[dict[Any, Any], dict[Any, Any]]) -> None:
    rvq = cases.module(case)
    masks = [cases.arguments(case, rank).get("mask") for rank in range(2)]
    mask = None if masks[0] is None else torch.cat(masks, dim=1)
    indices = [rvq(x, mask=mask)[1] for x in cases.rows()]
    together = [torch.cat([rank[case]["found"][t][2] for rank in both], dim=1) for t in range(cases.STEPS)]
    assert all(torch.equal(a, b) for a, b in zip(indices, together, strict=True))
    names = [n for n in rvq.state_dict() if "initted" not in n]
    got, want = ([state[n] for n in names] for state in (both[0][case]["state"], rvq.state_dict()))
    assert_within_budget(names, got, lambda *w: w, want, 4 * GRADIENTS)


@pytest.mark.parametrize("case", ["dropout", "dropout, cosine"])
def test_ranks_draw_the_same_number_of_levels(case: str, both: tuple[dict[Any, Any], dict[Any, Any]]) -> None:
    drawn = [[int((found[2] >= 0).sum(-1).unique()) for found in rank[case]["found"]] for rank in both]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


@pytest.mark.parametrize("case", ["dead codes", "dead codes, rank 0 alone"])
def test_dead_codes_become_rows_of_all_ranks(case: str, both: tuple[dict[Any, Any], dict[Any, Any]]) -> None:
    """In each step all codes die. Each rank has rows for half of them, if it has rows; the others wait."""
    codes = both[0][case]["state"]["layers.0._codebook.embed"][0]
    last = [rank[case]["found"][-1][0][rank[case]["found"][-1][2][..., 0] >= 0] for rank in both]
    of_rank = [(codes[:, None] == x).all(-1).any(-1) for x in last]
    assert [int(r.sum()) for r in of_rank] == [cases.K // 2, cases.K // 2 if case == "dead codes" else 0]


@pytest.mark.parametrize("case", cases.OPTIONS)
def test_one_message_a_step(case: str, both: tuple[dict[Any, Any], dict[Any, Any]]) -> None:
    """Of one size, whatever the number of levels; where levels go one by one, one for each that runs."""
    sent = both[0][case]["sent"]
    assert both[1][case]["sent"] == sent
    if "cosine" not in case:
        assert len(sent) == cases.STEPS and len(set(sent)) == 1

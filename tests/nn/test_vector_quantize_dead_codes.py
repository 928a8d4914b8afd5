"""Replacement of dead codes: which become rows, which rows these are, and what is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq.nn import dead_codes
from fastseq.nn.affine_codebook import AffineCodebook
from fastseq.nn.codebook import Codebook
from fastseq.nn.dead_codes import Drawn
from fastseq.nn.vector_quantize import VectorQuantize
from tests.tolerance import assert_same_bits

D = 4


def book(K: int, dead: Tensor, G: int = 1, **options: object) -> Codebook:
    """A codebook whose codes ``dead`` [G, K] are not used."""
    torch.manual_seed(0)
    made = Codebook(D, K, num_codebooks=G, threshold_ema_dead_code=2, **options)  # type: ignore[arg-type]
    made.cluster_size.copy_(torch.where(dead, 0.5, 7.0))
    return made


def row_of(rows: Tensor, codes: Tensor) -> Tensor:
    """The row that each of codes [m, D] is, or -1; rows: [N, D]."""
    same = (codes[:, None] == rows).all(-1)
    return torch.where(same.any(-1), same.long().argmax(-1), -1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("N", "K"), [(50, 8), (8, 8), (5, 8), (1, 3), (30, 1), (1000, 33)])
@pytest.mark.parametrize("G", [1, 2])
def test_each_dead_code_becomes_a_row_of_its_own(N: int, K: int, G: int, masked: bool) -> None:
    torch.manual_seed(1)
    dead = torch.rand(G, K) > 0.3
    rows = torch.randn(G, N, D)
    mask = torch.rand(G, N) > 0.5 if masked else None
    made = book(K, dead, G)
    before = made.embed.clone()
    made.expire_codes_(rows, mask)
    for g in range(G):
        valid = torch.arange(N) if mask is None else mask[g].nonzero()[:, 0]
        taken = row_of(rows[g], made.embed[g])
        wanted = min(int(dead[g].sum()), len(valid))
        changed = taken >= 0
        assert changed.sum() == wanted == len(taken[changed].unique())  # no row twice, even if there are too few
        assert torch.isin(taken[changed], valid).all() and not (changed & ~dead[g]).any()
        late = dead[g] & ~changed
        assert_same_bits("embed", made.embed[g][~changed], before[g][~changed])
        assert (made.cluster_size[g] == torch.where(changed, 2.0, torch.where(late, 0.5, 7.0))).all()
        assert_same_bits("embed_avg", made.embed_avg[g][changed], 2 * made.embed[g][changed])


def test_the_rest_waits_for_the_next_step() -> None:
    made = book(8, torch.ones(1, 8, dtype=torch.bool))
    for alive in (3, 6, 8, 8):
        made.expire_codes_(torch.randn(1, 3, D))
        assert (made.cluster_size >= 2).sum() == alive


@pytest.mark.parametrize(("N", "K", "dead"), [(40, 8, 1), (40, 8, 8), (12, 8, 5), (6, 8, 8), (6, 8, 2)])
def test_every_row_has_the_same_chance(N: int, K: int, dead: int) -> None:
    rows = torch.arange(N, dtype=torch.float32)[None, :, None].expand(1, N, D).contiguous()
    flags = torch.arange(K)[None] < dead
    hits = torch.zeros(N)
    trials = 1000
    for _ in range(trials):
        found, taken = dead_codes.assign(flags, dead_codes.draw(rows, None, K))
        hits += torch.bincount(found[taken][:, 0].long(), minlength=N)
    each = trials * min(dead, N) / N
    # 6 standard deviations of a binomial count, and of 12 rows in 8 stretches those in short ones come 4/3 as often
    assert (hits - each).abs().max() <= 6 * each**0.5 + (0.34 * each if N % K and N > K else 0)


def test_ranks_fill_places_of_their_own() -> None:
    K, sizes = 7, (5, 0, 3)
    parts = [dead_codes.draw(torch.randn(1, n, D) + 10, None, K, (rank, 3)) for rank, n in enumerate(sizes)]
    total = Drawn(*(sum(p) for p in zip(*parts, strict=True)))  # type: ignore[arg-type]
    assert [int(p.valid.sum()) for p in parts] == [3, 0, 2]
    assert (total.valid <= 1).all() and total.valid.sum() == 5
    rows, taken = dead_codes.assign(torch.ones(1, K, dtype=torch.bool), total)
    assert taken.sum() == 5 and len(rows[taken].unique(dim=0)) == 5 and (rows[taken] > 5).all()


def test_large_batches_keep_their_numbers() -> None:
    number, valid = dead_codes.draw_rows(2**40, 2**14, 1, None, torch.device("cpu"))
    assert valid.all() and (number.diff() > 0).all() and number.max() < 2**40 and number.min() >= 0


def test_cosine_codes_are_rows_of_length_one() -> None:
    made = book(4, torch.ones(1, 4, dtype=torch.bool), use_cosine_sim=True)
    rows = 3 * torch.randn(1, 20, D)
    made.expire_codes_(rows)
    assert (row_of(F.normalize(rows[0], dim=-1), made.embed[0]) >= 0).all()


def test_only_in_training_and_with_a_threshold() -> None:
    for training, threshold in ((False, 2.0), (True, 0.0)):
        made = book(4, torch.ones(1, 4, dtype=torch.bool)).train(training)
        made.threshold_ema_dead_code = threshold
        before = made.embed.clone()
        made.expire_codes_(torch.randn(1, 20, D))
        assert_same_bits("embed", made.embed, before)


@pytest.mark.parametrize("options", [{}, {"learnable_codebook": True}, {"directional_reparam": True}])
def test_a_collapsed_codebook_recovers(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    vq = VectorQuantize(D, 32, threshold_ema_dead_code=1, decay=0.5, **options)  # type: ignore[arg-type]
    vq._codebook.embed.data.add_(100.0)
    vq._codebook.embed_avg.add_(100.0)
    used = []
    for _ in range(12):
        _, index, _ = vq(torch.randn(4, 64, D))
        used.append(len(index.unique()))
    assert used[0] <= 5 and used[-1] >= 24


def test_rows_as_affine_codes() -> None:
    torch.manual_seed(0)
    made = AffineCodebook(D, 8, threshold_ema_dead_code=2)
    rows = torch.randn(1, 20, D) * 3 + 5
    made.prepare(rows, None)
    made.expire_codes_(rows)  # cluster_size is 1 at first: all are dead
    assert ((made.codes()[0][:, None] - rows[0]).abs().amax(-1) < 1e-5).any(-1).all()  # moved there and back


def test_rows_from_outside() -> None:
    torch.manual_seed(0)
    vq = VectorQuantize(2 * D, 8, heads=2, codebook_dim=D, separate_codebook_per_head=True, threshold_ema_dead_code=2)
    x = torch.randn(2, 10, 2 * D)
    mask = torch.arange(10) < torch.tensor([10, 0])[:, None]
    vq.expire_codes_(x, mask)  # cluster_size is 1 at first: all are dead
    for h in range(2):
        assert (row_of(x[0, :, h * D : (h + 1) * D], vq.codebook[h]) >= 0).all()

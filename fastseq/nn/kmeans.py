"""``kmeans``: k-means++ seeding and Lloyd's iterations on the lookup of vector quantization."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import _check, functional
from fastseq.nn._eager import eager
from fastseq.nn._ranks import ranks

AllReduce = Callable[[Tensor], object]

METRICS = ("l2", "cosine")
INITS = ("kmeans++", "random")
_COMPUTED = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_BLOCK = 256  # most seeds that are drawn before the distances are brought up to date
_logger = logging.getLogger("fastseq")


@eager
@torch.no_grad()
def kmeans(
    x: Tensor,
    K: int,
    *,
    iterations: int = 10,
    metric: str = "l2",
    mask: Tensor | None = None,
    init: str = "kmeans++",
    generator: torch.Generator | None = None,
    all_reduce: AllReduce | None = None,
) -> tuple[Tensor, Tensor]:
    """K means of the rows of each group (Lloyd 1982), seeded by k-means++ (Arthur and Vassilvitskii 2007) or at random.

    Rows with NaN or infinity do not count. It never holds a matrix of rows by means. Of fewer rows than K some seeds
    are the same row twice, and a warning says so.

    Args:
        x: [G, N, D], float32, float64, bfloat16 or float16 (computed in float32).
        K: means per group, >= 1.
        iterations: most rounds of Lloyd, >= 0; it ends before when nothing moves any more.
        metric: "l2", or "cosine": rows and means are scaled to length 1.
        mask: bool [G, N], the rows that count.
        init: "kmeans++", where a mean without rows moves to a row far from its mean; or "random": K rows, and a mean
            without rows stays where it is.
        generator: what one seed is drawn from; None is torch's on the CPU.
        all_reduce: sums a tensor over the ranks of ``torch.distributed``'s default group in place; then the rows of
            all ranks count, N may differ (also be 0), and every rank gets the same means.

    Returns:
        means [G, K, D], and how many rows are nearest to each: counts [G, K], of the dtype of the means.

    Raises:
        ArgumentError: naming the argument; also when a group has no row that counts, on every rank alike.
    """
    _check_arguments(x, K, iterations, metric, mask, init)
    x = x.detach().to(_COMPUTED.get(x.dtype, x.dtype))
    valid = x.isfinite().all(-1)
    valid = valid if mask is None else valid & mask
    if metric == "cosine":
        x = F.normalize(x, dim=-1)
    rows = _Rows(x, valid, all_reduce)
    for g, n in enumerate(rows.totals):
        if n == 0:
            _check.fail("kmeans", "x", "rows that count (in the mask and finite)", f"none in group {g}")
        if n < K:
            _logger.warning("kmeans: %d rows for %d means, so some means are the same row", n, K)
    random = rows.same_generator(generator)
    seed = _plus_plus if init == "kmeans++" else _random
    means = torch.stack([seed(rows, g, K, random) for g in range(x.shape[0])])
    for _ in range(iterations):
        moved = _lloyd(rows, means, init == "kmeans++", metric == "cosine")
        if torch.equal(moved, means):
            break
        means = moved
    index = functional.vq_nearest(x, means, mask=valid).index
    return means, rows.sum(functional.vq_sums(x, index, K)[0])


def _check_arguments(x: Tensor, K: int, iterations: int, metric: str, mask: Tensor | None, init: str) -> None:
    f = "kmeans"
    if x.dim() != 3 or x.shape[-1] < 1:
        _check.fail(f, "x", "[G, N, D] with D >= 1", list(x.shape))
    if x.dtype not in (torch.float32, torch.float64, *_COMPUTED):
        _check.fail(f, "x", "float32, float64, bfloat16 or float16", x.dtype)
    for name, value, least in (("K", K, 1), ("iterations", iterations, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            _check.fail(f, name, f"an integer >= {least}", repr(value))
    _check.one_of(f, "metric", metric, METRICS)
    _check.one_of(f, "init", init, INITS)
    if mask is not None:
        _check.shape(f, "mask", mask, "G, N", *x.shape[:2])
        _check.dtype(f, "mask", mask, torch.bool)
        _check.device(f, "mask", mask, x.device)


class _Rows:
    """The rows that count of all ranks, as one list per group: those of rank 0 first."""

    def __init__(self, x: Tensor, valid: Tensor, all_reduce: AllReduce | None) -> None:
        self.x, self.valid, self.all_reduce = x, valid, all_reduce
        self.rank, self.size = ranks() if all_reduce else (0, 1)
        per_rank = self.of_ranks(valid.sum(1)).cpu()  # [ranks, G]
        self.totals: list[int] = per_rank.sum(0).tolist()
        self.starts: list[int] = per_rank[: self.rank].sum(0).tolist()
        self.places = [row.nonzero()[:, 0] for row in valid]  # of the rows that count here

    def sum(self, t: Tensor) -> Tensor:
        """``t``, summed over the ranks (in place)."""
        if self.all_reduce is not None:
            self.all_reduce(t)
        return t

    def of_ranks(self, t: Tensor) -> Tensor:
        """``t`` of every rank: [ranks, ...]."""
        slots = t.new_zeros(self.size, *t.shape)
        slots[self.rank] = t
        return self.sum(slots)

    def same_generator(self, generator: torch.Generator | None) -> torch.Generator:
        """A generator on the CPU with one seed for all ranks, which rank 0 draws."""
        device = torch.device("cpu") if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=device).to(self.x.device)
        return torch.Generator().manual_seed(int(self.sum(seed if self.rank == 0 else torch.zeros_like(seed))))

    def take(self, g: int, numbers: Tensor) -> Tensor:
        """The rows [m, D] of these ``numbers`` [m] in the list of group g."""
        local = numbers - self.starts[g]
        mine = (local >= 0) & (local < len(self.places[g]))
        rows = self.x.new_zeros(len(numbers), self.x.shape[-1])
        rows[mine.to(rows.device)] = self.x[g, self.places[g][local[mine].to(rows.device)]]
        return self.sum(rows)

    def draw(self, g: int, weights: Tensor, m: int, random: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """m rows [m, D], each drawn with odds ``weights`` [N], and their weights [m]; None if all weights are 0."""
        # in float64 on the CPU: the same draws on every device
        below = weights.cpu().double().cumsum(0)
        total = below[-1:].sum()  # 0 without rows
        ends = self.of_ranks(total.to(weights.device)).cpu().cumsum(0)
        if not ends[-1] > 0:
            return None
        target = torch.rand(m, generator=random, dtype=torch.float64) * ends[-1]
        owner = torch.searchsorted(ends, target, right=True).clamp_max(int(torch.searchsorted(ends, ends[-1])))
        mine = owner == self.rank
        found = weights.new_zeros(m, 1 + self.x.shape[-1])
        if bool(mine.any()):
            target = target[mine] - (ends[self.rank] - total)
            place = torch.searchsorted(below, target, right=True).clamp_max(int(torch.searchsorted(below, total)))
            place = place.to(weights.device)
            found[mine.to(found.device)] = torch.cat([weights[place, None], self.x[g, place]], dim=1)
        found = self.sum(found)
        return found[:, 1:], found[:, 0]

    def decided(self, flags: Tensor) -> Tensor:
        """``flags`` of rank 0, whose arithmetic decides for all."""
        flags = flags.to(self.x.device, torch.int64)
        return self.sum(flags if self.rank == 0 else torch.zeros_like(flags)).bool()


def _random(rows: _Rows, g: int, K: int, random: torch.Generator) -> Tensor:
    n = rows.totals[g]
    if n < K:
        return rows.take(g, torch.randint(n, (K,), generator=random))
    return rows.take(g, torch.randperm(n, generator=random)[:K])


def _plus_plus(rows: _Rows, g: int, K: int, random: torch.Generator) -> Tensor:
    """K rows, each drawn with odds of its squared distance to those before it.

    Drawn in blocks by rejection, which is exact: a candidate has the odds that held before its block and stays with
    the probability by which they have shrunk since. A block then costs one lookup, not one pass per seed.
    """
    x, valid = rows.x[g], rows.valid[g]
    seeds, found = x.new_empty(K, x.shape[1]), 0
    weights = valid.to(x.dtype)
    while found < K:
        m = min(max(1, found // 4), _BLOCK, K - found)  # few beside those that are there: little is rejected
        drawn = rows.draw(g, weights, m, random)
        luck = torch.rand(m, generator=random, dtype=torch.float64)
        if drawn is None:  # every row is a seed already
            seeds[found:] = rows.take(g, torch.randint(rows.totals[g], (K - found,), generator=random))
            break
        new = drawn[0][rows.decided(_kept(*drawn, luck))]
        distance = functional.vq_nearest(x, new, mask=valid, return_distance=True).distance
        assert distance is not None
        distance = distance.clamp_max(torch.finfo(distance.dtype).max)
        weights = distance if found == 0 else torch.minimum(weights, distance)
        seeds[found : found + len(new)] = new
        found += len(new)
    return seeds


def _kept(candidates: Tensor, weights: Tensor, luck: Tensor) -> Tensor:
    """Which of the candidates [m, D] stay, bool [m]; one after the other, from their weights before any of them did."""
    candidates, now = candidates.cpu().double(), weights.cpu().double()
    kept = torch.zeros(len(now), dtype=torch.bool)
    for j, least in enumerate((luck * now).tolist()):
        if least < float(now[j]):
            kept[j] = True
            now = torch.minimum(now, (candidates - candidates[j]).square().sum(-1))
    return kept


def _lloyd(rows: _Rows, means: Tensor, reseed: bool, cosine: bool) -> Tensor:
    """The means [G, K, D] of the rows that are nearest to each of ``means``."""
    nearest = functional.vq_nearest(rows.x, means, mask=rows.valid, return_distance=True)
    counts, sums = functional.vq_sums(rows.x, nearest.index, means.shape[1])
    both = rows.sum(torch.cat([counts[..., None], sums], dim=-1))
    counts, sums = both[..., :1], both[..., 1:]
    moved = sums / counts.clamp_min(1)
    if cosine:
        moved = F.normalize(moved, dim=-1)
    moved = torch.where(counts > 0, moved, means)
    empty = counts[..., 0] == 0
    assert nearest.distance is not None
    return _fill(rows, moved, empty, nearest.distance) if reseed and bool(empty.any()) else moved


def _fill(rows: _Rows, means: Tensor, empty: Tensor, distance: Tensor) -> Tensor:
    """``means`` [G, K, D] with those that are ``empty`` [G, K] moved to the rows of largest ``distance`` [G, N]."""
    G, _K, D = means.shape
    most = int(empty.sum(-1).max())
    far, place = distance.sort(dim=-1, descending=True, stable=True)
    far, place = far[:, :most], place[:, :most]
    found = means.new_zeros(G, most, 1 + D)  # where there are fewer rows: at distance 0
    found[:, : far.shape[1], 0] = far
    found[:, : far.shape[1], 1:] = rows.x.gather(1, place[..., None].expand(*place.shape, D))
    found = rows.of_ranks(found).transpose(0, 1).flatten(1, 2)  # [G, ranks * most, 1 + D]
    order = found[..., 0].sort(dim=-1, descending=True, stable=True).indices[:, :most]
    found = found.gather(1, order[..., None].expand(*order.shape, 1 + D))
    turn = (empty.cumsum(-1) - 1).clamp_min(0)  # the first empty one gets the farthest row
    found = found.gather(1, turn[..., None].expand(*turn.shape, 1 + D))
    return torch.where(empty[..., None] & (found[..., :1] > 0), found[..., 1:], means)

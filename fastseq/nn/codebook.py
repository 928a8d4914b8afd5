"""``Codebook``: the codes of a quantizer, learned by moving averages or by gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq import _check, functional
from fastseq.nn import dead_codes
from fastseq.nn._eager import eager
from fastseq.nn._ranks import ranks, sum_, sum_over_ranks
from fastseq.nn.dead_codes import Drawn
from fastseq.nn.kmeans import kmeans

EPS = 1e-6  # least length that a row is divided by
Weight = Tensor | Callable[[Tensor, Tensor], Tensor]


class Codebook(nn.Module):
    """G codebooks of K codes, with the buffers and the names of vector-quantize-pytorch.

    ``initted`` (bool), ``cluster_size`` [G, K], ``embed_avg`` [G, K, D] and ``embed`` [G, K, D]; the last is a
    parameter where the codebook is learnable. The moving averages are those of van den Oord et al. 2017, appendix A.1.

    A code is dead where its ``cluster_size`` is below the threshold. It becomes a row of the batch. One row is drawn
    from each of K equal stretches of the rows that count, and the dead codes take theirs evenly from these, so no row
    is given out twice; where there are more dead codes than rows, the rest wait for the next step.

    Args:
        dim: D. codebook_size: K. num_codebooks: G.
        kmeans_init, kmeans_iters: make the codes of the first batch by so many steps of Lloyd's algorithm.
        sync_kmeans: of the first batch of all ranks.
        decay: of the moving averages, in [0, 1]. eps: smooths the counts, > 0.
        threshold_ema_dead_code: 0 turns replacement off.
        reset_cluster_size: of a replaced code; None means the threshold.
        use_ddp: sum over the processes of ``torch.distributed``, by one all-reduce for each update.
        learnable_codebook, ema_update, manual_ema_update, use_cosine_sim, vq_bridge: as in ``VectorQuantize``.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 2,
        reset_cluster_size: float | None = None,
        use_ddp: bool = False,
        learnable_codebook: bool = False,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        use_cosine_sim: bool = False,
        vq_bridge: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        self.kmeans_iters, self.sync_kmeans = kmeans_iters, sync_kmeans
        self.decay, self.eps, self.use_ddp = decay, eps, use_ddp
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.reset_cluster_size = threshold_ema_dead_code if reset_cluster_size is None else reset_cluster_size
        self.learnable_codebook, self.use_cosine_sim = learnable_codebook, use_cosine_sim
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.vq_bridge = vq_bridge
        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = self.transform_input(embed)
        self.ready = not kmeans_init  # what ``initted`` holds, without waiting for a device
        self._waiting: tuple[Tensor, Tensor] | None = None  # counts and sums of accumulated updates
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)

    @property
    def has_dead_code_replacement(self) -> bool:
        """Whether dead codes are replaced."""
        return self.threshold_ema_dead_code > 0

    @property
    def metric(self) -> str:
        """Of ``functional.vq_quantize``; for the cosine rows and codes are scaled here already."""
        return "dot" if self.use_cosine_sim else "l2"

    def transform_input(self, x: Tensor) -> Tensor:
        """Rows as they are compared with codes: of length 1 for the cosine, else as they are."""
        return F.normalize(x, dim=-1, eps=EPS) if self.use_cosine_sim else x

    def codes(self, snapshot: bool = False) -> Tensor:
        """The codes [G, K, D] that rows are compared with.

        Args:
            snapshot: a copy, for a graph of autograd that must outlive an update in place.
        """
        embed = self.embed.clone() if snapshot or self.vq_bridge is not None else self.embed
        return embed if self.vq_bridge is None else self.vq_bridge(embed)

    def prepare(self, rows: Tensor, mask: Tensor | None) -> None:
        """What is learned from the rows [G, N, D] of a batch before they are quantized: nothing here."""

    def to_codebook(self, rows: Tensor) -> Tensor:
        """Rows as they are averaged into codes."""
        return rows

    def sums_to_codebook(self, counts: Tensor, sums: Tensor) -> Tensor:
        """``to_codebook`` of each of the rows whose numbers and sums these are, added up."""
        return sums

    def init_embed_(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Make the codes by k-means on rows [G, N, D], once; mask: bool [G, N], the rows that count.

        Nothing happens where no rank has a row that counts.
        """
        if not self.ready:
            self._initialize(rows, mask)

    @eager
    @torch.no_grad()
    def _initialize(self, rows: Tensor, mask: Tensor | None) -> None:
        if bool(self.initted):
            self.ready = True
            return
        together = self.use_ddp and self.sync_kmeans
        count = (rows.new_full((), rows.shape[1]) if mask is None else mask[0].sum()).double()
        if together:
            (count,) = sum_over_ranks([count])
        if not int(count):
            return
        means, counts = kmeans(
            rows.detach(),
            self.codebook_size,
            iterations=self.kmeans_iters,
            metric="cosine" if self.use_cosine_sim else "l2",
            mask=mask,
            init="random",
            all_reduce=sum_ if together else None,
        )
        self.set_codes(means, counts)

    @torch.no_grad()
    def set_codes(self, means: Tensor, counts: Tensor | None = None) -> None:
        """Overwrite the codes and, to match, their moving averages.

        Args:
            means: [G, K, D].
            counts: [G, K], the new ``cluster_size``; None leaves it as it is.

        Raises:
            ArgumentError: for another shape.
        """
        _check.shape("set_codes", "means", means, "G, K, D", *self.embed.shape)
        if counts is not None:
            _check.shape("set_codes", "counts", counts, "G, K", *self.cluster_size.shape)
            self.cluster_size.copy_(counts)
        self._overwrite(means)
        self.embed_avg.copy_(self.embed * self.cluster_size[..., None])
        self.initted.fill_(True)
        self.ready = True

    def observe(
        self,
        rows: Tensor,
        counts: Tensor,
        sums: Tensor,
        mask: Tensor | None = None,
        *,
        ema_update: bool | None = None,
        weight: Weight | None = None,
        accumulate: bool = False,
    ) -> None:
        """Update from the quantized rows of a batch, of all ranks by one all-reduce, and replace dead codes.

        Args:
            rows: [G, N, D]. mask: bool [G, N], those that count.
            counts, sums: [G, K] and [G, K, D], of the rows of each code.
            ema_update, weight, accumulate: as in ``update``.
        """
        if not self.updates(ema_update):
            return
        with torch.no_grad():
            sums = self.sums_to_codebook(counts, sums)
            expires = self.has_dead_code_replacement and not accumulate
            found = [counts, sums, *(self.draw(rows, mask) if expires else ())]
            if self.use_ddp:
                found = sum_over_ranks(found)
            drawn = Drawn(*found[2:]) if expires else None
            self.update(found[0], found[1], drawn, ema_update=ema_update, weight=weight, accumulate=accumulate)

    def updates(self, ema_update: bool | None = None) -> bool:
        """Whether counts and sums are wanted: for moving averages or for dead codes."""
        return (self.ema_update if ema_update is None else ema_update) or self.has_dead_code_replacement

    def draw(self, rows: Tensor, mask: Tensor | None) -> Drawn:
        """This rank's share of the rows that dead codes become."""
        rows = self.to_codebook(rows.detach()).to(torch.promote_types(rows.dtype, torch.float32))
        return dead_codes.draw(rows, mask, self.codebook_size, ranks() if self.use_ddp else (0, 1))

    @torch.no_grad()
    def update(
        self,
        counts: Tensor,
        sums: Tensor,
        drawn: Drawn | None = None,
        *,
        ema_update: bool | None = None,
        weight: Weight | None = None,
        accumulate: bool = False,
        when: Tensor | None = None,
    ) -> None:
        """Move the averages, compute the codes from them, and replace dead codes.

        Args:
            counts, sums: [G, K] and [G, K, D], of the rows of each code on all ranks.
            drawn: rows for dead codes; None replaces none.
            ema_update: overrides that of the codebook; without it averages are kept for the dead codes alone.
            weight: of this update, [K] or [G, K], or a function of sums and counts that returns it.
            accumulate: add counts and sums to the next update instead.
            when: bool, a scalar on the device; where False, nothing changes.

        Raises:
            ArgumentError: for a weight of another shape.
        """
        if not self.updates(ema_update):
            return
        if callable(weight) and not isinstance(weight, Tensor):
            weight = weight(sums, counts)
        if self._waiting is not None:
            counts, sums = counts + self._waiting[0], sums + self._waiting[1]
        self._waiting = (counts, sums) if accumulate else None
        if accumulate:
            return
        self._blend(counts, sums, weight, when)
        if (self.ema_update if ema_update is None else ema_update) and not self.manual_ema_update:
            self.update_ema(when)
        if drawn is not None:
            self._replace(drawn, when)

    def _blend(self, counts: Tensor, sums: Tensor, weight: Tensor | None, when: Tensor | None) -> None:
        step: Any = 1 - self.decay
        if weight is not None:
            if weight.shape not in (self.cluster_size.shape, self.cluster_size.shape[1:]):
                expected = f"[K] or [G, K] = {list(self.cluster_size.shape)}"
                _check.fail("VectorQuantize", "ema_update_weight", expected, list(weight.shape))
            step = step * weight.to(self.cluster_size).expand_as(self.cluster_size)
        if when is not None:
            step = torch.where(when, step, 0.0).to(self.cluster_size).expand_as(self.cluster_size)
        self.cluster_size.lerp_(counts.to(self.cluster_size), step)
        wide = step[..., None].to(self.embed_avg).expand_as(self.embed_avg) if isinstance(step, Tensor) else step
        self.embed_avg.lerp_(sums.to(self.embed_avg), wide)

    @torch.no_grad()
    def update_ema(self, when: Tensor | None = None) -> None:
        """Compute the codes from the moving averages; where ``when``, a bool scalar, is False, leave them."""
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        means = self.transform_input(self.embed_avg / smoothed[..., None])
        self._overwrite(means if when is None else torch.where(when, means, self.embed))

    @torch.no_grad()
    def expire_codes_(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Replace dead codes by rows [G, ..., D], while training; mask: bool [G, N], the rows that count."""
        if not self.has_dead_code_replacement or not self.training:
            return
        drawn = self.draw(rows.reshape(self.num_codebooks, -1, rows.shape[-1]), mask)
        self._replace(Drawn(*sum_over_ranks(drawn)) if self.use_ddp else drawn, None)

    def _overwrite(self, codes: Tensor) -> None:
        if self.learnable_codebook and getattr(self, "_is_fsdp_managed_module", False):
            expected = "False within fully_shard, whose next gather would undo what is written"
            _check.fail("VectorQuantize", "learnable_codebook", expected, "True, with codes to overwrite")
        self.embed.copy_(codes)

    def _replace(self, drawn: Drawn, when: Tensor | None) -> None:
        dead = self.cluster_size < self.threshold_ema_dead_code
        if when is not None:
            dead = dead & when
        rows, taken = dead_codes.assign(dead, drawn)
        rows = self.transform_input(rows).to(self.embed)
        self._overwrite(torch.where(taken[..., None], rows, self.embed))
        self.cluster_size.copy_(torch.where(taken, self.reset_cluster_size, self.cluster_size))
        self.embed_avg.copy_(torch.where(taken[..., None], rows * self.reset_cluster_size, self.embed_avg))

    def update_indices(
        self,
        rows: Tensor,
        indices: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Weight | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """Update from rows [G, N, D] and their indices [G, N]; rows with index -1 do not count, nor masked ones."""
        counted = indices >= 0 if mask is None else (indices >= 0) & mask
        counts, sums = functional.vq_sums(rows, indices.masked_fill(~counted, -1), self.codebook_size)
        self.observe(
            rows,
            counts,
            sums,
            counted,
            ema_update=ema_update,
            weight=ema_update_weight,
            accumulate=accum_ema_update,
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.ready = not self.initted.is_meta and bool(self.initted)

    def extra_repr(self) -> str:
        """The sizes, and how the codes are learned."""
        G, K, D = self.embed.shape
        learned = "gradient" if self.learnable_codebook and not self.ema_update else "moving average"
        return f"num_codebooks={G}, codebook_size={K}, dim={D}, learned by {learned}"

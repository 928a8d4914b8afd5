"""``RowQuantizer``: rows become codes; the gradients, losses and updates of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastseq import functional
from fastseq.functional import Quantized
from fastseq.nn import vq_losses
from fastseq.nn._ranks import ranks, sum_over_ranks
from fastseq.nn.codebook import Codebook
from fastseq.nn.estimators import directional_reparam
from fastseq.nn.reinit import Reinit
from fastseq.nn.vq_layout import Heads
from fastseq.nn.vq_lookup import chosen, nearest

Transform = Callable[[Tensor], Tensor]


class LossBreakdown(NamedTuple):
    """The terms of the loss, before their weights."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class Call(NamedTuple):
    """What one forward was asked for."""

    B: int
    T: int
    mask: Tensor | None  # [B, T]
    counted: Tensor | None  # the same for rows, [G, N]
    topk: int | None
    temperature: float
    sampled: bool
    frozen: bool
    transform: Transform | None
    gradient: str  # of the output: "codes", "straight", "rotation" or "directional"
    soft: bool  # it goes through the softmax of the similarities
    similar: bool  # these are needed, with their gradient


class RowQuantizer(nn.Module):
    """The part of ``VectorQuantize`` that works on rows [G, N, D]; its options are set there."""

    _codebook: Codebook
    dim: int
    codebook_size: int
    heads: int
    separate_codebook_per_head: bool
    freeze_codebook: bool
    learnable_codebook: bool
    use_cosine_sim: bool
    sample_codebook_temp: float
    commitment_weight: float
    commitment_use_cross_entropy_loss: bool
    stochastic_sample_codes: bool
    straight_through: bool
    rotation_trick: bool
    directional_reparam: bool
    directional_reparam_variance: float
    sync_update_v: float
    orthogonal_reg_weight: float
    orthogonal_reg_active_codes_only: bool
    orthogonal_reg_max_codes: int | None
    codebook_diversity_loss_weight: float
    codebook_diversity_temperature: float
    manual_in_place_optimizer_update: bool
    route_gradients_to_input: bool
    return_zeros_for_masked_padding: bool
    index_dtype: torch.dtype

    in_place_codebook_optimizer: torch.optim.Optimizer | None
    has_commitment_loss: bool
    has_codebook_orthogonal_loss: bool
    has_codebook_diversity_loss: bool
    reinit: Reinit | None
    _heads: Heads

    def update_in_place_optimizer(self) -> None:
        """A step of ``in_place_codebook_optimizer``, if there is one, with the mean gradient of all ranks."""
        if self.in_place_codebook_optimizer is None:
            return
        if self._codebook.use_ddp:
            grads = [p.grad for p in self._codebook.parameters() if p.grad is not None]
            for grad, total in zip(grads, sum_over_ranks(grads), strict=True):
                grad.copy_(total / ranks()[1])
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    def _ways(self, from_input: bool, judged: bool, temperature: float) -> tuple[str, bool, bool]:
        """The last three of ``Call``: the way of the gradient, and whether similarities of rows and codes are needed.

        Args:
            from_input: the input wants a gradient. judged: its codes are given by the caller.
        """
        if not self.training:
            return "codes", False, judged
        routed = from_input and self.route_gradients_to_input
        soft = self.straight_through and not routed and temperature > 0
        by_entropy = self.has_commitment_loss and self.commitment_use_cross_entropy_loss
        similar = judged or soft or by_entropy or self.has_codebook_diversity_loss
        if not routed:
            return "codes", soft, similar
        gradient = "directional" if self.directional_reparam else "rotation" if self.rotation_trick else "straight"
        return gradient, soft, similar

    def _warms_up(self, rows: Tensor, call: Call) -> bool:
        """Tell ``reinit`` of the rows while training; whether it is too early for codes, and rows stay as they are."""
        if self.reinit is None:
            return False
        if self.training and not call.frozen:
            return not self.reinit.step(rows.detach(), call.counted, self._codebook)
        return not self.reinit.quantizes

    def _unquantized(self, rows: Tensor, call: Call) -> Quantized:
        index = torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device)
        if call.counted is not None:
            index = index.masked_fill(~call.counted, -1)
        if call.topk is not None:
            rows, index = (t[:, :, None].expand(*t.shape[:2], call.topk, *t.shape[2:]) for t in (rows, index))
        none = rows.new_zeros(index.shape)
        return Quantized(rows, index, none, none, None, None)

    def _quantize(
        self, rows: Tensor, call: Call, update: dict[str, Any]
    ) -> tuple[Quantized, Tensor | None, Tensor | None]:
        """The codes of the rows, their similarities where needed, and the loss of the optimizer in place."""
        book = self._codebook
        book.init_embed_(rows, call.counted)
        book.prepare(rows, call.counted)
        learns = self.training and not call.frozen
        sums = learns and call.topk is None and book.updates(update["ema_update"])
        optimized = None
        if learns and self.in_place_codebook_optimizer is not None:
            with torch.enable_grad():
                out, _ = self._lookup(rows.detach(), call._replace(gradient="codes", soft=False, similar=False), sums)
                self._observe(rows, out, call, update)
                optimized = out.codebook_error.sum() / self._numbers(rows, call)
                optimized.backward()
            if not self.manual_in_place_optimizer_update:
                self.update_in_place_optimizer()
            sums, optimized = False, optimized.detach()
        out, logits = self._lookup(rows, call, sums)
        estimated = self._estimate(rows, out, logits, call)  # of the codes as they were looked up
        self._observe(rows, out, call, update)
        return estimated, logits, optimized

    def _observe(self, rows: Tensor, out: Quantized, call: Call, update: dict[str, Any]) -> None:
        if out.counts is not None and out.sums is not None:
            self._codebook.observe(rows, out.counts, out.sums, call.counted, **update)

    def _lookup(self, rows: Tensor, call: Call, sums: bool) -> tuple[Quantized, Tensor | None]:
        book, mask = self._codebook, call.counted
        codes = book.codes(snapshot=call.similar or call.transform is not None)
        codes = codes.detach() if call.frozen else codes
        gradient = "codes" if call.gradient == "directional" else call.gradient
        if call.transform is not None:
            codes = book.transform_input(call.transform(codes).reshape(1, rows.shape[1], *codes.shape[1:]))
        logits = None
        if call.similar or call.sampled or call.transform is not None:
            with torch.set_grad_enabled(call.similar and torch.is_grad_enabled()):
                logits = vq_losses.similarities(rows, codes, self.use_cosine_sim)
        if call.topk is None and not call.sampled and call.transform is None:
            return nearest(rows, codes, book.metric, mask, gradient, sums), logits
        if logits is None or (call.topk is not None and not call.sampled and call.transform is None):
            index = functional.vq_nearest(rows, codes, metric=book.metric, best=call.topk or 1).index
            index = index[..., None] if call.topk == 1 else index
        else:
            scores = vq_losses.add_noise(logits.detach(), call.temperature) if call.sampled else logits
            index = scores.argmax(-1) if call.topk is None else scores.topk(call.topk, dim=-1).indices
        return chosen(rows, codes, index, mask, gradient, sums), logits

    def _estimate(self, rows: Tensor, out: Quantized, logits: Tensor | None, call: Call) -> Quantized:
        """``out`` with the gradients that its codes do not have yet."""
        quantized = out.quantized
        if call.gradient == "directional":
            rows = rows if call.topk is None else rows[:, :, None]
            quantized = directional_reparam(rows, quantized, self.directional_reparam_variance)
        if call.soft and logits is not None:
            share = (logits / call.temperature).softmax(-1)
            quantized = quantized + (share - share.detach()) @ self._codebook.codes(snapshot=True)
        if self.training and self.sync_update_v:
            quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
        return out if quantized is out.quantized else out._replace(quantized=quantized)

    def _numbers(self, rows: Tensor, call: Call) -> Tensor | int:
        """How many numbers the rows that count hold, at least 1."""
        D = rows.shape[-1]
        return max(rows.numel(), 1) if call.counted is None else call.counted.sum().clamp_min(1) * D

    def _losses(
        self, out: Quantized, logits: Tensor | None, rows: Tensor, call: Call, optimized: Tensor | None
    ) -> tuple[Tensor, LossBreakdown]:
        zero = rows.new_zeros(())
        loss = commitment = diversity = orthogonal = zero
        optimized = zero if optimized is None else optimized
        distance = out.commitment
        if self.learnable_codebook:
            distance = distance + (out.codebook_error - out.codebook_error.detach())
        if call.topk is not None and (self.has_commitment_loss or not self.training):
            commitment = distance / rows.shape[-1]
            loss = commitment * (self.commitment_weight if self.has_commitment_loss else 1.0)
        if not self.training:
            return loss, LossBreakdown(commitment, diversity, orthogonal, optimized)
        if self.has_codebook_diversity_loss and logits is not None:
            each = self._heads.by_sequence(logits, call.B, call.T)
            mask = None if call.mask is None else call.mask.expand(each.shape[:3])
            diversity = vq_losses.diversity_loss(each, self.codebook_diversity_temperature, mask)
            loss = loss + diversity * self.codebook_diversity_loss_weight
        if self.has_commitment_loss and call.topk is None:
            if self.commitment_use_cross_entropy_loss:
                commitment = zero if logits is None else vq_losses.cross_entropy(logits, out.index)
            else:
                commitment = distance.sum() / self._numbers(rows, call)
            loss = loss + commitment * self.commitment_weight
        if self.has_codebook_orthogonal_loss:
            orthogonal = self._orthogonal(out.index)
            loss = loss + orthogonal * self.orthogonal_reg_weight
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not loss.requires_grad:
            loss.requires_grad_()  # so that backward() can be called whatever the options
        return loss, LossBreakdown(commitment, diversity, orthogonal, optimized)

    def _orthogonal(self, index: Tensor) -> Tensor:
        """The orthogonality of the codes, of those in ``index``, or of some of them drawn at random."""
        codes, counted = self._codebook.embed.clone(), None
        (G, K, D), most = codes.shape, self.orthogonal_reg_max_codes
        if self.orthogonal_reg_active_codes_only:
            place = index.reshape(G, -1)
            used = codes.new_zeros(G, K + 1).scatter(1, torch.where(place < 0, K, place), 1.0)  # the last: padding
            counted = used[:, :K].detach()
        if most is not None and K > most:
            if counted is None:
                return vq_losses.orthogonal_loss(codes[:, torch.randperm(K, device=codes.device)[:most]], None)
            drawn = (torch.rand(G, K, device=codes.device) - 2 * counted).topk(most, largest=False).indices
            codes, counted = codes.gather(1, drawn[..., None].expand(G, most, D)), counted.gather(1, drawn)
        return vq_losses.orthogonal_loss(codes, counted)

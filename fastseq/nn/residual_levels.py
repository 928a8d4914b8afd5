"""The ways through the levels of a residual quantizer: one by one, with a beam, or all of them in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import functional
from fastseq.nn import onnx
from fastseq.nn._ranks import several, sum_over_ranks
from fastseq.nn.affine_codebook import AffineCodebook
from fastseq.nn.dead_codes import Drawn, draw_rows
from fastseq.nn.vector_quantize import VectorQuantize


class Request(NamedTuple):
    """What one forward asks of every level."""

    mask: Tensor | None  # bool [B, N], the rows that count
    levels: Tensor | None  # integers [B], how many levels each sample uses; None: all that there are
    temperature: float | None
    freeze: bool | None

    def active(self, level: int) -> Tensor | None:
        """The rows, bool [B, N] or [B, 1], that use this level; None where all do."""
        if self.levels is None:
            return self.mask
        used = (self.levels > level)[:, None]
        return used if self.mask is None else used & self.mask


class Found(NamedTuple):
    """What the levels that were walked gave."""

    quantized: Tensor  # [B, N, D], the sum
    indices: list[Tensor]  # [B, N] each
    losses: list[Tensor]  # scalars
    residuals: list[Tensor]  # [B, N, D] each, the input of every level


class Level(NamedTuple):
    """One level: the layer, the network that bends its codes (or None), and the weight of its distance in a beam."""

    layer: VectorQuantize
    network: Any
    weight: Tensor


def fraction(quantized: Tensor, share: float) -> Tensor:
    """``quantized``, with this share of its gradient."""
    return quantized.detach() if share <= 0 else share * quantized + (1 - share) * quantized.detach()


def where_there_are_rows(sums: Tensor, counts: Tensor) -> Tensor:
    """Weight of a moving average: 0 where no row used the level, which stays as it is then."""
    return (counts.sum(-1, keepdim=True) > 0).to(counts.dtype).expand_as(counts)


def _options(level: Level, request: Request, condition: Tensor) -> dict[str, Any]:
    transform = None if level.network is None else partial(level.network, condition=condition)
    return {
        "sample_codebook_temp": request.temperature,
        "freeze_codebook": request.freeze,
        "codebook_transform_fn": transform,
    }


def one_by_one(
    x: Tensor,
    levels: Sequence[Level],
    request: Request,
    share: float,
    indices: Tensor | None = None,
) -> Found:
    """Each level quantizes what the ones before it left.

    Args:
        x: [B, N, D]. share: of the gradient that a level's codes pass to the levels after it.
        indices: [B, N, M]: instead of quantization losses, the cross-entropy of these.
    """
    residual = x.to(torch.promote_types(x.dtype, torch.float32))
    total = torch.zeros_like(residual)
    found = Found(total, [], [], [])
    for m, level in enumerate(levels):
        options = _options(level, request, total)
        mask = request.active(m)
        if mask is not None:
            options["mask"] = mask.expand(x.shape[:2])
        found.residuals.append(residual)
        if indices is not None:
            quantized, loss = level.layer(residual, indices=indices[..., m], **options)
        else:
            if request.levels is not None:
                options["ema_update_weight"] = where_there_are_rows
            quantized, index, loss = level.layer(residual, **options)
            found.indices.append(index)
        found.losses.append(loss)
        residual = residual - fraction(quantized, share)
        total = total + quantized
    return found._replace(quantized=total)


class _Step(NamedTuple):
    """One level of a beam search, to trace the best candidate back; J beams before it, C candidates, k for each."""

    residual: Tensor  # [B, N, J, D]
    code: Tensor  # [B, N, C]
    loss: Tensor  # [B, N, C]
    kept: Tensor  # [B, N, J of the next level], places among the C
    k: int


def beam_search(x: Tensor, levels: Sequence[Level], request: Request, share: float, width: int) -> Found:
    """The best of ``width`` paths through the levels, by the weighted sum of their losses.

    Args:
        x: [B, N, D]. share: as in ``one_by_one``.
    """
    B, N, D = x.shape
    residual = x.to(torch.promote_types(x.dtype, torch.float32))[:, :, None]
    total = torch.zeros_like(residual)
    score = residual.new_zeros(B, N, 1)
    steps = []
    for m, level in enumerate(levels):
        J = residual.shape[2]
        options = _options(level, request, total.flatten(1, 2))
        mask = request.active(m)
        if mask is not None:
            options["mask"] = mask[:, :, None].expand(B, N, J).flatten(1)
        codes, index, loss = level.layer(residual.flatten(1, 2), topk=width, **options)
        k = codes.shape[2]
        codes, index = codes.reshape(B, N, J * k, D), index.reshape(B, N, J * k)
        if loss.dim() == 0:  # of a layer without commitment loss
            apart = (residual[:, :, :, None] - codes.view(B, N, J, k, D)).detach().square().mean(-1)
            loss = loss.expand(B, N, J * k)
        else:
            loss = loss.reshape(B, N, J * k)
            apart = loss.detach().view(B, N, J, k)
        score = (score[..., None] - apart * level.weight).flatten(2)
        score, kept = score.topk(min(width if m + 1 < len(levels) else 1, J * k), dim=-1)
        steps.append(_Step(residual, index, loss, kept, k))
        codes = _take(codes, kept)
        residual = _take(residual, kept // k) - fraction(codes, share)
        total = _take(total, kept // k) + codes
    return _trace_back(total[:, :, 0], steps, request)


def _take(t: Tensor, places: Tensor) -> Tensor:
    """Rows [B, N, J, D] of ``t`` [B, N, C, D] at ``places`` [B, N, J]."""
    return t.gather(2, places[..., None].expand(*places.shape, t.shape[-1]))


def _trace_back(quantized: Tensor, steps: list[_Step], request: Request) -> Found:
    """Index, loss and input of every level on the best path."""
    found = Found(quantized, [], [], [])
    place = torch.zeros_like(steps[-1].kept[..., :1])
    for m in reversed(range(len(steps))):
        step = steps[m]
        candidate = step.kept.gather(2, place)
        place = candidate // step.k
        loss = step.loss.gather(2, candidate)[..., 0]
        found.indices.insert(0, step.code.gather(2, candidate)[..., 0])
        found.losses.insert(0, _mean(loss, request.active(m)))
        found.residuals.insert(0, _take(step.residual.detach(), place)[:, :, 0])
    return found


def learns(layer: VectorQuantize, request: Request) -> bool:
    """Whether a forward updates the codebook of this level."""
    return layer.training and not (layer.freeze_codebook if request.freeze is None else request.freeze)


def learn_from(found: Found, levels: Sequence[Level], request: Request) -> None:
    """Update each codebook from the inputs and indices of its level."""
    for (layer, _, _), rest, index in zip(levels, found.residuals, found.indices, strict=True):
        if learns(layer, request):
            rows = layer._codebook.transform_input(rest.reshape(1, -1, rest.shape[-1]))
            layer._codebook.update_indices(rows, index.reshape(1, -1))


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Of ``values`` [B, N], those where ``mask`` (broadcast) is True; 0 where there are none."""
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    mask = mask.expand(values.shape)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def why_not_at_once(levels: Sequence[Level], request: Request, share: float, shared: bool) -> str | None:
    """Why ``all_at_once`` does not give what ``one_by_one`` gives; None where it does.

    Args:
        share: as in ``one_by_one``. shared: all levels have one codebook.
    """
    if onnx.exporting():
        return "ONNX has no operator for it"
    for layer, network, _ in levels:
        codebook = layer._codebook
        reasons = [
            (_kind(layer) != _kind(levels[0].layer), "levels that train or learn in different ways"),
            (network is not None, "implicit_neural_codebook"),
            (layer.use_cosine_sim, "use_cosine_sim"),
            (not codebook.ready, "k-means on the first batch"),
            (torch.is_grad_enabled() and codebook.embed.requires_grad, "learnable_codebook"),
            (bool(layer._forward_hooks or layer._forward_pre_hooks), "hooks of a level"),
        ]
        if layer.training:
            temperature = layer.sample_codebook_temp if request.temperature is None else request.temperature
            reasons += [
                (share > 0, "quant_grad_frac"),
                (shared, "shared_codebook"),
                (layer.stochastic_sample_codes and temperature > 0, "stochastic_sample_codes"),
                (layer.directional_reparam, "directional_reparam"),
                (not layer.route_gradients_to_input, "route_gradients_to_input=False"),
                (layer.commitment_use_cross_entropy_loss, "commitment_use_cross_entropy_loss"),
                (layer.has_codebook_diversity_loss, "codebook_diversity_loss_weight"),
                (layer.has_codebook_orthogonal_loss, "orthogonal_reg_weight"),
                (isinstance(codebook, AffineCodebook), "affine_param"),
                (layer.reinit is not None, "reinit"),
            ]
        for holds, reason in reasons:
            if holds:
                return reason
    return None


def _kind(layer: VectorQuantize) -> tuple[bool, ...]:
    """What ``all_at_once`` asks the first level alone."""
    codebook = layer._codebook
    expires = True if codebook.has_dead_code_replacement else False  # where a graph is made it is no plain bool
    return layer.training, layer.freeze_codebook, layer.rotation_trick, codebook.ema_update, expires, codebook.use_ddp


def all_at_once(x: Tensor, levels: Sequence[Level], request: Request, update: Sequence[VectorQuantize]) -> Found:
    """What ``one_by_one`` gives, by one operator that takes each row through all levels.

    Args:
        x: [B, N, D].
        update: the layers whose codebooks learn from this batch, those of ``levels`` and maybe more after them.
    """
    B, N, D = x.shape
    layers = [level.layer for level in levels]
    training = layers[0].training
    rows = (x if training else x.detach()).reshape(B * N, D)
    codebooks = [layer._codebook.codes()[0].detach() for layer in layers]
    mask = None if request.mask is None else request.mask.reshape(B * N)
    used = request.levels
    if used is not None:
        used = used.to(torch.int32)[:, None].expand(B, N).reshape(B * N)
    gradient = "rotation" if layers[0].rotation_trick else "straight"
    found = functional.vq_residual(rows, codebooks, mask=mask, levels=used, gradient=gradient, sums=bool(update))
    if found.counts is not None and found.sums is not None:
        with torch.no_grad():
            drawn = _draw(rows.detach(), codebooks, found.index, mask, update)
            _update(found.counts, found.sums, drawn, update, checked=used is not None or several())
    indices = [index.reshape(B, N).to(layer.index_dtype) for index, layer in zip(found.index.T, layers, strict=True)]
    full = mask is None and used is None
    losses = [_loss(found.commitment[m], found.index[:, m], D, layer, full) for m, layer in enumerate(layers)]
    return Found(found.quantized.reshape(B, N, D), indices, losses, [])


def _loss(commitment: Tensor, index: Tensor, D: int, layer: VectorQuantize, full: bool) -> Tensor:
    """The loss of a level, from the squared residuals [N] of its rows, all of which count where ``full``."""
    if not layer.training or not layer.has_commitment_loss:
        return commitment.new_zeros(())
    count = max(index.shape[0], 1) if full else (index >= 0).sum().clamp_min(1)
    return commitment.sum() / (count * D) * layer.commitment_weight


def _draw(
    rows: Tensor, codebooks: list[Tensor], index: Tensor, mask: Tensor | None, update: Sequence[VectorQuantize]
) -> list[Drawn]:
    """For each of ``update``, residuals that its dead codes become; nothing where dead codes stay.

    So many rows as there are codes are drawn once for all levels and taken through these again, so that the residuals
    of all rows need not be kept.

    Args:
        rows: [N, D]. codebooks: [K, D] each, before the update. index: [N, levels]. mask: bool [N].
    """
    own = [layer._codebook for layer in update]
    if not own[0].has_dead_code_replacement:
        return []
    R = max(codebook.codebook_size for codebook in own)
    N = rows.shape[0]
    number, valid = draw_rows(N, R, 1, None if mask is None else mask[None], rows.device)
    if N:
        rows, index = rows[number[0]], index[number[0]]
    else:
        valid = valid[:, :0]
    drawn = []
    for m, codebook in enumerate(own):
        if m < len(codebooks):
            drawn.append(codebook.draw(rows[None], valid & (index[:, m] >= 0)))
            rows = rows - F.embedding(index[:, m].long().clamp_min(0), codebooks[m]).to(rows.dtype)
        else:
            drawn.append(codebook.draw(rows[None], torch.zeros_like(valid)))
    return drawn


def _update(
    counts: Sequence[Tensor],
    sums: Sequence[Tensor],
    drawn: list[Drawn],
    update: Sequence[VectorQuantize],
    checked: bool,
) -> None:
    """Update each codebook, from the rows of all ranks by one all-reduce.

    Args:
        counts, sums: [K] and [K, D] of the levels that ran.
        drawn: of every one of ``update``, or empty.
        checked: leave a codebook as it is where no row on any rank used its level.
    """
    given = []
    for m, layer in enumerate(update):
        codebook = layer._codebook
        ran = m < len(counts)
        given += [
            counts[m][None] if ran else torch.zeros_like(codebook.cluster_size),
            sums[m][None] if ran else torch.zeros_like(codebook.embed_avg),
            *(drawn[m] if drawn else ()),
        ]
    if update[0]._codebook.use_ddp:
        given = sum_over_ranks(given)
    each = len(given) // len(update)
    for m, layer in enumerate(update):
        count, total, *rest = given[m * each : (m + 1) * each]
        when = count.sum() > 0 if checked else None
        layer._codebook.update(count, total, Drawn(*rest) if rest else None, when=when)

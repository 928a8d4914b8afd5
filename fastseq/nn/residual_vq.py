"""``ResidualVQ``: vectors become sums of codes, one of each level, as in vector-quantize-pytorch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import _check
from fastseq.nn._indices import check_indices
from fastseq.nn._ranks import several
from fastseq.nn.estimators import directional_reparam
from fastseq.nn.implicit_codebook import ImplicitCodebook
from fastseq.nn.residual_levels import (
    Found,
    Level,
    Request,
    all_at_once,
    beam_search,
    learn_from,
    learns,
    one_by_one,
    why_not_at_once,
)
from fastseq.nn.vector_quantize import VectorQuantize
from fastseq.nn.vq_layout import Layout
from fastseq.nn.vq_lookup import decode

_NAME = "ResidualVQ"
_REFUSED = {  # arguments of VectorQuantize that have no meaning for a level -> their defaults, and what to do instead
    "heads": (1, "use GroupedResidualVQ with groups"),
    "channel_last": (True, "transpose the input, or use accept_image_fmap"),
    "accept_3d_fmap": (False, "flatten depth, height and width into rows"),
    "layernorm_after_project_in": (False, "put a torch.nn.LayerNorm in front of the module"),
    "batch_norm": (None, "put a torch.nn.BatchNorm1d in front of the module"),
    "reinit": (None, "give each of .layers a Reinit of its own"),
}


class ResidualVQ(nn.Module):
    """Residual vector quantization: each level quantizes what the levels before it left.

    Zeghidour et al. 2021, "SoundStream", algorithm 1. A drop-in for the class of this name in vector-quantize-pytorch:
    arguments, results, state_dict. Where the options allow it all levels run in one pass over the rows: Euclidean
    distance, codebooks that are moving averages or do not change, nothing random, no beam (see
    ``residual_levels.why_not_at_once``); the results are the same.

    It differs where that class fails or contradicts itself: image maps of any height and width, ``indices`` (each
    level is judged on its own residual), beams beside ``implicit_neural_codebook``; ``freeze_codebook`` of the
    constructor holds unless a call says otherwise, and freezes beams too; ``diveq`` adds noise only in training.

    Args:
        dim: of the input.
        num_quantizers: levels; None where ``codebook_size`` is a tuple.
        codebook_size: codes of every level, or of each.
        codebook_dim: of the codes; None means ``dim``; else the input is projected to it and back.
        shared_codebook: one codebook for all levels, updated once per forward.
        diveq: the codebooks learn from the gradient of the output, which keeps the length of the error and a noisy
            direction (Vali et al. 2025, "DiVeQ"). Sets ``learnable_codebook``, and no commitment loss.
        heads: 1.
        quantize_dropout: in training use a random number of levels (Zeghidour et al. 2021), the same for the whole
            batch and, under ``torch.distributed``, on all ranks, as long as these call the module equally often.
        quantize_dropout_cutoff_index: at least so many levels and one more; 0..num_quantizers - 1.
        quantize_dropout_multiple_of: the number of levels is rounded up to a multiple of this.
        accept_image_fmap: the input is [B, dim, H, W].
        implicit_neural_codebook: the codes of all levels but the first are bent by a network that sees the sum of the
            levels before (QINCo, see ``ImplicitCodebook``); mlp_kwargs: its ``dim_hidden`` and ``depth``.
        beam_size, eval_beam_size: paths that are searched at once in training and evaluation; None means no beam, and
            evaluation as in training.
        beam_score_quantizer_weights: weight of each level in the score of a path; None means 1.
        quant_grad_frac: share of the gradient that a level's codes pass to later levels, in [0, 1].
        return_zeros_for_masked_padding: of rows outside the mask; else these return the input.
        quantize_dropout_per_sample: each sample of the batch draws its own number of levels.
        vq_kwargs: of ``VectorQuantize``, for every level.
    """

    beam_score_weights: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | Sequence[int],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        quantize_dropout_per_sample: bool = False,
        **vq_kwargs: Any,
    ) -> None:
        super().__init__()
        _refuse({"heads": heads, **vq_kwargs})
        _check.probability(_NAME, "quant_grad_frac", quant_grad_frac)
        sizes = _sizes(num_quantizers, codebook_size, shared_codebook)
        M = len(sizes)
        D = dim if codebook_dim is None else codebook_dim
        self.codebook_dim, self.num_quantizers, self.codebook_sizes = D, M, sizes
        self.has_projections = D != dim
        self.project_in: nn.Module = nn.Linear(dim, D) if D != dim else nn.Identity()
        self.project_out: nn.Module = nn.Linear(D, dim) if D != dim else nn.Identity()
        self.dim, self.accept_image_fmap = dim, accept_image_fmap
        self._layout = Layout(dim, channel_last=True, map_dims=2 if accept_image_fmap else 0)
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.implicit_neural_codebook, self.shared_codebook = implicit_neural_codebook, shared_codebook
        self.diveq = diveq
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.uniform_codebook_size = len(set(sizes)) == 1
        cutoff, multiple = quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        self._set_dropout(quantize_dropout, cutoff, multiple, quantize_dropout_per_sample)
        self._set_beam(beam_size, eval_beam_size, beam_score_quantizer_weights)
        if implicit_neural_codebook or diveq:
            vq_kwargs.update(learnable_codebook=True, ema_update=False)
        if diveq:
            vq_kwargs.update(route_gradients_to_input=False, commitment_weight=0.0)
        if shared_codebook:
            vq_kwargs.update(manual_ema_update=True, manual_in_place_optimizer_update=True)
        self.layers = nn.ModuleList(VectorQuantize(dim=D, codebook_size=K, **vq_kwargs) for K in sizes)
        first, *others = self._quantizers()
        self.vq_is_ema_updating = first.ema_update
        networks = [ImplicitCodebook(D, **(mlp_kwargs or {})) for _ in range(M - 1)] if implicit_neural_codebook else []
        self.mlps = nn.ModuleList(networks) if implicit_neural_codebook else (None,) * (M - 1)
        if shared_codebook:
            for layer in others:
                layer._codebook = first._codebook

    def _quantizers(self) -> list[VectorQuantize]:
        return list(self.layers)  # type: ignore[arg-type]

    def _networks(self) -> tuple[Any, ...]:
        return (None, *self.mlps)

    def _set_dropout(self, on: bool, cutoff: int, multiple: int, per_sample: bool) -> None:
        M = self.num_quantizers
        if not 0 <= cutoff < (M if on else cutoff + 1):
            _check.fail(_NAME, "quantize_dropout_cutoff_index", f"in 0..num_quantizers - 1 = 0..{M - 1}", cutoff)
        if multiple < 1:
            _check.fail(_NAME, "quantize_dropout_multiple_of", "an integer >= 1", multiple)
        if per_sample and not on:
            _check.fail(_NAME, "quantize_dropout_per_sample", "False where quantize_dropout=False", per_sample)
        self.quantize_dropout = on and M > 1
        self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of = cutoff, multiple
        self.quantize_dropout_per_sample = per_sample
        self._draws = 0  # of numbers of levels under torch.distributed

    def _set_beam(self, beam: int | None, eval_beam: int | None, weights: Sequence[float] | None) -> None:
        M = self.num_quantizers
        if eval_beam is not None and beam is None:
            _check.fail(_NAME, "eval_beam_size", "None where beam_size is None", eval_beam)
        for name, size in (("beam_size", beam), ("eval_beam_size", eval_beam)):
            if size is not None and size < 1:
                _check.fail(_NAME, name, "an integer >= 1, or None", size)
        if weights is not None and len(weights) != M:
            _check.fail(_NAME, "beam_score_quantizer_weights", f"num_quantizers = {M} numbers", f"{len(weights)}")
        self.beam_size, self.eval_beam_size = beam, beam if eval_beam is None else eval_beam
        given = torch.tensor([1.0] * M if weights is None else list(weights))
        self.register_buffer("beam_score_weights", given, persistent=False)

    @property
    def codebook_size(self) -> int:
        """Codes of the first level."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """[M, K, D], or where the sizes differ a tuple of [K, D]."""
        codebooks = tuple(layer._codebook.embed[0] for layer in self._quantizers())
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of each level.

        Args:
            indices: integers [B, ..., m], the first m levels, m <= num_quantizers; -1 means no code.

        Returns:
            [M, B, ..., codebook_dim]; zeros where there is no code.

        Raises:
            ArgumentError: more columns than levels; on the CPU also a number that is no code.
        """
        self._check_indices("get_codes_from_indices", indices)
        return self._padded(list(self._codes(indices)), 0)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` at evaluation returned with these indices, channels last: [B, ..., dim].

        Args:
            indices: as for ``get_codes_from_indices``.
        """
        self._check_indices("get_output_from_indices", indices)
        total: Tensor = sum(self._codes(indices))  # type: ignore[assignment]
        output: Tensor = self.project_out(total)
        return output

    def _check_indices(self, function: str, indices: Tensor) -> None:
        M = self.num_quantizers
        if indices.dim() < 2 or not 1 <= indices.shape[-1] <= M:
            _check.fail(function, "indices", f"[B, ..., 1 to {M} levels]", list(indices.shape))
        for index, K in zip(indices.unbind(-1), self.codebook_sizes, strict=False):
            check_indices(function, index, K, least=-1)

    def _codes(self, indices: Tensor) -> Iterator[Tensor]:
        total: Tensor | None = None
        for layer, network, index in zip(self._quantizers(), self._networks(), indices.unbind(-1), strict=False):
            codes = decode(layer._codebook.codes(), index, 1)
            if network is not None and total is not None:
                codes = torch.where((index >= 0)[..., None], network.chosen(codes, total), 0.0)
            total = codes if total is None else total + codes
            yield codes

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
        n_quantizers: int | Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """
        Args:
            x: [B, N, dim], [B, dim], or with ``accept_image_fmap`` [B, dim, H, W].
            mask: bool [B, N], the rows that count; others are zeros (or x) with index -1.
            indices: [B, N, M] (a list is stacked): return the cross-entropy of these codes given the distances instead
                of indices and losses.
            return_all_codes: also return the codes of each level, as the codebooks are after this forward.
            sample_codebook_temp, freeze_codebook: as in ``VectorQuantize``.
            beam_size: instead of the constructor's; 1 means no beam.
            rand_quantize_dropout_fixed_seed: of the number of levels in training.
            n_quantizers: use only the first levels, and draw no dropout: how many, 1..num_quantizers, or integers [B],
                how many for each sample.

        Returns:
            quantized, shaped as x; indices [B, N, M] ([B, M]; [B, H, W, M]), -1 for levels that were not used; losses
            [M], zeros at evaluation; with ``return_all_codes`` the codes [M, B, N, codebook_dim]. With ``indices``:
            quantized and the sum of the cross-entropies.

        Raises:
            ArgumentError: naming the argument.
        """
        rows, places = self._layout.enter(_NAME, x)
        mask = self._layout.mask(_NAME, x, mask, None)
        given = rows
        if mask is not None:
            rows = rows.masked_fill(~mask[..., None], 0)  # so that no gradient depends on what padding holds
        if n_quantizers is None and self.training and indices is None:
            n_quantizers = self.draw_levels(len(rows), rows.device, rand_quantize_dropout_fixed_seed)
        n, levels = self._number_of_levels(self.num_quantizers if n_quantizers is None else n_quantizers, rows)
        request = Request(mask, levels, sample_codebook_temp, freeze_codebook)
        inside = self.project_in(rows)
        if indices is not None:
            targets = self._targets(indices, mask, (*rows.shape[:2], n))
            found = one_by_one(inside, self._levels(n), request, self.quant_grad_frac, targets)
        else:
            found = self._quantize(inside, self._levels(n), request, beam_size)
        if self.shared_codebook and learns(self._quantizers()[0], request):
            self._update_shared(found, request)
        quantized = self._layout.leave(self._finish(found.quantized, inside, given, mask), places)
        if indices is not None:
            return quantized, torch.stack(found.losses).sum()
        index = self._layout.leave_index(self._padded(found.indices, -1).movedim(0, -1), places)
        losses = self._padded(found.losses, 0)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not losses.requires_grad:
            losses.requires_grad_()  # so that backward() can be called whatever the options
        if not return_all_codes:
            return quantized, index, losses
        return quantized, index, losses, torch.stack(list(self._codes(index)))

    def _levels(self, n: int) -> list[Level]:
        parts = zip(self._quantizers()[:n], self._networks(), self.beam_score_weights, strict=False)
        return [Level(*part) for part in parts]

    def _finish(self, quantized: Tensor, inside: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The output [B, N, dim] of the sum of the codes, for rows x that are ``inside`` behind the projection."""
        quantized = quantized.to(inside.dtype)
        if self.diveq and self.training:
            quantized = directional_reparam(inside, quantized)
        output: Tensor = self.project_out(quantized)
        if mask is None:
            return output
        other = torch.zeros_like(output) if self.return_zeros_for_masked_padding else x.to(output.dtype)
        return torch.where(mask[..., None], output, other)

    def _padded(self, values: list[Tensor], fill: int) -> Tensor:
        """``values`` of the levels that ran, stacked, and ``fill`` for the others."""
        rest = self.num_quantizers - len(values)
        return torch.stack(values + [torch.full_like(values[0], fill)] * rest)

    def draw_levels(self, B: int, device: Any = None, seed: int | None = None) -> int | Tensor | None:
        """How many levels a forward in training uses: ``n_quantizers`` for one call, drawn as dropout asks.

        Args:
            B: number of samples. device: where the numbers are wanted.
            seed: of the draw; None: the next of torch's default generator, or under ``torch.distributed`` the number
                of this call, which is the same on all ranks without a message between them (not in a graph).

        Returns:
            One number, or with dropout per sample (and in a graph that is compiled) int64 [B]; None without dropout.
        """
        if not self.quantize_dropout:
            return None
        M, cutoff, multiple = self.num_quantizers, self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of
        per_sample = self.quantize_dropout_per_sample
        if not per_sample and not torch.compiler.is_compiling():
            last = random.Random(self._next_seed() if seed is None else seed).randrange(cutoff, M)
            return min((last // multiple + 1) * multiple, M)
        number = B if per_sample else 1
        if seed is None:
            drawn = torch.randint(cutoff, M, (number,), device=device)
        else:
            drawn = torch.randint(cutoff, M, (number,), generator=torch.Generator().manual_seed(seed)).to(device)
        return ((drawn // multiple + 1) * multiple).clamp_max(M).expand(B)

    def _next_seed(self) -> int:
        if several():
            self._draws += 1
            return self._draws
        return int(torch.randint(10_000, ()))

    def _targets(self, indices: Tensor | Sequence[Tensor], mask: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
        """Given indices as [B, N, levels], checked."""
        given = indices if isinstance(indices, Tensor) else torch.stack(list(indices))
        if given.shape[-1:] != sizes[-1:] or given.numel() != math.prod(sizes):
            _check.fail(_NAME, "indices", f"[B, N, levels] = {list(sizes)}", list(given.shape))
        given = given.reshape(sizes)
        if not torch.compiler.is_compiling():
            dropped = given < 0 if mask is None else (given < 0) & mask[..., None]
            if dropped.any():
                _check.fail(_NAME, "indices", "of a forward without dropout (none is -1)", "-1")
        return given

    def _number_of_levels(self, given: int | Tensor, x: Tensor) -> tuple[int, Tensor | None]:
        """How many levels run, and how many of them each sample uses (integers [B]) where that differs."""
        M = self.num_quantizers
        if isinstance(given, Tensor):
            if given.shape != x.shape[:1] or given.is_floating_point() or given.dtype == torch.bool:
                got = f"{given.dtype} {list(given.shape)}"
                _check.fail(_NAME, "n_quantizers", f"an integer, or integers [B] = {list(x.shape[:1])}", got)
            _check.device(_NAME, "n_quantizers", given, x.device)
            return M, given
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= M:
            _check.fail(_NAME, "n_quantizers", f"in 1..num_quantizers = 1..{M}", repr(given))
        return given, None

    def _quantize(self, x: Tensor, levels: list[Level], request: Request, beam: int | None) -> Found:
        if beam is None:
            beam = self.beam_size if self.training else self.eval_beam_size
        elif beam < 1:
            _check.fail(_NAME, "beam_size", "an integer >= 1, or None", beam)
        if beam is not None and beam > 1:
            found = beam_search(x, levels, request, self.quant_grad_frac, beam)
            learn_from(found, levels, request)
        elif why_not_at_once(levels, request, self.quant_grad_frac, self.shared_codebook) is None:
            found = all_at_once(x, levels, request, self._learning(levels, request))
        else:
            found = one_by_one(x, levels, request, self.quant_grad_frac)
        return found

    def _learning(self, levels: list[Level], request: Request) -> list[VectorQuantize]:
        """The layers that ``all_at_once`` updates: on several ranks all, so that their messages are of one size also
        where they disagree on the number of levels."""
        first = levels[0].layer
        if not learns(first, request) or not first._codebook.updates():
            return []
        return self._quantizers()[: None if first._codebook.use_ddp and several() else len(levels)]

    def _update_shared(self, found: Found, request: Request) -> None:
        """The one codebook, after all levels have added to its averages or gradients."""
        layer = self._quantizers()[0]
        if self.vq_is_ema_updating:
            layer._codebook.update_ema()
        layer.update_in_place_optimizer()
        if layer._codebook.has_dead_code_replacement:
            rows = torch.cat(found.residuals, dim=1).detach()
            active = [request.active(m) for m in range(len(found.residuals))]
            B, N = found.residuals[0].shape[:2]
            masks = [a.expand(B, N) for a in active if a is not None]
            mask = torch.cat(masks, dim=1).reshape(1, -1) if masks else None
            layer._codebook.expire_codes_(layer._codebook.transform_input(rows), mask)


def _refuse(options: dict[str, Any]) -> None:
    for name, (default, instead) in _REFUSED.items():
        if options.get(name, default) != default:
            _check.fail(_NAME, name, f"{default!r} ({instead})", repr(options[name]))


def _sizes(levels: int | None, given: int | Sequence[int], shared: bool) -> tuple[int, ...]:
    """The number of codes of each level."""
    if isinstance(given, int):
        if levels is None or levels < 1:
            _check.fail(_NAME, "num_quantizers", "an integer >= 1 where codebook_size is one number", levels)
        return (given,) * levels
    sizes = tuple(given)
    if not sizes or levels not in (None, len(sizes)):
        _check.fail(_NAME, "codebook_size", f"num_quantizers = {levels} numbers", sizes)
    if shared and len(set(sizes)) > 1:
        _check.fail(_NAME, "codebook_size", "one number where shared_codebook=True", sizes)
    return sizes

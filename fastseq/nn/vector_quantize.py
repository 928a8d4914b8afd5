"""``VectorQuantize``: vectors become the nearest of K learned codes, as in vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import _check
from fastseq.functional import Quantized
from fastseq.nn import vq_losses, vq_options
from fastseq.nn._indices import check_indices
from fastseq.nn._ranks import several
from fastseq.nn.affine_codebook import AffineCodebook
from fastseq.nn.batch_norm import MaskedBatchNorm, normalize
from fastseq.nn.codebook import Codebook, Weight
from fastseq.nn.reinit import Reinit
from fastseq.nn.row_quantizer import Call, LossBreakdown, RowQuantizer, Transform
from fastseq.nn.vq_layout import Heads, Layout, Places
from fastseq.nn.vq_lookup import decode
from fastseq.nn.vq_options import NAME

__all__ = ["LossBreakdown", "VectorQuantize"]

_SHOWN = {  # option -> the value that is not worth showing
    "heads": 1,
    "separate_codebook_per_head": False,
    "use_cosine_sim": False,
    "batch_norm_at": None,
    "commitment_weight": 1.0,
    "rotation_trick": True,
    "freeze_codebook": False,
    "stochastic_sample_codes": False,
    "orthogonal_reg_weight": 0.0,
    "codebook_diversity_loss_weight": 0.0,
    "index_dtype": torch.int64,
}
_OF_CODEBOOK = (  # options that are attributes of the codebook; others are of the module
    *("codebook_size", "kmeans_init", "kmeans_iters", "sync_kmeans", "decay", "eps", "threshold_ema_dead_code"),
    *("ema_update", "manual_ema_update", "use_cosine_sim", "vq_bridge"),
)


class VectorQuantize(RowQuantizer):
    """A drop-in for ``vector_quantize_pytorch.VectorQuantize`` 1.32: arguments, results, state_dict, initial draws.

    van den Oord et al. 2017, "Neural Discrete Representation Learning". The lookup is exact and forms no matrix of
    rows by codes, unless an option is defined on one: sampling, cross-entropy and diversity.

    The codebook is updated within the forward that used it, so ``indices`` and ``quantized`` of a training step refer
    to the codes as they were before it. ``quantized`` equals these codes exactly. Lookup and losses are computed in
    float32 (float64 for float64), also under autocast; ``quantized`` has the dtype of x. A vector that is not finite
    gets index 0; the loss is not finite then, nor that code after an update, which is not taken until it is replaced.

    It differs from its model where that fails or contradicts itself. Nothing depends on what padding holds, and where
    all is padding the loss is 0. The commitment loss is always of the vectors that are quantized. ``lens`` works with
    ``channel_last=False``. The decoders take heads with a shared codebook, maps with projections, and -1 (zeros), and
    apply ``vq_bridge`` and ``affine_param``. With ``indices=`` the quantized output is the finished one. Statistics of
    ``affine_param`` do not change at evaluation. Dead codes: see ``Codebook``. Options that exclude each other raise.

    Args:
        dim: of the vectors. codebook_size: K.
        codebook_dim: D, of the codes; None means dim. If heads * D is not dim, a linear map leads in and one out.
        heads: each vector is cut into so many, each of which is quantized.
        separate_codebook_per_head: else they share one.
        decay, eps: of the moving averages of counts and sums, [0, 1], and what smooths the counts, > 0.
        freeze_codebook: no update, unless a call says otherwise.
        kmeans_init, kmeans_iters, sync_kmeans: make the codebook from the first batch, in so many steps, of all ranks.
        use_cosine_sim: compare vectors and codes of length 1.
        layernorm_after_project_in: where there is a projection.
        threshold_ema_dead_code: codes with a smaller moving average of their count become rows; 0 never.
        channel_last: False for inputs [B, dim, T]. accept_image_fmap: [B, dim, H, W].
        accept_3d_fmap: [B, dim, T, H, W].
        commitment_weight: of the mean squared distance of vectors and codes. commitment_use_cross_entropy_loss: of the
            cross-entropy of minus the distances instead.
        orthogonal_reg_weight, orthogonal_reg_active_codes_only, orthogonal_reg_max_codes: pairs of codes, of those in
            use, of so many drawn codes, become orthogonal (Shin et al. 2021).
        codebook_diversity_loss_weight, codebook_diversity_temperature: codes are used evenly.
        stochastic_sample_codes, sample_codebook_temp: while training, draw codes from the softmax of minus the
            distances over the temperature; 0 takes the nearest.
        rotation_trick: the gradient is turned as the vector is (Fifty et al. 2024); None means True unless one of
            the next two is, or dim is 1.
        straight_through: the gradient passes as it is; where it does not reach the input, that of the softmax.
        directional_reparam, directional_reparam_variance: the gradient reaches both vector and code (DiVeQ).
        sync_codebook: sum over all ranks; None means if there are several.
        ema_update: learn the codebook by moving averages; None means unless it is learnable.
        learnable_codebook: learn it by gradient; None means with directional_reparam or vq_bridge.
        vq_bridge: a module that maps the codes [G, K, D] to those that are compared (FVQ).
        manual_ema_update: the averages become codes only in ``_codebook.update_ema()``.
        in_place_codebook_optimizer: called with the parameters of the codebook, returns the optimizer that learns them
            within the forward; manual_in_place_optimizer_update: only in ``update_in_place_optimizer()``.
        affine_param, sync_affine_param, affine_param_batch_decay, affine_param_codebook_decay: see ``AffineCodebook``.
        sync_update_v: the gradient of the output times 1 + this, in [0, 1] (Huh et al. 2023, equation 21).
        return_zeros_for_masked_padding: else padding returns the input.
        route_gradients_to_input: else the gradient of the output goes to the codes.
        batch_norm: "input", of the vectors before the projection, or "codes", of those that are quantized, with
            statistics shared over heads (Lancucki et al. 2020).
        reinit: a ``Reinit``, which makes the codebook anew from a reservoir of rows on a schedule.
        index_dtype: of the indices: torch.int64, torch.int32 or torch.int16.

    Raises:
        ArgumentError: for options out of range or that exclude each other.
    """

    # fmt: off
    def __init__(  # in the order of vector-quantize-pytorch: calls by position carry over
        self, dim: int, codebook_size: int, codebook_dim: int | None = None,
        heads: int = 1, separate_codebook_per_head: bool = False,
        decay: float = 0.8, eps: float = 1e-5, freeze_codebook: bool = False,
        kmeans_init: bool = False, kmeans_iters: int = 10, sync_kmeans: bool = True,
        use_cosine_sim: bool = False, layernorm_after_project_in: bool = False, threshold_ema_dead_code: float = 0,
        channel_last: bool = True, accept_image_fmap: bool = False, accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0, commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0, orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0, codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False, sample_codebook_temp: float = 1.0,
        straight_through: bool = False, rotation_trick: bool | None = None,
        directional_reparam: bool = False, directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None, sync_affine_param: bool = False,
        ema_update: bool | None = None, vq_bridge: nn.Module | None = None, manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False, affine_param_batch_decay: float = 0.99, affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0, return_zeros_for_masked_padding: bool = True, route_gradients_to_input: bool = True,
        *, batch_norm: str | None = None, reinit: Reinit | None = None, index_dtype: torch.dtype = torch.int64,
    ) -> None:
        # fmt: on
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        o = SimpleNamespace(**given)
        vq_options.resolve(o)
        for name in vars(o).keys() - {*_OF_CODEBOOK, "batch_norm"}:
            setattr(self, name, getattr(o, name))
        self.codebook_size, self.use_cosine_sim, self.eps = codebook_size, use_cosine_sim, eps
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.has_codebook_orthogonal_loss = orthogonal_reg_weight > 0
        self.has_codebook_diversity_loss = codebook_diversity_loss_weight > 0
        self._layout = Layout(dim, channel_last, 2 if accept_image_fmap else 3 if accept_3d_fmap else 0)
        self._heads = Heads(heads, separate_codebook_per_head and heads > 1)
        self._add_projections(o)
        self._add_codebook(o)
        if batch_norm is not None:
            self.batch_norm = MaskedBatchNorm(dim if batch_norm == "input" else o.codebook_dim)
        self.batch_norm_at = batch_norm
        if reinit is not None:
            reinit.build(*self._codebook.embed.shape)

    def _add_projections(self, o: SimpleNamespace) -> None:
        inner = o.codebook_dim * o.heads
        self.has_projections = inner != o.dim
        self.project_in: nn.Module = nn.Linear(o.dim, inner) if inner != o.dim else nn.Identity()
        if inner != o.dim and o.layernorm_after_project_in:
            self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
        self.project_out: nn.Module = nn.Linear(inner, o.dim) if inner != o.dim else nn.Identity()

    def _add_codebook(self, o: SimpleNamespace) -> None:
        affine = ("sync_affine_param", "affine_param_batch_decay", "affine_param_codebook_decay")
        given = {name: getattr(o, name) for name in (*_OF_CODEBOOK, *(affine if o.affine_param else ()))}
        given["learnable_codebook"] = o.learnable_codebook or self.has_codebook_orthogonal_loss
        self._codebook = (AffineCodebook if o.affine_param else Codebook)(
            o.codebook_dim,
            num_codebooks=o.heads if o.separate_codebook_per_head else 1,
            use_ddp=several() if o.sync_codebook is None else o.sync_codebook,
            **given,
        )
        make = o.in_place_codebook_optimizer
        self.in_place_codebook_optimizer = None if make is None else make(self._codebook.parameters())

    @property
    def ema_update(self) -> bool:
        """Whether the codebook is learned by moving averages."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes, [K, D], or [heads, K, D] with ``separate_codebook_per_head``.

        Assigned ones overwrite the moving averages too, so that they stay when training goes on.
        """
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self._codebook.set_codes(codes if self.separate_codebook_per_head else codes[None])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of given indices, before the projection out.

        Args:
            indices: integers as ``forward`` returns them; -1 means none.

        Returns:
            The input's layout, with heads * D channels; zeros where the index is -1.

        Raises:
            ArgumentError: for another number of heads; on the CPU for an index out of range.
        """
        return self._outwards(self._decode("get_codes_from_indices", indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` at evaluation returned with these indices, but for padding; see above."""
        return self._outwards(self.project_out(self._decode("get_output_from_indices", indices)))

    def _decode(self, f: str, indices: Tensor) -> Tensor:
        check_indices(f, indices, self.codebook_size, -1)
        if self.heads > 1 and indices.shape[-1:] != (self.heads,):
            _check.fail(f, "indices", f"[..., heads = {self.heads}]", list(indices.shape))
        return decode(self._codebook.codes(), indices, self.heads)

    def _outwards(self, values: Tensor) -> Tensor:
        return values.movedim(values.dim() - 1, 1) if self._layout.channel_first else values

    def expire_codes_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Replace dead codes by vectors x [B, T, heads*D], while training; mask: bool [B, T], those that count."""
        rows = self._codebook.transform_input(self._heads.split(x))
        self._codebook.expire_codes_(rows, None if mask is None else self._heads.split_mask(mask))

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Update the codebook from outside, as ``forward`` does in training.

        Args:
            x, mask: as for ``forward``. indices: of the codes of x, as ``forward`` returns them.
        """
        found = self._layout.mask(NAME, x, mask, None)
        x, _ = self._layout.enter(NAME, x)
        call = self._call(x, found)
        check_indices("update_indices", indices, self.codebook_size, -1)
        rows = self._rows(x, call)
        self._codebook.update_indices(rows, self._given(indices, call), call.counted)

    update_ema_indices = update_indices

    # fmt: off
    def forward(
        self, x: Tensor, indices: Tensor | None = None, mask: Tensor | None = None, lens: Tensor | None = None,
        topk: int | None = None, sample_codebook_temp: float | None = None, freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False, codebook_transform_fn: Transform | None = None,
        ema_update_weight: Weight | None = None, accum_ema_update: bool = False, ema_update: bool | None = None,
    ) -> tuple[Any, ...]:
        # fmt: on
        """
        Args:
            x: [B, T, dim], [B, dim], [B, dim, T], [B, dim, H, W] or [B, dim, T, H, W], see the options.
            indices: as the indices below; then the loss is the cross-entropy of minus the distances against them.
            mask: bool [B, T], the vectors that count; or lens: integers [B], how many of each sequence do.
            topk: so many codes for each vector; the codebook is not updated.
            sample_codebook_temp, freeze_codebook, ema_update: override those of the module.
            return_loss_breakdown: also return a ``LossBreakdown``.
            codebook_transform_fn: maps the codes [1, K, D] to those of each vector, [1, B, T, K, D].
            ema_update_weight: [K] or [heads, K], of the update of each code, or a function of sums and counts.
            accum_ema_update: keep the update for the next forward, and add it then.

        Returns:
            A tuple of three

            - quantized: as x; [..., topk, dim] with ``topk`` (channels first: [B, dim, ..., topk]).
            - indices: [B, T], [B], [B, H, W] or [B, T, H, W], with a last dimension of heads or topk; -1 in padding.
            - loss: a scalar, 0 at evaluation; with ``topk`` that of each index.

            With ``indices``, quantized and loss only.

        Raises:
            ArgumentError: naming the argument. NotImplementedError: padding beside SyncBatchNorm.
        """
        padding = self._layout.mask(NAME, x, mask, lens)
        given, places = self._layout.enter(NAME, x)
        temperature = self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
        ways = self._ways(x.requires_grad, indices is not None, temperature)
        call = self._call(given, padding, topk, temperature, freeze_codebook, codebook_transform_fn, *ways)
        wanted = None if indices is None else self._given(indices, call)
        rows = self._rows(given, call)
        if self._warms_up(rows, call):
            out, logits, optimized = self._unquantized(rows, call), None, None
        else:
            update = {"weight": ema_update_weight, "accumulate": accum_ema_update, "ema_update": ema_update}
            out, logits, optimized = self._quantize(rows, call, update)
        quantized, index = self._finish(out, given, places, call)
        if wanted is not None:
            return quantized, rows.new_zeros(()) if logits is None else vq_losses.cross_entropy(logits, wanted)
        loss, terms = self._losses(out, logits, rows, call, optimized)
        if loss.dim():  # of each index: where these are
            each = (self._heads.join_index(t, call.B, call.T) for t in (loss, terms.commitment))
            loss, commitment = (self._layout.leave_index(t, places) for t in each)
            terms = terms._replace(commitment=commitment)
        return (quantized, index, loss, terms) if return_loss_breakdown else (quantized, index, loss)

    def _call(
        self,
        x: Tensor,
        mask: Tensor | None,
        topk: int | None = None,
        temperature: float = 0.0,
        frozen: bool | None = None,
        transform: Transform | None = None,
        gradient: str = "codes",
        soft: bool = False,
        similar: bool = False,
    ) -> Call:
        """Check and complete what one forward is asked for; x: [B, T, dim]."""
        if topk is not None:
            topk = self._topk(topk)
        if transform is not None and self.heads > 1:
            _check.fail(NAME, "codebook_transform_fn", f"None beside heads={self.heads}", "a function")
        counted = None if mask is None else self._heads.split_mask(mask)
        sampled = self.training and self.stochastic_sample_codes and temperature > 0
        frozen = self.freeze_codebook if frozen is None else frozen
        ways = (topk, temperature, sampled, frozen, transform, gradient, soft, similar)
        return Call(x.shape[0], x.shape[1], mask, counted, *ways)

    def _topk(self, topk: int) -> int:
        if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
            _check.fail(NAME, "topk", "an integer >= 1", repr(topk))
        if self.heads > 1:
            _check.fail(NAME, "topk", f"None beside heads={self.heads}", topk)
        if self.training:
            for name in ("commitment_use_cross_entropy_loss", "in_place_codebook_optimizer", "straight_through"):
                if getattr(self, name):
                    _check.fail(NAME, "topk", f"None while training with {name}", topk)
        return min(topk, self.codebook_size)

    def _rows(self, x: Tensor, call: Call) -> Tensor:
        """x [B, T, dim] as it is compared with the codes: [G, N, D]."""
        if call.mask is not None:
            x = x.masked_fill(~call.mask[..., None], 0)
        if self.batch_norm_at == "input":
            x = normalize(self.batch_norm, x, call.mask)
        rows = self._heads.split(self.project_in(x))
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()
        if self.batch_norm_at == "codes":
            rows = normalize(self.batch_norm, rows, call.counted)
        return self._codebook.transform_input(rows)

    def _finish(self, out: Quantized, x: Tensor, places: Places, call: Call) -> tuple[Tensor, Tensor]:
        """Codes and indices as the caller gets them; x: [B, T, dim], as it was given."""
        quantized: Tensor = self._heads.join(out.quantized, call.B, call.T)
        if self.has_projections:
            quantized = self.project_out(quantized.to(x.dtype))
        if call.mask is not None:
            counted, other = call.mask[..., None], torch.zeros_like(x) if self.return_zeros_for_masked_padding else x
            if call.topk is not None:
                counted, other = counted[..., None], other[:, :, None]
            quantized = torch.where(counted, quantized.to(x.dtype), other)
        index = self._heads.join_index(out.index, call.B, call.T)
        return (
            self._layout.leave(quantized.to(x.dtype), places),
            self._layout.leave_index(index, places).to(self.index_dtype),
        )

    def _given(self, indices: Tensor, call: Call) -> Tensor:
        """Indices from the caller as [G, N], -1 in padding."""
        check_indices(NAME, indices, self.codebook_size, -1)
        sizes = (call.B, call.T, self.heads) if self.heads > 1 else (call.B, call.T)
        if indices.numel() != call.B * call.T * self.heads:
            _check.fail(NAME, "indices", f"of {list(sizes)} or its layout", list(indices.shape))
        index = self._heads.split_index(indices.reshape(sizes).long())
        return index if call.counted is None else index.masked_fill(~call.counted, -1)

    def extra_repr(self) -> str:
        """The sizes, and the options that are not the defaults."""
        shown = [f"dim={self.dim}", f"codebook_size={self.codebook_size}"]
        for name, default in _SHOWN.items():
            if getattr(self, name) != default:
                shown.append(f"{name}={getattr(self, name)}")
        return ", ".join(shown)

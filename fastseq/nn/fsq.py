"""``FSQ``: finite scalar quantization, with the parameters and the call of ``vector_quantize_pytorch.FSQ``."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from fastseq import _check
from fastseq.nn._indices import check_indices

_MARGIN = 1e-3  # the bounds lie this share outside of the outermost levels, so that these are reached
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class FSQ(nn.Module):
    """A drop-in for ``vector_quantize_pytorch.FSQ``: finite scalar quantization (Mentzer et al., ICLR 2024).

    Each of d numbers is bounded and rounded to one of ``levels[j]`` values, and the index of a vector is the number
    with these digits, the first one lowest: ``sum_j digit_j * prod_{i<j} levels[i]``. What differs from there:

    - Digits are whole numbers before they become an index, and 16-bit inputs are computed in float32. So each index is
      exact in bfloat16 too, and always in 0..codebook_size-1: of noisy codes, for any levels, and where the input is
      NaN (digit 0; the code stays NaN).
    - Nothing of the size of the codebook is stored. ``implicit_codebook`` is made anew when it is asked for.
    - Indices are int64 where int32 does not hold codebook_size - 1.
    - ``noise_dropout`` is the probability that it says; there it is one half whatever it says, unless 0.

    Args:
        levels: values per dimension, each >= 3, or >= 2 with preserve_symmetry.
        dim: size of the input; linear projections are added where it is not len(levels) * num_codebooks. None: that.
        num_codebooks: vectors that are quantized side by side, each with len(levels) dimensions.
        keep_num_codebooks_dim: whether indices have a last dimension for them; None: where there are several.
        scale: None; it has no effect in vector_quantize_pytorch either.
        allowed_dtypes: what is computed as it is and not in float32; 16-bit types never are.
        channel_first: the input is [B, dim, ...], as it always is with four or more dimensions.
        projection_has_bias: of the projections.
        return_indices: False returns None for them.
        force_quantization_f32: compute other than ``allowed_dtypes`` in float32; otherwise float64 stays.
        preserve_symmetry: levels are spread evenly over -1..1, zero is no level where their number is even
            (Parker et al. 2024, section 3.2).
        noise_dropout: probability in [0, 1] of adding noise in -1/2..1/2 to a number of the code while training, only
            with preserve_symmetry. Indices are those without noise.
        bound_hard_clamp: bound by cutting off at -1 and 1 and not by tanh.
        orthogonal_rotation: turn the vectors by a fixed random rotation before, and back after quantization.
    """

    _levels: Tensor
    _basis: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: list[int] | tuple[int, ...],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        levels = _checked_levels(levels, preserve_symmetry)
        _check.probability("FSQ", "noise_dropout", noise_dropout)
        if noise_dropout and not preserve_symmetry:
            _check.fail("FSQ", "noise_dropout", "0 without preserve_symmetry=True", noise_dropout)
        if scale is not None:
            _check.fail("FSQ", "scale", "None (it has no effect in vector_quantize_pytorch either)", scale)
        if isinstance(num_codebooks, bool) or not isinstance(num_codebooks, int) or num_codebooks < 1:
            _check.fail("FSQ", "num_codebooks", "an integer >= 1", repr(num_codebooks))
        if num_codebooks > 1 and keep_num_codebooks_dim is False:
            _check.fail("FSQ", "keep_num_codebooks_dim", f"True for num_codebooks = {num_codebooks}", False)
        self.codebook_dim, self.num_codebooks = len(levels), num_codebooks
        self.codebook_size = math.prod(levels)
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        self.dim = self.effective_codebook_dim if dim is None else dim
        self.scale, self.allowed_dtypes, self.channel_first = scale, tuple(allowed_dtypes), channel_first
        self.return_indices, self.force_quantization_f32 = return_indices, force_quantization_f32
        self.preserve_symmetry, self.noise_dropout = preserve_symmetry, noise_dropout
        self.bound_hard_clamp, self.orthogonal_rotation = bound_hard_clamp, orthogonal_rotation

        index_dtype = torch.int32 if self.codebook_size <= 2**31 else torch.int64
        basis = [math.prod(levels[:j]) for j in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis, dtype=index_dtype), persistent=False)
        self.has_projections = self.dim != self.effective_codebook_dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, self.effective_codebook_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(self.effective_codebook_dim, self.dim, bias=projection_has_bias)
        if orthogonal_rotation:
            if len(set(levels)) > 1:
                warnings.warn("FSQ: orthogonal_rotation mixes dimensions, but levels differ", stacklevel=2)
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(len(levels), len(levels))))

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes, [codebook_size, d]."""
        return self._to_codes(
            self.indices_to_level_indices(torch.arange(self.codebook_size, device=self._basis.device))
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            z: [B, N, dim] or [B, dim]; [B, dim, ...] with channel_first, or with four or more dimensions.

        Returns:
            The codes, projected back, with the layout and dtype of the projected input, whose gradient goes through as
            if there was no rounding; and their indices, [B, N], [B] or [B, ...], with a last dimension num_codebooks
            where that is kept.

        Raises:
            ArgumentError: wrong size or dtype.
        """
        moved = self.channel_first or z.dim() >= 4
        z = z.movedim(1, -1) if moved and z.dim() > 1 else z
        if z.dim() < 2 or z.shape[-1] != self.dim:
            layout = f"[B, dim = {self.dim}, ...]" if moved else f"[B, N, dim = {self.dim}]"
            _check.fail("FSQ", "z", layout, list(z.movedim(-1, 1).shape if moved and z.dim() > 1 else z.shape))
        if z.dtype not in _FLOATS:
            _check.fail("FSQ", "z", "float32, float64, bfloat16 or float16", z.dtype)
        z = self.project_in(z).unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.orthogonal_rotation:
            z = z @ self.orthogonal_rot.to(z.dtype)
        dtype = z.dtype
        codes, digits = self._round(z.to(self._computed(dtype)))
        indices = None
        if self.return_indices:
            indices = self._to_indices(digits)
            indices = indices if self.keep_num_codebooks_dim else indices.squeeze(-1)
        codes = self._rotate_back(self._add_noise(codes)).flatten(-2).to(dtype)
        out: Tensor = self.project_out(codes)
        return out.movedim(-1, 1) if moved else out, indices

    def quantize(self, z: Tensor) -> Tensor:
        """The codes [..., d] of vectors [..., d]: bounded and rounded, with the gradient of no rounding."""
        return self._round(z.to(self._computed(z.dtype)))[0]

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Indices [...] of codes [..., d]; numbers that are no level count as the nearest one, NaN as the lowest.

        Raises:
            ArgumentError: the last dimension is not d.
        """
        if codes.shape[-1] != self.codebook_dim:
            _check.fail("FSQ", "codes", f"[..., d = {self.codebook_dim}]", list(codes.shape))
        codes = codes.to(torch.promote_types(codes.dtype, torch.float32))
        levels = self._levels.to(codes.dtype)
        digits = (codes + 1) * ((levels - 1) / 2) if self.preserve_symmetry else (codes + 1) * (levels // 2)
        return self._to_indices(digits.round())

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The digits [..., d] of indices [...], each in 0..levels[j]-1."""
        return (indices[..., None] // self._basis) % self._levels

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """
        Args:
            indices: integers as ``forward`` returns them.

        Returns:
            The output of ``forward`` for them.

        Raises:
            ArgumentError: no integers, or (on the CPU) not in 0..codebook_size-1.
        """
        check_indices("FSQ", indices, self.codebook_size)
        moved = self.channel_first or indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        codes = self._rotate_back(self._to_codes(self.indices_to_level_indices(indices)))
        codes = codes.flatten(-2) if self.keep_num_codebooks_dim else codes
        if isinstance(self.project_out, nn.Linear):
            codes = codes.to(self.project_out.weight.dtype)
        out: Tensor = self.project_out(codes)
        return out.movedim(-1, 1) if moved else out

    def extra_repr(self) -> str:
        return f"levels={self._levels.tolist()}, dim={self.dim}, num_codebooks={self.num_codebooks}"

    def _computed(self, dtype: torch.dtype) -> torch.dtype:
        """What a vector of ``dtype`` is quantized in."""
        wide = dtype in (torch.float32, torch.float64)
        return dtype if wide and (dtype in self.allowed_dtypes or not self.force_quantization_f32) else torch.float32

    def _round(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and digits (whole numbers of z's dtype), both [..., d]."""
        levels = self._levels.to(z.dtype)
        bounds = z.clamp(-1.0, 1.0) if self.bound_hard_clamp else z.tanh()
        if self.preserve_symmetry:
            places = (levels - 1) * (bounds + 1) / 2 + 0.5
            digits = places.detach().floor().clamp(torch.zeros_like(levels), levels - 1)
            return 2 / (levels - 1) * _straight(places, digits) - 1, digits
        half, width = (levels - 1) * (1 + _MARGIN) / 2, self._levels // 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0).to(z.dtype)
        shift = offset / half
        moved = (z + shift).clamp(-1.0, 1.0) if self.bound_hard_clamp else (z + shift.atanh()).tanh()
        places = moved * half - offset
        digits = places.detach().round().clamp(-width, levels - 1 - width)
        return _straight(places, digits) / width, digits + width

    def _to_indices(self, digits: Tensor) -> Tensor:
        digits = torch.where(digits > 0, digits, 0.0).minimum(self._levels - 1)  # NaN becomes 0
        return (digits.to(self._basis.dtype) * self._basis).sum(-1, dtype=self._basis.dtype)

    def _to_codes(self, digits: Tensor) -> Tensor:
        if self.preserve_symmetry:
            return digits * (2 / (self._levels - 1)) - 1
        width = self._levels // 2
        return (digits - width) / width

    def _add_noise(self, codes: Tensor) -> Tensor:
        if not self.training or not self.noise_dropout:
            return codes
        noisy = torch.rand_like(codes) < self.noise_dropout
        return torch.where(noisy, codes + (torch.rand_like(codes) - 0.5), codes).clamp(-1.0, 1.0)

    def _rotate_back(self, codes: Tensor) -> Tensor:
        if not self.orthogonal_rotation:
            return codes
        back = self.orthogonal_rot.to(codes.dtype).t()
        if not torch._C._is_any_autocast_enabled():
            return codes @ back
        with torch.autocast(codes.device.type, enabled=False):  # codes are computed in float32 at least
            return codes @ back


def _straight(places: Tensor, digits: Tensor) -> Tensor:
    """``digits`` with the gradient of ``places`` (Bengio et al. 2013)."""
    return places + (digits - places).detach()


def _checked_levels(levels: list[int] | tuple[int, ...], symmetric: bool) -> list[int]:
    least = 2 if symmetric else 3
    whole = isinstance(levels, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in levels)
    if not whole or not levels or min(levels) < least:
        hint = "" if symmetric else " (2 with preserve_symmetry=True)"
        _check.fail("FSQ", "levels", f"integers >= {least}{hint}", levels)
    if math.prod(levels) >= 2**63:
        _check.fail("FSQ", "levels", "with a product below 2**63", levels)
    return list(levels)

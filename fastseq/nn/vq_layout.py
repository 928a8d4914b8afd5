"""Where the vectors lie in the input of a quantizer: sequences, single vectors, channels first, images and volumes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _check


class Places(NamedTuple):
    """The sizes that ``Layout.leave`` and ``Layout.leave_index`` restore."""

    single: bool  # one vector for each element of the batch
    spatial: tuple[int, ...]  # of a map


class Layout(NamedTuple):
    """The order of dimensions of an input; the quantizer works on [B, T, D]."""

    channels: int  # D
    channel_last: bool
    map_dims: int  # 2 for images, 3 for volumes, else 0

    @property
    def channel_first(self) -> bool:
        """Whether the vectors of a sequence or map lie along dimension 1."""
        return self.map_dims > 0 or not self.channel_last

    def enter(self, f: str, x: Tensor) -> tuple[Tensor, Places]:
        """x as [B, T, D], and what is needed to undo that.

        Raises:
            ArgumentError: for another number of dimensions or channels, TypeError for integers.
        """
        expected = f"[B, D, {'H, W' if self.map_dims == 2 else 'T, H, W'}]" if self.map_dims else "[B, T, D] or [B, D]"
        if not self.map_dims and not self.channel_last:
            expected = "[B, D, T] or [B, D]"
        if x.dim() not in ((self.map_dims + 2,) if self.map_dims else (2, 3)):
            _check.fail(f, "x", expected, list(x.shape))
        single = x.dim() == 2
        along = 1 if self.channel_first or single else 2
        if x.shape[along] != self.channels:
            _check.fail(f, "x", f"{expected} with D = {self.channels}", list(x.shape))
        if not x.is_floating_point():
            raise TypeError(f"{f}: x must be of a floating-point dtype, got {x.dtype}")
        if single:
            return x[:, None], Places(True, ())
        spatial = tuple(x.shape[2:]) if self.map_dims else ()
        return (x.flatten(2).transpose(1, 2) if self.channel_first else x), Places(False, spatial)

    def leave(self, values: Tensor, places: Places) -> Tensor:
        """values [B, T, ..., D] as the input was: [B, ..., D], [B, T, ..., D], [B, D, T, ...] or [B, D, H, W, ...]."""
        if places.single:
            return values[:, 0]
        if self.channel_first:
            values = values.movedim(values.dim() - 1, 1)
        return values.unflatten(2, places.spatial) if self.map_dims else values

    def leave_index(self, index: Tensor, places: Places) -> Tensor:
        """index [B, T, ...] as [B, ...], [B, T, ...] or [B, H, W, ...]."""
        if places.single:
            return index[:, 0]
        return index.unflatten(1, places.spatial) if self.map_dims else index

    def mask(self, f: str, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        """The places of x that count, bool [B, T], from a mask or from lengths; None where all do.

        Raises:
            ArgumentError: for a wrong shape, both at once, or an input that has no padding.
        """
        if mask is None and lens is None:
            return None
        if mask is not None and lens is not None:
            _check.fail(f, "lens", "None where mask is given", "both")
        if self.map_dims or x.dim() == 2:
            _check.fail(f, "mask" if lens is None else "lens", "None for maps and for single vectors", "one")
        B, T = x.shape[0], x.shape[2 if self.channel_first else 1]
        if mask is not None:
            _check.dtype(f, "mask", mask, torch.bool)
            _check.shape(f, "mask", mask, "B, T", B, T)
            _check.device(f, "mask", mask, x.device)
            return mask
        assert lens is not None
        _check.shape(f, "lens", lens, "B", B)
        _check.device(f, "lens", lens, x.device)
        return torch.arange(T, device=x.device) < lens[:, None]


class Heads(NamedTuple):
    """How vectors are cut into heads, and which codebook each head has."""

    number: int
    separate: bool  # a codebook for each

    def split(self, x: Tensor) -> Tensor:
        """[B, T, heads*d] as rows [G, N, d], with G = heads codebooks or one."""
        if self.separate:
            return x.reshape(*x.shape[:2], self.number, x.shape[-1] // self.number).permute(2, 0, 1, 3).flatten(1, 2)
        return x.reshape(1, x.shape[0] * x.shape[1] * self.number, x.shape[-1] // self.number)

    def split_index(self, index: Tensor) -> Tensor:
        """[B, T] or [B, T, heads] as [G, N]."""
        if self.separate:
            return index.permute(2, 0, 1).flatten(1) if index.dim() == 3 else index.flatten()[None]
        return index.flatten()[None]

    def split_mask(self, mask: Tensor) -> Tensor:
        """[B, T] as [G, N]."""
        if self.separate:
            return mask.flatten()[None].expand(self.number, -1)
        return mask[:, :, None].expand(*mask.shape, self.number).reshape(1, -1)

    def join(self, rows: Tensor, B: int, T: int) -> Tensor:
        """[G, N, ..., d] as [B, T, ..., heads*d]; dimensions between only where there is one head."""
        if self.separate:
            return rows.reshape(self.number, B, T, rows.shape[-1]).permute(1, 2, 0, 3).flatten(2)
        return rows.reshape(B, T, *rows.shape[2:-1], self.number * rows.shape[-1])

    def join_index(self, index: Tensor, B: int, T: int) -> Tensor:
        """[G, N, ...] as [B, T, ..., heads], without the last where there is one head."""
        if self.separate:
            return index.reshape(self.number, B, T).permute(1, 2, 0)
        return index.reshape(B, T, *index.shape[2:], *((self.number,) if self.number > 1 else ()))

    def by_sequence(self, rows: Tensor, B: int, T: int) -> Tensor:
        """[G, N, ...] as [G or heads, B, T, ...], the rows of each sequence together."""
        if self.separate:
            return rows.reshape(self.number, B, T, *rows.shape[2:])
        return rows.reshape(B, T, self.number, *rows.shape[2:]).movedim(2, 0)

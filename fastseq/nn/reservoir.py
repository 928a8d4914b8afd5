"""``Reservoir``: an even sample of all rows seen, on the device where they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import _check
from fastseq.nn._rank_tensors import RankTensors
from fastseq.nn._ranks import gather, ranks

_LAST = torch.iinfo(torch.int64).max  # the key of an empty place
_GOLDEN = -7046029254386353131  # 2**64 divided by the golden ratio, as int64; the next two: splitmix64 (Steele 2014)
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685))


class Reservoir(RankTensors):
    """Of all rows added since the last ``empty``, ``size`` chosen evenly, without the host waiting for the device.

    It does the same as Algorithm R (Vitter 1985) for whole batches: each row draws a random key, and the rows with
    the smallest keys stay. So samples of several ranks can be merged: their smallest keys are a sample of all.

    Rows and keys are in the state_dict.

    Args:
        size: rows kept per group, >= 1.
        dim: D, >= 1.
        groups: G >= 1, each with a sample of its own.
        device, dtype: of the rows kept.

    Raises:
        ArgumentError: for another number.
    """

    rank_tensors = ("rows", "keys")
    rows: Tensor  # [G, size, D]
    keys: Tensor  # int64 [G, size]; the largest int64 marks an empty place

    def __init__(
        self, size: int, dim: int, groups: int = 1, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim), ("groups", groups)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                _check.fail("Reservoir", name, "an integer >= 1", repr(value))
        self.size, self.dim, self.groups = size, dim, groups
        self.rows = torch.zeros(groups, size, dim, device=device, dtype=dtype)
        self.keys = torch.full((groups, size), _LAST, device=device)

    @torch.no_grad()
    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Let rows [G, N, D] in by lot; those outside of ``mask`` (bool [G, N]) and those with NaN or infinity never.

        Nothing is kept after ``drop``.

        Raises:
            ArgumentError: for another shape, device or dtype of the mask.
        """
        if x.dim() != 3 or x.shape[0] != self.groups or x.shape[2] != self.dim:
            _check.fail("Reservoir.add", "x", f"[G = {self.groups}, N, D = {self.dim}]", list(x.shape))
        _check.device("Reservoir.add", "x", x, self.rows.device)
        if mask is not None:
            _check.shape("Reservoir.add", "mask", mask, "G, N", *x.shape[:2])
            _check.dtype("Reservoir.add", "mask", mask, torch.bool)
        if self.dropped:
            return
        valid = (x.detach() * 0).sum(-1) == 0  # finite
        valid = valid if mask is None else valid & mask
        keys = torch.where(valid, _keys(x.shape[:2], x.device), _LAST)
        n = min(x.shape[1], self.size)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # where the host need not wait: few can enter
            n = min(n, int((keys < self.keys.amax(1, keepdim=True)).sum(1).max()))
        new, place = keys.topk(n, largest=False)  # ascending
        old, slot = self.keys.topk(n)  # descending: the first to leave first
        enters = new < old  # ends where the larger of both sets begins
        slots = _flat(slot, self.size)
        rows = x.detach().reshape(-1, self.dim).index_select(0, _flat(place, x.shape[1])).to(self.rows.dtype)
        kept = self.rows.view(-1, self.dim)
        kept.index_copy_(0, slots, torch.where(enters.view(-1, 1), rows, kept.index_select(0, slots)))
        self.keys.scatter_(1, slot, torch.where(enters, new, old))

    def merge(self, together: bool = True) -> tuple[Tensor, Tensor]:
        """The sample of the rows of all ranks, by one exchange; the reservoirs stay as they are.

        A row that two ranks hold, because both loaded the checkpoint of one, counts once.

        Args:
            together: False for this rank's rows alone, without an exchange.

        Returns:
            rows [G, size, D], the same on every rank, in random order, those that hold nothing last; and bool
            [G, size], which of them hold something.
        """
        rows, keys = self.rows, self.keys
        if together and ranks()[1] > 1:
            packed = gather(torch.cat([rows, keys[..., None].view(rows.dtype)], dim=-1))
            packed = packed.transpose(0, 1).flatten(1, 2)  # [G, ranks * size, D + what a key takes]
            rows, keys = packed[..., : self.dim], packed[..., self.dim :].contiguous().view(torch.int64)[..., 0]
        keys, order = keys.sort(dim=-1, stable=True)
        again = torch.zeros_like(keys, dtype=torch.bool)
        again[:, 1:] = keys[:, 1:] == keys[:, :-1]
        keys, second = torch.where(again, _LAST, keys).sort(dim=-1, stable=True)
        order = order.gather(1, second)[:, : self.size]
        filled = keys[:, : self.size] < _LAST
        return rows.gather(1, order[..., None].expand(-1, -1, self.dim)), filled

    @torch.no_grad()
    def empty(self) -> None:
        """Forget all rows."""
        self.keys.fill_(_LAST)

    def drop(self) -> None:
        """Give the memory back; from now on nothing is kept."""
        self.rows, self.keys = self.rows[:, :0].clone(), self.keys[:, :0].clone()

    @property
    def dropped(self) -> bool:
        """Whether the memory was given back."""
        return self.keys.shape[1] == 0

    def load_refused(self, tensors: dict[str, Tensor]) -> str | None:
        """Why these cannot be loaded, or None; those of a dropped reservoir can."""
        rows, keys = tensors["rows"].shape, tensors["keys"].shape
        full = (self.groups, self.size, self.dim)
        if rows not in (full, (self.groups, 0, self.dim)) or rows[:2] != keys:
            return f"rows must be [G, size, D] = {list(full)}, got {list(rows)}"
        return None

    def extra_repr(self) -> str:
        """The sizes."""
        return f"size={self.size}, dim={self.dim}, groups={self.groups}" + (", dropped" if self.dropped else "")


def _flat(place: Tensor, n: int) -> Tensor:
    """Places [G, m] among n of each group, as places among all."""
    return (place + n * torch.arange(len(place), device=place.device)[:, None]).flatten()


def _keys(shape: torch.Size, device: torch.device) -> Tensor:
    """Random keys, 0 <= key < the largest int64; other ones on each rank, also where all ranks have one seed."""
    keys = torch.randint(_LAST, shape, device=device)
    rank = ranks()[0]
    if rank:
        keys = keys + ((rank * _GOLDEN + 2**63) % 2**64 - 2**63)
        for shift, factor in _MIX:
            keys = (keys ^ _shifted(keys, shift)) * factor
        keys = (keys ^ _shifted(keys, 31)) & _LAST
        keys = torch.where(keys == _LAST, 0, keys)
    return keys


def _shifted(keys: Tensor, bits: int) -> Tensor:
    """``keys`` shifted right as if they had no sign."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)

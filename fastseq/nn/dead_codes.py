"""Rows drawn for dead codes, on the device and without waiting for it.

Which codes are dead and how many rows count is known to the device alone. So a row is drawn for every code, and the
dead ones take as many of these as they need, spread over all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TURN = 2**16  # steps of a full turn of the offset, whose integers float32 holds


class Drawn(NamedTuple):
    """Rows for dead codes; those of several ranks are added up, each of which fills its own places."""

    rows: Tensor  # [G, K, D], zeros where there is none
    valid: Tensor  # [G, K], 1 where there is a row, else 0
    offset: Tensor  # [G], a whole number in [0, 65536), drawn by the first rank


def draw_rows(
    N: int, K: int, G: int, mask: Tensor | None, device: torch.device, share: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """Numbers of K distinct rows, one from each of K equal stretches; of all rows where there are no more than K.

    Args:
        N: number of rows. K: how many. G: how often.
        mask: bool [G, N], the rows that count.
        share: rank and number of ranks, each of which draws every so manyth of the K.

    Returns:
        Row numbers, int64 [G, K], and which of these are drawn, bool [G, K].
    """
    rank, ranks = share
    place = torch.arange(K, device=device)
    own, part = place // ranks, max(-(-(K - rank) // ranks), 1)
    count = torch.full((G, 1), N, device=device) if mask is None else mask.sum(-1, keepdim=True)
    enough = count >= part
    low = torch.where(enough, own * count // part, own)
    width = torch.where(enough, (own + 1) * count // part - low, 1)
    step = (torch.rand(G, K, device=device) * width).long()
    number = low + torch.minimum(step, width - 1)
    valid = (number < count) & (place % ranks == rank)
    if mask is not None:
        number = _nth(mask, number)
    return number.clamp(0, max(N - 1, 0)), valid


def draw(rows: Tensor, mask: Tensor | None, K: int, share: tuple[int, int] = (0, 1)) -> Drawn:
    """Draw for every code one of ``rows`` [G, N, D]; see ``draw_rows``."""
    G, N, D = rows.shape
    number, valid = draw_rows(N, K, G, mask, rows.device, share)
    found = rows.new_zeros(G, K, D)
    if N:
        found = torch.where(valid[..., None], rows.gather(1, number[..., None].expand(G, K, D)), 0.0)
    offset = torch.randint(0, _TURN, (G,), device=rows.device) if share[0] == 0 else torch.zeros(G, device=rows.device)
    return Drawn(found, valid.to(rows.dtype), offset.to(rows.dtype))


def assign(dead: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
    """Give each dead code a drawn row of its own; where there are too few, the last dead codes wait.

    Args:
        dead: bool [G, K].

    Returns:
        Rows [G, K, D] and which codes take theirs, bool [G, K].
    """
    K = dead.shape[1]
    valid = drawn.valid > 0.5
    there, wanted = valid.sum(-1, keepdim=True), dead.sum(-1, keepdim=True)
    turn = dead.cumsum(-1) - 1
    spread = (turn * _TURN + drawn.offset[:, None].long()) * there // (wanted.clamp_min(1) * _TURN)
    turn = torch.where(wanted <= there, spread, turn)
    place = _nth(valid, turn).clamp(0, K - 1)
    rows = drawn.rows.gather(1, place[..., None].expand_as(drawn.rows))
    return rows, dead & (turn < there)


def _nth(flags: Tensor, n: Tensor) -> Tensor:
    """Where the n-th (from 0) of the True ``flags`` [G, N] is, for n [G, K]; N where there is none."""
    return torch.searchsorted(flags.cumsum(-1).contiguous(), n.contiguous() + 1)

"""The state before every step, as a backend left it: where states are rounded, whole sequences cannot be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def states_before(
    h: Tensor,
    c: Tensor,
    first: tuple[Tensor, Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    start: tuple[Tensor | None, Tensor | None],
    reverse: bool,
) -> tuple[list[Tensor], Any]:
    """h and c before every valid element of a dense call, and where these are, [T, B]."""
    T, B, _ = c.shape
    lengths = torch.full((B,), T) if lengths is None else lengths
    h_in, c_in = torch.empty_like(h), torch.empty_like(c)
    for b in range(B):
        for t in range(int(lengths[b])):
            before, later = (t + 1, t + 1) if reverse else (t - 1, t)
            inside = 0 <= before < int(lengths[b])
            h_in[t, b], c_in[t, b] = (h[before, b], c[before, b]) if inside else (first[0][b], first[1][b])
            if reset is not None and later < int(lengths[b]) and reset[later, b]:
                h_in[t, b], c_in[t, b] = (0 if v is None else v for v in start)
    return [h_in, c_in], torch.arange(T)[:, None] < lengths


def check_last(outputs: Any, first: tuple[Tensor, Tensor], lengths: Tensor | None, reverse: bool) -> None:
    """The last states are those of each row's last step."""
    h, c, _, h_n, c_n = outputs
    T = len(h)
    for b in range(len(h_n)):
        length = T if lengths is None else int(lengths[b])
        end = 0 if reverse else length - 1
        last = (first[0][b], first[1][b]) if length == 0 else (h[end, b], c[end, b])
        assert torch.equal(h_n[b], last[0]) and torch.equal(c_n[b], last[1])

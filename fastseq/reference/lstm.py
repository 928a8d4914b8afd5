"""Definition of the LSTM recurrence with binary gates, and of the noise that makes them binary.

Layouts. Dense: ``x_gates`` is [T, B, 4*H], with optional ``lengths`` [B]. Packed: ``x_gates`` is [N, 4*H] in the
step-major order of ``torch.nn.utils.rnn.PackedSequence`` with ``batch_sizes`` [T]; N is their sum. Every other
per-step tensor (h, c, gates, reset, noise) has the same leading dimensions. Steps beyond a row's length hold zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Product = Callable[[Tensor], Tensor]  # h [B, P] to its part of the pre-activations [B, 4*H]; of weight_hr, [B, H] to h
Transposed = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # its gradient and h to dh and gradients of the weights


def lstm(
    x_gates: Tensor,
    weight_hh: Tensor | Product,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | Product | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    h_start: Tensor | None = None,
    c_start: Tensor | None = None,
    noise: Tensor | None = None,
    tau: float = 1.0,
    hard: bool = False,
    reverse: bool = False,
) -> Outputs:
    """LSTM recurrence (Hochreiter and Schmidhuber 1997, forget gate of Gers et al. 2000) with the input and forget
    gates of G2-LSTM (Li et al., ICML 2018, equation 8): ``sigmoid((a + noise) / tau)``.

    Args:
        x_gates: [T, B, 4*H] or packed [N, 4*H]; input part of the pre-activations i, f, g, o, biases added.
        weight_hh: [4*H, P], P = H without projection, or what takes the place of its product, see ``Product``.
        weight_hr: [P, H], or what takes the place of its product, or None.
        h0, c0: [B, P], [B, H].
        lengths: [B] valid steps per row (dense only). batch_sizes: [T] rows per step (packed only).
        reset: bool, [T, B] or [N]: this step begins a new segment; no state crosses from the step before it to it, in
            either direction. Forward, the state before it is the start state; in reverse, the step before it (in time)
            starts from the start state.
        h_start, c_start: [P], [H], the start state; None means zeros.
        noise: [T, B, 2*H] or [N, 2*H], added to the pre-activations of i and f.
        tau: temperature of i and f. hard: i and f are 1 where their pre-activation is positive, else 0.
        reverse: go from each row's last step to its first.

    Returns:
        h [T, B, P], c [T, B, H], gates [T, B, 4*H] (activated; packed: [N, ...]), h_n [B, P], c_n [B, H].
    """
    if batch_sizes is not None:
        index, mask, lengths = (v.to(h0.device) for v in packed_index(batch_sizes, h0.shape[0]))
        dense: Any = (None if v is None else unpack(v, index, mask) for v in (x_gates, reset, noise))
        x_gates, reset, noise = dense
        state = (weight_hh, h0, c0, weight_hr, lengths, None, reset, h_start, c_start)
        out = lstm(x_gates, *state, noise, tau, hard, reverse)
        return out[0][mask], out[1][mask], out[2][mask], *out[3:]
    T, H, P = x_gates.shape[0], c0.shape[1], h0.shape[1]
    product: Product = (lambda h: h @ weight_hh.mT) if isinstance(weight_hh, Tensor) else weight_hh
    project = (lambda m: m @ weight_hr.mT) if isinstance(weight_hr, Tensor) else weight_hr
    h_start = h0.new_zeros(P) if h_start is None else h_start
    c_start = c0.new_zeros(H) if c_start is None else c_start
    h, c = h0, c0
    outs: list[Any] = [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        later = t + 1 if reverse else t  # the step whose reset flag cuts the state that enters step t
        if reset is not None and later < T:
            cut = reset[later] if lengths is None else reset[later] & (later < lengths)
            h, c = torch.where(cut[:, None], h_start, h), torch.where(cut[:, None], c_start, c)
        i, f, g, o = (x_gates[t] + product(h)).chunk(4, -1)
        if noise is not None:
            i, f = i + noise[t, :, :H], f + noise[t, :, H:]
        i = (i > 0).to(i.dtype) if hard else (i / tau).sigmoid()
        f = (f > 0).to(f.dtype) if hard else (f / tau).sigmoid()
        g = g.tanh()
        o = o.sigmoid()
        c_new = f * c + i * g
        h_new = o * c_new.tanh()
        h_new = h_new if project is None else project(h_new)
        outs[t] = h_new, c_new, torch.cat((i, f, g, o), -1)
        if lengths is None:
            h, c = h_new, c_new
        else:
            live = (t < lengths)[:, None]
            h, c = torch.where(live, h_new, h), torch.where(live, c_new, c)
            outs[t] = tuple(torch.where(live, v, v.new_zeros(())) for v in outs[t])
    empty = (x_gates.new_zeros(0, len(h0), n) for n in (P, H, 4 * H))
    h_all, c_all, gates = (torch.stack(v) for v in zip(*outs, strict=True)) if T else empty
    return h_all, c_all, gates, h.clone(), c.clone()


def lstm_gates(
    x_gates: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, **options: Any
) -> Tensor:
    """The activated gates of ``lstm``, rebuilt from its inputs and its outputs h and c. Shapes as in ``lstm``."""
    return lstm(x_gates, weight_hh, h0, c0, **options)[2]


def lstm_backward(
    grads: tuple[Tensor | None, ...],
    gates: Tensor,
    h: Tensor,
    c: Tensor,
    weight_hh: Tensor | Transposed,
    h0: Tensor,
    c0: Tensor,
    weight_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    h_start: Tensor | None = None,
    c_start: Tensor | None = None,
    tau: float = 1.0,
    hard: bool = False,
    reverse: bool = False,
) -> tuple[Any, ...]:
    """Gradients of ``lstm`` from its outputs, itself differentiable in every floating-point argument.

    Args:
        grads: gradients of (h, c, gates, h_n, c_n), each shaped as that output, or None for zeros.
        weight_hh: as in ``lstm``, or what takes the place of its transposed product, see ``Transposed``.
        others: as in ``lstm``.

    Returns:
        dx_gates, dweight_hh (or the tuple that stands for it), dh0, dc0, dweight_hr (None without projection),
        dh_start [P], dc_start [H].
    """
    B, H, P = h0.shape[0], c0.shape[1], h0.shape[1]
    dh_all, dc_all, dgates_all, dh, dc = grads
    if batch_sizes is not None:
        index, mask, lengths = (v.to(h0.device) for v in packed_index(batch_sizes, B))
        packed = (dh_all, dc_all, dgates_all, gates, h, c, reset)
        padded: Any = (None if v is None else unpack(v, index, mask) for v in packed)
        dh_all, dc_all, dgates_all, gates, h, c, reset = padded
    T = gates.shape[0]
    h_first = h0.new_zeros(P) if h_start is None else h_start
    c_first = c0.new_zeros(H) if c_start is None else c_start
    dh, dc = torch.zeros_like(h0) if dh is None else dh, torch.zeros_like(c0) if dc is None else dc
    dx: list[Any] = [None] * T
    dense = isinstance(weight_hh, Tensor)
    transposed: Any = (lambda d, h: (d @ weight_hh, d.mT @ h)) if dense else weight_hh
    _, *dweights = transposed(gates.new_zeros(B, 4 * H), torch.zeros_like(h0))
    dweight_hr = None if weight_hr is None else torch.zeros_like(weight_hr)
    dh_first, dc_first = torch.zeros_like(h_first), torch.zeros_like(c_first)
    for t in range(T) if reverse else reversed(range(T)):
        earlier, later = (t + 1, t + 1) if reverse else (t - 1, t)
        h_in, c_in = (h[earlier], c[earlier]) if 0 <= earlier < T else (h0, c0)
        if reverse and lengths is not None and earlier < T:  # rows that begin here
            begins = (earlier >= lengths)[:, None]
            h_in, c_in = torch.where(begins, h0, h_in), torch.where(begins, c0, c_in)
        cut = torch.zeros(B, dtype=torch.bool, device=h0.device)
        if reset is not None and later < T:
            cut = reset[later] if lengths is None else reset[later] & (later < lengths)
            h_in, c_in = torch.where(cut[:, None], h_first, h_in), torch.where(cut[:, None], c_first, c_in)
        i, f, g, o = gates[t].chunk(4, -1)
        dh_t, dc_t = (dh if dh_all is None else dh + dh_all[t]), (dc if dc_all is None else dc + dc_all[t])
        tanh_c = c[t].tanh()
        dm = dh_t if weight_hr is None else dh_t @ weight_hr
        dc_t = dc_t + dm * o * (1 - tanh_c * tanh_c)
        d = torch.cat((dc_t * g, dc_t * c_in, dc_t * i, dm * tanh_c), -1)  # of the activated gates
        d = d if dgates_all is None else d + dgates_all[t]
        di, df, dg, do = d.chunk(4, -1)
        di, df = (0 * di, 0 * df) if hard else (di * i * (1 - i) / tau, df * f * (1 - f) / tau)
        d = torch.cat((di, df, dg * (1 - g * g), do * o * (1 - o)), -1)
        live = torch.ones(B, 1, dtype=torch.bool, device=h0.device) if lengths is None else (t < lengths)[:, None]
        zero = d.new_zeros(())
        d, dx_h = torch.where(live, d, zero), torch.where(live, dh_t, zero)
        dx[t] = d
        dh_in, *more = transposed(d, h_in)
        dweights = [a + b for a, b in zip(dweights, more, strict=True)]
        if dweight_hr is not None:
            dweight_hr = dweight_hr + dx_h.mT @ (o * tanh_c)
        dh_in, dc_in = torch.where(live, dh_in, dh), torch.where(live, dc_t * f, dc)
        crossing = (cut[:, None]) & live
        dh_first = dh_first + torch.where(crossing, dh_in, zero).sum(0)
        dc_first = dc_first + torch.where(crossing, dc_in, zero).sum(0)
        dh, dc = torch.where(crossing, zero, dh_in), torch.where(crossing, zero, dc_in)
    dx_gates = torch.stack(dx) if T else torch.zeros_like(gates)
    dx_gates = dx_gates if batch_sizes is None else dx_gates[mask]
    dweight_hh = dweights[0] if dense else tuple(dweights)
    return dx_gates, dweight_hh, dh.clone(), dc.clone(), dweight_hr, dh_first, dc_first


def packed_index(batch_sizes: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed to dense: index [T, B] into the packed rows, mask [T, B] of valid places, lengths [B]."""
    sizes = batch_sizes.to(torch.int64)
    row = torch.arange(rows)
    mask = row < sizes[:, None]
    index = (sizes.cumsum(0) - sizes)[:, None] + row
    return index.where(mask, torch.zeros_like(index)), mask, mask.sum(0)


def unpack(packed: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """[N, ...] to [T, B, ...], zeros beyond each row's end."""
    dense = packed[index]
    return torch.where(mask.reshape(mask.shape + (1,) * (dense.dim() - 2)), dense, dense.new_zeros(()))


def philox(counter: Tensor, key: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        counter: [..., 4] int64 holding 32-bit words. key: 64-bit seed, low word first.

    Returns:
        [..., 4] int64 holding 32-bit words.
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), -1)


def _product(m: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in signed 64-bit arithmetic by halves."""
    low = m * (word & 0xFFFF)
    high = m * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def gate_noise(
    seed: Tensor,
    T: int,
    B: int,
    H: int,
    rows: Tensor | None = None,
    row_offset: int = 0,
    stream: int = 0,
    noise_probability: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Noise of the input and forget gates: ``Bernoulli(noise_probability) * (log U - log(1 - U))``.

    The counter is (unit, step, row_offset + rows[row], stream), the key is the seed; words 0 and 1 give U and the mask
    of i, words 2 and 3 of f; U = ((word >> 8) + 0.5) * 2**-24, and the mask is 1 where its own U < noise_probability.

    Args:
        seed: int64, one element. rows: int64 [B], the number of each row before any sorting; None means 0..B-1.
        stream: 2 * layer + direction. noise_probability: in [0, 1].

    Returns:
        [T, B, 2*H] of ``dtype``: i, then f.
    """
    row = (torch.arange(B) if rows is None else rows.cpu()) + row_offset
    grid = torch.meshgrid(torch.arange(T), row & 0xFFFFFFFF, torch.arange(H), indexing="ij")
    counter = torch.stack((grid[2], grid[0], grid[1], torch.full_like(grid[0], stream)), -1)
    words = philox(counter, int(seed) & 0xFFFFFFFFFFFFFFFF)
    uniform = ((words >> 8).to(torch.float64) + 0.5) * 2.0**-24
    logit = uniform.log() - (1 - uniform).log()
    keep = uniform < noise_probability
    noise = torch.cat((logit[..., 0] * keep[..., 1], logit[..., 2] * keep[..., 3]), -1)
    return noise.to(dtype)

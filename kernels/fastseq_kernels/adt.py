"""ADT's samples and the step on their distribution, with noise from counters: words equal to the CPU's bit for bit.

A program takes one counter a thread, which is four numbers of a row, 32 apart, and goes through all samples with means,
spreads and sums in registers. Nothing is kept from one kernel to the next but what is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two
from fastseq_kernels._tiles import tanh

_RUN_TIME = ["samples", "B", "N", "eps_row", "step"]  # sizes that must not compile anew
_COUNTERS = 32  # in a block of 128 numbers
_MOST = 128  # counters of a program


@triton.jit
def _log(x):
    """Of what lies in (0, 1), to the last digits near 1 too: 2 atanh((m - 1) / (m + 1)), x = 2^n m, m near 1."""
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23  # of sqrt(1/2)
    m = (bits - (n << 23)).to(tl.float32, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = 0.6666667 + z * (0.4 + z * (0.2857143 + z * (0.22222222 + z * 0.18181819)))
    return n.to(tl.float32) * 0.69314718 + (2.0 * s + s * z * series)


@triton.jit
def _log1p(x):
    """log(1 + x) of what lies in [0, 1]: 2 atanh(x / (2 + x))."""
    s = x / (2.0 + x)
    z = s * s
    series = 0.2857143 + z * (0.22222222 + z * (0.18181819 + z * 0.15384616))
    return 2.0 * s + s * z * (0.6666667 + z * (0.4 + z * series))


@triton.jit
def _pair(word, angle_word):
    """sqrt(-2 log U) times cos and sin of 2 pi V; the angle is a number of quarter turns and a rest, both exact."""
    u = (2 * (word >> 9).to(tl.int32) + 1).to(tl.float32) * 5.9604645e-08  # 2^-24
    v = 2 * (angle_word >> 9).to(tl.int32) + 1
    quarters = (v + 2097152) >> 22
    x = (v - (quarters << 22)).to(tl.float32) * 3.7450704e-07  # pi / 2 / 2^22
    z = x * x
    sine = x + x * z * (-0.16666667 + z * (0.008333334 + z * (-0.0001984127 + z * 2.7557319e-06)))
    cosine = 1.0 + z * (-0.5 + z * (0.041666668 + z * (-0.0013888889 + z * (2.4801588e-05 + z * -2.755732e-07))))
    odd = (quarters & 1) == 1
    radius = tl.sqrt(-2.0 * _log(u))
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    first = tl.where(((quarters + 1) & 2) == 2, -first, first)
    return radius * first, radius * tl.where((quarters & 2) == 2, -second, second)


@triton.jit
def _normals(seed, counter, sample, row, step):
    """The four numbers of each counter."""
    c = counter.to(tl.uint32)
    place = (tl.full(c.shape, sample, tl.uint32), tl.full(c.shape, row, tl.uint32), tl.full(c.shape, step, tl.uint32))
    w0, w1, w2, w3 = tl.philox(seed, c, place[0], place[1], place[2])
    n0, n1 = _pair(w0, w1)
    n2, n3 = _pair(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _place(N, BLOCK: tl.constexpr):
    """Counters of this program, its row, and where in it the first number of each counter stands."""
    tiles = tl.cdiv(N, 4 * BLOCK)
    counter = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return counter, (tl.program_id(0) // tiles).to(tl.int64), (counter // 32) * 128 + counter % 32


@triton.jit(do_not_specialize=_RUN_TIME)
def _noise_kernel(
    out_ptr,  # [samples, B, N] out
    seed_ptr,  # int64 [1]
    samples,
    B,
    N,
    step,
    BLOCK: tl.constexpr,
):
    counter, row, first = _place(N, BLOCK)
    seed, out = tl.load(seed_ptr), out_ptr + row * N + first
    for s in range(samples):
        noise = _normals(seed, counter, s, row, step)
        for j in tl.static_range(4):
            tl.store(out + j * 32, noise[j], mask=first + j * 32 < N)
        out += B.to(tl.int64) * N


@triton.jit(do_not_specialize=_RUN_TIME)
def _sample_kernel(
    x_ptr,  # [B, N]
    mu_ptr,  # float32 [B, N]
    rho_ptr,  # float32 [B, N]
    eps_ptr,  # float32 [B, N], or [1, N] with eps_row = 0
    out_ptr,  # [samples, B, N] out
    seed_ptr,  # int64 [1]
    samples,
    B,
    N,
    eps_row,
    step,
    low,
    high,
    BLOCK: tl.constexpr,
):
    counter, row, first = _place(N, BLOCK)
    at, seed = row * N + first, tl.load(seed_ptr)
    x, mu, spread, eps = (), (), (), ()
    for j in tl.static_range(4):
        here, inside = at + j * 32, first + j * 32 < N
        x = x + (tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32),)
        mu = mu + (tl.load(mu_ptr + here, mask=inside, other=0.0),)
        spread = spread + (_softplus(tl.load(rho_ptr + here, mask=inside, other=0.0)),)
        eps = eps + (tl.load(eps_ptr + row * eps_row + first + j * 32, mask=inside, other=0.0),)
    out = out_ptr + at
    for s in range(samples):
        noise = _normals(seed, counter, s, row, step)
        for j in tl.static_range(4):
            moved = x[j] + eps[j] * tanh(mu[j] + spread[j] * noise[j])
            moved = tl.where(moved < low, low, tl.where(moved > high, high, moved))
            tl.store(out + j * 32, moved, mask=first + j * 32 < N)
        out += B.to(tl.int64) * N


@triton.jit
def _way(t, TOTAL: tl.constexpr):
    """Where a step goes: the sign, or what an optimizer without memory makes of a total."""
    if TOTAL:
        return t / (tl.abs(t) + 1e-8)
    else:
        return tl.where(t > 0, 1.0, 0.0) - tl.where(t < 0, 1.0, 0.0)


@triton.jit
def _finish(d, value, place, inside, row_of, totals_ptr, d_ptr, up_ptr, rate):
    """From the gradients of one of the two parameters to results."""
    if totals_ptr is not None:
        d += tl.load(totals_ptr + row_of + place, mask=inside, other=0.0)
    if d_ptr is not None:
        tl.store(d_ptr + row_of + place, d, mask=inside)
    if up_ptr is not None:
        tl.store(up_ptr + place, value + rate * _way(d, totals_ptr is not None), mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def _step_kernel(
    g_ptr,  # [samples, B, N]
    x_ptr,  # [B, N]
    mu_ptr,  # float32 [B, N]
    rho_ptr,  # float32 [B, N]
    eps_ptr,  # float32 [B, N], or [1, N] with eps_row = 0
    weight_ptr,  # float32 [B]
    totals_ptr,  # float32 [2, B, N] or None
    d_ptr,  # float32 [2, B, N] out, or None
    mu_up_ptr,  # float32 [B, N] out, or None
    rho_up_ptr,  # float32 [B, N] out, or None
    seed_ptr,  # int64 [1]
    samples,
    B,
    N,
    eps_row,
    step,
    low,
    high,
    rate,
    BLOCK: tl.constexpr,
):
    counter, row, first = _place(N, BLOCK)
    at, seed, weight = row * N + first, tl.load(seed_ptr), tl.load(weight_ptr + row)
    x, mu, rho, spread, eps, dmu, dspread = (), (), (), (), (), (), ()
    for j in tl.static_range(4):
        here, inside = at + j * 32, first + j * 32 < N
        x = x + (tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32),)
        mu = mu + (tl.load(mu_ptr + here, mask=inside, other=0.0),)
        rho = rho + (tl.load(rho_ptr + here, mask=inside, other=0.0),)
        spread = spread + (_softplus(rho[j]),)
        eps = eps + (tl.load(eps_ptr + row * eps_row + first + j * 32, mask=inside, other=0.0),)
        dmu, dspread = dmu + (tl.zeros([BLOCK], tl.float32),), dspread + (tl.zeros([BLOCK], tl.float32),)
    g_row = g_ptr + at
    for s in range(samples):
        noise = _normals(seed, counter, s, row, step)
        new_mu, new_spread = (), ()
        for j in tl.static_range(4):
            u = mu[j] + spread[j] * noise[j]
            e, t = tl.exp(-2.0 * tl.abs(u)), tanh(u)
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e))  # of tanh: 1 - t^2 has no digits far out
            moved = x[j] + eps[j] * t
            g = tl.load(g_row + j * 32, mask=first + j * 32 < N, other=0.0).to(tl.float32)
            du = tl.where((moved >= low) & (moved <= high), eps[j] * slope * g, 0.0)
            du -= tl.where(eps[j] != 0, 2.0 * weight, 0.0) * t
            new_mu, new_spread = new_mu + (dmu[j] + du,), new_spread + (dspread[j] + du * noise[j],)
        dmu, dspread = new_mu, new_spread
        g_row += B.to(tl.int64) * N
    for j in tl.static_range(4):
        e = tl.exp(-tl.abs(rho[j]))
        sigmoid = tl.where(rho[j] > 0, 1.0, e) / (1.0 + e)
        of_log = tl.where(rho[j] < -80, 1.0, sigmoid / spread[j])  # goes to 1 where both go to zero
        drho = dspread[j] * sigmoid + tl.where(eps[j] != 0, samples * weight * of_log, 0.0)
        here, inside, second = at + j * 32, first + j * 32 < N, B.to(tl.int64) * N
        _finish(dmu[j], mu[j], here, inside, 0, totals_ptr, d_ptr, mu_up_ptr, rate)
        _finish(drho, rho[j], here, inside, second, totals_ptr, d_ptr, rho_up_ptr, rate)


def _launch(kernel: Any, B: int, N: int, *args: Any) -> None:
    block = _COUNTERS * power_of_two(cdiv(N, 4 * _COUNTERS), most=_MOST // _COUNTERS)
    launch(kernel, (B * cdiv(N, 4 * block),), *args, BLOCK=block, num_warps=block // 32)


def _eps_row(eps: Tensor) -> int:
    """Numbers from the eps of one row to that of the next."""
    return 0 if len(eps) == 1 else eps.shape[1]


def adt_noise(like: Tensor, seed: Tensor, samples: int, step: int) -> Tensor:
    """``reference.adt_noise`` in float32, [samples, B, N] for ``like`` [B, N]."""
    B, N = like.shape
    out = torch.empty(samples, B, N, dtype=like.dtype, device=like.device)
    _launch(_noise_kernel, B, N, out, seed.to(like.device), samples, B, N, step)
    return out


def adt_sample(
    x: Tensor, mu: Tensor, rho: Tensor, seed: Tensor, eps: Tensor, samples: int, step: int, low: float, high: float
) -> Tensor:
    """``reference.adt_sample`` with that noise, of the dtype of x."""
    B, N = x.shape
    out = torch.empty(samples, B, N, dtype=x.dtype, device=x.device)
    given = (x, mu, rho, eps, out, seed.to(x.device), samples, B, N, _eps_row(eps), step, low, high)
    _launch(_sample_kernel, B, N, *given)
    return out


def adt_backward(
    g: Tensor,
    x: Tensor,
    mu: Tensor,
    rho: Tensor,
    seed: Tensor,
    eps: Tensor,
    weight: Tensor,
    step: int,
    low: float,
    high: float,
) -> Tensor:
    """``reference.adt_backward`` with that noise, [2, B, N]."""
    S, B, N = g.shape
    d = torch.empty(2, B, N, dtype=mu.dtype, device=x.device)
    tensors = (g, x, mu, rho, eps, weight, None, d, None, None, seed.to(x.device))
    _launch(_step_kernel, B, N, *tensors, S, B, N, _eps_row(eps), step, low, high, 0.0)
    return d


def adt_ascend(
    g: Tensor,
    x: Tensor,
    mu: Tensor,
    rho: Tensor,
    seed: Tensor,
    eps: Tensor,
    weight: Tensor,
    totals: Tensor | None,
    step: int,
    rate: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.adt_ascend`` with that noise."""
    S, B, N = g.shape
    up = torch.empty_like(mu), torch.empty_like(rho)
    d = mu.new_empty(0) if totals is None else torch.empty_like(totals)
    tensors = (g, x, mu, rho, eps, weight, totals, None if totals is None else d, *up, seed.to(x.device))
    _launch(_step_kernel, B, N, *tensors, S, B, N, _eps_row(eps), step, low, high, rate)
    return *up, d

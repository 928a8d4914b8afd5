"""Kernels that compute nothing of use: they show what a launch, a read from L2 and a small product cost."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def empty(x_ptr):
    pass


@triton.jit(do_not_specialize=["repeats"])
def read_again(
    x_ptr,  # [size], a multiple of BLOCK
    out_ptr,  # [programs]
    size,
    repeats,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.int32)
    for _ in range(repeats):
        for start in range(0, size, BLOCK):
            # .cg: past the cache of the multiprocessor
            total += tl.load(x_ptr + start + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["repeats"])
def dot_again(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    out_ptr,  # [programs, M, N]
    repeats,
    M: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    total = tl.zeros([M, N], tl.float32)
    for _ in range(repeats):
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out_ptr + tl.program_id(0) * M * N + m[:, None] * N + n[None, :], total)

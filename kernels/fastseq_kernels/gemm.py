"""The matrix product with one order of summation over K: a row of the result does not depend on the other rows.

Tiles depend on N, K and the dtype, never on the number of rows, and each element is summed over K in ascending order,
in as many chunks as ``_chunks`` says, which are then added in order. Inside an LSTM ``layer_product`` leaves the
product to cuBLAS wherever torch would compute it with the precision that is asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels._launch import cdiv, launch, power_of_two, rnn_precision
from fastseq_kernels._tiles import add_product

_RUN_TIME = ["M", "K", "blocks"]  # sizes that must not compile anew; rows are M, or K of a weight's gradient


@triton.jit(do_not_specialize=_RUN_TIME)
def _gemm_kernel(
    a_ptr,  # [M, K] by its strides
    b_ptr,  # [K, N] by its strides
    bias_ptr,  # [N] or None
    out_ptr,  # [chunks of K, M, N]
    M,
    N,
    K,
    blocks,  # tiles of K in one chunk
    a_row,
    a_column,
    b_row,
    b_column,
    K_MULTIPLE: tl.constexpr,  # of K, where that is a size of the model: what keeps loads along K wide
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK_N)
    m_first, n_first = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M, (tl.program_id(0) % across) * BLOCK_N
    first = tl.program_id(1).to(tl.int64) * blocks * BLOCK_K
    m, n, k = tl.arange(0, BLOCK_M), n_first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # What passes 2^31 is in the scalars; inside of a tile 32 bits do.
    a = a_ptr + (m_first * a_row + first * a_column)
    b = b_ptr + (n_first.to(tl.int64) * b_column + first * b_row)
    a_tile = m[:, None] * a_row + k[None, :] * a_column
    b_tile = k[:, None] * b_row + tl.arange(0, BLOCK_N)[None, :] * b_column
    m_left, k_left = tl.minimum(M - m_first, BLOCK_M).to(tl.int32), tl.minimum(K - first, blocks * BLOCK_K).to(tl.int32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lost = total
    for done in range(0, k_left, BLOCK_K):
        inside = k < tl.multiple_of(k_left - done, K_MULTIPLE)
        left = tl.load(a + a_tile, mask=(m < m_left)[:, None] & inside[None, :], other=0.0)
        right = tl.load(b + b_tile, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        total, lost = add_product(total, lost, left, right, PRECISION)
        a += tl.cast(BLOCK_K, tl.int64) * a_column
        b += tl.cast(BLOCK_K, tl.int64) * b_row
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (tl.program_id(1).to(tl.int64) * M + m_first) * N
    tl.store(out + m[:, None] * N + n[None, :], total, mask=(m < m_left)[:, None] & (n < N)[None, :])


class Tile(NamedTuple):
    """How the kernel runs."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def tile(N: int, K: int, dtype: torch.dtype, precision: str) -> Tile:
    """Products without tensor cores keep a whole BLOCK_K of both operands in registers, so theirs is short."""
    if dtype == torch.float32 and precision == "ieee":
        return Tile(64, power_of_two(N, 16, 64), 16, 8, 2)
    block_k = power_of_two(K, 16, 32 if dtype == torch.float32 else 64)
    block_n = power_of_two(N, 16, 128)
    return Tile(128, block_n, block_k, 8 if block_n == 128 else 4, 3)


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    transpose_a: bool,
    transpose_b: bool,
    precision: str,
    chunks: int = 1,
) -> Tensor:
    """``op(a) @ op(b) + bias`` in a's dtype; ``precision`` as in ``tl.dot``, the sum over K in ``chunks`` parts."""
    a, b = a.mT if transpose_a else a, b.mT if transpose_b else b
    (M, K), N = a.shape, b.shape[1]
    at = tile(N, K, a.dtype, precision)
    blocks = cdiv(max(K, 1), chunks * at.block_k)
    chunks = cdiv(max(K, 1), blocks * at.block_k)
    out = torch.empty(chunks, M, N, device=a.device, dtype=a.dtype if chunks == 1 else torch.float32)
    launch(
        _gemm_kernel,
        (cdiv(M, at.block_m) * cdiv(N, at.block_n), chunks),
        *(a, b, bias if chunks == 1 else None, out, M, N, K, blocks, *a.stride(), *b.stride()),
        K_MULTIPLE=16 if K % 16 == 0 and 1 in (a.stride(1), b.stride(0)) else 1,
        PRECISION=precision,
        BLOCK_M=at.block_m,
        BLOCK_N=at.block_n,
        BLOCK_K=at.block_k,
        num_warps=at.num_warps,
        num_stages=at.num_stages,
    )
    if chunks == 1:
        return out[0]
    total = out.sum(0)
    return (total if bias is None else total + bias).to(a.dtype)


def _chunks(K: int, transpose_a: bool) -> int:
    """With ``transpose_a`` the result is small and the sum long, as in a weight's gradient: it needs more programs."""
    return max(1, min(16, cdiv(K, 4096))) if transpose_a else 1


def matmul_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a plain product: TF32 where ``torch.backends.cuda.matmul`` allows it."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def layer_product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, transpose_a: bool = False, transpose_b: bool = False
) -> Tensor:
    """The product inside an LSTM: torch's own, unless the switches of cudnn.rnn and of cuda.matmul disagree on TF32."""
    precision = rnn_precision(a.dtype)
    if precision != matmul_precision(a.dtype):
        return product(a, b, bias, transpose_a, transpose_b, precision, _chunks(b.shape[0], transpose_a))
    a, b = a.mT if transpose_a else a, b.mT if transpose_b else b
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def gemm(
    a: Tensor, b: Tensor, bias: Tensor | None = None, transpose_a: bool = False, transpose_b: bool = False
) -> Tensor:
    """``reference.linear``; float32 is exact to float32 unless ``torch.backends.cuda.matmul`` allows TF32."""
    K = a.shape[0 if transpose_a else 1]
    return product(a, b, bias, transpose_a, transpose_b, matmul_precision(a.dtype), _chunks(K, transpose_a))

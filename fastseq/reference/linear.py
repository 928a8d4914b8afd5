"""Definition of the matrix product with a fixed order of summation (``fastseq::gemm``)."""

from __future__ import annotations

from torch import Tensor


def linear(
    a: Tensor, b: Tensor, bias: Tensor | None = None, transpose_a: bool = False, transpose_b: bool = False
) -> Tensor:
    """``op(a) @ op(b) + bias`` with op the transpose where asked.

    Args:
        a: [M, K], or [K, M] with ``transpose_a``.
        b: [K, N], or [N, K] with ``transpose_b`` (the layout of ``nn.Linear.weight``).
        bias: [N] or None.

    Returns:
        [M, N].
    """
    out = (a.mT if transpose_a else a) @ (b.mT if transpose_b else b)
    return out if bias is None else out + bias

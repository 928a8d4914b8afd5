"""The lookup in operators that ONNX has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq.functional import Quantized


def exporting() -> bool:
    """Whether ``torch.onnx.export`` is tracing this call."""
    if torch.compiler.is_dynamo_compiling():
        return False
    traced = torch.compiler.is_exporting() or torch._C._is_tracing()
    return traced and torch.onnx.is_in_onnx_export()


def quantize(x: Tensor, codebook: Tensor, dot: bool, mask: Tensor | None) -> Quantized:
    """``functional.vq_quantize`` without gradients and sums, by a product and the place of its smallest entry.

    Codes that are nearly as good as the best may win, since products are summed in another order.

    Args:
        x: [G, N, D]. codebook: [G, K, D]. dot: the largest product, not the smallest distance. mask: bool [G, N].

    Returns:
        ``Quantized`` whose fields after ``index`` are None or zero.
    """
    scores = -x @ codebook.transpose(1, 2)
    if not dot:
        scores = scores + 0.5 * codebook.square().sum(-1)[:, None, :]
    index = scores.argmin(-1)
    if codebook.shape[0] == 1:
        codes = F.embedding(index[0], codebook[0])[None]
    else:
        codes = codebook.gather(1, index[..., None].expand(*index.shape, codebook.shape[-1]))
    if mask is not None:
        codes, index = torch.where(mask[..., None], codes, 0.0), index.masked_fill(~mask, -1)
    zero = torch.zeros_like(scores[..., 0])
    return Quantized(codes, index, zero, zero, None, None)

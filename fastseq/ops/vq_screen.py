"""``fastseq::vq_screen``: many rows past a screen on tensor cores, ``csrc/cuda/vq_screen.h``.

x [G, N, D], codebook [G, K, D], and what ``fastseq_kernels._pieces.split_codes`` makes of it. Written: index and score
[G, N] of the rows that the screen decides, and in open [G, N] and count [G] those that it leaves to triton's sweep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.ops._library import library
from fastseq.ops._triton import kernels
from fastseq.ops.vq_lookup import INDEX, Call, Found, Shape

library.define(
    "vq_screen(Tensor x, Tensor codebook, Tensor starts, Tensor pieces, Tensor h, Tensor most, Tensor? centre, "
    "Tensor? mask, int products, bool dot, float slack, Tensor(a!) index, Tensor(b!)? score, Tensor(c!) open, "
    "Tensor(d!) count) -> ()"
)
library.define("vq_screen_fits(int device, int products, int D) -> bool")

MOST_D = 256
CODES = 128  # to a multiple of which the codes are filled up
WIDTHS = (64, 128, 256)  # and their columns to one of these
MOST_G = 65535
# Estimates: nobody has timed it. As of triton's screen, which shorter or fewer codes do not pay for; and each block of
# threads has all codes of its rows, so there must be work for at least half of the multiprocessors.
LEAST_D, LEAST_K = 17, 128
ROWS = 256  # of a block of threads, at most


@torch.library.register_fake("fastseq::vq_screen", lib=library)
def _(*args: object) -> None:
    """Everything is written into tensors that are given."""


def products(shape: Shape) -> int:
    """Of a score, as ``fastseq_kernels._pieces.products_of`` has it."""
    x, codes = shape.dtypes[:2]
    return 1 if x == codes != torch.float32 else 2 if x == torch.bfloat16 else 3


def _fits(shape: Shape) -> bool:
    """Whether the device has room; there must be one."""
    found: bool = torch.ops.fastseq.vq_screen_fits(shape.device.index or 0, products(shape), shape.size[2])
    return found


def why_not(shape: Shape) -> str | None:
    G, _, D = shape.size
    if shape.screen == 0:
        return "a screen is not wanted"
    if len(shape.sizes) > 1 or not shape.grouped:
        return "no screen of several levels"
    if G > MOST_G:
        return f"G = {G} is more than a screen takes, G <= {MOST_G} is not"
    if D > MOST_D:
        return f"D = {D} is more than a screen holds, D <= {MOST_D} is not"
    if D % 2 and products(shape) < 3:
        return f"D = {D} is odd, so that no two 16-bit numbers of a row can be read together"
    if not torch.cuda.is_available():
        return "no CUDA device is here"
    return None if _fits(shape) else "the device has no room for a screen's block of threads"


def doubt(shape: Shape) -> str | None:
    """Where triton's way is said to cost less."""
    (G, N, D), K = shape.size, shape.sizes[0]
    if D < LEAST_D or K < LEAST_K:
        return f"codes of D = {D}, K = {K} do not pay for a screen by our estimate, D >= {LEAST_D}, K >= {LEAST_K} do"
    blocks, processors = G * -(-N // ROWS), kernels("_launch").target(shape.device).multiprocessors
    if 2 * blocks < processors:
        return f"{G * N} rows are work for {blocks} of {processors} multiprocessors"
    return None


def detail(shape: Shape) -> str:
    return f"screen on tensor cores, products of 16 bits: {products(shape)}"


def screened(call: Call) -> tuple[Tensor, Tensor | None]:
    """Index and score [G, N], all rows but the open ones decided by the screen."""
    pieces, sweep = kernels("_pieces"), kernels("vq_nearest").sweep
    of_screen = kernels("vq_screen")
    x, (codebook,), (G, N, D) = call.data, call.codebooks, call.size
    if x.data_ptr() % 4:
        x = x.clone()  # a view that begins at an odd number
    starts, turned = kernels("_scores").turned_codes(codebook, call.dot)
    codes = pieces.split_codes(codebook, starts, call.dot, x, next(w for w in WIDTHS if w >= D), CODES)
    index = torch.empty(G, N, dtype=INDEX[call.bits], device=x.device)
    score = torch.empty(G, N, dtype=torch.float32, device=x.device) if call.score else None
    opened = torch.empty(G, N, dtype=torch.int32, device=x.device)
    count = torch.empty(G, dtype=torch.int32, device=x.device)
    torch.ops.fastseq.vq_screen.default(
        *(x, codebook, starts, codes.pieces, codes.h, codes.most, codes.centre, call.mask),
        *(codes.products, call.dot, pieces._SLACK, index, score, opened, count),
    )
    left = of_screen.Screened(0, N, opened, count)
    sweep(of_screen.Lookup(x, codebook, starts, turned, call.dot, call.mask, index, score), left)
    return index, score


def run(call: Call) -> Found:
    x, (codebook,), (G, N, _) = call.data, call.codebooks, call.size
    index, score = screened(call)
    distance = torch.empty((G, N) if call.distance else 0, dtype=torch.float32, device=x.device)
    quantized = torch.empty_like(x) if call.quantized else x.new_empty(0)
    if call.distance or call.quantized:
        outs = (quantized if call.quantized else None, distance if call.distance else None)
        kernels("vq_nearest").gather(x, codebook, index, *outs)
    none = distance.new_empty(0)
    per_level = distance.view(G, 1, N) if call.distance else distance
    return Found(index[..., None], per_level, none if score is None else score[:, None], quantized)

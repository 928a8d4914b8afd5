"""What the parity calls of vector quantization, most important first. Indices must be those of the definition."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.parity import Check, Kernels, definition
from fastseq import reference
from tests.ops import vq_cases
from tests.ops.vq_cases import BACKENDS, Case
from tests.tolerance import GRADIENTS

CASES = {
    "usual": Case(300, 500, 64),
    "wide": Case(130, 257, 256),
    "narrow": Case(200, 1024, 8, masked=True),
    "few": Case(5, 3000, 48),
    "groups": Case(33, 70, 24, G=3, masked=True),
    "dot": Case(64, 100, 32, dot=True),
    "one": Case(1, 1, 1),
    "deep": Case(20, 40, 1100),
    **{kind: Case(65, 130, 40, kind=kind) for kind in vq_cases.KINDS if kind != "normal"},
}
DRY = ("one",)
HARD = ("usual", "narrow", "groups", "duplicates", "strange")
RESIDUAL = {"usual": (70, 24, (100, 65, 130)), "narrow": (130, 8, (1024,) * 4), "one": (1, 1, (1,))}


def inputs(name: str, dtype: torch.dtype, mixed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows and mask, and codes, which stay in float32 where ``mixed``."""
    x, codebook, mask = vq_cases.inputs(CASES[name])
    return x.to(dtype), codebook.to(torch.float32 if mixed else dtype), mask


def same(name: str, got: Tensor, expected: Tensor) -> None:
    wrong = int((~((got == expected) | (got.isnan() & expected.isnan()))).sum())
    assert got.shape == expected.shape and not wrong, f"{name}: {wrong} of {expected.numel()} differ"


def _distances(kernels: Kernels, x: Tensor, codebook: Tensor, index: Tensor, got: Tensor) -> None:
    if torch.isfinite(x).all() and torch.isfinite(codebook).all():
        single = Kernels(kernels.context, "float32")
        single.within_budget("distance", [got], vq_cases.distances, [x.float(), codebook.float(), index])


def nearest(kernels: Kernels, name: str, mixed: bool, screen: int, best: int = 1) -> None:
    case = CASES[name]
    x, codebook, mask = inputs(name, kernels.torch_dtype, mixed)
    best = min(best, case.K)
    given = [x, codebook, mask, case.dot, best, 64, True, True, screen]
    index, distance, score = kernels.call("vq_nearest", "vq_nearest", given)
    wide = x.float(), codebook.float()
    same("index", index, reference.vq_nearest(*wide, mask, case.dot, best))
    same("score", score, vq_cases.expected_scores(*wide, mask, case.dot, index))
    _distances(kernels, x, codebook, index, distance)


def quantize(kernels: Kernels, name: str, mixed: bool, by_code: bool = True) -> None:
    """``by_code``: sums too."""
    case = CASES[name]
    x, codebook, mask = inputs(name, kernels.torch_dtype, mixed)
    got = kernels.call("vq_quantize", "vq_quantize", [x, codebook, mask, case.dot, by_code])
    codes, index, distance, counts, sums = got
    same("index", index, reference.vq_nearest(x.float(), codebook.float(), mask, case.dot)[..., 0])
    same("codes", codes, reference.vq_gather(codebook, index).to(x.dtype))
    _distances(kernels, x, codebook, index[..., None], distance[..., None])
    if by_code:
        _same_sums(kernels, x, index, case.K, counts, sums)


def _same_sums(kernels: Kernels, x: Tensor, index: Tensor, K: int, counts: Tensor, sums: Tensor) -> None:
    expected = reference.vq_sums(x.double(), index, K)
    same("counts", counts, expected[0].float())
    if torch.isfinite(x).all():
        given = [x.float(), index, K]
        Kernels(kernels.context, "float32").within_budget("sums", [sums], lambda *a: reference.vq_sums(*a)[1], given)


def sums(kernels: Kernels, name: str) -> None:
    case = CASES[name]
    x = inputs(name, kernels.torch_dtype, False)[0]
    index = vq_cases.places(case.G, case.N, case.K)
    counts, total = kernels.call("vq_sums", "vq_sums", [x, index, case.K])
    _same_sums(kernels, x, index, case.K, counts, total)


def backward(kernels: Kernels, name: str, gradient: int) -> None:
    case = CASES[name]
    x, codebook, _ = inputs(name, kernels.torch_dtype, False)
    index = vq_cases.places(case.G, case.N, case.K)
    codes = reference.vq_gather(codebook, index).to(x.dtype)
    dy, *rest = vq_cases.upstream(case.G, case.N, case.D, "quantized commitment codebook_error", torch.float32)
    given: list[Any] = [dy.to(x.dtype), *rest, x, codes, index, case.K, gradient, True, True]  # type: ignore[union-attr]
    got = kernels.call("vq_backward", "vq_backward", given)
    kernels.within_budget("dx dcodebook", got, definition("vq_backward", BACKENDS), given, GRADIENTS)


def _codes(bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (3, 1001), generator=torch.Generator().manual_seed(37))


def pack(kernels: Kernels, bits: int) -> None:
    index = _codes(bits)
    same("packed", kernels.call("vq_codes", "vq_pack", [index, bits])[0], reference.vq_pack(index, bits))


def unpack(kernels: Kernels, bits: int) -> None:
    index = _codes(bits)
    given = [reference.vq_pack(index, bits), bits, index.shape[1]]
    same("unpacked", kernels.call("vq_codes", "vq_unpack", given)[0], index)


def _residual(name: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    N, D, sizes = RESIDUAL[name]
    books = [(vq_cases.normals(K, D, seed=n) / 2**n).to(dtype) for n, K in enumerate(sizes)]
    levels = torch.arange(N) % (len(sizes) + 1) if N > 1 else torch.full((N,), len(sizes))
    return vq_cases.normals(N, D, seed=9).to(dtype), books, levels


def _followed(x: Tensor, books: list[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the codes that ``index`` [N, M] names, and squared distances [M, N]."""
    rest, total, apart = x, torch.zeros_like(x), []
    for m, book in enumerate(books):
        chosen = reference.vq_gather(book[None].to(x.dtype), index[None, :, m])[0]
        apart.append(torch.where(index[:, m] >= 0, (rest - chosen).square().sum(-1), 0.0))
        total, rest = total + chosen, rest - chosen
    return total, torch.stack(apart)


def residual(kernels: Kernels, name: str, by_code: bool = True) -> None:
    """``by_code``: sums too."""
    x, books, levels = _residual(name, kernels.torch_dtype)
    got = kernels.call("vq_residual", "vq_residual", [x, books, None, levels, by_code, True])
    check_residual(kernels, x, books, levels, got[:3])


def check_residual(
    kernels: Kernels, x: Tensor, books: list[Tensor], levels: Tensor | None, got: Sequence[Tensor]
) -> None:
    """Sum, index and distance of a residual quantizer."""
    total, index, distance = got
    same("index", index, reference.vq_residual(x.float(), [b.float() for b in books], None, levels)[1])
    kernels.within_budget("quantized", [total], lambda *a: _followed(*a)[0], [x, books, index])
    single = Kernels(kernels.context, "float32")
    wide = [x.float(), [b.float() for b in books], index]
    single.within_budget("distance", [distance], lambda *a: _followed(*a)[1], wide)


def residual_backward(kernels: Kernels, name: str, gradient: int) -> None:
    x, books, levels = _residual(name, kernels.torch_dtype)
    index = reference.vq_residual(x.float(), [b.float() for b in books], None, levels)[1]
    dy, dcommitment = vq_cases.normals(*x.shape, seed=3).to(x.dtype), vq_cases.normals(len(books), len(x), seed=4)
    given = [dy, dcommitment, x, torch.cat(books), [len(b) for b in books], index, gradient]
    got = kernels.call("vq_residual", "vq_residual_backward", given)
    kernels.within_budget("dx", got, definition("vq_residual_backward", BACKENDS), given, GRADIENTS)


def checks(kernels: Kernels) -> Iterator[Check]:
    dry, short = kernels.context.dry, kernels.dtype != "float32"
    for name in DRY if dry else CASES:
        for mixed in (False, True) if short and not dry else (False,):
            for screen in (0, 1) if not dry else (0,):
                call = functools.partial(nearest, kernels, name, mixed, screen)
                yield Check("vq_nearest", "vq_nearest", f"{name} {mixed} screen {screen}", call)
    if dry:
        return
    for name in HARD:
        yield Check(
            "vq_nearest", "vq_nearest", f"{name} best 3", functools.partial(nearest, kernels, name, False, 0, 3)
        )
        for mixed in (False, True) if short else (False,):
            call = functools.partial(quantize, kernels, name, mixed)
            yield Check("vq_quantize", "vq_quantize", f"{name} {mixed}", call)
        yield Check("vq_sums", "vq_sums", name, functools.partial(sums, kernels, name))
    for gradient in range(3):
        for name in ("usual", "groups", "one"):
            call = functools.partial(backward, kernels, name, gradient)
            yield Check("vq_backward", "vq_backward", f"{name} {vq_cases.GRADIENTS[gradient]}", call)
    for name in RESIDUAL:
        yield Check("vq_residual", "vq_residual", name, functools.partial(residual, kernels, name))
        for gradient in range(2):
            call = functools.partial(residual_backward, kernels, name, gradient)
            yield Check("vq_residual", "vq_residual_backward", f"{name} {vq_cases.GRADIENTS[gradient]}", call)
    if not short:
        for bits in (1, 7, 10, 16, 31):
            yield Check("vq_codes", "vq_pack", f"{bits} bits", functools.partial(pack, kernels, bits))
            yield Check("vq_codes", "vq_unpack", f"{bits} bits", functools.partial(unpack, kernels, bits))

"""What the parity calls of the compiled lookup of few rows, verified as ``vq_lookup``: its kernel in any number of
parts, and the operators that take it. Blocks that wait for each other can hang: each case has a limit."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.gpu import parity_vq
from benchmarks.gpu.parity import Check, Kernels
from benchmarks.gpu.parity_persist import same_bits
from benchmarks.gpu.part import backend
from benchmarks.harness import CannotRun
from fastseq.ops import vq_lookup
from fastseq.ops.vq_lookup import Call, Found
from tests.ops import vq_cases

SECONDS = 0.5  # of a case, roughly
LIMIT = 40.0  # of a case, before it counts as hung: nothing compiles in it
STACKS = {  # rows, columns, and codes of each level
    "codec": (1, 128, (1024,) * 8),
    "rows": (40, 64, (1024, 1024)),
    "odd": (19, 33, (100, 65, 7)),
    "one": (1, 1, (1,)),
    "deep": (3, 512, (300, 40)),
    "large": (17, 16, (5000,)),
    "many": (500, 9, (70,)),
    "levels": (2, 8, (16,) * 32),
}
DRY = {"odd": (3, 9, (70, 33, 5)), "one": (1, 1, (1,))}
REPEATS = 100


class Compiled(Kernels):
    """Operators by their backend "cuda"."""

    def call(self, module: str, op: str, args: Sequence[Any], stay: Sequence[Any] = ()) -> list[Tensor]:
        own = next(b for b in vq_cases.BACKENDS[op] if b.name == "cuda")
        moved = self.moved(args, stay)
        with backend("cuda"):
            reason = own.why_not(*moved)
            if reason is not None:
                raise CannotRun(reason)
            return [v.cpu() for v in pytree.tree_leaves(own.run(*moved))]


def runs(dry: bool) -> AbstractContextManager[None]:
    """Inside, the kernel can be called; in a dry run on CPU tensors, emulated."""
    if not dry:
        return nullcontext()
    from tests.cuda import vq_lookup as emulated

    return emulated.registered()


def drawn(kernels: Kernels, name: str, seed: int = 0) -> Call:
    """A stack on the device; rows use different numbers of levels."""
    N, D, sizes = kernels.context.pick(STACKS, DRY)[name]
    device, dtype = kernels.context.device, kernels.torch_dtype
    books = [vq_cases.normals(K, D, seed=seed + n) / 2 ** min(n, 6) for n, K in enumerate(sizes)]
    levels = len(sizes) - torch.arange(N) % (len(sizes) + 1)
    x = vq_cases.normals(N, D, seed=seed + 99).to(device, dtype)
    return Call(x, [b.to(device, dtype) for b in books], levels=levels.to(device), score=True)


def parts_of(kernels: Kernels, call: Call) -> int:
    """The most, which is what an operator takes."""
    found = 3 if kernels.context.dry else vq_lookup.parts_of(call.shape)
    if not found:
        raise CannotRun(f"needs {call.shape.groups} blocks of threads at a time, the device holds fewer")
    return found


def stack(kernels: Kernels, name: str) -> None:
    """The definition's index, and the same bits in any number of parts."""
    call = drawn(kernels, name)
    most = parts_of(kernels, call)
    with runs(kernels.context.dry):
        first = vq_lookup.lookup(call, most)
        for parts in sorted({1, 2, (most + 1) // 2}):
            same_bits_of(vq_lookup.lookup(call, parts), first)
    assert call.levels is not None
    got = [v.cpu() for v in (first.quantized, first.index[0], first.distance[0])]
    books = [b.cpu() for b in call.codebooks]
    parity_vq.check_residual(kernels, call.data.cpu(), books, call.levels.cpu(), got)


def same_bits_of(got: Found, expected: Found) -> None:
    parity_vq.same("index", got.index, expected.index)
    same_bits(Found._fields[1:], got[1:], expected[1:])


def repeats(kernels: Kernels, name: str) -> None:
    call = drawn(kernels, name)
    most = parts_of(kernels, call)
    with runs(kernels.context.dry):
        first = vq_lookup.lookup(call, most)
        for _ in range(kernels.context.pick(REPEATS, 2)):
            same_bits_of(vq_lookup.lookup(call, most), first)


def _needs_device(kernels: Kernels) -> None:
    if kernels.context.dry:
        raise CannotRun("it needs a GPU")


def streams(kernels: Kernels, name: str) -> None:
    """Two calls at once give the bits of one after the other."""
    _needs_device(kernels)
    calls = [drawn(kernels, name, seed) for seed in (0, 1)]
    most = parts_of(kernels, calls[0])
    alone = [vq_lookup.lookup(call, most) for call in calls]
    torch.cuda.synchronize()
    lanes = [torch.cuda.Stream() for _ in calls]
    for _ in range(20):
        found = []
        for lane, call in zip(lanes, calls, strict=True):
            with torch.cuda.stream(lane):
                found.append(vq_lookup.lookup(call, most))
        torch.cuda.synchronize()
        for got, expected in zip(found, alone, strict=True):
            same_bits_of(got, expected)


def graph(kernels: Kernels, name: str) -> None:
    """Captured once, replayed with other rows in the same place."""
    _needs_device(kernels)
    call = drawn(kernels, name)
    most = parts_of(kernels, call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        vq_lookup.lookup(call, most)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = vq_lookup.lookup(call, most)
    for seed in (1, 2):
        call.data.copy_(drawn(kernels, name, seed).data)
        captured.replay()
        torch.cuda.synchronize()
        same_bits_of(found, vq_lookup.lookup(call, most))


def checks(kernels: Kernels) -> Iterator[Check]:
    if kernels.dtype == "tf32":
        return
    dry, own = kernels.context.dry, Compiled(*kernels)
    for name in kernels.context.pick(STACKS, DRY):
        yield Check("vq_lookup", "vq_lookup", name, functools.partial(stack, kernels, name), LIMIT)
    name = kernels.context.pick("rows", "odd")
    for call in (repeats, streams, graph):
        yield Check("vq_lookup", "vq_lookup", call.__name__, functools.partial(call, kernels, name), LIMIT)
    if dry:
        return
    for name in parity_vq.CASES:
        for mixed in (False, True) if kernels.dtype != "float32" else (False,):
            case = f"{name} {mixed}"
            call = functools.partial(parity_vq.nearest, own, name, mixed, 0)
            yield Check("vq_lookup", "vq_nearest", case, call, LIMIT)
            call = functools.partial(parity_vq.quantize, own, name, mixed, False)
            yield Check("vq_lookup", "vq_quantize", case, call, LIMIT)
    for name in parity_vq.RESIDUAL:
        call = functools.partial(parity_vq.residual, own, name, False)
        yield Check("vq_lookup", "vq_residual", name, call, LIMIT)

"""What the parity calls of the compiled screen, verified as ``vq_screen``: its kernel with the sweep of what it leaves
open, on few rows and on many."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from benchmarks.gpu import parity_vq
from benchmarks.gpu.parity import Check, Kernels
from benchmarks.harness import CannotRun
from fastseq import reference
from fastseq.ops import vq_screen
from fastseq.ops.vq_lookup import Call, Found
from tests.ops import vq_cases
from tests.ops.vq_cases import Case

SECONDS = 1.0  # of a case, roughly
CASES = {
    **{name: case for name, case in parity_vq.CASES.items() if case.D <= vq_screen.MOST_D},
    "several tiles": Case(700, 1030, 64, G=2),
    "half full": Case(1000, 600, 130, masked=True),
    "full": Case(512, 512, 256, dot=True),
    "odd": Case(300, 300, 33),
    "close": Case(500, 900, 40, kind="duplicates"),
}
DRY = {"one": Case(1, 1, 2), "odd": Case(5, 20, 3)}
MANY = 20000  # rows, more than the device has at a time
REPEATS = 20


def _runs(dry: bool) -> AbstractContextManager[None]:
    """Inside, the kernel can be called; in a dry run on CPU tensors, emulated."""
    if not dry:
        return nullcontext()
    from tests.cuda import vq_screen as emulated

    return emulated.registered()


def drawn(kernels: Kernels, case: Case, mixed: bool, seed: int = 0) -> Call:
    """On the device; codes in float32 where ``mixed``."""
    device, low = kernels.context.device, kernels.torch_dtype
    x, codebook, mask = vq_cases.inputs(case, seed=seed)
    codes = codebook.to(device, torch.float32 if mixed else low)
    call = Call(x.to(device, low), [codes], None if mask is None else mask.to(device), dot=case.dot, score=True)
    if case.D % 2 and vq_screen.products(call.shape) < 3:
        raise CannotRun(f"D = {case.D} is odd")
    return call


def _found(kernels: Kernels, call: Call) -> Found:
    with _runs(kernels.context.dry):
        return vq_screen.run(call)


def lookup(kernels: Kernels, case: Case, mixed: bool) -> None:
    """Index, score, distance and codes are those of the definition."""
    call = drawn(kernels, case, mixed)
    index, distance, score, codes = (v.cpu() for v in _found(kernels, call))
    x, codebook = call.data.cpu(), call.codebooks[0].cpu()
    mask = None if call.mask is None else call.mask.cpu()
    wide = x.float(), codebook.float()
    expected = reference.vq_nearest(*wide, mask, case.dot)
    parity_vq.same("index", index, expected)
    parity_vq.same("score", score[:, 0], vq_cases.expected_scores(*wide, mask, case.dot, expected)[..., 0])
    parity_vq.same("quantized", codes, reference.vq_gather(codebook, expected[..., 0]).to(x.dtype))
    parity_vq._distances(kernels, x, codebook, index, distance[:, 0, :, None])


def _large(kernels: Kernels, seed: int = 0) -> Call:
    return drawn(kernels, Case(kernels.context.pick(MANY, 3), kernels.context.pick(512, 20), 64), False, seed)


def repeats(kernels: Kernels) -> None:
    """The same bits from run to run, and where some of the rows are alone."""
    call = _large(kernels)
    first = _found(kernels, call)
    for _ in range(kernels.context.pick(REPEATS, 1)):
        again = _found(kernels, call)
        for name, got, expected in zip(Found._fields, again, first, strict=True):
            parity_vq.same(name, got, expected)
    part = call._replace(data=call.data[:, -129:].contiguous())
    parity_vq.same("index of some rows", _found(kernels, part).index, first.index[:, -129:])


def graph(kernels: Kernels) -> None:
    """Captured once, replayed with other rows in the same place."""
    if kernels.context.dry:
        raise CannotRun("it needs a GPU")
    call = _large(kernels)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        vq_screen.run(call)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = vq_screen.run(call)
    for seed in (1, 2):
        call.data.copy_(_large(kernels, seed).data)
        captured.replay()
        torch.cuda.synchronize()
        parity_vq.same("index", found.index, vq_screen.run(call).index)


def checks(kernels: Kernels) -> Iterator[Check]:
    if kernels.dtype == "tf32":
        return
    cases = kernels.context.pick(CASES, DRY)
    for name, case in cases.items():
        for mixed in (False, True) if kernels.dtype != "float32" else (False,):
            call = functools.partial(lookup, kernels, case, mixed)
            yield Check("vq_screen", "vq_screen", f"{name}{' mixed' * mixed}", call)
    for other in (repeats, graph):
        yield Check("vq_screen", "vq_screen", other.__name__, functools.partial(other, kernels))

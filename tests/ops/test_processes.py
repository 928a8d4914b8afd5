"""The operators under Python threads, in a forked child, and over many calls."""

from __future__ import annotations

import gc
import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastseq import functional
from fastseq.ops.gemm import gemm
from fastseq.ops.lstm_autograd import lstm
from tests.ops import lstm_cases as cases
from tests.ops import vq_cases
from tests.ops.lstm_cases import Case
from tests.tolerance import assert_same_bits

pytestmark = cases.needs_compiled()
ROOT = Path(__file__).parents[2]
SHARED = Case(4, 37, 130, P=70, **cases.ALL)


def everything(args: cases.Inputs) -> list[torch.Tensor]:
    """Forward and backward by the differentiable operator, and one product."""
    call = cases.Inputs(*(t.detach().clone().requires_grad_() for t in args[:4]), args.options)
    outputs = lstm(*call)
    torch.autograd.backward(outputs, cases.upstream(outputs))
    return [*outputs, *(t.grad for t in call[:4]), gemm(args.weight_hh, args.h0, None, False, True)]


def test_four_python_threads() -> None:
    """Each of four threads, all at work at once, gets what one thread alone gets."""
    calls = [cases.inputs(SHARED, seed=n) for n in range(4)]
    torch.set_num_threads(2)
    expected = [everything(args) for args in calls]
    names = "h c gates h_n c_n dx_gates dweight_hh dh0 dc0 product"
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for got, right in zip(pool.map(everything, calls), expected, strict=True):
                assert_same_bits(names, got, right)


VQ = vq_cases.Case(1100, 520, 33, masked=True)
QUANTIZED = "quantized index commitment codebook_error counts sums dx dcodebook deep indices commitments ddeep near"


def all_quantizers(inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """Lookup, quantizer and residual quantizer, forward and backward."""
    x, codebook = (t[0].clone().requires_grad_() for t in inputs[:2])
    out = functional.vq_quantize(x, codebook, mask=inputs[2][0], gradient="rotation", sums=True)
    whole = out.quantized.sum() + out.commitment.sum() + out.codebook_error.sum()
    deep = functional.vq_residual(x, [codebook, codebook[:100]])
    grads = torch.autograd.grad(whole, (x, codebook))
    again = torch.autograd.grad(deep.quantized.sum() + deep.commitment.sum(), x)
    near = functional.vq_nearest(x, codebook, best=3).index
    return [v.detach() for v in (*out, *grads, *deep[:3], *again, near)]


def test_four_python_threads_of_quantizers() -> None:
    calls = [vq_cases.inputs(VQ, seed=n) for n in range(4)]
    torch.set_num_threads(2)
    expected = [all_quantizers(inputs) for inputs in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, right in zip(pool.map(all_quantizers, calls), expected, strict=True):
                assert_same_bits(QUANTIZED, got, right)


def numpy_lookups(inputs: tuple[Any, ...], threads: int = 1) -> list[torch.Tensor]:
    """What the numpy door has of ``all_quantizers``."""
    x, codebook, mask = inputs
    return [
        *vq_cases.by_numpy("vq_nearest", x, codebook, mask, False, 1, 64, True, True, 1, threads=threads),
        *vq_cases.by_numpy("vq_quantize", x, codebook, mask, False, True, threads=threads),
        *vq_cases.by_numpy("vq_residual", x[0], [codebook[0], codebook[0]], None, None, True, threads=threads),
    ]


def test_four_python_threads_of_lookups_on_the_numpy_door() -> None:
    calls = [vq_cases.inputs(VQ, seed=n) for n in range(4)]
    expected = [numpy_lookups(inputs) for inputs in calls]
    prepared = cases.numpy_door().Codebook(calls[0][1].numpy())  # one for all threads
    rows = [inputs[0].numpy() for inputs in calls]
    near = [prepared.nearest(x)[0] for x in rows]
    with ThreadPoolExecutor(4) as pool:
        for threads in (1, 2, 3):
            found = list(pool.map(lambda inputs, n=threads: numpy_lookups(inputs, n), calls))
            for got, right in zip(found, expected, strict=True):
                assert_same_bits([str(n) for n in range(len(right))], got, right)
            for got, right in zip(
                pool.map(lambda x, n=threads: prepared.nearest(x, threads=n)[0], rows), near, strict=True
            ):
                assert_same_bits("near", got, right)


def test_four_python_threads_on_the_numpy_door() -> None:
    core = cases.numpy_door()
    calls = [cases.inputs(SHARED, seed=n) for n in range(4)]
    expected = [cases.numpy_forward(core, args) for args in calls]
    with ThreadPoolExecutor(4) as pool:
        for threads in (1, 2, 3):
            for _ in range(5):
                found = list(pool.map(lambda args, n=threads: cases.numpy_forward(core, args, 2, n), calls))
                for got, right in zip(found, expected, strict=True):
                    assert_same_bits(cases.OUTPUTS, got, right)


FORK = """
import os, sys
{prepare}
expected = call(2)
child = os.fork()
if child == 0:
    same = all(call(threads) == expected for threads in {threads})
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert call(2) == expected
print("same")
"""
NUMPY = """
import numpy
from fastseq import _core
random = numpy.random.default_rng(0)
x, w = random.standard_normal((6, 37, 520)).astype("f"), random.standard_normal((520, 130)).astype("f") / 12
h0, c0 = (random.standard_normal((37, 130)).astype("f") for _ in range(2))
book = random.standard_normal((6, 40, 520)).astype("f")
def call(threads):
    out = _core.lstm_forward(x, w, h0, c0, seed=5, save=2, threads=threads)
    found = _core.lstm_backward(*out, *reversed(out[:3]), w, h0, c0, threads=threads)
    codes = _core.vq_quantize(x, book, sums=True, threads=threads)
    return [v.tobytes() for v in (*out, *found, *codes, _core.gemm(w, h0, None, False, True, threads=threads))]
"""
TORCH = """
import torch
from fastseq.ops.gemm import gemm
from tests.ops import lstm_cases as cases
args = cases.inputs(cases.Case(4, 37, 130, P=70, **cases.ALL))
def call(threads):
    torch.set_num_threads(threads)
    out = torch.ops.fastseq.lstm_forward(*args[:4], *args.options, 2)
    found = torch.ops.fastseq.lstm_backward(*cases.backward_arguments(args, out, cases.upstream(out)))
    return [v.numpy().tobytes() for v in (*out, *found, gemm(args.weight_hh, args.h0, None, False, True))]
"""


@pytest.mark.parametrize("prepare, threads", [(NUMPY, (1, 2, 4)), (TORCH, (1,))], ids=["numpy", "torch"])
def test_forked_child(prepare: str, threads: tuple[int, ...]) -> None:
    """A child forked after a call on two threads computes the same: with any team through the numpy door, with one
    thread through torch, whose OpenMP pool allows a child no more."""
    cases.numpy_door()
    done = subprocess.run(
        [sys.executable, "-c", FORK.format(prepare=prepare, threads=threads)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def torch_calls() -> Callable[[], Any]:
    args = cases.inputs(Case(3, 2, 5, P=3, layout="lengths", **cases.ALL), requires_grad=True)
    grads = cases.upstream(cases.definition(*args, None))

    def call() -> None:
        torch.autograd.grad(lstm(*args), args[:4], grads)

    return call


def numpy_calls() -> Callable[[], Any]:
    core = cases.numpy_door()
    args = cases.inputs(Case(3, 2, 5, P=3, layout="lengths", **cases.ALL))
    outputs = tuple(torch.from_numpy(v) for v in cases.numpy_forward(core, args))
    backward = cases.backward_arguments(args, outputs, cases.upstream(outputs))

    def call() -> None:
        cases.numpy_forward(core, args, threads=2)
        cases.numpy_backward(core, backward, threads=2)

    return call


def torch_quantizers() -> Callable[[], Any]:
    x, codebook, mask = vq_cases.inputs(vq_cases.Case(6, 9, 5, masked=True))
    x, codebook = x[0].requires_grad_(), codebook[0].requires_grad_()
    rows, codes = x.detach()[None], codebook.detach()[None]
    turn = itertools.cycle(range(4))

    def call() -> None:
        n = next(turn)
        if n == 0:
            out = functional.vq_quantize(x, codebook, mask=mask[0], sums=True)
            grads = (out.quantized, out.codebook_error)
            torch.autograd.grad(grads, (x, codebook), grads)
        elif n == 1:
            deep = functional.vq_residual(x, [codebook, codebook])
            torch.autograd.grad(deep.quantized, x, deep.quantized)
        else:
            near = torch.ops.fastseq.vq_nearest(rows, codes, mask, False, 2 * n - 3, 64, True, True, 2)[0]
            torch.ops.fastseq.vq_sums(rows, near[..., 0].contiguous(), 9)

    return call


def numpy_quantizers() -> Callable[[], Any]:
    core = cases.numpy_door()
    x, codebook = (t.numpy() for t in vq_cases.inputs(vq_cases.Case(6, 9, 5))[:2])

    def call() -> None:
        core.vq_nearest(x, codebook, best=2, distance=True, threads=2)
        _, index, *_ = core.vq_quantize(x, codebook, sums=True, threads=2)
        core.vq_residual(x[0], [codebook[0], codebook[0]], sums=True, threads=2)
        core.Codebook(codebook).nearest(x)
        core.vq_unpack(core.vq_pack(index, 4), 4, 6)

    return call


def refused_quantizers() -> Callable[[], Any]:
    core = cases.numpy_door()
    x, codebook = (t.numpy() for t in vq_cases.inputs(vq_cases.Case(6, 9, 5))[:2])
    packed = np.full((1, 2), 255, np.uint8)

    def call() -> None:
        for wrong in (
            lambda: core.vq_nearest(x, codebook[:, :, :4]),
            lambda: core.vq_sums(x, np.full((1, 6), 9), 9),
            lambda: core.vq_unpack(packed, 3, 5),
            lambda: core.Codebook(codebook[0]),
        ):
            with pytest.raises(ValueError):
                wrong()

    return call


def refused_calls() -> Callable[[], Any]:
    core = cases.numpy_door()
    args = cases.inputs(Case(3, 2, 5))
    args = args._replace(weight_hh=args.weight_hh[:, :4].contiguous())

    def call() -> None:
        with pytest.raises(ValueError):
            cases.numpy_forward(core, args)

    return call


CALLS = [torch_calls, numpy_calls, refused_calls, torch_quantizers, numpy_quantizers, refused_quantizers]


@pytest.mark.parametrize("calls", CALLS)
def test_no_leak(calls: Callable[[], Callable[[], Any]]) -> None:
    """Resident memory does not grow by as much as one smallest allocation (32 bytes) per call over 10,000 calls."""
    call = calls()
    for _ in range(2000):
        call()
    gc.collect()
    before = resident()
    for _ in range(10_000):
        call()
    gc.collect()
    assert resident() - before < 32 * 10_000


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

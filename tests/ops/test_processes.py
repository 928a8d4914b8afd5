"""The operators under Python threads, in a forked child, and over many calls."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastseq.ops.gemm import gemm
from fastseq.ops.lstm_autograd import lstm
from tests.ops import lstm_cases as cases
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
def call(threads):
    out = _core.lstm_forward(x, w, h0, c0, seed=5, save=2, threads=threads)
    found = _core.lstm_backward(*out, *reversed(out[:3]), w, h0, c0, threads=threads)
    return [v.tobytes() for v in (*out, *found, _core.gemm(w, h0, None, False, True, threads=threads))]
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


def refused_calls() -> Callable[[], Any]:
    core = cases.numpy_door()
    args = cases.inputs(Case(3, 2, 5))
    args = args._replace(weight_hh=args.weight_hh[:, :4].contiguous())

    def call() -> None:
        with pytest.raises(ValueError):
            cases.numpy_forward(core, args)

    return call


@pytest.mark.parametrize("calls", [torch_calls, numpy_calls, refused_calls])
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

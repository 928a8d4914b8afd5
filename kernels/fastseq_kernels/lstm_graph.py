"""The loop of ``lstm_step`` as CUDA graphs of a fixed number of steps, replayed over any length.

A graph holds the addresses that it was captured with. So its kernels take one address, that of a table on the device,
and read from it the addresses of this call's tensors, T and the number of steps done; the last kernel of a graph adds
to that number. A call writes the table, replays the graph for whole blocks of steps and launches the rest one by one.
A table serves one stream, on which calls follow each other; a lock keeps their writing and replaying together.

Graphs are used on devices where they were seen to be right (``_verified``); elsewhere steps are launched one by one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq_kernels import lstm_step, lstm_step_backward
from fastseq_kernels._launch import launch
from fastseq_kernels._steps import Found, Grads, Recurrence
from fastseq_kernels._verified import doubt
from fastseq_kernels.lstm_step import Loop

STEPS = 32  # of one graph
GRAPHS = 16  # kept at a time
_POINTERS = tl.constexpr(17)  # entries of the table before T and the steps done
_SIZE = 20

_lock = threading.Lock()


@triton.jit
def _address(ptr):
    if ptr is None:
        return tl.cast(0, tl.int64)
    else:
        return ptr.to(tl.int64)


@triton.jit(do_not_specialize=["T"])
def _table_kernel(table_ptr, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, T):
    """Write the addresses of a call into the table, T, and that no step is done."""
    tl.store(table_ptr + 0, _address(p0))
    tl.store(table_ptr + 1, _address(p1))
    tl.store(table_ptr + 2, _address(p2))
    tl.store(table_ptr + 3, _address(p3))
    tl.store(table_ptr + 4, _address(p4))
    tl.store(table_ptr + 5, _address(p5))
    tl.store(table_ptr + 6, _address(p6))
    tl.store(table_ptr + 7, _address(p7))
    tl.store(table_ptr + 8, _address(p8))
    tl.store(table_ptr + 9, _address(p9))
    tl.store(table_ptr + 10, _address(p10))
    tl.store(table_ptr + 11, _address(p11))
    tl.store(table_ptr + 12, _address(p12))
    tl.store(table_ptr + 13, _address(p13))
    tl.store(table_ptr + 14, _address(p14))
    tl.store(table_ptr + 15, _address(p15))
    tl.store(table_ptr + 16, _address(p16))
    tl.store(table_ptr + _POINTERS, T.to(tl.int64))
    tl.store(table_ptr + _POINTERS + 1, tl.cast(0, tl.int64))


@triton.jit(do_not_specialize=["steps"])
def _advance_kernel(table_ptr, steps):
    """Count the steps of one graph as done."""
    tl.store(table_ptr + _POINTERS + 1, tl.load(table_ptr + _POINTERS + 1) + steps)


@triton.jit
def _tensor(table_ptr, n: tl.constexpr, KIND: tl.constexpr):
    """The n-th tensor of the call, where GIVEN has a bit for it. torch aligns memory to 16 bytes and more."""
    return tl.multiple_of(tl.load(table_ptr + n).to(tl.pointer_type(KIND)), 16)


@triton.jit
def _step_of(table_ptr, n, FALLING: tl.constexpr):
    """T and the step that is the n-th of this graph."""
    T = tl.load(table_ptr + _POINTERS).to(tl.int32)
    done = tl.load(table_ptr + _POINTERS + 1).to(tl.int32) + n
    return T, T - 1 - done if FALLING else done


@triton.jit(do_not_specialize=["n", "B"])
def _graph_step_kernel(
    table_ptr,
    inverse_tau,
    n,
    B,
    H,
    P,
    GIVEN: tl.constexpr,
    KIND: tl.constexpr,
    FALLING: tl.constexpr,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    KEEP_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    T, t = _step_of(table_ptr, n, FALLING)
    lstm_step.step(
        _tensor(table_ptr, 0, KIND) if (GIVEN >> 0) & 1 else None,
        _tensor(table_ptr, 1, KIND) if (GIVEN >> 1) & 1 else None,
        _tensor(table_ptr, 2, KIND) if (GIVEN >> 2) & 1 else None,
        _tensor(table_ptr, 3, tl.float32) if (GIVEN >> 3) & 1 else None,
        _tensor(table_ptr, 4, KIND) if (GIVEN >> 4) & 1 else None,
        None,
        _tensor(table_ptr, 6, KIND) if (GIVEN >> 6) & 1 else None,
        _tensor(table_ptr, 7, tl.float32) if (GIVEN >> 7) & 1 else None,
        _tensor(table_ptr, 8, KIND) if (GIVEN >> 8) & 1 else None,
        _tensor(table_ptr, 9, tl.float32) if (GIVEN >> 9) & 1 else None,
        _tensor(table_ptr, 10, KIND) if (GIVEN >> 10) & 1 else None,
        _tensor(table_ptr, 11, tl.float32) if (GIVEN >> 11) & 1 else None,
        _tensor(table_ptr, 12, tl.int64) if (GIVEN >> 12) & 1 else None,
        _tensor(table_ptr, 13, tl.int64) if (GIVEN >> 13) & 1 else None,
        _tensor(table_ptr, 14, tl.int1) if (GIVEN >> 14) & 1 else None,
        *(inverse_tau, t, T, B, H, P, HARD, REVERSE, KEEP_C, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
    )


@triton.jit(do_not_specialize=["n", "B"])
def _graph_step_backward_kernel(
    table_ptr,
    inverse_tau,
    n,
    B,
    H,
    P,
    GIVEN: tl.constexpr,
    KIND: tl.constexpr,
    FALLING: tl.constexpr,
    HARD: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    T, t = _step_of(table_ptr, n, FALLING)
    lstm_step_backward.step_backward(
        _tensor(table_ptr, 0, KIND) if (GIVEN >> 0) & 1 else None,
        _tensor(table_ptr, 1, tl.float32) if (GIVEN >> 1) & 1 else None,
        _tensor(table_ptr, 2, KIND) if (GIVEN >> 2) & 1 else None,
        _tensor(table_ptr, 3, KIND) if (GIVEN >> 3) & 1 else None,
        _tensor(table_ptr, 4, tl.float32) if (GIVEN >> 4) & 1 else None,
        _tensor(table_ptr, 5, tl.float32) if (GIVEN >> 5) & 1 else None,
        _tensor(table_ptr, 6, tl.float32) if (GIVEN >> 6) & 1 else None,
        _tensor(table_ptr, 7, KIND) if (GIVEN >> 7) & 1 else None,
        None,
        _tensor(table_ptr, 9, KIND) if (GIVEN >> 9) & 1 else None,
        _tensor(table_ptr, 10, tl.float32) if (GIVEN >> 10) & 1 else None,
        _tensor(table_ptr, 11, tl.float32) if (GIVEN >> 11) & 1 else None,
        _tensor(table_ptr, 12, tl.float32) if (GIVEN >> 12) & 1 else None,
        _tensor(table_ptr, 13, KIND) if (GIVEN >> 13) & 1 else None,
        _tensor(table_ptr, 14, tl.int64) if (GIVEN >> 14) & 1 else None,
        _tensor(table_ptr, 15, tl.int64) if (GIVEN >> 15) & 1 else None,
        _tensor(table_ptr, 16, tl.int1) if (GIVEN >> 16) & 1 else None,
        *(inverse_tau, t, T, B, H, P, HARD, REVERSE, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
    )


_KERNELS = {
    lstm_step._step_kernel: _graph_step_kernel,
    lstm_step_backward._step_backward_kernel: _graph_step_backward_kernel,
}
_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Block(NamedTuple):
    """A table, and the graph that reads it; without one the block is launched step by step."""

    table: Tensor  # int64 [_SIZE]
    graph: Any


_blocks: OrderedDict[tuple[Any, ...], Block] = OrderedDict()


def _as_int64(loop: Loop) -> Loop:
    """Lengths of another type would need kernels of their own."""
    tensors = tuple(t.to(torch.int64) if t is not None and t.dtype == torch.int32 else t for t in loop.tensors)
    return loop._replace(tensors=tensors)


def _launch_block(loop: Loop, table: Tensor) -> None:
    """All steps of one graph and the count of them; every launch depends on the table alone."""
    call, given = loop.call, sum(1 << n for n, t in enumerate(loop.tensors) if t is not None)
    kind = _KINDS[call.weight_hh.dtype]
    step = lstm_step.repeated(
        *(_KERNELS[loop.kernel], call.rows.B, call.H, loop.at, table.device),
        GIVEN=given,
        KIND=kind,
        FALLING=loop.falling,
        **loop.constexprs,
    )
    for n in range(STEPS):
        step(table, 1.0 / call.tau, n, call.rows.B, call.H, call.P)
    launch(_advance_kernel, (1,), table, STEPS, num_warps=1)


def _key(loop: Loop) -> tuple[Any, ...]:
    """Everything that the launches of a block depend on, and the stream that its table serves."""
    call, device = loop.call, loop.call.h0.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    given = tuple(t is None for t in loop.tensors)
    sizes = (call.rows.B, call.H, call.P, call.tau, call.weight_hh.dtype)
    return (loop.kernel, device, stream, *sizes, given, loop.at, *sorted(loop.constexprs.items()), loop.falling)


def _capture(loop: Loop, table: Tensor) -> Any:
    """The graph of one block. Nothing waits: neither for the device nor, in other threads, for this capture."""
    device = table.device
    side = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            _launch_block(loop, table)
        finally:
            graph.capture_end()
    return graph


def run(loop: Loop) -> None:
    """All steps of a loop without projection: whole blocks by their graph, the rest one by one."""
    T = loop.call.rows.T
    loop = _as_int64(loop)
    blocks = T // STEPS
    if blocks:
        with _lock:
            _run_blocks(loop, blocks)
    step = loop.launcher()
    for n in range(blocks * STEPS, T):
        step(loop.step(n))


def _run_blocks(loop: Loop, blocks: int) -> None:
    """The first block of a new kind is launched, which also compiles and loads its kernels; the others replay it."""
    key = _key(loop)
    block = _blocks.get(key)
    fresh = block is None
    if block is None:
        block = Block(torch.empty(_SIZE, dtype=torch.int64, device=loop.call.h0.device), None)
    tensors = loop.tensors + (None,) * (_POINTERS.value - len(loop.tensors))
    launch(_table_kernel, (1,), block.table, *tensors, loop.call.rows.T, num_warps=1)
    if fresh:
        _launch_block(loop, block.table)
        blocks -= 1
        if block.table.device.type == "cuda":
            block = block._replace(graph=_capture(loop, block.table))
        _blocks[key] = block
        while len(_blocks) > GRAPHS:
            _blocks.popitem(last=False)
    _blocks.move_to_end(key)
    for _ in range(blocks):
        if block.graph is None:
            _launch_block(loop, block.table)
        else:
            block.graph.replay()


def wanted(call: Recurrence) -> bool:
    """Whether graphs are to run this call: they do not inside of a capture of the user's own."""
    if call.h0.device.type != "cuda" or call.weight_hr is not None or call.rows.T < 2 * STEPS:
        return False
    return doubt("lstm_graph", call.h0.device, call.h0.dtype) is None and not torch.cuda.is_current_stream_capturing()


def forward(
    call: Recurrence, x_gates: Tensor, h: Tensor, c: Tensor | None, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``lstm_step.forward`` by graphs."""
    loop, h_n, c_n = lstm_step.forward_loop(call, x_gates, h, c, gates)
    run(loop)
    return h_n, c_n


def backward(call: Recurrence, grads: Grads, gates: Tensor, c: Tensor) -> Found:
    """``lstm_step_backward.backward`` by graphs."""
    loop, found, carry = lstm_step_backward.backward_loop(call, grads, gates, c)
    run(loop)
    carry(found.dh0, 0, True)
    return found

"""Results of the LSTM operators that must be equal bit for bit: threads, batches, runs, doors, instruction sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import reference
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import CASES, DTYPES, Case, Inputs
from tests.tolerance import assert_same_bits

pytestmark = cases.needs_compiled()
EVERYTHING = cases.OUTPUTS.split() + ["rebuilt"] + cases.GRADIENTS.split()
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Larger than one register tile, one panel and one block over K, and worth several threads.
LARGE = {
    "wide": Case(3, 3, 301),
    "tall": Case(3, 131, 67),
    "square": Case(3, 45, 130),
    "deep": Case(2, 2, 700),
    "projection": Case(3, 37, 150, P=141, **cases.ALL),
    "by_rows": Case(3, 45, 130, P=70, reset=True, noise=0.2, reverse=True),
    "lengths": Case(5, 37, 130, layout="lengths", **cases.ALL),
    "packed_reverse": Case(5, 37, 130, layout="packed", reverse=True, **cases.ALL),
}
SMALL = {name: CASES[name] for name in ("one", "prime", "over_tile", "all_dense", "all_lengths_reverse", "all_packed")}


def by_torch(args: Inputs) -> list[Tensor]:
    """Everything that the torch operators return for one call: forward, rebuilt gates, gradients."""
    ops = torch.ops.fastseq
    outputs = ops.lstm_forward(*args[:4], *args.options, 2)
    rebuilt = ops.lstm_gates(args.x_gates, *outputs[:2], *args[1:4], *args.options)
    grads = ops.lstm_backward(*cases.backward_arguments(args, outputs, cases.upstream(outputs)))
    return [*outputs, rebuilt, *grads]


def by_numpy(core: Any, args: Inputs, threads: int) -> list[Tensor]:
    """The same through the numpy door."""
    outputs = [torch.from_numpy(v) for v in cases.numpy_forward(core, args, 2, threads)]
    rebuilt = torch.from_numpy(cases.numpy_gates(core, args, *outputs[:2], threads=threads))
    backward = cases.backward_arguments(args, tuple(outputs), cases.upstream(tuple(outputs)))
    return [*outputs, rebuilt, *(torch.from_numpy(v) for v in cases.numpy_backward(core, backward, threads))]


@pytest.mark.parametrize("case", [*SMALL.values(), *LARGE.values()], ids=[*SMALL, *LARGE])
@each_dtype
def test_threads_and_runs(case: Case, dtype: torch.dtype) -> None:
    args = cases.inputs(case, dtype)
    torch.set_num_threads(1)
    expected = by_torch(args)
    assert_same_bits(EVERYTHING, by_torch(args), expected)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same_bits([f"{n} ({threads} threads)" for n in EVERYTHING], by_torch(args), expected)


@pytest.mark.parametrize("case", [*SMALL.values(), *LARGE.values()], ids=[*SMALL, *LARGE])
@each_dtype
def test_doors(case: Case, dtype: torch.dtype) -> None:
    """The numpy door, with any team, gives what the torch operator gives."""
    core = cases.numpy_door()
    args = cases.inputs(case, dtype)
    expected = by_torch(args)
    for threads in (1, 2, 3, 4):
        assert_same_bits([f"{n} ({threads} threads)" for n in EVERYTHING], by_numpy(core, args, threads), expected)


def row_of(args: Inputs, row: int, lengths: list[int], index: Tensor | None) -> Inputs:
    """The inputs of one row of a batch, as a dense batch of its own without padding."""
    o, length = args.options, lengths[row]

    def steps(tensor: Tensor) -> Tensor:
        return (tensor[:length, row] if index is None else tensor[index[:length, row]])[:, None].contiguous()

    options = o._replace(
        lengths=None,
        batch_sizes=None,
        reset=None if o.reset is None else steps(o.reset),
        rows=torch.tensor([row]) if o.rows is None else o.rows[row : row + 1],
    )
    return Inputs(steps(args.x_gates), args.weight_hh, args.h0[row : row + 1], args.c0[row : row + 1], options)


ROWS = {
    "prime": CASES["prime"],
    "over_tile": CASES["over_tile"],
    "all_dense": CASES["all_dense"],
    "all_lengths_reverse": CASES["all_lengths_reverse"],
    "all_packed": CASES["all_packed"],
    "tall": Case(3, 53, 33),
    "wide": Case(3, 7, 301),
    "large": Case(3, 29, 130, P=70, layout="packed", reverse=True, **cases.ALL),
}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS.keys())
@each_dtype
@pytest.mark.parametrize("threads", [1, 2])
def test_row_alone_and_in_a_batch(case: Case, dtype: torch.dtype, threads: int) -> None:
    """What a row gives does not depend on who shares the batch: outputs and the gradients that belong to the row."""
    torch.set_num_threads(threads)
    args = cases.inputs(case, dtype)
    lengths, index = [case.T] * case.B, None
    if case.layout == "packed":
        index, _, counted = reference.packed_index(args.options.batch_sizes, case.B)
        lengths = counted.tolist()
    elif case.layout == "lengths":
        lengths = args.options.lengths.tolist()
    ops = torch.ops.fastseq
    outputs = ops.lstm_forward(*args[:4], *args.options, 2)
    grads = cases.upstream(outputs)
    found = ops.lstm_backward(*cases.backward_arguments(args, outputs, grads))
    for row in range(case.B):
        alone = row_of(args, row, lengths, index)
        whole = [
            row_of(Inputs(v, *args[1:]), row, lengths, index).x_gates for v in (*outputs[:3], *grads[:3], found[0])
        ]
        own = [v[row : row + 1] for v in (*outputs[3:], *grads[3:], *found[2:4])]
        got = ops.lstm_forward(*alone[:4], *alone.options, 2)
        expected = (*whole[:3], *own[:2])
        assert_same_bits([f"{n} of row {row}" for n in cases.OUTPUTS.split()], got, expected)
        got = ops.lstm_backward(*cases.backward_arguments(alone, expected, (*whole[3:6], *own[2:4])))
        names = [f"{n} of row {row}" for n in ("dx_gates", "dh0", "dc0")]
        assert_same_bits(names, (got[0], got[2], got[3]), (whole[6], *own[4:]))

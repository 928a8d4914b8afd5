"""The LSTM operators on drawn shapes and options: definition, rebuilt gates and threads in one draw."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import tolerance
from tests.core.constants import BLOCK_K, TILE_ROWS
from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import DTYPES, Case
from tests.tolerance import assert_same_bits, assert_within_budget

LARGE_DRAWS = 40


small = cases.shapes(st.integers(0, 6), st.integers(0, 14), st.integers(1, 40), st.integers(1, 40))
# Beyond a register tile, a panel, a block over K, and the work that pays for two threads.
wide = st.integers(BLOCK_K + 1, BLOCK_K + 40)
large = cases.shapes(st.just(2), st.integers(TILE_ROWS + 1, TILE_ROWS + 6), wide, wide)


def check(backend: str, case: Case, dtype: torch.dtype, threads: int, seed: int) -> None:
    cases.assume_runs(backend, dtype)
    args = cases.inputs(case, dtype, seed)
    if case.hard:
        assume(cases.decided(args))
    torch.set_num_threads(threads)
    outputs = cases.run("lstm_forward", backend, *args[:4], *args.options, 2)
    assert_within_budget(cases.OUTPUTS, outputs, cases.definition, cases.exact(args))
    rebuilt = cases.run("lstm_gates", backend, args.x_gates, *outputs[:2], *args[1:4], *args.options)
    if backend == "triton":  # the product of all steps at once sums in another order
        assert_within_budget("gates", rebuilt, cases.definition_gates, cases.exact(args))
    else:
        assert_same_bits("gates", rebuilt, outputs[2])
    grads = cases.upstream(outputs, seed)
    got, call = cases.gradients(backend, args, grads), (*cases.exact(args), grads)
    names = [f"d{name}" for name in cases.differentiable(args)]
    assert_within_budget(names, got, cases.definition_gradients, call, tolerance.GRADIENTS)


@pytest.mark.parametrize("backend", cases.backends())
@given(case=small, dtype=st.sampled_from(DTYPES), threads=st.sampled_from([1, 2]), seed=st.integers(0, 2**20))
def test_small(backend: str, case: Case, dtype: torch.dtype, threads: int, seed: int) -> None:
    check(backend, case, dtype, threads, seed)


@pytest.mark.parametrize("backend", cases.compiled())
@settings(max_examples=LARGE_DRAWS)
@given(case=large, dtype=st.sampled_from(DTYPES), threads=st.sampled_from([1, 2]), seed=st.integers(0, 2**20))
def test_large(backend: str, case: Case, dtype: torch.dtype, threads: int, seed: int) -> None:
    check(backend, case, dtype, threads, seed)

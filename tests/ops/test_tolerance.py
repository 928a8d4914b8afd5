"""The judge itself: small faults do not pass, and the plain computation does."""

from __future__ import annotations

import pytest
import torch

from tests.ops import lstm_cases as cases
from tests.ops.lstm_cases import CASES, DTYPES
from tests.tolerance import GRADIENTS, assert_same_bits, assert_within_budget


@pytest.mark.parametrize("case", ["one", "prime", "long", "deep", "all_packed_reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_an_error_in_the_weights_is_caught(case: str, dtype: torch.dtype) -> None:
    """Weights that are off by 80 roundings, 1e-5 in float32."""
    args = cases.inputs(CASES[case], dtype)
    exact = cases.exact(args)
    off = 1 + 80 * torch.finfo(dtype).eps
    wrong = args._replace(x_gates=args.x_gates * off, weight_hh=args.weight_hh * off)
    outputs = cases.run("lstm_forward", "reference", *args[:4], *args.options, 2)
    assert_within_budget(cases.OUTPUTS, outputs, cases.definition, exact)
    with pytest.raises(AssertionError, match="error .* budget"):
        faulty = cases.run("lstm_forward", "reference", *wrong[:4], *wrong.options, 2)
        assert_within_budget(cases.OUTPUTS, faulty, cases.definition, exact)
    grads = cases.upstream(outputs)
    names = [f"d{n}" for n in cases.differentiable(args)]
    with pytest.raises(AssertionError, match="error .* budget"):
        faulty = cases.gradients("reference", wrong, grads)
        assert_within_budget(names, faulty, cases.definition_gradients, (*exact, grads), GRADIENTS)


def test_what_is_no_number_is_caught() -> None:
    x = torch.ones(3)
    got = torch.tensor([2.0, torch.nan, 2.0])
    for wrong in (got, got.nan_to_num(torch.inf), torch.ones(4)):
        with pytest.raises(AssertionError):
            assert_within_budget("double", wrong, lambda v: 2 * v, (x,))
    assert_within_budget("double", 2 * x, lambda v: 2 * v, (x,))


def test_bits() -> None:
    assert_same_bits("x", torch.tensor([torch.nan, 0.0]), torch.tensor([torch.nan, 0.0]))
    with pytest.raises(AssertionError, match="1 of 2 values differ"):
        assert_same_bits("x", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002]))
    with pytest.raises(AssertionError, match="sign of zero"):
        assert_same_bits("x", torch.tensor([0.0]), torch.tensor([-0.0]))


def test_fresh_memory_is_nan() -> None:
    assert torch.empty(5).isnan().all()

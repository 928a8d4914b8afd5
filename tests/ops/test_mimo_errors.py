"""What the operators on rows of several examples refuse, and in which words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastseq import functional
from tests.ops import lstm_cases, vq_cases

X, PARTS, D, ROWS = torch.zeros(2, 4, 3, 5), torch.zeros(2, 4, 3, 6), torch.zeros(2, 7, 3, 6), torch.zeros(2, 7, 3, 10)
WEIGHT, INDEX = torch.zeros(6, 10), torch.zeros(2, 7, dtype=torch.int32)
BAD = INDEX.clone()
BAD[1, 5] = 4
NEGATIVE = INDEX.clone()
NEGATIVE[0, 2] = -1

PLACE = r"index must lie in 0 .. B - 1 = 3, got index\[1, 5\] = 4"
RAW: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "gather_place": ("mimo_gather", (X, BAD, None), PLACE),
    "gather_negative": ("mimo_gather", (X, NEGATIVE, None), r"0 .. B - 1 = 3, got index\[0, 2\] = -1"),
    "gather_no_examples": ("mimo_gather", (X[:, :0], INDEX, None), r"0 .. B - 1 = -1, got index\[0, 0\] = 0"),
    "gather_rank": ("mimo_gather", (X[0], INDEX, None), r"x must be \[A, B, S, C\], got \[4, 3, 5\]"),
    "gather_stride": ("mimo_gather", (X.mT, INDEX, None), "x must be contiguous"),
    "gather_labels_rank": ("mimo_gather", (X, INDEX, X[0, :, 0, 0]), r"labels must be \[B, L\], got \[4\]"),
    "gather_labels": ("mimo_gather", (X, INDEX, X[0, :3, 0]), r"labels must be \[B, L\] = \[4, 5\], got \[3, 5\]"),
    "gather_labels_stride": ("mimo_gather", (X, INDEX, torch.zeros(5, 4).mT), "labels must be contiguous"),
    "index_rank": ("mimo_gather", (X, INDEX[0], None), r"index must be \[M, N\], got \[7\]"),
    "index_dtype": ("mimo_gather", (X, INDEX.long(), None), "index must be int32, got int64"),
    "index_stride": ("mimo_gather", (X, INDEX.mT.contiguous().mT, None), "index must be contiguous"),
    "index_slots": ("mimo_gather", (X, INDEX[:0], None), r"index must be \[M, N\] with M of at least 1, got \[0, 7\]"),
    "combine_place": ("mimo_combine", (PARTS, BAD, None), PLACE),
    "combine_rank": ("mimo_combine", (PARTS[0], INDEX, None), r"parts must be \[A, B, S, M\*G\], got \[4, 3, 6\]"),
    "combine_slots": ("mimo_combine", (X, INDEX, None), r"parts must be \[A, B, S, M\*G\] = \[2, 4, 3, 4\], got"),
    "combine_dtype": ("mimo_combine", (PARTS.int(), INDEX, None), "parts must be float32 or float64, got int32"),
    "combine_stride": ("mimo_combine", (PARTS.transpose(0, 1), INDEX, None), r"parts must be contiguous"),
    "combine_bias": ("mimo_combine", (PARTS, INDEX, WEIGHT[0]), r"bias must be \[G\] = \[3\], got \[10\]"),
    "combine_bias_dtype": (
        "mimo_combine",
        (PARTS, INDEX, torch.zeros(3).double()),
        "bias must be float32, got float64",
    ),
    "combine_backward_place": ("mimo_combine_backward", (D, BAD, 4), PLACE),
    "combine_backward_large_B": ("mimo_combine_backward", (D, INDEX, 2**61), "B must lie in 0 .. 2"),
    "combine_backward_B": ("mimo_combine_backward", (D, INDEX, -1), r"B must lie in 0 .. 2\*\*31 - 1, got -1"),
    "combine_backward_rows": (
        "mimo_combine_backward",
        (D[:, :5].contiguous(), INDEX, 4),
        r"d must be \[A, N, S, G\] = \[2, 7, 3, 6\], got \[2, 5, 3, 6\]",
    ),
    "gather_backward_place": ("mimo_gather_backward", (ROWS, BAD, 4), PLACE),
    "gather_backward_width": (
        "mimo_gather_backward",
        (torch.zeros(2, 7, 3, 9), INDEX, 4),
        r"d must be \[A, N, S, M\*C\] = \[2, 7, 3, 8\], got \[2, 7, 3, 9\]",
    ),
    "gather_backward_dtype": (
        "mimo_gather_backward",
        (ROWS.long(), INDEX, 4),
        "d must be float32 or float64, got int64",
    ),
    "project_place": ("mimo_project", (X, WEIGHT, None, BAD), PLACE),
    "project_rank": ("mimo_project", (X[0], WEIGHT, None, INDEX), r"x must be \[A, B, S, C\], got \[4, 3, 5\]"),
    "project_dtype": ("mimo_project", (X.half(), WEIGHT, None, INDEX), "x must be float32 or float64"),
    "project_weight_rank": ("mimo_project", (X, WEIGHT[0], None, INDEX), r"weight must be \[G, M\*C\], got \[10\]"),
    "project_weight": (
        "mimo_project",
        (X, WEIGHT[:, :9].contiguous(), None, INDEX),
        r"weight must be \[G, M\*C\] = \[6, 10\], got \[6, 9\]",
    ),
    "project_weight_dtype": ("mimo_project", (X, WEIGHT.double(), None, INDEX), "weight must be float32, got float64"),
    "project_weight_stride": ("mimo_project", (X, torch.zeros(10, 6).mT, None, INDEX), "weight must be contiguous"),
    "project_bias": ("mimo_project", (X, WEIGHT, WEIGHT[0], INDEX), r"bias must be \[G\] = \[6\], got \[10\]"),
    "project_backward_place": ("mimo_project_backward", (D, X, WEIGHT, BAD, True, True, True), PLACE),
    "project_backward_d": (
        "mimo_project_backward",
        (ROWS, X, WEIGHT, INDEX, True, True, True),
        r"d must be \[A, N, S, G\] = \[2, 7, 3, 6\], got \[2, 7, 3, 10\]",
    ),
}


@vq_cases.needs_compiled()
@pytest.mark.parametrize("door", ["torch", "numpy"])
@pytest.mark.parametrize(("op", "call", "says"), RAW.values(), ids=RAW.keys())
def test_wrong_argument_of_the_operator(op: str, call: tuple[Any, ...], says: str, door: str) -> None:
    run = getattr(torch.ops.fastseq, op) if door == "torch" else getattr(lstm_cases.numpy_door(), op)
    with pytest.raises(ValueError, match=f"{op}: .*{says}"):
        run(*(call if door == "torch" else vq_cases.arrays(call)))


def test_the_numpy_door_converts_nothing_and_copies_no_objects() -> None:
    core, index = lstm_cases.numpy_door(), INDEX.numpy()
    with pytest.raises(ValueError, match="mimo_gather: x and labels must not hold Python objects"):
        core.mimo_gather(np.zeros((1, 4, 1, 2), dtype=object), index)
    with pytest.raises(ValueError, match="mimo_gather: x and labels must not hold Python objects"):
        core.mimo_gather(X.numpy(), index, np.zeros((4, 2), dtype=object))
    with pytest.raises(ValueError, match="mimo_gather: threads must be at least 1, got 0"):
        core.mimo_gather(X.numpy(), index, threads=0)
    with pytest.raises(TypeError):
        core.mimo_combine([[[[1.0, 2.0]]]], index)


LONG = INDEX.long()
FUNCTIONAL: dict[str, tuple[Any, str]] = {
    "batch": (lambda: functional.mimo_index(0, 2), "mimo_index: batch must be an integer >= 1, got 0"),
    "slots": (lambda: functional.mimo_index(4, 1), "mimo_index: M must be an integer >= 2, got 1"),
    "repetition": (lambda: functional.mimo_index(4, 2, 0), "mimo_index: R must be an integer >= 1, got 0"),
    "repetition_float": (lambda: functional.mimo_index(4, 2, 2.0), "mimo_index: R must be an integer >= 1, got 2.0"),
    "repetition_bool": (lambda: functional.mimo_index(4, 2, True), "mimo_index: R must be an integer >= 1, got True"),
    "rho": (lambda: functional.mimo_index(4, 2, 1, 1.5), r"mimo_index: rho must be a number in \[0, 1\], got 1.5"),
    "many": (
        lambda: functional.mimo_index(2**30, 2, 2),
        r"mimo_index: batch \* R must be below 2\*\*31 rows, got 2147483648",
    ),
    "batch_dim": (
        lambda: functional.mimo_gather(X, LONG, batch_dim=4),
        r"mimo_gather: batch_dim must be a dimension of \[2, 4, 3, 5\], got 4",
    ),
    "channel_dim": (
        lambda: functional.mimo_gather(X, LONG, channel_dim=True),
        r"mimo_gather: channel_dim must be a dimension of \[2, 4, 3, 5\], got True",
    ),
    "order": (
        lambda: functional.mimo_gather(X, LONG, batch_dim=2, channel_dim=1),
        r"mimo_gather: batch_dim must be before the channels, dimension 1 of \[2, 4, 3, 5\], got 2",
    ),
    "index_rank": (
        lambda: functional.mimo_gather(X, LONG[0], batch_dim=1),
        r"mimo_gather: index must be \[M, N\] with M >= 1, got \[7\]",
    ),
    "index_slots": (
        lambda: functional.mimo_combine(X, LONG[:0], batch_dim=1),
        r"mimo_combine: index must be \[M, N\] with M >= 1, got \[0, 7\]",
    ),
    "index_dtype": (
        lambda: functional.mimo_project(X, WEIGHT, None, INDEX.float(), batch_dim=1),
        "mimo_project: index must be int32 or int64, got torch.float32",
    ),
    "labels": (
        lambda: functional.mimo_labels(torch.tensor(3), LONG),
        r"mimo_labels: labels must be \[B, ...\], got \[\]",
    ),
    "parts": (
        lambda: functional.mimo_combine(X, LONG, batch_dim=1),
        r"mimo_combine: parts must be M\*G channels, a multiple of M = 2, got \[2, 4, 3, 5\]",
    ),
    "parts_dtype": (
        lambda: functional.mimo_combine(PARTS.int(), LONG, batch_dim=1),
        "mimo_combine: parts must be float32, float64, bfloat16 or float16, got torch.int32",
    ),
    "combine_bias": (
        lambda: functional.mimo_combine(PARTS, LONG, torch.zeros(4), batch_dim=1),
        r"mimo_combine: bias must be \[G\] = \[3\], got \[4\]",
    ),
    "weight": (
        lambda: functional.mimo_project(X, WEIGHT[:, :9], None, LONG, batch_dim=1),
        r"mimo_project: weight must be \[G, M\*C\] = \[G, 10\], got \[6, 9\]",
    ),
    "weight_dtype": (
        lambda: functional.mimo_project(X, WEIGHT.double(), None, LONG, batch_dim=1),
        "mimo_project: weight must be torch.float32, got torch.float64",
    ),
    "bias": (
        lambda: functional.mimo_project(X, WEIGHT, torch.zeros(5), LONG, batch_dim=1),
        r"mimo_project: bias must be \[G\] = \[6\], got \[5\]",
    ),
    "bias_dtype": (
        lambda: functional.mimo_project(X, WEIGHT, torch.zeros(6).double(), LONG, batch_dim=1),
        "mimo_project: bias must be torch.float32, got torch.float64",
    ),
    "x_dtype": (
        lambda: functional.mimo_project(X.long(), WEIGHT.long(), None, LONG, batch_dim=1),
        "mimo_project: x must be float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "place": (lambda: functional.mimo_gather(X, BAD.long(), batch_dim=1), f"mimo_gather: {PLACE}"),
    "beyond_int32": (
        lambda: functional.mimo_gather(X, LONG + 2**32, batch_dim=1),
        r"mimo_gather: index must lie in 0 .. B - 1 = 3, got index\[0, 0\] = 2147483647",
    ),
    "far_below": (
        lambda: functional.mimo_labels(torch.zeros(4), LONG - 2**32),
        r"mimo_gather: index must lie in 0 .. B - 1 = 3, got index\[0, 0\] = -1",
    ),
}


@vq_cases.needs_compiled()
@pytest.mark.parametrize(("call", "says"), FUNCTIONAL.values(), ids=FUNCTIONAL.keys())
def test_wrong_argument(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()

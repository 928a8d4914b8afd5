"""Wrong arguments of vector quantization: answers in words that name the argument, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastseq import functional as F
from fastseq import reference
from fastseq._check import ArgumentError
from fastseq.ops import vq_cuda
from fastseq.ops._select import choose
from tests.ops import vq_cases as cases
from tests.ops.vq_cases import Case

pytestmark = cases.needs_compiled()
X, BOOK, MASK = cases.inputs(Case(6, 5, 4, masked=True))
X3, BOOK3, _ = cases.inputs(Case(6, 5, 4, G=3))
ROWS, CODES = X[0], BOOK[0]
FLOATS = "float32, float64, bfloat16 or float16"
Call = Callable[[], Any]


def both(name: str, call: Callable[..., Any], says: str) -> dict[str, tuple[Call, str]]:
    """The same mistake in ``vq_nearest`` and ``vq_quantize``."""
    return {
        f"nearest_{name}": (lambda: call(F.vq_nearest), f"vq_nearest: {says}"),
        f"quantize_{name}": (lambda: call(F.vq_quantize), f"vq_quantize: {says}"),
    }


WRONG: dict[str, tuple[Call, str]] = {
    **both("metric", lambda f: f(ROWS, CODES, metric="l1"), "metric must be one of 'l2', 'dot', 'cosine', got 'l1'"),
    **both("codes_rank", lambda f: f(ROWS, CODES[0]), r"codebook must be \[K, D\] or \[G, K, D\], got \[4\]"),
    **both("no_codes", lambda f: f(ROWS, CODES[:0]), r"codebook must be without empty dimensions, got \[0, 4\]"),
    **both(
        "no_dimensions",
        lambda f: f(ROWS[:, :0], CODES[:, :0]),
        r"codebook must be without empty dimensions, got \[5, 0\]",
    ),
    **both("no_groups", lambda f: f(X3[:0], BOOK3[:0]), r"codebook must be without empty dimensions, got \[0, 5, 4\]"),
    **both("x_size", lambda f: f(ROWS[:, :3], CODES), r"x must be \[..., D = 4\], got \[6, 3\]"),
    **both("x_rank", lambda f: f(torch.tensor(1.0), CODES), r"x must be \[..., D = 4\], got \[\]"),
    **both("x_groups", lambda f: f(X3[:2], BOOK3), r"x must be \[G = 3, ..., D = 4\], got \[2, 6, 4\]"),
    **both("x_dtype", lambda f: f(ROWS.int(), CODES), f"x must be {FLOATS}, got torch.int32"),
    **both("codes_dtype", lambda f: f(ROWS, CODES.long()), f"codebook must be {FLOATS}, got torch.int64"),
    **both("codes_device", lambda f: f(ROWS, CODES.to("meta")), "codebook must be on cpu, got one on meta"),
    **both("mask_dtype", lambda f: f(ROWS, CODES, mask=MASK[0].int()), "mask must be torch.bool, got torch.int32"),
    **both("mask_size", lambda f: f(ROWS, CODES, mask=MASK[0, :5]), r"mask must be x without D = \[6\], got \[5\]"),
    **both(
        "mask_groups",
        lambda f: f(X3, BOOK3, mask=MASK[0, :5]),
        r"mask must be x without D = \[3, 6\], got \[5\]",
    ),
    **both(
        "mask_device",
        lambda f: f(ROWS, CODES, mask=MASK[0].to("meta")),
        "mask must be on cpu, got one on meta",
    ),
    "best": (lambda: F.vq_nearest(ROWS, CODES, best=0), "vq_nearest: best must be an integer in 1..K = 1..5, got 0"),
    "best_large": (
        lambda: F.vq_nearest(ROWS, CODES, best=6),
        "vq_nearest: best must be an integer in 1..K = 1..5, got 6",
    ),
    "best_bool": (
        lambda: F.vq_nearest(ROWS, CODES, best=True),
        "vq_nearest: best must be an integer in 1..K = 1..5, got True",
    ),
    "best_float": (
        lambda: F.vq_nearest(ROWS, CODES, best=2.0),
        "vq_nearest: best must be an integer in 1..K = 1..5, got 2.0",
    ),
    "index_dtype": (
        lambda: F.vq_nearest(ROWS, CODES, index_dtype=torch.uint8),
        "vq_nearest: index_dtype must be torch.int64, torch.int32 or torch.int16, got torch.uint8",
    ),
    "index_dtype_small": (
        lambda: F.vq_nearest(torch.zeros(2, 1), torch.zeros(2**15 + 1, 1), index_dtype=torch.int16),
        "vq_nearest: index_dtype must be wide enough for K = 32769, got torch.int16",
    ),
    "screen": (
        lambda: F.vq_nearest(ROWS, CODES, screen="auto"),
        "vq_nearest: screen must be True, False or None, got 'auto'",
    ),
    "gradient": (
        lambda: F.vq_quantize(ROWS, CODES, gradient="none"),
        "vq_quantize: gradient must be one of 'straight', 'rotation', 'codes', got 'none'",
    ),
    "sums_rank": (
        lambda: F.vq_sums(ROWS[0], torch.zeros(4).long(), 5),
        r"vq_sums: x must be \[N, D\] or \[G, N, D\], got \[4\]",
    ),
    "sums_dtype": (
        lambda: F.vq_sums(ROWS.long(), torch.zeros(6).long(), 5),
        f"vq_sums: x must be {FLOATS}, got torch.int64",
    ),
    "sums_index_dtype": (
        lambda: F.vq_sums(ROWS, torch.zeros(6), 5),
        "vq_sums: index must be int64, int32 or int16, got torch.float32",
    ),
    "sums_index_size": (
        lambda: F.vq_sums(ROWS, torch.zeros(5).long(), 5),
        r"vq_sums: index must be x without D = \[6\], got \[5\]",
    ),
    "sums_index_device": (
        lambda: F.vq_sums(ROWS, torch.zeros(6).long().to("meta"), 5),
        "vq_sums: index must be on cpu, got one on meta",
    ),
    "residual_gradient": (
        lambda: F.vq_residual(ROWS, [CODES], gradient="codes"),
        "vq_residual: gradient must be one of 'straight', 'rotation', got 'codes'",
    ),
    "residual_rank": (
        lambda: F.vq_residual(X, [CODES]),
        r"vq_residual: x must be \[N, D\] with D >= 1, got \[1, 6, 4\]",
    ),
    "residual_no_dimensions": (
        lambda: F.vq_residual(ROWS[:, :0], [CODES[:, :0]]),
        r"vq_residual: x must be \[N, D\] with D >= 1, got \[6, 0\]",
    ),
    "residual_no_levels": (
        lambda: F.vq_residual(ROWS, []),
        "vq_residual: codebooks must be at least one, got none",
    ),
    "residual_dtype": (lambda: F.vq_residual(ROWS.int(), [CODES]), f"vq_residual: x must be {FLOATS}, got torch.int32"),
    "residual_codes_dtype": (
        lambda: F.vq_residual(ROWS, [CODES, CODES.int()]),
        rf"vq_residual: codebooks\[1\] must be {FLOATS}, got torch.int32",
    ),
    "residual_codes_device": (
        lambda: F.vq_residual(ROWS, [CODES, CODES.to("meta")]),
        r"vq_residual: codebooks\[1\] must be on cpu, got one on meta",
    ),
    "residual_codes_size": (
        lambda: F.vq_residual(ROWS, [CODES, CODES[:, :3]]),
        r"vq_residual: codebooks\[1\] must be \[K, D\] = \[K, 4\] with K >= 1, got \[5, 3\]",
    ),
    "residual_no_codes": (
        lambda: F.vq_residual(ROWS, [CODES[:0]]),
        r"vq_residual: codebooks\[0\] must be \[K, D\] = \[K, 4\] with K >= 1, got \[0, 4\]",
    ),
    "residual_mask_size": (
        lambda: F.vq_residual(ROWS, [CODES], mask=MASK[0, :3]),
        r"vq_residual: mask must be \[N\] = \[6\], got \[3\]",
    ),
    "residual_mask_dtype": (
        lambda: F.vq_residual(ROWS, [CODES], mask=MASK[0].byte()),
        "vq_residual: mask must be torch.bool, got torch.uint8",
    ),
    "residual_mask_device": (
        lambda: F.vq_residual(ROWS, [CODES], mask=MASK[0].to("meta")),
        "vq_residual: mask must be on cpu, got one on meta",
    ),
    "residual_levels_size": (
        lambda: F.vq_residual(ROWS, [CODES], levels=torch.ones(3).int()),
        r"vq_residual: levels must be \[N\] = \[6\], got \[3\]",
    ),
    "residual_levels_dtype": (
        lambda: F.vq_residual(ROWS, [CODES], levels=torch.ones(6)),
        "vq_residual: levels must be integers, got torch.float32",
    ),
    "residual_levels_bool": (
        lambda: F.vq_residual(ROWS, [CODES], levels=MASK[0]),
        "vq_residual: levels must be integers, got torch.bool",
    ),
}


@pytest.mark.parametrize("call, says", WRONG.values(), ids=WRONG.keys())
def test_wrong_argument(call: Call, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        call()


def test_index_out_of_range() -> None:
    """Of what a decoder or k-means was given: found before memory is touched."""
    for index, got in ((5, "5 at 4"), (-2, "-2 at 4"), (2**40, "1099511627776 at 4")):
        wrong = torch.tensor([0, 1, 2, 3, index, 4])
        with pytest.raises(ValueError, match=f"vq_sums: index must lie in -1 .. K - 1 = 4, got {got}"):
            F.vq_sums(ROWS, wrong, 5)
    with pytest.raises(ValueError, match="vq_sums: K must be at least 1, got 0"):
        F.vq_sums(ROWS, torch.full((6,), -1), 0)


# ---- the operators themselves, by both doors ----


def strided(tensor: Tensor) -> Tensor:
    """The same values with a stride of two."""
    return torch.stack((tensor, tensor), -1)[..., 0]


NEAREST = {"x": X, "codebook": BOOK, "mask": MASK, "dot": False, "best": 1, "bits": 64}
NEAREST |= {"distance": False, "score": False, "screen": 2}
INDEX = cases.places(1, 6, 5)
PLACES, D = cases.places(1, 12, 5).view(6, 2), cases.normals(2, 6)
CALLS: dict[str, dict[str, Any]] = {
    "vq_nearest": NEAREST,
    "vq_quantize": {"x": X, "codebook": BOOK, "mask": MASK, "dot": False, "sums": True},
    "vq_sums": {"x": X, "index": INDEX, "K": 5},
    "vq_residual": {"x": ROWS, "codebooks": [CODES, CODES], "mask": MASK[0], "levels": INDEX[0], "sums": True},
    "vq_backward": {
        **{"dquantized": X, "dcommitment": X[..., 0].contiguous(), "dcodebook_error": X[..., 0].contiguous()},
        **{"x": X, "codes": reference.vq_gather(BOOK, INDEX), "index": INDEX, "K": 5, "gradient": 0},
        **{"need_x": True, "need_codebook": True},
    },
    "vq_residual_backward": {
        **{"dquantized": ROWS, "dcommitment": D, "x": ROWS, "codes": torch.cat((CODES, CODES)), "sizes": [5, 5]},
        **{"index": PLACES, "gradient": 0},
    },
}
ONLY_TORCH = ("vq_backward", "vq_residual_backward")
LOOKUP: dict[str, tuple[str, Any, str]] = {
    "x_rank": ("x", ROWS, r"x must be \[G, N, D\], got \[6, 4\]"),
    "x_dtype": ("x", X.half(), "x must be float32 or float64, got float16"),
    "x_stride": ("x", strided(X), "x must be contiguous"),
    "codebook_rank": ("codebook", CODES, r"codebook must be \[G, K, D\], got \[5, 4\]"),
    "codebook_groups": ("codebook", BOOK3, r"codebook must be \[G, K, D\] = \[1, 5, 4\], got \[3, 5, 4\]"),
    "codebook_size": (
        "codebook",
        BOOK[..., :3].contiguous(),
        r"codebook must be \[G, K, D\] = \[1, 5, 4\], got \[1, 5, 3\]",
    ),
    "codebook_dtype": ("codebook", BOOK.double(), "codebook must be float32, got float64"),
    "codebook_stride": ("codebook", strided(BOOK), "codebook must be contiguous"),
    "no_codes": ("codebook", BOOK[:, :0].contiguous(), r"codebook must have K and D of at least 1, got \[1, 0, 4\]"),
    "mask_size": ("mask", MASK[:, :5].contiguous(), r"mask must be \[G, N\] = \[1, 6\], got \[1, 5\]"),
    "mask_dtype": ("mask", MASK.byte(), "mask must be bool, got uint8"),
    "mask_stride": ("mask", strided(MASK), "mask must be contiguous"),
}
RAW: dict[str, dict[str, tuple[str, Any, str]]] = {
    "vq_nearest": {
        **LOOKUP,
        "best": ("best", 6, "best must lie in 1 .. K = 5, got 6"),
        "best_zero": ("best", 0, "best must lie in 1 .. K = 5, got 0"),
        "bits": ("bits", 8, "bits must be 16, 32 or 64, got 8"),
        "screen": ("screen", 3, r"screen must be 0 \(never\), 1 \(always\) or 2 \(automatic\), got 3"),
    },
    "vq_quantize": LOOKUP,
    "vq_sums": {
        "x_rank": LOOKUP["x_rank"],
        "x_dtype": LOOKUP["x_dtype"],
        "x_stride": LOOKUP["x_stride"],
        "index_size": ("index", INDEX[:, :5].contiguous(), r"index must be \[G, N\] = \[1, 6\], got \[1, 5\]"),
        "index_dtype": ("index", INDEX.int(), "index must be int64, got int32"),
        "index_stride": ("index", strided(INDEX), "index must be contiguous"),
        "index_large": ("index", INDEX + 9, r"index must lie in -1 .. K - 1 = 4, got \d+ at 0"),
        "index_negative": ("index", INDEX * 0 - 2, "index must lie in -1 .. K - 1 = 4, got -2 at 0"),
        "K": ("K", 0, "K must be at least 1, got 0"),
    },
    "vq_backward": {
        "x_stride": LOOKUP["x_stride"],
        "codes_size": ("codes", X[:, :5].contiguous(), r"codes must be \[G, N, D\] = \[1, 6, 4\], got \[1, 5, 4\]"),
        "codes_dtype": ("codes", X.double(), "codes must be float32, got float64"),
        "dquantized_size": ("dquantized", ROWS, r"dquantized must be \[G, N, D\] = \[1, 6, 4\], got \[6, 4\]"),
        "dquantized_stride": ("dquantized", strided(X), "dquantized must be contiguous"),
        "dcommitment_size": ("dcommitment", X, r"dcommitment must be \[G, N\] = \[1, 6\], got \[1, 6, 4\]"),
        "dcommitment_dtype": ("dcommitment", X[..., 0].double(), "dcommitment must be float32, got float64"),
        "dcodebook_error_size": ("dcodebook_error", X, r"dcodebook_error must be \[G, N\] = \[1, 6\], got \[1, 6, 4\]"),
        "index_large": ("index", INDEX + 9, r"index must lie in -1 .. K - 1 = 4, got \d+ at 0"),
        "K": ("K", 0, "K must be at least 1, got 0"),
        "gradient": ("gradient", 3, "gradient must be 0, 1 or 2, got 3"),
    },
    "vq_residual": {
        "x_rank": ("x", X, r"x must be \[N, D\], got \[1, 6, 4\]"),
        "x_dtype": ("x", ROWS.half(), "x must be float32 or float64, got float16"),
        "x_stride": ("x", strided(ROWS), "x must be contiguous"),
        "no_levels": ("codebooks", [], "there must be at least one codebook and one dimension, got M = 0, D = 4"),
        "codes_rank": ("codebooks", [CODES, BOOK], r"codebooks\[1\] must be \[K, D\], got \[1, 5, 4\]"),
        "codes_size": (
            "codebooks",
            [CODES, CODES[:, :3].contiguous()],
            r"codebooks\[1\] must be \[K, D\] = \[5, 4\], got \[5, 3\]",
        ),
        "codes_dtype": ("codebooks", [CODES.double()], r"codebooks\[0\] must be float32, got float64"),
        "codes_stride": ("codebooks", [strided(CODES)], r"codebooks\[0\] must be contiguous"),
        "no_codes": ("codebooks", [CODES[:0]], r"codebooks\[0\] must have 1 to 2\*\*31 - 1 codes, got 0"),
        "mask_size": ("mask", MASK, r"mask must be \[N\] = \[6\], got \[1, 6\]"),
        "mask_dtype": ("mask", MASK[0].byte(), "mask must be bool, got uint8"),
        "levels_size": ("levels", INDEX, r"levels must be \[N\] = \[6\], got \[1, 6\]"),
        "levels_dtype": ("levels", INDEX[0].int(), "levels must be int64, got int32"),
    },
    "vq_residual_backward": {
        "x_stride": ("x", strided(ROWS), "x must be contiguous"),
        "codes_rank": ("codes", BOOK, r"codes must be \[K, D\], got \[1, 5, 4\]"),
        "codes_dtype": ("codes", torch.cat((CODES, CODES)).double(), r"codebooks\[0\] must be float32, got float64"),
        "codes_half": ("codes", torch.cat((CODES, CODES)).half(), "codes must be float32 or float64, got float16"),
        "codes_stride": ("codes", strided(torch.cat((CODES, CODES))), "codes must be contiguous"),
        "sizes": ("sizes", [5, 6], "sizes must be those of the codebooks in codes, got 6"),
        "sizes_zero": ("sizes", [10, 0], "sizes must be those of the codebooks in codes, got 0"),
        "sizes_few": ("sizes", [5], "sizes must sum to the rows of codes = 10, got 5"),
        "dquantized_size": ("dquantized", X, r"dquantized must be \[N, D\] = \[6, 4\], got \[1, 6, 4\]"),
        "dcommitment_size": (
            "dcommitment",
            D.mT.contiguous(),
            r"dcommitment must be \[M, N\] = \[2, 6\], got \[6, 2\]",
        ),
        "index_size": ("index", PLACES.mT.contiguous(), r"index must be \[N, M\] = \[6, 2\], got \[2, 6\]"),
        "index_dtype": ("index", PLACES.int(), "index must be int64, got int32"),
        "index_large": ("index", PLACES + 9, r"index must lie in -1 .. K - 1 = 4, got \d+ at 0"),
        "gradient": ("gradient", 2, "gradient must be 0 or 1, got 2"),
    },
}
CHANGES = [(op, name) for op, changes in RAW.items() for name in changes]


def torch_call(op: str, arguments: dict[str, Any]) -> Any:
    keep = [False] if op == "vq_residual" else []
    return getattr(torch.ops.fastseq, op)(*arguments.values(), *keep)


@pytest.mark.parametrize("op, name", CHANGES, ids=[f"{op}-{name}" for op, name in CHANGES])
def test_wrong_argument_of_the_operator(op: str, name: str) -> None:
    argument, value, says = RAW[op][name]
    arguments = CALLS[op] | {argument: value}
    torch_call(op, CALLS[op])  # is right without the change
    with pytest.raises(ValueError, match=f"{op}: {says}"):
        torch_call(op, arguments)
    if op not in ONLY_TORCH:
        core = cases.numpy_door()
        with pytest.raises(ValueError, match=f"{op}: {says}"):
            getattr(core, op)(*cases.arrays(arguments.values()))


@pytest.mark.parametrize("op", [op for op in CALLS if op not in ONLY_TORCH])
def test_wrong_threads(op: str) -> None:
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"{op}: threads must be at least 1, got {threads}"):
            getattr(cases.numpy_door(), op)(*cases.arrays(CALLS[op].values()), threads=threads)


def test_an_index_of_16_bits_that_cannot_hold_the_codes() -> None:
    x, codebook = torch.zeros(1, 2, 1), torch.zeros(1, 2**15 + 1, 1)
    says = "vq_nearest: an index of 16 bits cannot hold K = 32769 codes"
    with pytest.raises(ValueError, match=says):
        torch.ops.fastseq.vq_nearest(x, codebook, None, False, 1, 16, False, False, 2)
    with pytest.raises(ValueError, match=says):
        cases.numpy_door().vq_nearest(x.numpy(), codebook.numpy(), bits=16)


def test_wrong_argument_of_a_prepared_codebook() -> None:
    core = cases.numpy_door()
    book, x = BOOK.numpy(), X.numpy()
    for wrong, says in (
        (book[0], r"Codebook: codebook must be \[G, K, D\], got \[5, 4\]"),
        (book.astype(np.float16), "Codebook: .* must be float32 or float64, got float16"),
        (book[:, :0], r"Codebook: codebook must have K and D of at least 1, got \[1, 0, 4\]"),
        (book[:, ::2], "Codebook: .* must be contiguous"),
    ):
        with pytest.raises(ValueError, match=says):
            core.Codebook(wrong)
    prepared = core.Codebook(book)
    for call, says in (
        ((x[0],), r"x must be \[G, N, D\], got \[6, 4\]"),
        ((x.astype(np.float64),), "codebook must be float64, got float32"),
        ((x[:, :, :3].copy(),), r"codebook must be \[G, K, D\] = \[1, 5, 3\], got \[1, 5, 4\]"),
        ((np.concatenate((x, x)),), r"codebook must be \[G, K, D\] = \[2, 5, 4\], got \[1, 5, 4\]"),
        ((x[:, ::2],), "x must be contiguous"),
        ((x, 6), "best must lie in 1 .. K = 5, got 6"),
        ((x, 1, 8), "bits must be 16, 32 or 64, got 8"),
    ):
        with pytest.raises(ValueError, match=f"Codebook.nearest: {says}"):
            prepared.nearest(*call)
    with pytest.raises(ValueError, match="Codebook.nearest: threads must be at least 1, got 0"):
        prepared.nearest(x, threads=0)


def test_nothing_is_converted_by_numpy() -> None:
    core = cases.numpy_door()
    with pytest.raises(TypeError):
        core.vq_nearest([[[1.0]]], [[[1.0]]])
    with pytest.raises(TypeError):
        core.vq_sums(X.numpy(), [[0] * 6], 5)


@pytest.mark.parametrize("op", CALLS)
def test_another_device_is_named(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    monkeypatch.setenv("FASTSEQ_BACKEND", "cpu")
    cuda = "cuda: FASTSEQ_BACKEND=cpu; " if op in vq_cuda.BACKEND else ""
    with pytest.raises(RuntimeError, match=f"cpu: input is on meta; {cuda}triton: FASTSEQ_BACKEND=cpu; reference"):
        choose(op, cases.BACKENDS[op], torch.zeros(2, 3, 4, device="meta"))


def test_inputs_stay_as_they_are() -> None:
    before = [t.clone() for t in (X, BOOK, MASK, INDEX)]
    for op in CALLS:
        torch_call(op, CALLS[op])
    leaves = [t.clone().requires_grad_() for t in (ROWS, CODES)]
    out = F.vq_quantize(*leaves, gradient="rotation")
    (out.quantized.sum() + out.commitment.sum() + out.codebook_error.sum()).backward()
    assert all(torch.equal(was, now) for was, now in zip(before, (X, BOOK, MASK, INDEX), strict=True))
    assert torch.equal(leaves[0], ROWS) and torch.equal(leaves[1], CODES)

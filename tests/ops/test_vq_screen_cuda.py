"""The screen of the backend "cuda", without a GPU: when it is taken, and what comes out by its kernel, which is
emulated between kernels of triton that are interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import parity_screen
from benchmarks.gpu.parity import Kernels, _row
from benchmarks.gpu.part import Context
from fastseq.ops import _cuda, vq_lookup, vq_screen
from fastseq.ops._triton import interpreted, kernels, why_not_triton
from tests.cuda import vq_screen as emulated
from tests.ops.test_vq_lookup import FLOAT, LOW, arguments, backend, forget, reason, same_outputs
from tests.ops.vq_cases import Case

MANY = Case(600, 128, 24, masked=True)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if the library were there, and a device of four multiprocessors, of which three hold a block of the lookup."""
    monkeypatch.delenv("FASTSEQ_BACKEND", raising=False)
    monkeypatch.setattr(_cuda, "why_not_loaded", None)
    monkeypatch.setattr(_cuda, "why_not_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vq_screen, "_fits", lambda shape: True)
    forget(monkeypatch, lambda shape: min(2, 3 // shape.groups))
    monkeypatch.setattr(kernels("_verified"), "capability", lambda index: 90)
    monkeypatch.setattr(kernels("_verified"), "rows", lambda: {})
    target = kernels("_launch").target(torch.device("cpu"))._replace(multiprocessors=4)
    monkeypatch.setattr(kernels("_launch"), "target", lambda device: target)
    return monkeypatch


@pytest.mark.parametrize("op", ["vq_nearest", "vq_quantize"])
def test_many_rows_take_it(op: str, here: pytest.MonkeyPatch) -> None:
    assert reason(op, arguments(op, case=MANY)) == "unverified: no result row of vq_screen for sm_90"
    here.setenv("FASTSEQ_BACKEND", "cuda")
    assert reason(op, arguments(op, case=MANY)) is None
    assert reason(op, arguments(op, case=MANY), "doubt") is None
    assert reason(op, arguments(op, case=MANY), "detail") == "screen on tensor cores, products of 16 bits: 3"
    assert reason(op, arguments(op, LOW, MANY), "detail") == "screen on tensor cores, products of 16 bits: 1"
    few = arguments(op, case=MANY._replace(N=40))
    assert reason(op, few, "detail") == "one launch: 3 groups of up to 16 rows, the codes in 1 parts"


def test_sums_by_code_come_with_it(here: pytest.MonkeyPatch) -> None:
    here.setenv("FASTSEQ_BACKEND", "cuda")
    assert reason("vq_quantize", arguments("vq_quantize", case=MANY._replace(N=40), sums=True)) is None
    args = arguments("vq_residual", case=MANY._replace(G=2), sums=True)
    assert reason("vq_residual", args) == "no sums by code of few rows"


@pytest.mark.parametrize(
    ("screen", "case", "why"),
    [
        (1, MANY._replace(D=257), "D = 257 is more than a screen holds, D <= 256 is not"),
        (0, MANY._replace(N=5000), "needs 313 blocks of threads at a time, the device holds fewer"),
        (2, MANY._replace(N=5000, D=300), "needs 313 blocks of threads at a time, the device holds fewer"),
    ],
)
def test_what_it_is_not_for(screen: int, case: Case, why: str, here: pytest.MonkeyPatch) -> None:
    here.setenv("FASTSEQ_BACKEND", "cuda")
    assert reason("vq_nearest", arguments("vq_nearest", case=case, screen=screen)) == why


@pytest.mark.parametrize("op", ["vq_nearest", "vq_quantize"])
def test_where_triton_is_said_to_be_better(op: str, here: pytest.MonkeyPatch) -> None:
    short = "codes of D = 16, K = 128 do not pay for a screen by our estimate, D >= 17, K >= 128 do"
    assert reason(op, arguments(op, case=MANY._replace(D=16)), "doubt") == short
    small = "codes of D = 24, K = 127 do not pay for a screen by our estimate, D >= 17, K >= 128 do"
    assert reason(op, arguments(op, case=MANY._replace(K=127)), "doubt") == small
    assert reason(op, arguments(op, case=MANY._replace(N=200), **{"sums": True, "screen": 1}), "doubt") == (
        "200 rows are work for 1 of 4 multiprocessors"
    )


def test_rows_of_odd_length_or_place(here: pytest.MonkeyPatch) -> None:
    here.setenv("FASTSEQ_BACKEND", "cuda")
    odd = MANY._replace(D=33)
    assert reason("vq_nearest", arguments("vq_nearest", case=odd, screen=1)) is None
    words = "D = 33 is odd, so that no two 16-bit numbers of a row can be read together"
    assert reason("vq_nearest", arguments("vq_nearest", LOW, odd, screen=1)) == words


@pytest.mark.parametrize("code", vq_lookup.DTYPES, ids=str)
@pytest.mark.parametrize("row", vq_lookup.DTYPES, ids=str)
def test_products_are_those_of_the_pieces(row: torch.dtype, code: torch.dtype) -> None:
    x, codebook = torch.zeros(1, 2, 4, dtype=row), torch.zeros(1, 3, 4, dtype=code)
    found = vq_screen.products(vq_lookup.Call(x, [codebook]).shape)
    assert found == kernels("_pieces").products_of(x, codebook)[0]


def test_where_there_is_no_device_or_no_room(here: pytest.MonkeyPatch) -> None:
    here.setenv("FASTSEQ_BACKEND", "cuda")
    args = arguments("vq_nearest", case=MANY, screen=1)
    here.setattr(vq_screen, "_fits", lambda shape: False)
    assert reason("vq_nearest", args) == "the device has no room for a screen's block of threads"
    here.setattr(torch.cuda, "is_available", lambda: False)
    assert reason("vq_nearest", args) == "no CUDA device is here"


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "nearest": ("vq_nearest", {}),
    "index": ("vq_nearest", {"distance": False, "score": False, "bits": 16, "mask": None}),
    "quantize": ("vq_quantize", {"sums": True}),
}


@pytest.mark.skipif(
    not interpreted() or why_not_triton() is not None, reason="triton: interpreted with TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("dtype", [FLOAT, LOW], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_with_triton_are_those_of_the_definition(
    options: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Duplicates of codes, so that some rows stay open."""
    op, change = OPTIONS[options]
    forget(monkeypatch, vq_lookup.parts_of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vq_screen, "_fits", lambda shape: True)
    args = arguments(op, dtype, Case(40, 70, 20, G=2, kind="duplicates", masked=True), screen=1, **change)
    with emulated.registered():
        found = backend(op).run(*args)
    expected = backend(op, "reference").run(*args)
    same_outputs(op, found[:3], expected[:3])
    for got, sums in zip(found[3:], expected[3:], strict=True):
        torch.testing.assert_close(got, sums)


@pytest.mark.skipif(
    not interpreted() or why_not_triton() is not None, reason="triton: interpreted with TRITON_INTERPRET=1"
)
def test_what_make_gpu_checks_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right in a dry run; and what is wrong is seen."""
    dry = Kernels(Context(torch.device("cpu"), True), "float32")

    def gates() -> dict[str, str]:
        return {c.case: _row(c, "float32")[0]["gate"] for c in parity_screen.checks(dry)}

    no = "cannot run: it needs a GPU"
    assert gates() == {"one": "passed", "odd": "passed", "repeats": "passed", "graph": no}
    right = vq_screen.run

    def wrong(call: vq_lookup.Call) -> vq_lookup.Found:
        found = right(call)
        found.index[0, -1] += 1
        return found

    monkeypatch.setattr(vq_screen, "run", wrong)
    assert gates()["odd"].startswith("wrong: index: 1 of")


def test_what_make_gpu_verifies() -> None:
    real = Kernels(Context(torch.device("cpu"), False), "bfloat16")
    assert {c.module for c in parity_screen.checks(real)} == {"vq_screen"} == {main.COMPILED["screen"]}
    assert not list(parity_screen.checks(real._replace(dtype="tf32")))


def test_the_limits_are_those_of_the_kernel() -> None:
    constants = (emulated.CSRC / "cuda" / "vq_screen.h").read_text()
    assert f"kScreenMostD = {vq_screen.MOST_D};" in constants
    assert f"kScreenCodes = {vq_screen.CODES};" in constants and emulated.CODES == vq_screen.CODES

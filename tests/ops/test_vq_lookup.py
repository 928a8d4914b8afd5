"""The backend "cuda" of the quantizers' operators, without a GPU: when it runs, and what comes out by its kernel, which
is emulated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastseq import functional
from fastseq.ops import _cuda, _library, vq_cuda, vq_lookup
from fastseq.ops._select import consider
from fastseq.ops._triton import interpreted, kernels, why_not_triton
from tests.cuda import vq_lookup as emulated
from tests.ops import vq_cases
from tests.ops.vq_cases import Case
from tests.tolerance import assert_same_bits, assert_within_budget

FLOAT, LOW = torch.float32, torch.bfloat16
CASE = Case(5, 40, 9, G=2, masked=True)


def arguments(op: str, low: torch.dtype = FLOAT, case: Case = CASE, **change: Any) -> list[Any]:
    """Of an operator; those that the schema names are changed."""
    x, codebook, mask = vq_cases.inputs(case)
    x, codebook = x.to(low), codebook.to(low)
    given: dict[str, Any] = {"x": x, "codebook": codebook, "mask": mask, "dot": case.dot, "sums": False}
    given |= {"best": 1, "bits": 32, "distance": True, "score": True, "screen": 2, "keep": True}
    if op == "vq_residual":
        levels = torch.arange(case.N) % 3
        given |= {"x": x[0], "codebooks": [codebook[0], codebook[1, :7]], "mask": mask[0], "levels": levels}
    given |= change
    return [given[a.name] for a in getattr(torch.ops.fastseq, op).default._schema.arguments]


def backend(op: str, name: str = "cuda") -> Any:
    return next(b for b in _library.TABLES[op] if b.name == name)


def forget(monkeypatch: pytest.MonkeyPatch, parts_of: Any) -> None:
    """Other answers of a device, none of which is remembered."""
    monkeypatch.setattr(vq_lookup, "parts_of", parts_of)
    for name in ("way", "why_not", "doubt"):
        found = getattr(vq_cuda, name)
        monkeypatch.setattr(vq_cuda, name, getattr(found, "__wrapped__", found))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend takes CPU tensors: its kernel is emulated."""
    forget(monkeypatch, lambda shape: emulated.parts(0, *shape.size, shape.sizes))
    with emulated.registered():
        yield


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "nearest": ("vq_nearest", {}),
    "index": ("vq_nearest", {"distance": False, "score": False, "bits": 16}),
    "distance": ("vq_nearest", {"score": False, "bits": 64, "mask": None, "dot": True}),
    "quantize": ("vq_quantize", {}),
    "residual": ("vq_residual", {}),
    "every level": ("vq_residual", {"mask": None, "levels": None, "keep": False}),
}


def same_outputs(op: str, got: Any, expected: Any) -> None:
    """Shapes, dtypes and numbers, but for distances, which are nearly so."""
    assert type(got) is type(expected)
    distance = 1 if op == "vq_nearest" else 2
    assert_within_budget("distance", got[distance], lambda e: e, (expected[distance],))
    for n, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert (g.shape, g.dtype) == (e.shape, e.dtype), n
        assert n == distance or torch.equal(g, e), n


@pytest.mark.parametrize("dtype", vq_lookup.DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_are_those_of_the_definition(options: str, dtype: torch.dtype, runs: None) -> None:
    op, change = OPTIONS[options]
    args = arguments(op, dtype, **change)
    same_outputs(op, backend(op).run(*args), backend(op, "reference").run(*args))


@pytest.mark.skipif(
    not interpreted() or why_not_triton() is not None, reason="triton: interpreted with TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_are_those_of_triton(options: str, runs: None) -> None:
    op, change = OPTIONS[options]
    args = arguments(op, LOW, **change)
    same_outputs(op, backend(op).run(*args), backend(op, "triton").run(*args))


@pytest.mark.filterwarnings("ignore:Warning only once")  # of torch, that operators are overridden
def test_gradients_go_through_it(runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward is that of the other backends: what forward keeps for it is the same."""
    x, codebook, _ = vq_cases.inputs(Case(5, 40, 9))

    def gradients(*run: Any) -> list[Tensor]:
        rows = x[0].clone().requires_grad_()
        with torch.library._scoped_library("fastseq", "IMPL") as library:
            for op in run:
                library.impl(op, backend(op).run, "CPU", allow_override=True)
            one = functional.vq_quantize(rows, codebook[0])
            more = functional.vq_residual(rows, [codebook[0], codebook[0] / 2])
            (one.quantized.sum() + one.commitment.sum() + more.quantized.sum() + more.commitment.sum()).backward()
        assert rows.grad is not None
        return [one.quantized.detach(), more.index, rows.grad]

    assert_same_bits("quantized index dx", gradients("vq_quantize", "vq_residual"), gradients())


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if the library were there, and a device that holds a hundred blocks and that nobody has tried."""
    monkeypatch.delenv("FASTSEQ_BACKEND", raising=False)
    monkeypatch.setattr(_cuda, "why_not_loaded", None)
    monkeypatch.setattr(_cuda, "why_not_triton", lambda: None)
    forget(monkeypatch, lambda shape: min(2, 100 // shape.groups))
    monkeypatch.setattr(kernels("_verified"), "capability", lambda index: 90)
    monkeypatch.setattr(kernels("_verified"), "rows", lambda: {})
    return monkeypatch


def on_cuda(args: list[Any]) -> list[Any]:
    """Inside a fake mode."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(v) for v in value]
        return torch.empty(value.shape, device="cuda", dtype=value.dtype) if isinstance(value, Tensor) else value

    return [moved(value) for value in args]


def reason(op: str, args: list[Any], ask: str = "why_not") -> Any:
    """What the backend says of a call on ``cuda``."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return getattr(backend(op), ask)(*on_cuda(args))


OPERATORS = list(vq_cuda.BACKEND)


@pytest.mark.parametrize("op", OPERATORS)
def test_it_runs_where_it_is_verified_or_asked_for(op: str, here: pytest.MonkeyPatch) -> None:
    assert reason(op, arguments(op)) == "unverified: no result row of vq_lookup for sm_90"
    here.setattr(_cuda, "_record", lambda: {"cuda": {"source": "ab"}})
    here.setattr(
        kernels("_verified"), "rows", lambda: {"sm_90": {"vq_lookup": {"source": "ab", "dtypes": ["float32"]}}}
    )
    assert reason(op, arguments(op)) is None
    assert reason(op, arguments(op, LOW)) == "unverified: no result row of vq_lookup in bfloat16 for sm_90"
    here.setenv("FASTSEQ_BACKEND", "cuda")
    assert reason(op, arguments(op, LOW)) is None


@pytest.mark.parametrize("op", OPERATORS)
def test_what_it_is_not_for(op: str, here: pytest.MonkeyPatch) -> None:
    here.setenv("FASTSEQ_BACKEND", "cuda")
    kinds = "only float32, bfloat16 and float16, x are float64"
    assert reason(op, arguments(op, torch.float64)) == kinds
    assert reason(op, arguments(op, case=CASE._replace(N=0))) == "no rows"
    assert reason(op, arguments(op, case=CASE._replace(D=513))) == "D = 513 is more than it holds, D <= 512 is not"
    groups = 101 if op == "vq_residual" else 202
    crowd = arguments(op, case=CASE._replace(N=16 * 101))
    assert reason(op, crowd) == f"needs {groups} blocks of threads at a time, the device holds fewer"
    forget(here, lambda shape: None)
    assert reason(op, arguments(op)) == "no CUDA device is here"


def test_options_that_it_has_not(here: pytest.MonkeyPatch) -> None:
    here.setenv("FASTSEQ_BACKEND", "cuda")
    assert reason("vq_nearest", arguments("vq_nearest", best=2)) == "only the nearest code, best = 1"
    for op in ("vq_quantize", "vq_residual"):
        assert reason(op, arguments(op, sums=True)) == "no sums by code of few rows"
    books = [torch.zeros(3, 9), torch.zeros(3, 9, dtype=LOW)]
    assert reason("vq_residual", arguments("vq_residual", codebooks=books)) == "codebooks of several dtypes"
    args = arguments("vq_residual", codebooks=books[:1] * 33)
    assert reason("vq_residual", args) == "33 levels are more than it has room for, 32 are not"


@pytest.mark.parametrize("op", OPERATORS)
def test_many_rows_go_another_way(op: str, here: pytest.MonkeyPatch) -> None:
    few, many = (arguments(op, case=Case(N, 40, 9, G=2, masked=True)) for N in (256, 513))
    rows = 513 if op == "vq_residual" else 1026
    assert reason(op, few, "doubt") is None
    words = f"{rows} rows are more than the 512 up to which one launch is faster by our estimate"
    assert reason(op, many, "doubt") == words
    book = (
        {"codebooks": [torch.zeros(120000, 512)]} if op == "vq_residual" else {"codebook": torch.zeros(2, 60000, 512)}
    )
    args = arguments(op, case=CASE._replace(D=512), **book)
    words = "0.31e9 multiply-adds are more than pays for one launch by our estimate"
    assert reason(op, args, "doubt") == words


@pytest.mark.parametrize("op", OPERATORS)
def test_explain_tells_its_parts(op: str, here: pytest.MonkeyPatch) -> None:
    here.setenv("FASTSEQ_BACKEND", "cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = consider(op, _library.TABLES[op], *on_cuda(arguments(op)))
    assert found.backend is not None and found.backend.name == "cuda"
    groups = 1 if op == "vq_residual" else 2
    assert found.why == f"FASTSEQ_BACKEND=cuda; one launch: {groups} groups of up to 5 rows, the codes in 2 parts"


def test_what_the_device_is_asked_for_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.fastseq, "vq_lookup_parts", lambda *args: asked.append(args) or 3, raising=False)
    vq_lookup.parts_of.cache_clear()
    shape = vq_cuda._of_quantize(torch.zeros(2, 3, 4), torch.zeros(2, 50, 4), None, False, False).shape
    assert vq_lookup.parts_of(shape) == vq_lookup.parts_of(shape) == 3
    assert asked == [(0, 2, 3, 4, (50,))]
    vq_lookup.parts_of.cache_clear()

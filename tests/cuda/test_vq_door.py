"""The door of the lookup in csrc/cuda, in a torch without CUDA: schemas, fakes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cuda import vq_lookup as emulated
from tests.cuda.library import python, said

# Arguments for any sizes and dtypes; `change` replaces some.
CALLS = """
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode
from fastseq.ops import _cuda, vq_lookup
ops, CUDA = torch.ops.fastseq, DispatchKeySet(DispatchKey.CUDA)


def lookup(G=2, N=3, D=5, sizes=(7, 4), low=torch.bfloat16, bits=torch.int64, device="cpu", **change):
    zeros = lambda *size, dtype=torch.float32: torch.zeros(*size, dtype=dtype, device=device)
    books = [zeros(G, K, D, dtype=low) for K in sizes]
    given = {"x": zeros(G, N, D, dtype=low), "codebooks": books, "mask": zeros(G, N, dtype=torch.bool)}
    given |= {"levels": zeros(N, dtype=torch.int64), "dot": False, "parts": 1}
    M = len(sizes)
    out = {"index": zeros(G, N, M, dtype=bits), "distance": zeros(G, M, N), "score": zeros(G, M, N)}
    return list({**given, **out, "quantized": zeros(G, N, D, dtype=low), **change}.values())


def refused(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return "nothing was wrong"


def parts(*args):
    return refused(lambda: ops.vq_lookup_parts(*args))


def given(**change):
    return refused(lambda: ops.vq_lookup.default.redispatch(CUDA, *lookup(**change)))
"""


def test_schema_fakes_and_sizes(package: Path) -> None:
    code = """
print(_cuda.why_not_loaded, ops.vq_lookup.default._schema)
with FakeTensorMode():
    for device in ("cuda", "cpu"):
        print(ops.vq_lookup(*lookup(device=device)), ops.vq_lookup(*lookup(score=None, quantized=None, device=device)))
"""
    schema, *fakes = python(package, CALLS + code).splitlines()
    assert schema.startswith("None fastseq::vq_lookup(Tensor x, Tensor[] codebooks, Tensor? mask, Tensor? levels, ")
    assert fakes == ["None None"] * 2


REFUSED = {
    "given()": "x must be on cuda",
    "given(bits=torch.int16, mask=None, levels=None)": "x must be on cuda",
    "given(low=torch.float32, distance=None, score=None, quantized=None)": "x must be on cuda",
    "given(low=torch.float64)": "x must be float32, bfloat16 or float16, got float64",
    "given(x=torch.zeros(3, 5))": "x must be [G, N, D], got [3, 5]",
    "given(N=0)": "G, N and D must be at least 1, got 2, 0 and 5",
    "given(D=513)": "D must be at most 512, got 513",
    "given(sizes=())": "codebooks must list 1 to 32 levels, got 0",
    "given(sizes=(1,) * 33)": "codebooks must list 1 to 32 levels, got 33",
    "given(sizes=(3, 0))": "a codebook must have 1 to 2**31 - 1 codes, got 0",
    "given(codebooks=[torch.zeros(2, 7, 5), torch.zeros(2, 7, 5).half()])": "codebooks[1] must be float32, got float16",
    "given(codebooks=[torch.zeros(2, 7, 4)])": "codebooks[0] must be [G, K, D] = [2, 7, 5], got [2, 7, 4]",
    "given(codebooks=[torch.zeros(2, 5, 7).mT])": "codebooks[0] must be contiguous",
    "given(mask=torch.zeros(3, dtype=torch.bool))": "mask must be [G, N] = [2, 3], got [3]",
    "given(levels=torch.zeros(3))": "levels must be int64, got float32",
    "given(parts=0)": "parts must lie in 1 .. 64, got 0",
    "given(parts=65)": "parts must lie in 1 .. 64, got 65",
    "given(bits=torch.uint8)": "index must be int16, int32 or int64, got uint8",
    "given(index=torch.zeros(2, 3, 1).long())": "index must be [G, N, M] = [2, 3, 2], got [2, 3, 1]",
    "given(distance=torch.zeros(2, 3, 2))": "distance must be [G, M, N] = [2, 2, 3], got [2, 3, 2]",
    "given(score=torch.zeros(2, 2, 3).half())": "score must be float32, got float16",
    "given(quantized=torch.zeros(2, 3, 5))": "quantized must be bfloat16, got float32",
    "parts(0, 1, 1, 600, [3])": "D must be at most 512, got 600",
    "parts(0, 1, 1, 5, [3, -1])": "a codebook must have 1 to 2**31 - 1 codes, got -1",
}


@pytest.fixture(scope="module")
def messages(package: Path) -> dict[str, str]:
    return said(package, CALLS, REFUSED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a torch without CUDA")
@pytest.mark.parametrize("call", REFUSED)
def test_what_the_door_refuses(call: str, messages: dict[str, str]) -> None:
    op = "vq_lookup_parts" if call.startswith("parts") else "vq_lookup"
    assert messages[call] == f"{op}: {REFUSED[call]}"


def test_the_limits_are_those_of_the_backend() -> None:
    from fastseq.ops import vq_lookup

    constants = (emulated.CSRC / "cuda" / "vq_lookup.h").read_text()
    assert f"kVqMostD = {vq_lookup.MOST_D};" in constants
    assert f"kVqMostLevels = {vq_lookup.MOST_LEVELS};" in constants
    assert f" kVqRows = {vq_lookup.ROWS}, " in (emulated.CSRC / "cuda" / "vq_plan.h").read_text()

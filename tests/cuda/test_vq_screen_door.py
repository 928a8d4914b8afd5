"""The door of the screen in csrc/cuda, in a torch without CUDA: schema, fakes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cuda.library import python, said

# Arguments for any sizes and dtypes; `change` replaces some.
CALLS = """
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode
from fastseq.ops import _cuda, vq_screen
ops, CUDA = torch.ops.fastseq, DispatchKeySet(DispatchKey.CUDA)


def screen(G=2, N=3, D=40, K=130, products=1, row=torch.bfloat16, piece=torch.bfloat16, device="cpu", **change):
    zeros = lambda *size, dtype=torch.float32: torch.zeros(*size, dtype=dtype, device=device)
    given = {"x": zeros(G, N, D, dtype=row), "codebook": zeros(G, K, D, dtype=row), "starts": zeros(G, K)}
    given |= {"pieces": zeros(G, 1 + (products > 1), 256, 64, dtype=piece), "h": zeros(G, 256), "most": zeros(G, 5)}
    given |= {"centre": zeros(G, D) if products == 3 else None, "mask": zeros(G, N, dtype=torch.bool)}
    given |= {"products": products, "dot": False, "slack": 1.0, "index": zeros(G, N, dtype=torch.int64)}
    given |= {"score": zeros(G, N), "open": zeros(G, N, dtype=torch.int32), "count": zeros(G, dtype=torch.int32)}
    return list({**given, **change}.values())


def given(**change):
    try:
        ops.vq_screen.default.redispatch(CUDA, *screen(**change))
    except (ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return "nothing was wrong"
"""


def test_schema_and_fakes(package: Path) -> None:
    code = """
print(_cuda.why_not_loaded, ops.vq_screen.default._schema)
with FakeTensorMode():
    for device in ("cuda", "cpu"):
        print(ops.vq_screen(*screen(device=device)), ops.vq_screen(*screen(score=None, mask=None, device=device)))
"""
    schema, *fakes = python(package, CALLS + code).splitlines()
    assert schema.startswith("None fastseq::vq_screen(Tensor x, Tensor codebook, Tensor starts, Tensor pieces, ")
    assert fakes == ["None None"] * 2


REFUSED = {
    "given()": "x must be on cuda",
    "given(products=3, row=torch.float32)": "x must be on cuda",
    "given(row=torch.float16, piece=torch.float16, mask=None, score=None)": "x must be on cuda",
    "given(row=torch.float64)": "x must be float32, bfloat16 or float16, got float64",
    "given(x=torch.zeros(3, 5))": "x must be [G, N, D], got [3, 5]",
    "given(N=0)": "G, N, D and K must be at least 1, got 2, 0, 40 and 130",
    "given(D=39)": "D must be even with one piece of the rows, got 39",
    "given(x=torch.zeros(241).bfloat16()[1:].view(2, 3, 40))": "x must begin at a multiple of 4 bytes",
    "given(D=257)": "D must be at most 256, got 257",
    "given(products=4)": "products must be 1, 2 or 3, got 4",
    "given(K=257)": "pieces must have K rounded up to a multiple of 128 codes and D to 64, 128 or 256 columns, "
    "got 256 and 64",
    "given(pieces=torch.zeros(2, 1, 256, 48).bfloat16())": "pieces must have K rounded up to a multiple of 128 codes "
    "and D to 64, 128 or 256 columns, got 256 and 48",
    "given(pieces=torch.zeros(2, 2, 256, 64).bfloat16())": "pieces must be [G, P, padded, width] = [2, 1, 256, 64], "
    "got [2, 2, 256, 64]",
    "given(piece=torch.float32)": "pieces must be bfloat16, or float16 with one product, got float32",
    "given(row=torch.float16, piece=torch.float16, products=3)": "pieces must be bfloat16, or float16 with one "
    "product, got float16",
    "given(row=torch.float32)": "x must be bfloat16 like pieces, got float32",
    "given(codebook=torch.zeros(2, 130, 39).bfloat16())": "codebook must be [G, K, D] = [2, 130, 40], got [2, 130, 39]",
    "given(codebook=torch.zeros(2, 130, 40))": "codebook must be bfloat16 like pieces, got float32",
    "given(products=3)": "x must be float32 or float16, got bfloat16",
    "given(starts=torch.zeros(2, 129))": "starts must be [G, K] = [2, 130], got [2, 129]",
    "given(h=torch.zeros(2, 130))": "h must be [G, padded] = [2, 256], got [2, 130]",
    "given(h=torch.zeros(513)[1:].view(2, 256))": "h must begin at a multiple of 16 bytes",
    "given(most=torch.zeros(5))": "most must be [G, 5] = [2, 5], got [5]",
    "given(centre=torch.zeros(2, 40))": "centre must be given with three products, and only then",
    "given(products=3, row=torch.float32, centre=None)": "centre must be given with three products, and only then",
    "given(mask=torch.zeros(3, dtype=torch.bool))": "mask must be [G, N] = [2, 3], got [3]",
    "given(index=torch.zeros(2, 3).byte())": "index must be int16, int32 or int64, got uint8",
    "given(score=torch.zeros(2, 3).half())": "score must be float32, got float16",
    "given(open=torch.zeros(2, 3).long())": "open must be int32, got int64",
    "given(count=torch.zeros(3).int())": "count must be [G] = [2], got [3]",
}


@pytest.fixture(scope="module")
def messages(package: Path) -> dict[str, str]:
    return said(package, CALLS, REFUSED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a torch without CUDA")
@pytest.mark.parametrize("call", REFUSED)
def test_what_the_door_refuses(call: str, messages: dict[str, str]) -> None:
    assert messages[call] == f"vq_screen: {REFUSED[call]}"

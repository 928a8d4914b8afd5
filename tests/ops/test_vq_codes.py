"""Codes as bits: packing and its inverse against the definition, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastseq import functional, reference
from tests.ops import vq_cases as cases
from tests.tolerance import assert_same_bits

each_backend = pytest.mark.parametrize("backend", cases.backends("vq_pack"))
EVERY_WIDTH = range(1, 33)


def codes(lines: int, count: int, bits: int, seed: int = 0) -> Tensor:
    """Random ones, the largest and the smallest among them."""
    generator = torch.Generator().manual_seed(1000 * seed + 31)
    drawn = torch.randint(0, 2**bits, (lines, count), generator=generator)
    drawn[:, ::5] = 2**bits - 1
    drawn[:, 3::7] = 0
    return drawn


def by_numbers(index: Tensor, bits: int) -> list[bytes]:
    """Each line as one large number, whose bytes are the packed ones."""
    size = (index.shape[1] * bits + 7) // 8
    numbers = (sum(code << (i * bits) for i, code in enumerate(line)) for line in index.tolist())
    return [number.to_bytes(size, "little") for number in numbers]


@pytest.mark.parametrize("bits", EVERY_WIDTH)
@each_backend
def test_every_width(backend: str, bits: int) -> None:
    for lines, count in ((1, 1), (3, 7), (2, 8), (1, 65), (0, 4), (4, 0)):
        index = codes(lines, count, bits)
        packed = cases.run("vq_pack", backend, index, bits)
        assert [bytes(line.tolist()) for line in packed] == by_numbers(index, bits)
        assert (packed.shape, packed.dtype) == ((lines, (count * bits + 7) // 8), torch.uint8)
        assert_same_bits("index", cases.run("vq_unpack", backend, packed, bits, count), index)


drawn = st.tuples(st.integers(0, 5), st.integers(0, 80), st.integers(1, 32))


@given(size=drawn, seed=st.integers(0, 2**20))
@pytest.mark.parametrize("backend", cases.compiled("vq_pack"))
def test_round_trip(backend: str, size: tuple[int, int, int], seed: int) -> None:
    lines, count, bits = size
    index = codes(lines, count, bits, seed)
    packed = cases.run("vq_pack", backend, index, bits)
    assert_same_bits("packed", packed, reference.vq_pack(index, bits))
    assert_same_bits("packed_by_numpy", cases.numpy_door().vq_pack(index.numpy(), bits), packed)
    assert_same_bits("index", cases.run("vq_unpack", backend, packed, bits, count), index)
    assert_same_bits("index_by_reference", reference.vq_unpack(packed, bits, count), index)
    assert_same_bits("index_by_numpy", cases.numpy_door().vq_unpack(packed.numpy(), bits, count), index)


@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 32)).filter(lambda s: s[1] * s[2] % 8),
    seed=st.integers(0, 2**20),
    line=st.integers(0, 3),
    place=st.integers(0, 6),
)
@each_backend
def test_corrupted_filling(backend: str, size: tuple[int, int, int], seed: int, line: int, place: int) -> None:
    """A single bit after the last code of a line is found, and the line is named."""
    lines, count, bits = size
    line, free = line % lines, -count * bits % 8
    packed = cases.run("vq_pack", backend, codes(lines, count, bits, seed), bits)
    packed[line, -1] |= 1 << (8 - free + place % free)
    says = f"vq_unpack: packed is corrupted: bits after the last code of line {line} are not zero"
    with pytest.raises(ValueError, match=says):
        cases.run("vq_unpack", backend, packed, bits, count)
    with pytest.raises(ValueError, match=says):
        cases.numpy_door().vq_unpack(packed.numpy(), bits, count)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_functional(dtype: torch.dtype) -> None:
    """Any leading dimensions and strides, any width of integers."""
    index = codes(6, 20, 7).view(2, 3, 20).to(dtype)
    packed = functional.vq_pack(index, 7)
    assert packed.shape == (2, 3, 18)
    assert_same_bits("lines", packed.flatten(0, 1), reference.vq_pack(index.flatten(0, 1).long(), 7))
    assert_same_bits("strided", functional.vq_pack(index.transpose(0, 1), 7), packed.transpose(0, 1).contiguous())
    assert_same_bits("one_line", functional.vq_pack(index[0, 0], 7), packed[0, 0])
    if dtype != torch.uint8:
        assert_same_bits("index", functional.vq_unpack(packed, 7, 20, dtype=dtype), index)
        strided = packed.transpose(0, 1)
        assert_same_bits("back", functional.vq_unpack(strided, 7, 20, dtype=dtype), index.transpose(0, 1).contiguous())
        assert_same_bits("one_line_back", functional.vq_unpack(packed[0, 0], 7, 20, dtype=dtype), index[0, 0])


def test_a_prefix_of_levels_is_a_prefix_of_lines() -> None:
    """Codes of a residual quantizer, levels first: fewer levels are fewer lines of the same bytes."""
    indices = codes(33, 8, 10)  # [N, M]
    whole = functional.vq_pack(indices.movedim(-1, 0), 10)
    assert_same_bits("three_levels", functional.vq_pack(indices[:, :3].movedim(-1, 0), 10), whole[:3])


def test_code_bits() -> None:
    for K in range(1, 70):
        assert functional.code_bits(K) == max(1, (K - 1).bit_length())
        assert 2 ** functional.code_bits(K) >= K
    assert [functional.code_bits(K) for K in (1024, 1025, 2**31, 2**32)] == [10, 11, 31, 32]


def test_no_lines_and_no_codes() -> None:
    for shape in ((0, 5), (3, 0), (0, 0), (2, 0, 4)):
        packed = functional.vq_pack(torch.zeros(shape, dtype=torch.int64), 5)
        assert packed.shape == (*shape[:-1], (shape[-1] * 5 + 7) // 8)
        assert functional.vq_unpack(packed, 5, shape[-1]).shape == shape


WRONG: dict[str, tuple[Any, str]] = {
    "K": (lambda: functional.code_bits(0), r"code_bits: K must be an integer in 1..2\*\*32, got 0"),
    "K_large": (
        lambda: functional.code_bits(2**32 + 1),
        r"code_bits: K must be an integer in 1..2\*\*32, got 4294967297",
    ),
    "K_float": (lambda: functional.code_bits(8.0), r"code_bits: K must be an integer in 1..2\*\*32, got 8.0"),
    "K_bool": (lambda: functional.code_bits(True), r"code_bits: K must be an integer in 1..2\*\*32, got True"),
    "bits": (lambda: functional.vq_pack(torch.zeros(3).long(), 0), "vq_pack: bits must be an integer in 1..32, got 0"),
    "bits_large": (
        lambda: functional.vq_pack(torch.zeros(3).long(), 33),
        "vq_pack: bits must be an integer in 1..32, got 33",
    ),
    "bits_float": (
        lambda: functional.vq_unpack(torch.zeros(3).byte(), 8.0, 3),
        "vq_unpack: bits must be an integer in 1..32, got 8.0",
    ),
    "bits_bool": (
        lambda: functional.vq_unpack(torch.zeros(3).byte(), True, 3),
        "vq_unpack: bits must be an integer in 1..32, got True",
    ),
    "index_dtype": (
        lambda: functional.vq_pack(torch.zeros(3), 8),
        "vq_pack: index must be int64, int32, int16 or uint8, got torch.float32",
    ),
    "index_rank": (
        lambda: functional.vq_pack(torch.tensor(3), 8),
        r"vq_pack: index must be \[..., N\], got \[\]",
    ),
    "count": (
        lambda: functional.vq_unpack(torch.zeros(3).byte(), 8, -1),
        "vq_unpack: count must be an integer >= 0, got -1",
    ),
    "count_float": (
        lambda: functional.vq_unpack(torch.zeros(3).byte(), 8, 3.0),
        "vq_unpack: count must be an integer >= 0, got 3.0",
    ),
    "packed_dtype": (
        lambda: functional.vq_unpack(torch.zeros(3).long(), 8, 3),
        "vq_unpack: packed must be torch.uint8, got torch.int64",
    ),
    "packed_size": (
        lambda: functional.vq_unpack(torch.zeros(2, 4).byte(), 8, 3),
        r"vq_unpack: packed must be \[..., \(count \* bits \+ 7\) // 8\] = \[..., 3\], got \[2, 4\]",
    ),
    "packed_rank": (
        lambda: functional.vq_unpack(torch.tensor(3).byte(), 8, 1),
        r"vq_unpack: packed must be \[..., \(count \* bits \+ 7\) // 8\] = \[..., 1\], got \[\]",
    ),
    "dtype_small": (
        lambda: functional.vq_unpack(torch.zeros(2).byte(), 16, 1, dtype=torch.int16),
        "vq_unpack: dtype must be int64, int32 or int16 and hold 16 bits, got torch.int16",
    ),
    "dtype": (
        lambda: functional.vq_unpack(torch.zeros(2).byte(), 2, 1, dtype=torch.uint8),
        "vq_unpack: dtype must be int64, int32 or int16 and hold 2 bits, got torch.uint8",
    ),
    "too_large": (
        lambda: functional.vq_pack(torch.tensor([[0, 1], [7, 8]]), 3),
        r"vq_pack: index must lie in 0 .. 2\*\*bits - 1 = 7, got 8 at 3",
    ),
    "dropped": (
        lambda: functional.vq_pack(torch.tensor([5, -1]), 32),
        r"vq_pack: index must lie in 0 .. 2\*\*bits - 1 = 4294967295, got -1 at 1",
    ),
    "corrupted": (
        lambda: functional.vq_unpack(torch.tensor([255, 2]).byte(), 3, 3),
        "vq_unpack: packed is corrupted: bits after the last code of line 0 are not zero",
    ),
}


@cases.needs_compiled()
@pytest.mark.parametrize("call, says", WRONG.values(), ids=WRONG.keys())
def test_wrong_argument(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


PACK, UNPACK = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.uint8)
RAW: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "bits": ("vq_pack", (PACK, 33), "bits must lie in 1 .. 32, got 33"),
    "rank": ("vq_pack", (PACK[0], 3), r"index must be \[L, N\], got \[3\]"),
    "dtype": ("vq_pack", (PACK.int(), 3), "index must be int64, got int32"),
    "stride": ("vq_pack", (PACK.mT, 3), "index must be contiguous"),
    "range": ("vq_pack", (PACK + 8, 3), r"index must lie in 0 .. 2\*\*bits - 1 = 7, got 8 at 0"),
    "negative": ("vq_pack", (PACK - 1, 32), r"index must lie in 0 .. 2\*\*bits - 1 = 4294967295, got -1 at 0"),
    "packed_bits": ("vq_unpack", (UNPACK, 0, 3), "bits must lie in 1 .. 32, got 0"),
    "packed_count": ("vq_unpack", (UNPACK, 8, -3), "count must not be negative, got -3"),
    "packed_rank": ("vq_unpack", (UNPACK[0], 8, 3), r"packed must be \[L, bytes\], got \[3\]"),
    "packed_size": (
        "vq_unpack",
        (UNPACK, 8, 4),
        r"packed must be \[L, \(N\*bits \+ 7\) / 8\] = \[2, 4\], got \[2, 3\]",
    ),
    "packed_dtype": ("vq_unpack", (UNPACK.long(), 8, 3), "packed must be uint8, got int64"),
    "packed_stride": ("vq_unpack", (UNPACK.mT, 8, 2), "packed must be contiguous"),
    "count_beyond": ("vq_unpack", (UNPACK, 8, 2**62), r"packed must be \[L, \(N\*bits \+ 7\) / 8\]"),
}


@cases.needs_compiled()
@pytest.mark.parametrize("door", ["torch", "numpy"])
@pytest.mark.parametrize("op, call, says", RAW.values(), ids=RAW.keys())
def test_wrong_argument_of_the_operator(op: str, call: tuple[Any, ...], says: str, door: str) -> None:
    run = getattr(torch.ops.fastseq, op) if door == "torch" else getattr(cases.numpy_door(), op)
    with pytest.raises(ValueError, match=f"{op}: {says}"):
        run(*(call if door == "torch" else cases.arrays(call)))


def test_no_copy_by_numpy() -> None:
    """What is not of the right kind is refused by name, not converted."""
    core = cases.numpy_door()
    with pytest.raises(ValueError, match="vq_pack: index must be int64"):
        core.vq_pack(np.zeros((2, 3)), 3)
    with pytest.raises(TypeError):
        core.vq_pack([[1, 2]], 3)

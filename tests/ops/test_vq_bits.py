"""Results of vector quantization that must be equal bit for bit: threads, runs, doors, batches, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import functional
from tests.ops import vq_cases as cases
from tests.ops.vq_cases import Case, each_dtype
from tests.tolerance import assert_same_bits

pytestmark = cases.needs_compiled()
DRIVE = Path(__file__).parents[1] / "core" / "drive.py"

CASES = {
    "one": Case(1, 1, 1),
    "few_rows": Case(3, 700, 130, masked=True),
    "few_panels": Case(20, 900, 70, G=2),
    "tall": Case(3000, 20, 33, masked=True),
    "groups": Case(300, 60, 40, G=3, masked=True),
    "ties": Case(600, 130, 12, kind="whole"),
    "screened": Case(1030, 513, 33, kind="mean"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def lookups(case: Case, dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...]]]:
    """Calls that both doors have: the name of the operator and its arguments."""
    x, codebook, mask = cases.inputs(case, dtype)
    best = min(4, case.K)
    index = cases.places(case.G, case.N, case.K)
    levels = cases.places(1, case.N, 4)[0]
    books = [codebook[0], codebook[0, : max(1, case.K // 2)] / 3]
    return [
        ("vq_nearest", (x, codebook, mask, False, 1, 64, True, True, 0)),
        ("vq_nearest", (x, codebook, mask, True, 1, 32, True, True, 1)),
        ("vq_nearest", (x, codebook, mask, False, best, 16, True, True, 2)),
        ("vq_quantize", (x, codebook, mask, case.dot, True)),
        ("vq_sums", (x, index, case.K)),
        ("vq_residual", (x[0].contiguous(), books, None if mask is None else mask[0], levels, True)),
    ]


def by_torch(op: str, args: tuple[Any, ...]) -> list[Tensor]:
    extra = (False,) if op == "vq_residual" else ()  # the copy of the codes, which the numpy door does not give
    out = list(getattr(torch.ops.fastseq, op)(*args, *extra))
    return out[: len(out) - len(extra)]


def gradients(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """What the operators of backward give, which only torch has."""
    found = []
    x, codebook, _ = cases.inputs(case, dtype)
    index = cases.places(case.G, case.N, case.K)
    codes = codebook.gather(1, index.clamp_min(0)[..., None].expand(*index.shape, case.D))
    grads = [cases.normals(*shape, dtype=dtype) for shape in (x.shape, x.shape[:2], x.shape[:2])]
    for way in range(3):
        found += torch.ops.fastseq.vq_backward(*grads, x, codes, index, case.K, way, True, True)
    sizes, d = [case.K, case.K], cases.normals(2, case.N, dtype=dtype)
    books, levels = torch.cat((codebook[0], codebook[0] / 2)), cases.places(1, 2 * case.N, case.K).view(-1, 2)
    for way in range(2):
        call = (grads[0][0].contiguous(), d, x[0].contiguous(), books, sizes, levels, way)
        found.append(torch.ops.fastseq.vq_residual_backward(*call))
    return found


@each_case
@each_dtype
def test_threads_runs_and_doors(case: Case, dtype: torch.dtype) -> None:
    """Any number of threads, twice, and the numpy door with any team give the same."""
    for op, args in lookups(case, dtype):
        torch.set_num_threads(1)
        expected = by_torch(op, args)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            names = [f"{op}_{n}_on_{threads}" for n in range(len(expected))]
            assert_same_bits(names, by_torch(op, args), expected)
            if threads != 2:
                assert_same_bits(names, cases.by_numpy(op, *args, threads=threads), expected)


@each_case
@each_dtype
def test_threads_of_the_gradients(case: Case, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = gradients(case, dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits([f"{n}" for n in range(len(expected))], gradients(case, dtype), expected)


@pytest.mark.parametrize("kind", ["normal", "mean", "whole", "neighbours", "magnitudes", "strange"])
@pytest.mark.parametrize("dot", [False, True], ids=["l2", "dot"])
def test_row_alone_and_in_a_batch(kind: str, dot: bool) -> None:
    """What a row gets depends on it and the codebook alone: not on who shares the batch, nor on where it stands."""
    x, codebook, _ = cases.inputs(Case(1100, 530, 33, kind=kind, dot=dot))
    whole = torch.ops.fastseq.vq_nearest(x, codebook, None, dot, 1, 64, True, True, 2)
    rows = {0, 1, 15, 16, 511, 1098, 1099}
    for screen in cases.SCREENS:
        for n in rows:
            alone = torch.ops.fastseq.vq_nearest(x[:, n : n + 1], codebook, None, dot, 1, 64, True, True, screen)
            assert_same_bits("index distance", alone[:2], [v[:, n : n + 1] for v in whole[:2]])
            assert torch.equal(alone[2], whole[2][:, n : n + 1]), "score"
        order = torch.randperm(1100)[:601]
        some = torch.ops.fastseq.vq_nearest(x[:, order], codebook, None, dot, 1, 64, True, True, screen)
        assert_same_bits("index distance", some[:2], [v[:, order] for v in whole[:2]])


def test_a_mask_changes_no_other_row() -> None:
    for case in (Case(300, 60, 20, G=2), Case(3, 60, 20, G=2), Case(1100, 530, 33)):
        x, codebook, _ = cases.inputs(case)
        mask = torch.rand(case.G, case.N) < 0.5
        plain = torch.ops.fastseq.vq_quantize(x, codebook, None, False, False)
        got = torch.ops.fastseq.vq_quantize(torch.where(mask[..., None], x, torch.nan), codebook, mask, False, False)
        expected = [
            torch.where(mask if v.dim() == 2 else mask[..., None], v, -1 if n == 1 else 0)
            for n, v in enumerate(plain[:3])
        ]
        assert_same_bits("codes index distance", got[:3], expected)


def test_a_row_of_the_residual_quantizer_alone_and_in_a_batch() -> None:
    x, books = cases.normals(1300, 9), [cases.normals(K, 9, seed=K) for K in (30, 7, 50)]
    whole = functional.vq_residual(x, books)
    for rows in ([0], [1299], [5, 700, 31], list(range(1299, 200, -1))):
        got = functional.vq_residual(x[rows], books)
        expected = (whole.quantized[rows], whole.index[rows], whole.commitment[:, rows])
        assert_same_bits("quantized index commitment", got[:3], expected)


def test_parts_of_a_codebook_merge_by_their_scores() -> None:
    """As a codebook that is spread over ranks is looked up: the smallest score, of equals the first part."""
    for kind in ("normal", "whole", "neighbours"):
        x, codebook, _ = cases.inputs(Case(200, 90, 12, kind=kind))
        whole = functional.vq_nearest(x[0], codebook[0], return_score=True)
        parts = [functional.vq_nearest(x[0], part, return_score=True) for part in codebook[0].split(37)]
        scores = torch.stack([part.score for part in parts])
        first = scores.argmin(0)
        index = torch.stack([part.index + 37 * n for n, part in enumerate(parts)]).gather(0, first[None])[0]
        assert torch.equal(index, whole.index)
        assert torch.equal(scores.amin(0), whole.score)


PREPARED = {"few": Case(3, 150, 37), "groups": Case(2, 40, 5, G=3), "many": Case(80, 33, 20), "one": Case(1, 1, 1)}


@pytest.mark.parametrize("case", PREPARED.values(), ids=PREPARED.keys())
@pytest.mark.parametrize("dot", [False, True], ids=["l2", "dot"])
@each_dtype
def test_prepared_codebook(case: Case, dot: bool, dtype: torch.dtype) -> None:
    """A codebook that the numpy door keeps ready gives what the lookup gives, call after call."""
    core = cases.numpy_door()
    for kind in ("normal", "whole", "strange"):
        x, codebook, _ = cases.inputs(case._replace(kind=kind), dtype)
        prepared = core.Codebook(codebook.numpy(), dot)
        for best in {1, min(3, case.K)}:
            expected = torch.ops.fastseq.vq_nearest(x, codebook, None, dot, best, 32, True, False, 2)[:2]
            for threads in (1, 2, 3):
                got = prepared.nearest(x.numpy(), best, 32, True, threads=threads)
                assert_same_bits("index distance", got, expected)
        first = prepared.nearest(x.numpy())
        assert_same_bits(
            "index", first[0], torch.ops.fastseq.vq_nearest(x, codebook, None, dot, 1, 64, False, False, 2)[0]
        )
        assert first[1].size == 0


def test_prepared_codebook_outlives_its_array() -> None:
    core = cases.numpy_door()
    x, codebook, _ = cases.inputs(Case(2, 500, 64))
    expected = torch.ops.fastseq.vq_nearest(x, codebook, None, False, 1, 64, True, False, 2)[:2]
    prepared = core.Codebook(codebook.numpy().copy())
    garbage = [torch.full((1, 500, 64), torch.nan) for _ in range(20)]
    assert_same_bits("index distance", prepared.nearest(x.numpy(), distance=True), expected)
    assert len(garbage) == 20


def drive(isa: str, *arguments: str) -> list[str]:
    """What ``drive.py`` prints of vector quantization with that instruction set."""
    environment = {**os.environ, "FASTSEQ_ISA": isa, "PYTHONPATH": str(DRIVE.parents[2])}
    command = [sys.executable, str(DRIVE), "--only", "vq", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert lines[0] == f"isa {isa}"
    assert len(lines) > 300
    return lines[1:]


def test_every_instruction_set_gives_the_same_bits() -> None:
    """Also the one whose fused multiply-add is a call into the C library."""
    core = cases.numpy_door()
    if core.isa() != core.isas()[-1]:
        pytest.skip(f"{core.isa()}: the run of {core.isas()[-1]} compares all of them")
    expected = drive(core.isa())
    for isa in core.isas()[:-1]:
        different = [got for got, right in zip(drive(isa, "--threads", "2"), expected, strict=True) if got != right]
        assert not different, f"{isa}: {len(different)} of {len(expected)} results differ, first: {different[:5]}"

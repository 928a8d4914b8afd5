"""Instruction sets: the wide ones give the same bits, for any team; each is chosen by FASTSEQ_ISA or refused."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.drive import INTEGERS

core = pytest.importorskip("fastseq._core", reason="fastseq._core is not built")
DRIVE = Path(__file__).with_name("drive.py")
ROOT = DRIVE.parents[2]
WIDE = [isa for isa in core.isas() if isa != "scalar"]
# the code of others but for products of bytes, which these parts have
BYTES, PARTS = ("avx2_vnni", "avx512_vnni", "avx512_amx"), ("vq", "packed")


@functools.cache
def drive(isa: str, *arguments: str, least: int = 1000) -> list[str]:
    """The lines that ``drive.py`` prints with that instruction set."""
    environment = {**os.environ, "FASTSEQ_ISA": isa, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(DRIVE), *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert lines[0] == f"isa {isa}"
    assert len(lines) > least
    return lines[1:]


def assert_same_lines(got: list[str], expected: list[str]) -> None:
    different = [g for g, e in zip(got, expected, strict=True) if g != e]
    assert not different, f"{len(different)} of {len(got)} results differ, first: {different[:5]}"


def test_wide_sets_give_the_same_bits() -> None:
    """AVX2, AVX-512, and AVX-512's body built with AVX2's flags where the build holds it."""
    if len(WIDE) < 2:
        pytest.skip(f"{core.isas()}: one wide instruction set; FASTSEQ_BUILD_TEST_ISA=1 builds another")
    expected = drive(WIDE[0])
    for isa in WIDE[1:]:
        if isa not in BYTES:
            assert_same_lines(drive(isa), expected)
            continue
        for part in PARTS:
            lines = [line for line in expected if line.startswith(f"{part} ")]
            assert_same_lines(drive(isa, "--only", part), lines)


def test_integers_give_the_same_bits_on_every_set() -> None:
    """Exact sums, and cells that round once: nothing that is made integers differs, not even on the scalar set."""

    def integers(lines: list[str]) -> list[str]:
        found = [line for line in lines if line.startswith(tuple(f"packed {form} " for form in INTEGERS))]
        assert len(found) > 100
        return found

    if not WIDE:
        pytest.skip("the scalar set is the only one")
    # what the other wide sets give is compared with the first's above
    assert_same_lines(integers(drive("scalar", "--only", "packed", least=100)), integers(drive(WIDE[0])))


@pytest.mark.parametrize("isa", core.isas())
def test_threads(isa: str) -> None:
    alone = isa if isa == "scalar" else WIDE[0]  # and so the wide sets are compared here too
    assert_same_lines(drive(isa, "--spread", "few", "--threads", "3"), drive(alone, "--spread", "few"))


def test_the_best_set_is_the_default() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FASTSEQ_ISA"}
    code = "from fastseq import _core; print(_core.isa(), _core.isas()[-1], _core.isas()[0])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    chosen, best, least = done.stdout.split()
    assert chosen == best
    assert least == "scalar"


def test_an_unknown_set_is_an_error() -> None:
    environment = {**os.environ, "FASTSEQ_ISA": "sse9"}
    for call in ("isa()", "gemm(one, one)", "lstm_noise(1, 2, 3, 4)"):
        code = f"import numpy; from fastseq import _core; one = numpy.ones((1, 1)); _core.{call}"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode != 0, call
        assert "FASTSEQ_ISA=sse9 cannot run here; these can: scalar" in done.stderr

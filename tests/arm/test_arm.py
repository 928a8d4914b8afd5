"""The core, the numpy door and the C interface on 64-bit ARM: equal bits, in an emulator. Says nothing about speed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastseq import _core, deploy
from tests.arm import target
from tests.core.test_instruction_sets import DRIVE, WIDE, assert_same_lines, drive
from tests.deploy import models

LAYER = DRIVE.with_name("drive_layer.cpp")
STREAM = Path(models.__file__).with_name("stream.c")
SETS = ("scalar", "neon")
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module", autouse=True)
def built() -> Path:
    """The folder of the packages."""
    reason = target.missing()
    if reason:
        pytest.fail(reason)
    return target.build()


def lines(isa: str, *arguments: str) -> list[str]:
    """What ``drive.py`` prints there."""
    first, *rest = target.python(DRIVE, *arguments, FASTSEQ_ISA=isa).splitlines()
    assert first == f"isa {isa}" and len(rest) > 1000
    return rest


def test_neon_gives_the_bits_of_other_wide_sets() -> None:
    assert_same_lines(lines("neon"), drive(WIDE[0]))


def test_the_scalar_set_gives_the_bits_that_it_gives_here() -> None:
    assert_same_lines(lines("scalar", "--spread", "few"), drive("scalar", "--spread", "few"))


def test_threads() -> None:
    assert_same_lines(lines("neon", "--spread", "few", "--threads", "3"), drive(WIDE[0], "--spread", "few"))


def test_the_choice_of_a_set() -> None:
    code = "from fastseq import _core; print(_core.isa(), *_core.isas())"
    assert target.python("-c", code, FASTSEQ_ISA="").split() == ["neon", *SETS]
    code = "from fastseq import _core\ntry: _core.isa()\nexcept ValueError as error: print(error)"
    assert "FASTSEQ_ISA=avx2 cannot run here; these can: scalar, neon" in target.python("-c", code, FASTSEQ_ISA="avx2")


def test_denormal_numbers_are_zeros() -> None:
    code = (
        "import numpy; from fastseq import _core; one = numpy.ones((1, 1), 'f4'); print(_core.gemm(one * 1e-40, one))"
    )
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=target.ROOT)
    assert here.stdout == target.python("-c", code) == "[[0.]]\n"


@pytest.mark.parametrize(("isa", "threads"), [("scalar", "1"), ("neon", "1"), ("neon", "3")])
def test_whole_layers(isa: str, threads: str, tmp_path: Path) -> None:
    """Straight on the core; see the driver."""
    neon = max(target.ROOT.glob("build/libraries-*/libfastseq_neon.a"), key=os.path.getmtime)
    libraries = [f"-lfastseq_{name}" for name in ("core", "isa", *SETS)]
    flags = ["-std=c++20", "-O1", f"-I{target.ROOT / 'csrc'}", f"-L{neon.parent}", *libraries, "-pthread"]
    program = target.compiled(LAYER, tmp_path / "layer", *flags)
    name, calls = target.emulate(program, threads, FASTSEQ_ISA=isa).split()
    assert name == isa and int(calls) > 300


@pytest.mark.parametrize("isa", SETS)
def test_a_set_exports_its_table_and_nothing_else(isa: str, tmp_path: Path) -> None:
    """As on other processors: no code of one set may come to serve another."""
    flags = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi", "-c"]
    source = target.ROOT / "csrc" / "core" / f"isa_{isa}.cpp"
    found = target.compiled(source, tmp_path / "isa.o", f"-I{target.ROOT / 'csrc'}", *flags)
    symbols = [line.split()[-2:] for line in target.run([f"{target.TRIPLE}-nm", found]).splitlines()]
    assert [name for kind, name in symbols if kind in "WwVvu"] == []
    table = f"_ZN7fastseq4core{len(isa)}{isa}5tableE"
    assert [name for kind, name in symbols if kind.isupper() and kind != "U"] == [table]
    assert not [name for _, name in symbols if "GLOBAL__sub_I" in name]


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_deployed_model(bits: int, built: Path, tmp_path: Path) -> None:
    """From a file written here, in Python and in C: the results of this machine."""
    state, _ = models.tagger()
    if bits < 32:
        state = models.quantized(state, bits, 8 if bits == 4 else None)
    path = tmp_path / "tagger.fastseq"
    deploy.save(state, path)
    x = np.random.default_rng(0).integers(0, 30, (25, 3)).astype(np.int32)
    expected = deploy.Model.load(str(path)).run(x)[0]
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy, fastseq.deploy as deploy\n"
        "y, _ = deploy.Model.load(sys.argv[1] + '/tagger.fastseq').run(numpy.load(sys.argv[1] + '/x.npy'))\n"
        "numpy.save(sys.argv[1] + '/y.npy', y)"
    )
    target.python("-c", code, tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)

    library = built / "fastseq"
    flags = ["-std=c99", f"-I{deploy.include()}", f"-L{library}", "-lfastseq", f"-Wl,-rpath,{library}"]
    program = target.compiled(STREAM, tmp_path / "stream", *flags)
    printed = target.emulate(program, path, stdin=" ".join(map(str, x[:, 0])))
    got = np.array([line.split() for line in printed.splitlines()], np.float32)
    np.testing.assert_array_equal(got, expected[:, 0])


def test_this_machine_runs_a_wide_set() -> None:
    """Else the bits above would be compared with those of the scalar set, which has no fused products."""
    assert _core.isa() in WIDE

"""The core and the numpy door under the address and undefined-behaviour sanitizers, in a build of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
DRIVE, LAYER = (Path(__file__).with_name(name) for name in ("drive.py", "drive_layer.cpp"))
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
FLAGS = ["-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-UNDEBUG"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx2"]
VNNI = [*AVX512, "-mavx512vnni"]
SETS = {
    "isa_avx2": ["-mavx2", "-mfma"],
    "isa_avx2_vnni": ["-mavx2", "-mfma", "-mavxvnni"],
    "isa_avx512": AVX512,
    "isa_avx512_vnni": VNNI,
    "isa_avx512_amx": [*VNNI, "-mamx-tile", "-mamx-int8"],
}
pytestmark = [
    pytest.mark.sanitizer,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' libraries are preloaded the Linux way"),
]


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


class Built(NamedTuple):
    """The numpy door, and a program that drives what has no numpy door."""

    door: Path
    layer: Path


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The core with every instruction set and what drives it, built with the sanitizers."""
    import pybind11

    folder = tmp_path_factory.mktemp("sanitized")
    includes = [f"-I{path}" for path in (CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]
    have = [f"-DFASTSEQ_HAVE_{name.removeprefix('isa_').upper()}" for name in SETS]
    known = ("isa_scalar", *SETS)  # the others are not for this processor
    core = [s for s in sorted(CSRC.glob("core/*.cpp")) if not s.stem.startswith("isa_") or s.stem in known]
    # one file for the whole door, and one for the runtime: what their headers hold is compiled once
    door, deploy = folder / "door.cpp", folder / "deploy.cpp"
    for unit, sources in ((door, CSRC.glob("python/*.cpp")), (deploy, CSRC.glob("deploy/*.cpp"))):
        unit.write_text("".join(f'#include "{s}"\n' for s in sorted(sources) if s.stem != "c_api"))

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.parent.name}_{source.stem}.o")
        level = "-O0" if source == door else "-O1"  # the door computes nothing
        flags = [level, *FLAGS, *SANITIZERS, *SETS.get(source.stem, []), *have, *includes]
        run([str(COMPILER), *flags, "-c", str(source), "-o", target])
        return target

    # the longest first
    sources = [door, *sorted([*core, deploy, LAYER], key=lambda source: source.stem not in ["isa_scalar", *SETS])]
    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip(sources, pool.map(compile_one, sources), strict=True))
    built = Built(folder / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}", folder / "drive_layer")
    link = [str(COMPILER), *SANITIZERS, "-pthread", *(objects[s] for s in core)]
    run([*link, "-shared", objects[door], objects[deploy], "-o", str(built.door)])
    run([*link, objects[LAYER], "-o", str(built.layer)])
    return built


def library_path(name: str) -> str:
    return run([str(COMPILER), f"-print-file-name={name}"]).strip()


OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255",  # fresh memory is NaN
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
each_team = pytest.mark.parametrize("threads", [1, 3])
each_isa = pytest.mark.parametrize("isa", ["scalar", *(name.removeprefix("isa_") for name in SETS)])
FLAG = {"avx2_vnni": "avx_vnni", "avx512": "avx512dq", "avx512_amx": "amx_int8"}  # else the set's name


def supported(isa: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text().replace("\n", " ")
    return isa == "scalar" or f" {FLAG.get(isa, isa)} " in flags


def need(isa: str) -> None:
    if not supported(isa):
        pytest.skip(f"{isa}: not supported by this machine")


def same_as(isa: str) -> str | None:
    """The set that runs here too and has the same code, but for products of packed weights and the screen of the
    lookup, which here is that of avx2."""
    other = {"avx2_vnni": "avx2", "avx512": "avx512_vnni", "avx512_amx": "avx512_vnni"}.get(isa)
    return other if other and supported(other) else None


@each_team
@each_isa
def test_numpy_door(sanitized: Built, isa: str, threads: int) -> None:
    """No error is found, and no result holds the NaN that fresh memory is filled with."""
    need(isa)
    command = [sys.executable, str(DRIVE), "--core", str(sanitized.door), "--threads", str(threads), "--fresh"]
    if threads > 1 or isa == "scalar":
        command += ["--spread", "few"]
    if same_as(isa):
        command += ["--only", "packed"]
    out = run(
        command,
        LD_PRELOAD=f"{library_path('libasan.so')} {library_path('libstdc++.so')}",
        PYTHONMALLOC="malloc",
        FASTSEQ_ISA=isa,
        FASTSEQ_POISON="1",
        OPENBLAS_NUM_THREADS="1",
        **OPTIONS,
    )
    assert out.splitlines()[0] == f"isa {isa}"
    assert len(out.splitlines()) > 1000 + 4000 * (same_as(isa) is None)


@each_team
@each_isa
def test_layer(sanitized: Built, isa: str, threads: int) -> None:
    """The same for whole layers, straight on the core."""
    need(isa)
    if same_as(isa):
        pytest.skip(f"{isa}: {same_as(isa)} runs, the same code")
    name, calls = run([str(sanitized.layer), str(threads)], FASTSEQ_ISA=isa, **OPTIONS).split()
    assert name == isa
    assert int(calls) > 300

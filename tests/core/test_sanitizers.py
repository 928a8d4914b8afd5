"""The core and the numpy door under the address and undefined-behaviour sanitizers, in a build of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
DRIVE = Path(__file__).with_name("drive.py")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-UNDEBUG"]
SETS = {
    "isa_avx2": ["-mavx2", "-mfma"],
    "isa_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx2"],
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


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``_core`` with every instruction set, built with the sanitizers."""
    import pybind11

    folder = tmp_path_factory.mktemp("sanitized")
    includes = [f"-I{path}" for path in (CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]
    have = ["-DFASTSEQ_HAVE_AVX2", "-DFASTSEQ_HAVE_AVX512"]
    sources = [path for path in sorted(CSRC.glob("core/*.cpp")) if path.stem not in ("isa_neon",)]
    sources += sorted(CSRC.glob("python/*.cpp"))

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.parent.name}_{source.stem}.o")
        flags = [*FLAGS, *SANITIZERS, *SETS.get(source.stem, []), *have, *includes]
        run([str(COMPILER), *flags, "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    run([str(COMPILER), "-shared", *SANITIZERS, *objects, "-lpthread", "-o", str(library)])
    return library


def library_path(name: str) -> str:
    return run([str(COMPILER), f"-print-file-name={name}"]).strip()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_core(sanitized: Path, isa: str, threads: int) -> None:
    """No error is found, and no result holds the NaN that fresh memory is filled with."""
    flags = Path("/proc/cpuinfo").read_text()
    if isa != "scalar" and f" {isa}" not in flags:
        pytest.skip(f"{isa}: not supported by this machine")
    command = [sys.executable, str(DRIVE), "--core", str(sanitized), "--threads", str(threads)]
    if threads > 1 or isa == "scalar":
        command += ["--spread", "few"]
    out = run(
        command,
        LD_PRELOAD=f"{library_path('libasan.so')} {library_path('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255",
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONMALLOC="malloc",
        FASTSEQ_ISA=isa,
        OPENBLAS_NUM_THREADS="1",
    )
    assert out.splitlines()[0] == f"isa {isa}"
    assert len(out.splitlines()) > 1000

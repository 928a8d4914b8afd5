"""What pyproject.toml cannot say: one static library per instruction set, and the doors that link them all.

Environment at build time:
    FASTSEQ_BUILD=core|torch|cuda  build exactly up to this, or fail; unset: build what can be built here.
    FASTSEQ_BUILD_TEST_ISA=1       also the AVX-512 body compiled with AVX2 flags, for tests; refused in a wheel.
    FASTSEQ_BUILD_JOBS=N           compilers running at a time; default: the number of cores.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

try:
    import pybind11
    from setuptools import Extension, setup
    from setuptools.command.build_clib import build_clib
    from setuptools.command.build_ext import build_ext
    from setuptools.modified import newer_group
except ImportError as error:
    sys.exit(f"fastseq: {error}. Without build isolation, first run: pip install 'setuptools>=77' pybind11")

TORCH_MINIMUM = (2, 10)  # the stable ABI that csrc/torch is written for
C_LIBRARY = "fastseq.libfastseq"  # the runtime for C; not a Python module
FILES = sorted(glob.glob("csrc/**/*.*", recursive=True))

FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-pthread", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra"]
CORE_FLAGS = [*FLAGS, "-ffp-contract=off"]  # fused where fma is written, nowhere else: equal bits on every set
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx2"]


def fail(message: str) -> NoReturn:
    sys.exit(f"fastseq: {message}")


def sources(folder: str) -> list[str]:
    return [f for f in FILES if os.path.dirname(f) == f"csrc/{folder}" and f.endswith(".cpp")]


def instruction_sets() -> dict[str, tuple[str, list[str]]]:
    """Name -> (source, its flags beyond the baseline)."""
    # -Wno-psabi: a Vec wider than the set's registers is passed in memory, but only inside its own file
    found: dict[str, tuple[str, list[str]]] = {"scalar": ("csrc/core/isa_scalar.cpp", ["-Wno-psabi"])}
    if not sysconfig.get_platform().endswith(("x86_64", "amd64")):
        return found
    found |= {"avx2": ("csrc/core/isa_avx2.cpp", AVX2), "avx512": ("csrc/core/isa_avx512.cpp", AVX512)}
    found["avx2_vnni"] = ("csrc/core/isa_avx2_vnni.cpp", [*AVX2, "-mavxvnni"])
    vnni = [*AVX512, "-mavx512vnni"]
    found["avx512_vnni"] = ("csrc/core/isa_avx512_vnni.cpp", vnni)
    if sys.platform == "linux":
        found["avx512_amx"] = ("csrc/core/isa_avx512_amx.cpp", [*vnni, "-mamx-tile", "-mamx-int8"])
    if os.environ.get("FASTSEQ_BUILD_TEST_ISA", "0") not in ("", "0"):
        if "bdist_wheel" in sys.argv:
            fail("FASTSEQ_BUILD_TEST_ISA is for tests, a wheel must not contain avx512_on_avx2")
        flags = [*AVX2, "-Wno-psabi", "-DFASTSEQ_AVX512_ON_AVX2"]
        found["avx512_on_avx2"] = ("csrc/core/isa_avx512.cpp", flags)
    return found


def find_torch() -> tuple[str, str] | str:
    """Folder and version of the torch in this environment, or why it does not serve. Does not import it."""
    if sys.platform != "linux":
        return "the torch door is built on Linux only"
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch is not importable here (in an isolated build it never is; use pip install --no-build-isolation)"
    root = os.path.dirname(spec.origin)
    with open(os.path.join(root, "version.py"), encoding="utf-8") as file:
        version = re.search(r"__version__ = '([^']+)'", file.read())
    if version is None:
        return f"cannot tell the version of the torch in {root}"
    if tuple(map(int, version[1].split(".")[:2])) < TORCH_MINIMUM:
        return f"torch {version[1]} is older than {TORCH_MINIMUM[0]}.{TORCH_MINIMUM[1]}"
    return root, version[1]


def decide() -> tuple[tuple[str, str] | None, dict[str, str]]:
    """The torch to build against, or None, and what is not built with the reason."""
    wanted = os.environ.get("FASTSEQ_BUILD", "")
    if wanted not in ("", "core", "torch", "cuda"):
        fail(f"FASTSEQ_BUILD must be core, torch or cuda, got {wanted!r}")
    torch = "FASTSEQ_BUILD=core" if wanted == "core" else find_torch()
    missing = {"cuda": "this version has no CUDA kernels"}
    if isinstance(torch, str):
        missing["torch"] = torch
    for door in {"torch": ["torch"], "cuda": ["torch", "cuda"]}.get(wanted, []):
        if door in missing:
            fail(f"FASTSEQ_BUILD={wanted}, but {door} cannot be built: {missing[door]}")
    return (None if isinstance(torch, str) else torch), missing


def core_libraries(sets: dict[str, tuple[str, list[str]]]) -> list[tuple[str, dict[str, Any]]]:
    """In link order: what calls before what is called."""

    def library(name: str, sources: list[str], *flags: str) -> tuple[str, dict[str, Any]]:
        return name, {"sources": sources, "include_dirs": ["csrc"], "cflags": [*CORE_FLAGS, *flags]}

    plain = [s for s in sources("core") if not os.path.basename(s).startswith("isa")]
    choice = library("fastseq_isa", ["csrc/core/isa.cpp"], *(f"-DFASTSEQ_HAVE_{name.upper()}" for name in sets))
    return [
        library("fastseq_core", plain),
        choice,
        *(library(f"fastseq_{name}", [source], *flags) for name, (source, flags) in sets.items()),
    ]


def doors(torch: tuple[str, str] | None) -> list[Extension]:
    def door(name: str, files: list[str], *flags: str, **rest: Any) -> Extension:
        options = {"include_dirs": ["csrc"], "depends": FILES, "language": "c++", **rest}
        return Extension(name, files, extra_compile_args=[*FLAGS, *flags], **options)

    c_api = "csrc/deploy/c_api.cpp"
    runtime = [s for s in sources("deploy") if s != c_api]
    include = ["-isystem", pybind11.get_include()]
    found = [door("fastseq._core", [*sources("python"), *runtime], *include, extra_link_args=["-pthread"])]
    if sys.platform == "linux":
        link = ["-pthread", "-Wl,-soname,libfastseq.so"]
        found.append(door(C_LIBRARY, [*runtime, c_api], "-Ifastseq/deploy/include", extra_link_args=link))
    if torch:
        root, minimum = torch[0], f"0x{TORCH_MINIMUM[0]:02x}{TORCH_MINIMUM[1]:02x}000000000000"
        torch_door = door(
            "fastseq._torch",
            sources("torch"),
            # links libgomp.so.1 by that name: in the process it is the one that torch has already loaded
            "-fopenmp",
            f"-DTORCH_TARGET_VERSION={minimum}",
            "-isystem",
            os.path.join(root, "include"),
            extra_link_args=["-fopenmp", "-pthread"],
            libraries=["torch_cpu"],
            library_dirs=[os.path.join(root, "lib")],
            depends=[*FILES, os.path.join(root, "version.py")],
            py_limited_api=True,
        )
        found.append(torch_door)
    return found


def kept(name: str, *identity: Any) -> str:
    """The folder where ``name`` is kept from build to build; other flags or versions mean another folder."""
    environment = [os.environ.get(v) for v in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")]
    text = repr((identity, environment, sys.version, pybind11.__version__))
    return os.path.join("build", f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}")


sets = instruction_sets()
torch, missing = decide()
libraries, extensions = core_libraries(sets), doors(torch)
decision = {
    "built": ["core", "torch"] if torch else ["core"],
    "missing": missing,
    "torch": torch and torch[1],
    "flags": CORE_FLAGS,
    "instruction_sets": {name: flags for name, (_, flags) in sets.items()},
}
jobs = ThreadPoolExecutor(int(os.environ.get("FASTSEQ_BUILD_JOBS") or os.cpu_count() or 1))


def compile_stale(compiler: Any) -> None:
    """Make ``compiler.compile`` keep objects from build to build, leave out what is up to date and run in parallel."""
    compile_all = compiler.compile

    def compile(sources: list[str], depends: list[str] = FILES, **options: Any) -> list[str]:
        options["output_dir"] = kept("objects", {**options, "output_dir": None})
        objects: list[str] = compiler.object_filenames(sources, output_dir=options["output_dir"])
        headers = [f for f in depends if not f.endswith(".cpp")]
        stale = [s for s, o in zip(sources, objects, strict=True) if newer_group([s, *headers], o)]
        for done in [jobs.submit(compile_all, [s], **options) for s in stale]:
            done.result()
        return objects

    compiler.compile = compile


class BuildCore(build_clib):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_clib = kept("libraries", libraries)

    def build_libraries(self, libraries: list[tuple[str, dict[str, Any]]]) -> None:
        built = f"core ({', '.join(sets)})" + (f", torch door for torch {torch[1]}" if torch else "")
        not_built = "; ".join(f"no {name}: {why}" for name, why in missing.items())
        print(f"fastseq: building {built}; {not_built}", flush=True)
        compile_stale(self.compiler)

        def build(name: str, sources: list[str], include_dirs: list[str], cflags: list[str]) -> None:
            objects = self.compiler.compile(sources, include_dirs=include_dirs, extra_postargs=cflags)
            archive = self.compiler.library_filename(name, output_dir=self.build_clib)
            if os.path.exists(archive):
                os.remove(archive)  # ar would keep the members of sources that are gone
            self.compiler.create_static_lib(objects, name, output_dir=self.build_clib)

        with ThreadPoolExecutor(len(libraries)) as pool:
            list(pool.map(lambda library: build(library[0], **library[1]), libraries))


class BuildDoors(build_ext):
    def get_ext_filename(self, name: str) -> str:
        folder, _, last = name.rpartition(".")  # asked for with and without the package
        if last == C_LIBRARY.split(".")[-1]:
            return os.path.join(folder, f"{last}.so")
        return str(super().get_ext_filename(name))

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or len(self.extensions)  # jobs bounds the number of compilers

    def build_extensions(self) -> None:
        compile_stale(self.compiler)
        super().build_extensions()

    def run(self) -> None:
        super().run()
        ask = [self.compiler.compiler_so_cxx[0], "--version"]
        version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        text = json.dumps({**decision, "compiler": version}, indent=1)
        for root in [self.build_lib, *(["."] if self.inplace else [])]:
            with open(os.path.join(root, "fastseq", "_build.json"), "w", encoding="utf-8") as file:
                file.write(text + "\n")
            if not torch:  # left by an earlier build in the same folder
                for old in glob.glob(os.path.join(root, "fastseq", "_torch*.so")):
                    os.remove(old)


setup(libraries=libraries, ext_modules=extensions, cmdclass={"build_clib": BuildCore, "build_ext": BuildDoors})

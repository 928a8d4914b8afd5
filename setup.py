"""What pyproject.toml cannot say: one static library per instruction set, and the doors that link them all.

Environment at build time:
    FASTSEQ_BUILD=core|torch|cuda  build exactly up to this, or fail; unset: build what can be built and used here.
    FASTSEQ_CUDA_ARCHS=80;90a      the GPUs to compile csrc/cuda for; default: 80;86;89;90a;100;120. Needs nvcc, of
                                   CUDA_HOME, CUDA_PATH or PATH. The newest without a letter stands for later ones too.
    FASTSEQ_BUILD_TEST_ISA=1       also the AVX-512 body compiled with AVX2 flags, for tests; refused in a wheel.
    FASTSEQ_OPERATORS=NAME         torch's namespace for the operators, in a build that shares a process with another.
    FASTSEQ_BUILD_JOBS=N           compilers running at a time; default: the number of cores.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

try:
    import pybind11
    from setuptools import Extension, setup
    from setuptools.command.build_clib import build_clib
    from setuptools.command.build_ext import build_ext
    from setuptools.modified import newer_group
except ImportError as error:
    sys.exit(f"fastseq: {error}. Without build isolation, first run: pip install 'setuptools>=77' pybind11")

TORCH_MINIMUM = (2, 10)  # the stable ABI that csrc/torch and csrc/torch_cuda are written for
NVCC_MINIMUM = (12, 0)  # the first with C++20
CUDA_ARCHS = "80;86;89;90a;100;120"
C_LIBRARY = "fastseq.libfastseq"  # the runtime for C; not a Python module
C_API = "csrc/deploy/c_api.cpp"
CUDA_LIBRARY = "fastseq._cuda"
OPERATORS = os.environ.get("FASTSEQ_OPERATORS") or "fastseq"
FILES = sorted(glob.glob("csrc/**/*.*", recursive=True))

SEES = {  # folder -> those whose headers its files may include; tests/test_architecture.py holds them to it
    "core": {"core"},
    "cuda": {"core", "cuda"},
    "deploy": {"core", "deploy"},
    "python": {"core", "deploy", "door", "python"},
    "torch": {"core", "door", "torch"},
    "torch_cuda": {"core", "cuda", "door", "torch", "torch_cuda"},
}
JOINED = {"deploy", "python", "torch"}  # each compiled as one file: the headers cost more than what includes them

FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-pthread", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra"]
CORE_FLAGS = [*FLAGS, "-ffp-contract=off"]  # fused where fma is written, nowhere else: equal bits on every set
AVX2 = ["-mavx2", "-mfma"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-Icsrc", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx2"]


def fail(message: str) -> NoReturn:
    sys.exit(f"fastseq: {message}")


def sources(folder: str) -> list[str]:
    return [f for f in FILES if os.path.dirname(f) == f"csrc/{folder}" and f.endswith(".cpp")]


def instruction_sets() -> dict[str, tuple[str, list[str]]]:
    """Name -> (source, its flags beyond the baseline)."""
    # -Wno-psabi: a Vec wider than the set's registers is passed in memory, but only inside its own file
    found: dict[str, tuple[str, list[str]]] = {"scalar": ("csrc/core/isa_scalar.cpp", ["-Wno-psabi"])}
    platform = sysconfig.get_platform()
    if platform.endswith(("aarch64", "arm64")):
        return found | {"neon": ("csrc/core/isa_neon.cpp", [])}
    if not platform.endswith(("x86_64", "amd64")):
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
        # vectors in two halves take the optimiser longest of all, for what is tested and never timed
        flags = [*AVX2, "-Wno-psabi", "-DFASTSEQ_AVX512_ON_AVX2", "-O1"]
        found["avx512_on_avx2"] = ("csrc/core/isa_avx512.cpp", flags)
    return found


class Torch(NamedTuple):
    root: str
    version: str
    cuda: str | None  # what it was built with


def find_torch() -> Torch | str:
    """The torch in this environment, or why it does not serve. Does not import it."""
    if sys.platform != "linux":
        return "the torch door is built on Linux only"
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch is not importable here (in an isolated build it never is; use pip install --no-build-isolation)"
    root = os.path.dirname(spec.origin)
    with open(os.path.join(root, "version.py"), encoding="utf-8") as file:
        text = file.read()
    version, cuda = re.search(r"__version__ = '([^']+)'", text), re.search(r"^cuda\b.*= '([^']+)'", text, re.M)
    if version is None:
        return f"cannot tell the version of the torch in {root}"
    if tuple(map(int, version[1].split(".")[:2])) < TORCH_MINIMUM:
        return f"torch {version[1]} is older than {TORCH_MINIMUM[0]}.{TORCH_MINIMUM[1]}"
    return Torch(root, version[1], cuda and cuda[1])


class Cuda(NamedTuple):
    nvcc: str
    version: str
    libraries: str  # the folder of libcudart_static.a
    targets: list[str]  # as nvcc names them: sm_80, ..., compute_120


def cuda_archs() -> list[str]:
    """What FASTSEQ_CUDA_ARCHS asks for, ascending."""
    given = os.environ.get("FASTSEQ_CUDA_ARCHS") or CUDA_ARCHS
    found = [arch for arch in re.split(r"[;,\s]+", given) if arch]
    for arch in found:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            fail(f"FASTSEQ_CUDA_ARCHS must list GPUs from 80 on, as {CUDA_ARCHS}, got {arch!r} in {given!r}")
    return sorted(set(found), key=lambda arch: (int(arch.rstrip("af")), arch))


def find_cuda(torch: Torch | str, wanted: str) -> Cuda | str:
    """The compiler of csrc/cuda and its targets, or why it is not compiled."""
    archs = cuda_archs()
    if wanted in ("core", "torch"):
        return f"FASTSEQ_BUILD={wanted}"
    if isinstance(torch, str):
        return "it needs torch"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if nvcc is None:
        return "nvcc is not on PATH and CUDA_HOME is not set"
    if not os.access(nvcc, os.X_OK):
        return f"{nvcc} is not there, where CUDA_HOME or CUDA_PATH says"
    if torch.cuda is None and wanted != "cuda":
        return f"torch {torch.version} has no CUDA (FASTSEQ_BUILD=cuda builds it all the same)"

    def ask(*question: str) -> str:
        run = subprocess.run([nvcc, *question], capture_output=True, text=True, check=True)
        return run.stdout + run.stderr

    release = re.search(r"release (\d+)\.(\d+), V(\S+)", ask("--version"))
    if release is None or (int(release[1]), int(release[2])) < NVCC_MINIMUM:
        return f"{nvcc} is older than {NVCC_MINIMUM[0]}.{NVCC_MINIMUM[1]}"
    folders = re.findall(r'"-L([^"]+)"', ask("--dryrun", "-c", "none.cu"))
    folder = next((f for f in folders if os.path.exists(os.path.join(f, "libcudart_static.a"))), None)
    if folder is None:
        return f"{nvcc} has no libcudart_static.a beside it"
    known = set(re.findall(r"sm_(\d+)", ask("--list-gpu-code")))
    if unknown := [arch for arch in archs if arch.rstrip("af") not in known]:
        if os.environ.get("FASTSEQ_CUDA_ARCHS"):
            fail(f"FASTSEQ_CUDA_ARCHS: nvcc {release[3]} does not know {', '.join(unknown)}")
        archs = [arch for arch in archs if arch not in unknown]
    plain = [arch for arch in archs if arch.isdigit()]
    return Cuda(nvcc, release[3], folder, [f"sm_{a}" for a in archs] + [f"compute_{a}" for a in plain[-1:]])


def decide() -> tuple[Torch | None, Cuda | None, dict[str, str]]:
    """What to build against, or None, and what is not built with the reason."""
    wanted = os.environ.get("FASTSEQ_BUILD", "")
    if wanted not in ("", "core", "torch", "cuda"):
        fail(f"FASTSEQ_BUILD must be core, torch or cuda, got {wanted!r}")
    if not OPERATORS.isidentifier():
        fail(f"FASTSEQ_OPERATORS must be a name, got {OPERATORS!r}")
    torch = "FASTSEQ_BUILD=core" if wanted == "core" else find_torch()
    cuda = find_cuda(torch, wanted)
    missing = {name: why for name, why in {"torch": torch, "cuda": cuda}.items() if isinstance(why, str)}
    for door in {"torch": ["torch"], "cuda": ["torch", "cuda"]}.get(wanted, []):
        if door in missing:
            fail(f"FASTSEQ_BUILD={wanted}, but {door} cannot be built: {missing[door]}")
    return (None if isinstance(torch, str) else torch), (None if isinstance(cuda, str) else cuda), missing


def static_libraries(sets: dict[str, tuple[str, list[str]]]) -> list[tuple[str, dict[str, Any]]]:
    """In link order: what calls before what is called."""

    def library(name: str, sources: list[str], *flags: str) -> tuple[str, dict[str, Any]]:
        return name, {"sources": sources, "include_dirs": ["csrc"], "cflags": [*CORE_FLAGS, *flags]}

    runtime = [s for s in sources("deploy") if s != C_API]
    plain = [s for s in sources("core") if not os.path.basename(s).startswith("isa")]
    choice = library("fastseq_isa", ["csrc/core/isa.cpp"], *(f"-DFASTSEQ_HAVE_{name.upper()}" for name in sets))
    return [
        library("fastseq_deploy", runtime),
        library("fastseq_core", plain),
        choice,
        *(library(f"fastseq_{name}", [source], *flags) for name, (source, flags) in sets.items()),
    ]


def doors(torch: Torch | None, cuda: Cuda | None) -> list[Extension]:
    def door(name: str, files: list[str], *flags: str, **rest: Any) -> Extension:
        options = {"include_dirs": ["csrc"], "depends": FILES, "language": "c++", **rest}
        return Extension(name, files, extra_compile_args=[*FLAGS, *flags], **options)

    include = ["-isystem", pybind11.get_include()]
    found = [door("fastseq._core", sources("python"), *include, extra_link_args=["-pthread"])]
    if sys.platform == "linux":
        link = ["-pthread", "-Wl,-soname,libfastseq.so"]
        found.append(door(C_LIBRARY, [C_API], "-Ifastseq/deploy/include", extra_link_args=link))
    if torch:
        minimum = f"-DTORCH_TARGET_VERSION=0x{TORCH_MINIMUM[0]:02x}{TORCH_MINIMUM[1]:02x}000000000000"
        include = [minimum, f"-DFASTSEQ_OPERATORS={OPERATORS}", "-isystem", os.path.join(torch.root, "include")]
        stable: dict[str, Any] = {
            "library_dirs": [os.path.join(torch.root, "lib")],
            "depends": [*FILES, os.path.join(torch.root, "version.py")],
            "py_limited_api": True,
        }
        # links libgomp.so.1 by that name: in the process it is the one that torch has already loaded
        link = ["-fopenmp", "-pthread"]
        files = sources("torch")
        found.append(
            door("fastseq._torch", files, "-fopenmp", *include, extra_link_args=link, libraries=["torch_cpu"], **stable)
        )
        if cuda:
            # of libtorch.so nothing is needed, but libtorch_cuda.so comes with it, where there is one
            link = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lrt", "-ldl", "-pthread"]
            link.append("-Wl,--exclude-libs,libcudart_static.a")
            objects = [*kernel_objects(cuda).values(), os.path.join(cuda.libraries, "libcudart_static.a")]
            files = sources("torch_cuda")
            found.append(door(CUDA_LIBRARY, files, *include, extra_link_args=link, extra_objects=objects, **stable))
    return found


def kept(name: str, *identity: Any) -> str:
    """The folder where ``name`` is kept from build to build; other flags or versions mean another folder."""
    environment = [os.environ.get(v) for v in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")]
    text = repr((identity, environment, sys.version, pybind11.__version__))
    return os.path.join("build", f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}")


def headers(source: str, depends: list[str] = FILES) -> list[str]:
    """What ``source`` depends on beside itself."""
    seen = SEES[os.path.basename(os.path.dirname(source))]
    other = (f for f in depends if not f.endswith((".cpp", ".cu")))
    return [f for f in other if not f.startswith("csrc/") or os.path.basename(os.path.dirname(f)) in seen]


def joined(sources: list[str]) -> dict[str, list[str]]:
    """What the compiler is given -> its sources: for those of a folder in JOINED one file that includes them all."""
    found: dict[str, list[str]] = {}
    for source in sources:
        folder = os.path.basename(os.path.dirname(source))
        together = folder in JOINED and len(sources) > 1
        found.setdefault(f"build/joined/{folder}.cpp" if together else source, []).append(source)
    for unit in (Path(unit) for unit in found if unit not in sources):
        text = "".join(f'#include "{os.path.relpath(part, "csrc")}"\n' for part in found[str(unit)])
        if not unit.exists() or unit.read_text() != text:  # the same list again is no newer file
            unit.parent.mkdir(parents=True, exist_ok=True)
            unit.write_text(text)
    return found


def kernel_objects(cuda: Cuda) -> dict[str, str]:
    """The sources of csrc/cuda and their objects, which other targets have elsewhere."""
    flags = [os.environ.get(v) for v in ("NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    folder = kept("objects", NVCC_FLAGS, cuda, flags)
    return {s: os.path.join(folder, f"{os.path.splitext(s)[0]}.o") for s in FILES if s.endswith(".cu")}


def compile_kernels(cuda: Cuda) -> None:
    """Run nvcc for what is not up to date."""
    stale = [(s, o) for s, o in kernel_objects(cuda).items() if newer_group([s, *headers(s)], o)]
    numbers = [target.removeprefix("sm_") for target in cuda.targets if target.startswith("sm_")]
    codes = {n: [target for target in cuda.targets if target.rpartition("_")[2] == n] for n in numbers}
    command = [cuda.nvcc, *NVCC_FLAGS, f"--threads={max(1, JOBS // max(1, len(stale)))}"]
    command += [f"-gencode=arch=compute_{n},code=[{','.join(names)}]" for n, names in codes.items()]

    def compile(source: str, output: str) -> None:
        os.makedirs(os.path.dirname(output), exist_ok=True)
        print(" ".join(call := [*command, "-c", source, "-o", output]), flush=True)
        if subprocess.run(call).returncode:
            fail(f"nvcc could not compile {source}")

    for done in [jobs.submit(compile, *pair) for pair in stale]:
        done.result()


def digest(*folders: str) -> str:
    """Of all files in these folders: what a result row of their kernels is valid for."""
    found = hashlib.sha256()
    for name in (f for f in FILES if os.path.dirname(f) in folders):
        with open(name, "rb") as file:
            found.update(name.encode() + b"\0" + file.read() + b"\0")
    return found.hexdigest()[:16]


sets = instruction_sets()
torch, cuda, missing = decide()
libraries, extensions = static_libraries(sets), doors(torch, cuda)
decision = {
    "built": [name for name in ("core", "torch", "cuda") if name not in missing],
    "missing": missing,
    "torch": torch and torch.version,
    "cuda": cuda and {"targets": cuda.targets, "nvcc": cuda.version, "source": digest("csrc/cuda", "csrc/torch_cuda")},
    "flags": CORE_FLAGS,
    "instruction_sets": {name: flags for name, (_, flags) in sets.items()},
    "operators": OPERATORS,
}
JOBS = int(os.environ.get("FASTSEQ_BUILD_JOBS") or os.cpu_count() or 1)
jobs = ThreadPoolExecutor(JOBS)


def compile_stale(compiler: Any) -> None:
    """Make ``compiler.compile`` keep objects from build to build, leave out what is up to date and run in parallel."""
    compile_all = compiler.compile

    def compile(sources: list[str], depends: list[str] = FILES, **options: Any) -> list[str]:
        options["output_dir"] = kept("objects", {**options, "output_dir": None})
        units = joined(sources)
        objects: list[str] = compiler.object_filenames(list(units), output_dir=options["output_dir"])
        stale = [
            unit
            for (unit, parts), found in zip(units.items(), objects, strict=True)
            if newer_group([unit, *parts, *headers(parts[0], depends)], found)
        ]
        for done in [jobs.submit(compile_all, [s], **options) for s in stale]:
            done.result()
        return objects

    compiler.compile = compile


class BuildCore(build_clib):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_clib = kept("libraries", libraries)

    def build_libraries(self, libraries: list[tuple[str, dict[str, Any]]]) -> None:
        built = f"core ({', '.join(sets)})" + (f", torch door for torch {torch.version}" if torch else "")
        built += f", cuda {cuda.version} ({', '.join(cuda.targets)})" if cuda else ""
        print(
            "; ".join([f"fastseq: building {built}", *(f"no {name}: {why}" for name, why in missing.items())]),
            flush=True,
        )
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

    def build_extension(self, ext: Extension) -> None:
        if cuda and ext.name == CUDA_LIBRARY:
            compile_kernels(cuda)
            if os.path.exists(old := self.get_ext_fullpath(ext.name)):  # other targets are no newer files
                os.remove(old)
        super().build_extension(ext)

    def run(self) -> None:
        record = Path(self.build_lib, "fastseq", "_build.json")
        before = json.loads(record.read_text()) if record.exists() else {}
        # what lies there was linked of other parts, which are no newer files
        self.force = self.force or any(before.get(name) != value for name, value in decision.items())
        super().run()
        ask = [self.compiler.compiler_so_cxx[0], "--version"]
        version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        text = json.dumps({**decision, "compiler": version}, indent=1)
        for root in [self.build_lib, *(["."] if self.inplace else [])]:
            with open(os.path.join(root, "fastseq", "_build.json"), "w", encoding="utf-8") as file:
                file.write(text + "\n")
            for name in missing:  # left by an earlier build in the same folder
                for old in glob.glob(os.path.join(root, "fastseq", f"_{name}*.so")):
                    os.remove(old)


setup(libraries=libraries, ext_modules=extensions, cmdclass={"build_clib": BuildCore, "build_ext": BuildDoors})

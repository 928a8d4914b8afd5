"""Imports and includes point down: the order is the one in README.md, Developing."""

from __future__ import annotations

import ast
import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# layer (a module or package) -> the other layers that it may import
LAYERS = {
    "fastseq": {
        "fastseq.calibration",
        "fastseq.compression",
        "fastseq.deploy",
        "fastseq.convert",
        "fastseq.exporting",
        "fastseq.functional",
        "fastseq.nn",
        "fastseq.ops",
        "fastseq.recipes",
        "fastseq.reference",
        "fastseq.replacement",
        "fastseq._config",
        "fastseq._explain",
    },
    "fastseq_kernels": set(),
    "fastseq.reference": set(),
    "fastseq.ops": {"fastseq.reference", "fastseq_kernels"},
    "fastseq._check": set(),
    "fastseq.functional": {"fastseq._check", "fastseq.ops", "fastseq.reference"},
    "fastseq.nn": {"fastseq._check", "fastseq.functional"},
    "fastseq.calibration": {"fastseq._check", "fastseq.functional"},
    "fastseq.recipes": {"fastseq._check", "fastseq.functional", "fastseq.nn"},
    "fastseq.replacement": {"fastseq._check", "fastseq.nn"},
    "fastseq.compression": {"fastseq._check", "fastseq.nn", "fastseq.reference"},
    "fastseq._core": set(),
    "fastseq.convert": {"fastseq._check"},
    "fastseq.exporting": {"fastseq._check", "fastseq.calibration", "fastseq.nn"},
    "fastseq.deploy": {"fastseq._check", "fastseq._core"},
    "fastseq._explain": {"fastseq.ops"},
    "fastseq._config": {"fastseq", "fastseq._core", "fastseq.ops"},
    "fastseq._doctor": {"fastseq", "fastseq._config", "fastseq._core", "fastseq.nn", "fastseq.ops"},
    "fastseq.demo": {
        "fastseq",
        "fastseq.calibration",
        "fastseq.deploy",
        "fastseq.functional",
        "fastseq.nn",
        "fastseq.recipes",
    },
    "fastseq.conversion_official": {"fastseq", "fastseq._check", "fastseq.convert", "fastseq.nn"},
    "fastseq.conversion": {"fastseq._check", "fastseq.conversion_official", "fastseq.convert", "fastseq.deploy"},
    "fastseq.cli": {"fastseq", "fastseq._doctor", "fastseq.conversion", "fastseq.demo", "fastseq.deploy"},
}
NO_TORCH = (
    "fastseq",
    "fastseq._check",
    "fastseq._config",
    "fastseq._doctor",
    "fastseq.cli",
    "fastseq.conversion",
    "fastseq.conversion_official",
    "fastseq.convert",
    "fastseq.deploy",
)  # import without it

SYSTEM = r"<(sys/)?\w+(\.h)?>"
INCLUDES = {  # the first pattern that fits a file decides
    r"core/(isa_\w+\.cpp|simd_\w+\.h|\w+\.inl\.h)": r'<(math|stdint|immintrin|arm_neon)\.h>|"core/.*"',
    r"core/isa\.cpp": r'<\w+>|<(cpuid|unistd|sys/syscall)\.h>|"core/.*"',  # asks what there is
    r"core/.*": r'<\w+>|<immintrin\.h>|"core/.*"',
    r"deploy/c_api\.cpp": r'<\w+>|"(core|deploy)/.*"|"fastseq\.h"',
    r"deploy/.*": r'<\w+>|<unistd\.h>|"(core|deploy)/.*"',
    r"cuda/.*": r'<\w+>|<(cuda\w*|cooperative_groups|mma)\.h>|"(core|cuda)/.*"',
    r"door/.*": rf'{SYSTEM}|"(core|door)/.*"',
    r"torch/.*": rf'{SYSTEM}|<torch/(csrc/stable|headeronly)/.*>|"(core|door|torch)/.*"',
    r"torch_cuda/.*": rf'{SYSTEM}|<torch/(csrc/stable|headeronly)/.*>|"(core|cuda|door|torch|torch_cuda)/.*"',
    r"python/.*": rf'{SYSTEM}|<pybind11/.*>|"(core|deploy|door|python)/.*"',
}


def layer(module: str) -> str:
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len, default="")


def statements(node: ast.AST, now: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports anywhere below; with ``now`` only those that run when the file is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not (now and isinstance(child, (ast.FunctionDef, ast.If))):
            yield from statements(child, now)


@functools.cache  # all but one of the files that a test reads are those of the test before
def statements_of(text: str, now: bool = False) -> tuple[ast.Import | ast.ImportFrom, ...]:
    return tuple(statements(ast.parse(text), now))


def imported(text: str, modules: set[str], now: bool = False) -> Iterator[str]:
    """The modules that a file imports; with ``now`` only those that importing it imports."""
    for node in statements_of(text, now):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names if names <= modules else {str(node.module)}


def wrong_imports(root: Path) -> Iterator[str]:
    files = {f: f.relative_to(base) for base in (root, root / "kernels") for f in base.glob("fastseq*/**/*.py")}
    modules = {f: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for f, path in files.items()}
    for file, module in modules.items():
        text, own = file.read_text(), layer(module)
        if own == "fastseq" and module != "fastseq":
            yield f"{module} belongs to no layer"
        for name in set(imported(text, set(modules.values()))):
            if name.split(".")[0] in ("tests", "benchmarks") or layer(name) not in LAYERS[own] | {own, ""}:
                yield f"{module} imports {name}"
        if own in NO_TORCH and {"torch", "triton"} & {n.split(".")[0] for n in imported(text, set(), now=True)}:
            yield f"{module} imports torch"


def wrong_includes(root: Path) -> Iterator[str]:
    for file in root.glob("csrc/**/*.*"):
        path = str(file.relative_to(root / "csrc"))
        allowed = next((INCLUDES[pattern] for pattern in INCLUDES if re.fullmatch(pattern, path)), "nothing")
        for name in re.findall(r"^\s*#\s*include\s+(\S+)", file.read_text(), re.M):
            if not re.fullmatch(allowed, name):
                yield f"{path} includes {name}"


def test_imports_point_down() -> None:
    assert not list(wrong_imports(ROOT))


def test_includes_point_down() -> None:
    assert not list(wrong_includes(ROOT))


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("fastseq/reference/lstm.py", "from fastseq import ops", "fastseq.reference.lstm imports fastseq.ops"),
        ("fastseq/nn/lstm.py", "import fastseq.ops.lstm", "fastseq.nn.lstm imports fastseq.ops.lstm"),
        ("fastseq/_check.py", "import torch", "fastseq._check imports torch"),
        ("fastseq/extra.py", "", "fastseq.extra belongs to no layer"),
        ("kernels/fastseq_kernels/lstm.py", "import fastseq", "fastseq_kernels.lstm imports fastseq"),
        (
            "csrc/core/gemm.cpp",
            "#include <torch/csrc/stable/tensor.h>",
            "core/gemm.cpp includes <torch/csrc/stable/tensor.h>",
        ),
        ("csrc/core/lstm.inl.h", "#include <vector>", "core/lstm.inl.h includes <vector>"),
        ("csrc/core/gemm.h", "#include <omp.h>", "core/gemm.h includes <omp.h>"),
        ("csrc/cuda/lstm_persist.h", "#include <torch/all.h>", "cuda/lstm_persist.h includes <torch/all.h>"),
        (
            "csrc/cuda/lstm_persist.h",
            '#include "door/array.h"',
            'cuda/lstm_persist.h includes "door/array.h"',
        ),
        ("csrc/torch/lstm.cpp", '#include "cuda/lstm_persist.h"', 'torch/lstm.cpp includes "cuda/lstm_persist.h"'),
        (
            "csrc/torch_cuda/view.h",
            "#include <c10/cuda/CUDAStream.h>",
            "torch_cuda/view.h includes <c10/cuda/CUDAStream.h>",
        ),
        ("csrc/torch/lstm.cpp", "#include <ATen/ATen.h>", "torch/lstm.cpp includes <ATen/ATen.h>"),
    ],
)
def test_a_wrong_direction_is_named(tmp_path: Path, path: str, line: str, complaint: str) -> None:
    for folder in ("fastseq", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    file = tmp_path / path
    file.write_text((file.read_text() if file.exists() else "") + f"\n{line}\n")
    assert [*wrong_imports(tmp_path), *wrong_includes(tmp_path)] == [complaint]

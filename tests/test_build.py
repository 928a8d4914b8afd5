"""What was built, what an object file of one instruction set may hold, and what a build without torch gives."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import fastseq
from fastseq import _core
from tests import documents

ROOT = Path(__file__).parents[1]
BUILD = json.loads((ROOT / "fastseq" / "_build.json").read_text())
SETS = BUILD["instruction_sets"]
NO_TORCH = "import sys; sys.modules['torch'] = None; "


def python(code: str, *options: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in another Python; an environment variable that is None is taken away."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    kept = {name: value for name, value in merged.items() if value is not None}
    return subprocess.run([sys.executable, *options, "-c", code], env=kept, capture_output=True, text=True, timeout=300)


def symbols(isa: str, folder: Path) -> list[tuple[str, str]]:
    """Kind and name of every symbol that isa_<set>.cpp leaves at -O0."""
    source = ROOT / "csrc" / "core" / f"isa_{isa.removesuffix('_on_avx2')}.cpp"
    command = [os.environ.get("CXX") or sysconfig.get_config_var("CXX").split()[0], *BUILD["flags"], *SETS[isa]]
    command += ["-O0", f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(folder / "isa.o")]
    subprocess.run(command, check=True)
    listing = subprocess.run(["nm", folder / "isa.o"], check=True, capture_output=True, text=True).stdout
    return [(line.split()[-2], line.split()[-1]) for line in listing.splitlines()]


@pytest.mark.parametrize("isa", SETS)
def test_an_instruction_set_exports_its_table_and_nothing_else(isa: str, tmp_path: Path) -> None:
    found = symbols(isa, tmp_path)
    # -O0, because optimisation inlines what would be a weak copy, compiled for this set, of code that others share
    assert [name for kind, name in found if kind in "WwVvu"] == []
    table = f"_ZN7fastseq4core{len(isa)}{isa}5tableE"
    assert [name for kind, name in found if kind.isupper() and kind != "U"] == [table]
    assert [name for _, name in found if "GLOBAL__sub_I" in name or "static_initialization" in name] == []


@pytest.mark.parametrize("isa", _core.isas())
def test_fastseq_isa_lowers_the_choice(isa: str) -> None:
    run = python("import fastseq._core as c; print(c.isa())", FASTSEQ_ISA=isa)
    assert (run.stdout, run.stderr) == (f"{isa}\n", "")


@pytest.mark.parametrize("isa", ["sse9", "AVX2", *(set(SETS) - set(_core.isas()))])
def test_fastseq_isa_that_cannot_run_is_an_error(isa: str) -> None:
    code = "import numpy as np; from fastseq import _core; _core.gemm(np.ones((2, 2)), np.ones((2, 2)))"
    run = python(code, FASTSEQ_ISA=isa)
    assert run.returncode == 1
    assert f"gemm: FASTSEQ_ISA={isa} cannot run here; these can: {', '.join(_core.isas())}\n" in run.stderr


def test_the_best_set_runs_and_it_is_not_the_one_for_tests() -> None:
    isas = _core.isas()
    run = python("import fastseq._core as c; print(c.isa())", FASTSEQ_ISA=None)
    order = ("scalar", "neon", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_amx")
    ascending = [name for name in order if name in isas]
    assert run.stdout.strip() == ascending[-1] == _core.isas()[-1]


def test_importing_fastseq_imports_neither_torch_nor_numpy() -> None:
    run = python("import sys, fastseq, fastseq.cli; print({'torch', 'numpy', 'triton'} & set(sys.modules))")
    assert (run.stdout, run.stderr) == ("set()\n", "")


def test_the_modules_do_without_the_compiler_of_torch_until_it_is_used() -> None:
    run = python("import sys, fastseq.nn; print('torch._dynamo' in sys.modules)")
    assert (run.stdout, run.stderr) == ("False\n", "")


@pytest.mark.parametrize("module", ["fastseq._core", "fastseq._check", "fastseq.cli", "fastseq_kernels"])
def test_imports_without_torch(module: str) -> None:
    run = python(f"{NO_TORCH} import {module}", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    assert (run.returncode, run.stderr) == (0, "")


def test_attributes() -> None:
    assert {"nn", "functional", "replace", "replaced", "show_config"} <= set(dir(fastseq))
    assert fastseq.nn.LSTM.__module__.startswith("fastseq.nn")
    assert callable(fastseq.replace) and callable(fastseq.replaced)
    with pytest.raises(AttributeError, match="module 'fastseq' has no attribute 'absent'"):
        _ = fastseq.absent


def test_show_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSEQ_BACKEND", raising=False)
    config = fastseq.show_config()
    printed = capsys.readouterr().out
    assert config["build"]["doors"] == {"core": None, "torch": None, "cuda": BUILD["missing"].get("cuda")}
    assert config["instruction_set"]["runs"] == _core.isa()
    assert set(config["instruction_set"]["not"]) == set(SETS) - {_core.isa()}
    assert (config["backend"]["runs"], config["backend"]["why"]) == ("cpu", "the first that can run here")
    assert config["gpu"]["triton"] and (config["gpu"]["device"] is None) == (not torch.cuda.is_available())
    for text in (fastseq.__version__, BUILD["compiler"], "-ffp-contract=off", f" {_core.isa()}, ", " cpu, the first"):
        assert text in printed


def test_show_config_says_why_a_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_BACKEND", "reference")
    why = "FASTSEQ_BACKEND=reference"
    assert fastseq.show_config()["backend"] == {
        "runs": "reference",
        "why": why,
        "not": {"cpu": why, "cuda": why, "triton": why},
    }
    monkeypatch.setenv("FASTSEQ_BACKEND", "abacus")
    assert fastseq.show_config()["backend"]["runs"] is None


def test_show_config_says_why_an_instruction_set_runs() -> None:
    code = f"{NO_TORCH} import fastseq; print(fastseq.show_config()['instruction_set'])"
    assert "scalar, FASTSEQ_ISA=scalar" in python(code, FASTSEQ_ISA="scalar").stdout
    unknown = python(code, FASTSEQ_ISA="sse9")
    assert unknown.returncode == 0
    assert "'runs': None, 'why': 'isa: FASTSEQ_ISA=sse9 cannot run here" in unknown.stdout


def test_show_config_without_torch() -> None:
    run = python(f"{NO_TORCH} import fastseq; c = fastseq.show_config(); print(c['torch'], c['backend']['why'])")
    assert "None torch: not installed; fastseq._core works without it" in run.stdout


def examples() -> list[str]:
    """Of the README, but for those of "Without torch", which tests/deploy/test_readme.py runs one after the other."""
    before, section = (ROOT / "README.md").read_text().split("\n## Without torch\n")
    return re.findall(r"```python\n(.*?)```", before + section[section.index("\n## ") :], re.S)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, documents.Outcome]:
    """How each example ended and what it said on standard error, each in a process that has imported torch only."""
    folder = tmp_path_factory.mktemp("readme")
    ended = documents.run_forked(("README.md", 1, folder, example) for example in examples())
    return dict(zip(examples(), ended, strict=True))


@pytest.mark.parametrize("example", examples())
def test_examples_in_the_readme_run(example: str, outcomes: dict[str, documents.Outcome]) -> None:
    assert outcomes[example] == (0, "")


def namesake(folder: Path) -> None:
    info = folder / "fastseq-0.3.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastseq\nVersion: 0.3.2\n")


def test_the_other_distribution_called_fastseq_gives_a_warning(tmp_path: Path) -> None:
    quiet = python("import fastseq")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    namesake(tmp_path)
    run = python("import fastseq; import fastseq._check", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert run.returncode == 0
    assert run.stderr.count("RuntimeWarning: the distribution 'fastseq' 0.3.2 is installed") == 1
    assert "another project" in run.stderr and "pip uninstall fastseq" in run.stderr


def setup(*arguments: str, **environment: str | None) -> str:
    """What ``setup.py`` says on standard error."""
    code = f"import sys; sys.argv = ['setup.py', *{arguments}]; exec(open('setup.py').read())"
    merged = {**os.environ, "FASTSEQ_BUILD": None, "FASTSEQ_BUILD_TEST_ISA": None, **environment}
    kept = {name: value for name, value in merged.items() if value is not None}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=300)
    return run.stderr.strip()


def test_a_build_that_was_asked_for_and_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    assert setup("--version", FASTSEQ_BUILD="both") == "fastseq: FASTSEQ_BUILD must be core, torch or cuda, got 'both'"
    assert setup("--version", FASTSEQ_OPERATORS="a-b") == "fastseq: FASTSEQ_OPERATORS must be a name, got 'a-b'"
    refused = setup("bdist_wheel", FASTSEQ_BUILD_TEST_ISA="1")
    assert refused == "fastseq: FASTSEQ_BUILD_TEST_ISA is for tests, a wheel must not contain avx512_on_avx2"
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    old = setup("--version", FASTSEQ_BUILD="torch", PYTHONPATH=str(tmp_path))
    assert old == "fastseq: FASTSEQ_BUILD=torch, but torch cannot be built: torch 2.9.1+cpu is older than 2.10"


class Compiler:
    """Leaves an empty object and keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def object_filenames(self, sources: list[str], output_dir: str) -> list[str]:
        return [f"{output_dir}/{source}.o" for source in sources]

    def compile(self, sources: list[str], output_dir: str) -> None:
        self.given += sources
        for path in map(Path, self.object_filenames(sources, output_dir)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def test_what_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources of a runtime or door are compiled as one, and whatever is not older than what it depends on stays."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    files = [f"csrc/{name}" for name in ("core/gemm.h", "core/gemm.cpp", "deploy/json.h", "deploy/json.cpp")]
    files.append("csrc/deploy/file.cpp")
    for path in (tmp_path / file for file in files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSEQ_BUILD", "core")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    found = runpy.run_path("setup.py")
    sources, runtime, core = [f for f in files if f.endswith(".cpp")], "build/joined/deploy.cpp", "csrc/core/gemm.cpp"

    def compiled(*changed: str, sources: list[str] = sources) -> set[str]:
        for file in changed:
            time.sleep(0.05)  # a file's time has steps of milliseconds
            (tmp_path / file).touch()
        time.sleep(0.05)
        compiler = Compiler()
        found["compile_stale"](compiler)
        compiler.compile(sources)
        return set(compiler.given)

    assert compiled() == {core, runtime}
    assert Path(runtime).read_text() == '#include "deploy/json.cpp"\n#include "deploy/file.cpp"\n'
    assert compiled() == set()
    assert compiled("csrc/deploy/file.cpp") == compiled("csrc/deploy/json.h") == {runtime}
    assert compiled(core) == {core}
    assert compiled("csrc/core/gemm.h") == {core, runtime}
    assert compiled(sources=["csrc/deploy/json.cpp"]) == {"csrc/deploy/json.cpp"}
    assert compiled(sources=sources[::-1]) == {runtime}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, with the objects that exist already, and what they were linked to for tests."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("csrc", "fastseq", "kernels", "build"):
        if (ROOT / name).exists():
            skipped = ["arm", "hub"] if name == "build" else ["*.so"]
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", *skipped))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    return copy


@pytest.mark.parametrize("door", ["core", "torch"])
def test_wheel(door: str, source: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "FASTSEQ_BUILD": door, "FASTSEQ_BUILD_TEST_ISA": "0"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "-w", tmp_path, source], check=True, env=environment, timeout=600)
    (wheel,) = tmp_path.glob("fastseq_kernels-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    compiled = {path.name.split(".")[0]: path.read_bytes() for path in tmp_path.glob("fastseq/*.so")}
    assert set(compiled) == {"_core", "libfastseq"} | ({"_torch"} if door == "torch" else set())
    assert all(b"avx512_on_avx2" not in content and b"scalar" in content for content in compiled.values())
    assert {"py.typed", "_core.pyi"} <= {path.name for path in (tmp_path / "fastseq").iterdir()}
    assert (tmp_path / "fastseq_kernels" / "verified.json").exists()
    code = "import fastseq, fastseq_kernels as k; c = fastseq.show_config(); print(c['build']['doors']['torch'])"
    code = ("" if door == "torch" else NO_TORCH) + code + "; print(fastseq.__file__, k.__file__, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    why, *files = run.stdout.splitlines()[-3:]
    assert why == ("None" if door == "torch" else "FASTSEQ_BUILD=core")
    assert files == [str(tmp_path / package / "__init__.py") for package in ("fastseq", "fastseq_kernels")]

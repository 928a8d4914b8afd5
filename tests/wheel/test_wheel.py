"""The wheel and the source distribution of ``make wheel`` as a stranger finds them, and the layout of ``make hub``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fastseq
from tests.wheel.environment import ROOT, Environment

DIST = ROOT / "dist"
TORCH = os.environ.get("TORCH", f"torch=={torch.__version__.split('+')[0]}")
WITH_TORCH = ["ops/test_lstm_values.py", "ops/test_vq_nearest.py", "ops/test_mimo.py", "deploy/test_model.py"]
pytestmark = pytest.mark.nightly


def built(pattern: str) -> Path:
    found = list(DIST.glob(pattern))
    if len(found) != 1:
        pytest.fail(f"dist/{pattern}: {len(found)} files; run make wheel first")
    return found[0]


@pytest.fixture(scope="module")
def wheel() -> Path:
    return built(f"fastseq_kernels-{fastseq.__version__}-*.whl")


@pytest.fixture(scope="module")
def source() -> Path:
    return built(f"fastseq_kernels-{fastseq.__version__}.tar.gz")


@pytest.fixture(scope="module")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Without torch."""
    found = Environment(tmp_path_factory.mktemp("plain"), wheel)
    found.copy_tests()
    return found


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With torch, and what the tests, the ten minutes and the Hub's loader need."""
    needed = ("pytest>=8", "hypothesis>=6.100", "scikit-learn>=1.3", "kernels>=0.17")
    found = Environment(tmp_path_factory.mktemp("full"), wheel, TORCH, *needed)
    found.copy_tests()
    return found


def examples(title: str, page: str = "README.md") -> list[str]:
    """Those below a heading of the README or of another page."""
    section = (ROOT / page).read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    found: list[str] = re.findall(r"```python\n(.*?)```", section, re.S)
    return found


def test_what_is_in_the_wheel(wheel: Path) -> None:
    assert re.search(r"-manylinux_2_\d+_(x86_64|aarch64)\.", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        compiled = {name.split("/")[-1].split(".")[0]: file.read(name) for name in names if name.endswith(".so")}
    assert set(compiled) == {"_core", "_torch", "libfastseq"}
    assert not [name for name in names if ".libs/" in name or re.search(r"lib(gomp|torch|c10)", name)]
    assert all(b"avx512_on_avx2" not in content for content in compiled.values())
    assert {"fastseq/py.typed", "fastseq/_core.pyi", "fastseq/deploy/include/fastseq.h"} <= set(names)


def test_without_torch(plain: Environment) -> None:
    assert "torch: not installed" in plain.run("fastseq", "info")
    plain.run("python", "-c", *examples("Kernels alone", "docs/deployment.md"))
    results = plain.run("python", "tests/core/drive.py", "--spread", "few").splitlines()
    assert results[0].startswith("isa ") and len(results) > 20000
    where = plain.run("python", "-c", "import fastseq; print(fastseq.__file__)")
    assert where.startswith(str(plain.bin.parent))


def test_with_torch(full: Environment) -> None:
    assert re.search(r"cpu, the first", full.run("fastseq", "info"))
    full.run("python", "-c", examples("LSTM")[0])
    tests = [f"tests/{name}" for name in WITH_TORCH]
    out = full.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert int(re.search(r"(\d+) passed", out)[1]) > 150  # type: ignore[index]


def test_ten_minutes(full: Environment) -> None:
    """docs/start.md from its first block to the last, as a stranger would type it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "start.md").read_text(), re.S)
    printed = full.run("python", "-c", "\n".join(blocks))
    assert float(re.search(r"accuracy (0\.\d+)", printed)[1]) > 0.85  # type: ignore[index]
    assert "as with torch: 0.0e+00" in printed and "of 64 codes in use" in printed


def test_a_model_leaves_torch_behind(full: Environment, plain: Environment) -> None:
    save, load = examples("Without torch")
    full.run("python", "-c", save)
    shutil.copy(full.work / "lstm.fastseq", plain.work)
    assert plain.run("python", "-c", f"{load}\nprint(y.shape, state.shape)") == "(128,) (16, 512)\n"


def test_the_source_distribution_builds_without_torch(source: Path, tmp_path: Path) -> None:
    """Isolated, as pip does by default: kernels for numpy arrays, and a message about the rest."""
    with tarfile.open(source) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"csrc/core/simd_neon.h", "csrc/torch/view.h", "setup.py", "LICENSE"} <= names
    unset = ("FASTSEQ_BUILD", "FASTSEQ_BUILD_TEST_ISA", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(command, check=True, env=kept, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    env = Environment(tmp_path / "env", wheel)
    info = env.run("fastseq", "info")
    assert "torch is not importable here (in an isolated build it never is" in info
    env.run("python", "-c", *examples("Kernels alone", "docs/deployment.md"))


HUB = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
from kernels.verify import Digest, Metadata
import fastseq.nn

variant, = Path(sys.argv[1]).glob("build/torch-stable-abi*-cpu-*")
for folder in (Path(sys.argv[1], "build", "torch-cuda"), variant):
    metadata = Metadata.read_from_file(folder / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, folder))
hub = get_local_kernel(Path(sys.argv[1]), backend="cpu")
x = torch.randn(7, 3, 5)
ours, theirs, plain = hub.nn.LSTM(5, 8), fastseq.nn.LSTM(5, 8), torch.nn.LSTM(5, 8)
assert type(ours) is not type(theirs)
for module in (ours, theirs):
    module.load_state_dict(plain.state_dict())
assert torch.equal(ours(x)[0], theirs(x)[0])
torch.testing.assert_close(ours(x)[0], plain(x)[0])
for name in (metadata.id, "fastseq"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{name}::lstm_forward", "CPU")
print(*hub.__all__)
"""


def test_the_layout_for_the_hub(full: Environment) -> None:
    """The Hub's own loader takes it, beside the installed package and with the same results."""
    assert full.run("python", "-c", HUB, DIST / "hub") == "functional nn\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="cibuildwheel needs Python 3.11")
@pytest.mark.parametrize(("platform", "archs"), [("linux", "x86_64 aarch64"), ("macos", "x86_64 arm64")])
def test_the_configuration_of_cibuildwheel(platform: str, archs: str) -> None:
    for arch in archs.split():
        command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", platform]
        run = subprocess.run([*command, "--archs", arch], cwd=ROOT, capture_output=True, text=True, check=True)
        versions = {line.split("-")[0] for line in run.stdout.split()}
        assert {"cp310", "cp314"} <= versions and all(line.endswith(arch) for line in run.stdout.split())

"""Whether csrc/cuda is built, for what, and what the library needs from where it is loaded."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cuda.library import ROOT, TARGET, decisions, python

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --dryrun) echo '#$ LIBRARIES=  "-L{folder}/stubs" "-L{folder}"' >&2 ;;
  --list-gpu-code) echo "sm_75 sm_80 sm_86 sm_89 sm_90 {known}" ;;
esac
"""


@pytest.fixture
def nvcc(tmp_path: Path) -> Any:
    """A program that answers as nvcc does, where CUDA_HOME says."""

    def install(release: str = "13.0", known: str = "sm_100 sm_120") -> dict[str, str]:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").write_text(NVCC.format(release=release, folder=tmp_path, known=known))
        (tmp_path / "bin" / "nvcc").chmod(0o755)
        (tmp_path / "libcudart_static.a").touch()
        return {"CUDA_HOME": str(tmp_path)}

    return install


def with_torch(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """Another torch than the one of this process."""
    (folder / "version.py").write_text(text)
    spec = SimpleNamespace(origin=str(folder / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_all_targets_and_the_newest_for_later_ones(nvcc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = decisions(monkeypatch, FASTSEQ_BUILD="cuda", **nvcc())["decision"]
    assert found["built"] == ["core", "torch", "cuda"] and found["missing"] == {}
    assert found["cuda"]["targets"] == ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_120"]
    assert found["cuda"]["nvcc"] == "13.0.88" and re.fullmatch("[0-9a-f]{16}", found["cuda"]["source"])


def test_an_older_nvcc_leaves_out_what_it_does_not_know(nvcc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"FASTSEQ_BUILD": "cuda", **nvcc("12.4", known="")}
    targets = decisions(monkeypatch, **environment)["decision"]["cuda"]["targets"]
    assert targets == ["sm_80", "sm_86", "sm_89", "sm_90a", "compute_89"]
    with pytest.raises(SystemExit, match=r"^fastseq: FASTSEQ_CUDA_ARCHS: nvcc 12.4.88 does not know 100, 120$"):
        decisions(monkeypatch, FASTSEQ_CUDA_ARCHS="80;100;120", **environment)


@pytest.mark.parametrize(
    "archs, targets",
    [
        ("80", ["sm_80", "compute_80"]),
        ("90a,80", ["sm_80", "sm_90a", "compute_80"]),
        ("90a", ["sm_90a"]),
        ("100; 90;90", ["sm_90", "sm_100", "compute_100"]),
    ],
)
def test_targets_can_be_narrowed(archs: str, targets: list[str], nvcc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = decisions(monkeypatch, FASTSEQ_BUILD="cuda", FASTSEQ_CUDA_ARCHS=archs, **nvcc())
    assert found["decision"]["cuda"]["targets"] == targets
    others = decisions(monkeypatch, FASTSEQ_BUILD="cuda", FASTSEQ_CUDA_ARCHS="86", CUDA_HOME=found["cuda"].nvcc[:-9])
    objects = [set(f["kernel_objects"](f["cuda"]).values()) for f in (found, others)]
    assert objects[0] and not objects[0] & objects[1]  # kept apart


@pytest.mark.parametrize(
    ("archs", "bad"), [("75;80", "75"), ("sm_80", "sm_80"), ("80;native", "native"), ("90b", "90b")]
)
def test_archs_that_are_none(archs: str, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"FASTSEQ_CUDA_ARCHS must list GPUs from 80 on, as 80;86;89;90a;100;120, got {bad!r} in {archs!r}"
    with pytest.raises(SystemExit, match=f"^fastseq: {re.escape(words)}$"):
        decisions(monkeypatch, FASTSEQ_BUILD="core", FASTSEQ_CUDA_ARCHS=archs)


def test_what_was_asked_for_and_cannot_be_built_is_an_error(nvcc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**environment: str) -> str:
        with pytest.raises(SystemExit) as caught:
            decisions(monkeypatch, FASTSEQ_BUILD="cuda", **environment)
        return str(caught.value).removeprefix("fastseq: FASTSEQ_BUILD=cuda, but cuda cannot be built: ")

    assert refused(PATH="/nowhere") == "nvcc is not on PATH and CUDA_HOME is not set"
    assert refused(CUDA_PATH="/nowhere") == "/nowhere/bin/nvcc is not there, where CUDA_HOME or CUDA_PATH says"
    home = nvcc("11.8")
    assert refused(**home) == f"{home['CUDA_HOME']}/bin/nvcc is older than 12.0"


def test_no_static_runtime(nvcc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home = nvcc()
    Path(home["CUDA_HOME"], "libcudart_static.a").unlink()
    with pytest.raises(SystemExit, match="nvcc has no libcudart_static.a beside it"):
        decisions(monkeypatch, FASTSEQ_BUILD="cuda", **home)


def test_left_to_itself_it_builds_for_a_torch_with_cuda(
    nvcc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = nvcc()
    with_torch(monkeypatch, tmp_path, "__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    assert decisions(monkeypatch, **home)["missing"] == {}
    assert decisions(monkeypatch, FASTSEQ_BUILD="torch", **home)["missing"] == {"cuda": "FASTSEQ_BUILD=torch"}
    assert decisions(monkeypatch, PATH="/nowhere")["missing"] == {
        "cuda": "nvcc is not on PATH and CUDA_HOME is not set"
    }
    with_torch(monkeypatch, tmp_path, "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip = None\n")
    reason = "torch 2.13.0+cpu has no CUDA (FASTSEQ_BUILD=cuda builds it all the same)"
    assert decisions(monkeypatch, **home)["missing"] == {"cuda": reason}


def test_a_header_of_cuda_makes_no_core_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    headers = decisions(monkeypatch, FASTSEQ_BUILD="core")["headers"]
    contract = "csrc/cuda/lstm_persist.h"
    seen = [contract in headers(f"csrc/{f}") for f in ("core/vq.cpp", "torch/vq.cpp", "cuda/a.cu", "torch_cuda/a.cpp")]
    assert seen == [False, False, True, True]
    assert "version.py" in headers("csrc/torch/vq.cpp", ["version.py"])


def test_a_source_distribution_has_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = decisions(monkeypatch, FASTSEQ_BUILD="core")
    sources = {str(f.relative_to(ROOT)) for f in (ROOT / "csrc").glob("*cuda/*.*")}
    assert sources and all(sources <= set(extension.depends) for extension in found["extensions"])


def test_the_record_of_the_build(package: Path) -> None:
    record = json.loads((package / "fastseq" / "_build.json").read_text())
    assert record["cuda"]["targets"] == [f"sm_{TARGET}", f"compute_{TARGET}"]


def test_the_library_needs_no_cuda_to_load(package: Path) -> None:
    path = package / "fastseq" / "_cuda.abi3.so"
    listing = subprocess.run(["nm", "-D", path], check=True, capture_output=True, text=True).stdout
    symbols = [(line.split()[-2], line.split()[-1].split("@")[0]) for line in listing.splitlines()]
    needed = {name for kind, name in symbols if kind == "U"}
    assert [name for name in needed if re.match(r"cu[A-Z]|__cuda|_ZN2at|_ZNK2at|_ZN3c10|_ZNK3c10|Py", name)] == []
    assert [name for kind, name in symbols if kind in "wv" and "torch" in name] == [
        "aoti_torch_get_current_cuda_stream"
    ]
    assert [name for kind, name in symbols if kind in "TDBR" and "cuda" in name.lower()] == []
    dynamic = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(libraries)
    assert not [name for name in libraries if "cuda" in name or "cublas" in name or "c10" in name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a torch without CUDA")
def test_info_says_what_was_built(package: Path) -> None:
    printed = python(package, "import fastseq; fastseq.show_config()")
    assert re.search(r"^  cuda door +built$", printed, re.M)
    assert re.search(rf"^  cuda built +sm_{TARGET}, compute_{TARGET} by nvcc \d+", printed, re.M)

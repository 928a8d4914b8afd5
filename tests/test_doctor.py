"""``fastseq doctor``: set-ups broken on purpose, what it says of each, and its exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastseq import _doctor
from fastseq.ops import _library, _triton

ROOT = Path(__file__).parents[1]
NO_TORCH = "import sys; sys.modules['torch'] = None"


def doctor(code: str, *paths: Path, **environment: str) -> tuple[int, dict[str, str]]:
    """In a process of its own: the exit status, and by the name of each check its verdict and the text behind it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTSEQ_")}
    kept |= {"PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT, ROOT / "kernels"])), **environment}
    # an editable install would find elsewhere what a copy of the package lacks
    here = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]"
    command = f"{here}\n{code}\nimport sys; from fastseq import cli; sys.exit(cli.main(['doctor']))"
    where = {"cwd": paths[0] if paths else ROOT, "env": kept}  # python -c looks there first
    run = subprocess.run([sys.executable, "-c", command], **where, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in run.stderr, run.stderr
    found: dict[str, str] = {}
    for line in run.stdout.splitlines():
        verdict, name = line[:6].strip(), line[7:24].strip()
        if verdict in (_doctor.FINE, _doctor.NOTE, _doctor.WRONG):
            found[name] = f"{verdict}: {line[26:]}"
        elif "->" in line:
            found[[*found][-1]] += f" {line.strip()}"
    assert (run.returncode != 0) == any(text.startswith(_doctor.WRONG) for text in found.values()), run.stdout
    return run.returncode, found


def copied(folder: Path, *left_out: str) -> Path:
    """The package without some of its files, to be found before the one that is tested."""
    shutil.copytree(ROOT / "fastseq", folder / "fastseq", ignore=shutil.ignore_patterns("__pycache__", *left_out))
    return folder


def test_nothing_is_wrong_here() -> None:
    """In a process of its own: other tests have loaded packages that bring an OpenMP runtime with them."""
    command = [sys.executable, "-c", "import sys; from fastseq import cli; sys.exit(cli.main(['doctor']))"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("\nnothing is wrong\n") and "it gives what torch.nn.LSTM gives" in done.stdout
    assert torch.__version__ in done.stdout


def test_without_torch() -> None:
    status, found = doctor(NO_TORCH)
    assert status == 0 and found["torch"].startswith("note: not installed: fastseq.deploy runs without it")
    assert "-> pip install torch, and then in the folder of the sources: pip install --no-build" in found["torch"]
    assert found["a product"] == "fine: of numpy arrays, it is right" and "kernels for torch" not in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__version__ = '2.6.0'", 'wrong: 2.6.0 is older than 2.10 -> pip install "torch>=2.10", and then '),
        ("raise OSError('libcudart: no such file')", "wrong: it cannot be imported: libcudart: no such file"),
        ("import absent", "wrong: it cannot be imported: No module named 'absent' -> pip install absent"),
    ],
)
def test_another_torch(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(text)
    status, found = doctor("", tmp_path)
    assert status == 1 and found["torch"].startswith(message)


def test_nothing_was_compiled_and_there_is_no_compiler(tmp_path: Path) -> None:
    status, found = doctor(NO_TORCH, copied(tmp_path, "*.so"), CXX="nocompiler")
    assert found["kernels for numpy"].startswith("wrong: not built -> in the folder of the sources: pip install --no")
    assert found["compiler"].startswith("wrong: 'nocompiler' is not there -> Debian, Ubuntu: apt install g++")
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho 'error: unrecognized option -std=c++20' >&2\nexit 1\n")
    old.chmod(0o755)
    other = "_core.cpython-39-x86_64-linux-gnu.so"
    (tmp_path / "fastseq" / other).touch()
    found = doctor(NO_TORCH, tmp_path, CXX=str(old))[1]
    assert found["kernels for numpy"].startswith(f"wrong: built for another Python ({other}), and this is cpython-3")
    assert "does not compile C++20: error: unrecognized option" in found["compiler"]


def test_a_compiler_is_no_need_where_all_is_built() -> None:
    status, found = doctor(NO_TORCH, CXX="nocompiler")
    assert status == 0
    assert found["compiler"].startswith("note: 'nocompiler' is not there; what needs one is built already")


def test_kernels_for_another_torch(tmp_path: Path) -> None:
    record = copied(tmp_path, "_torch*.so") / "fastseq" / "_build.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"torch": "2.99.0"}))
    (tmp_path / "fastseq" / "_torch.abi3.so").write_bytes(b"of another machine")
    status, found = doctor("", tmp_path)
    assert status == 1
    message = f"wrong: built with torch 2.99.0, and this is {torch.__version__}: _torch.abi3.so does not load with"
    assert found["kernels for torch"].startswith(message)
    assert "FASTSEQ_BACKEND=reference" in found["kernels for torch"]


def test_kernels_for_torch_are_missing_or_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    why = "not in the compiled library, which an older version built; rebuild it"
    old = _triton.Backend("cpu", lambda: None, lambda *args: why)
    monkeypatch.setitem(_library.TABLES, "sort", (old,))
    (found,) = (f for f in _doctor.examine() if f.name == "kernels for torch")
    assert found.verdict == _doctor.WRONG and found.what == "an older version built them: sort are not in it"
    monkeypatch.setattr(_library, "why_not_compiled", "not built (...)")
    monkeypatch.setattr(_doctor, "_HERE", tmp_path)
    monkeypatch.setattr(_doctor, "build_record", lambda: {"missing": {"torch": "no torch was there"}})
    (found,) = (f for f in _doctor.examine() if f.name == "kernels for torch")
    assert (found.verdict, found.what) == (_doctor.WRONG, "not built: no torch was there")


def test_two_openmp_runtimes(tmp_path: Path) -> None:
    """A second one in the process, under the name that Intel's has."""
    own = next(iter((Path(torch.__file__).parent / "lib").glob("libgomp*")), None)
    if own is None:
        pytest.skip("this torch brings no libgomp")
    second = tmp_path / "libiomp5.so"
    shutil.copy(own, second)
    status, found = doctor(f"import ctypes, torch; ctypes.CDLL({str(second)!r})")
    assert status == 1 and found["OpenMP"].startswith("wrong: 2 runtimes in one process, whose threads compete")
    assert str(second) in found["OpenMP"] and "one source, pip or conda" in found["OpenMP"]


def test_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU Triton is needed, elsewhere it is not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [f.verdict for f in _doctor._triton()] == [_doctor.NOTE]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    for why, verdict in ((None, _doctor.FINE), ("triton is not installed; pip install 'triton>=3.5'", _doctor.WRONG)):
        monkeypatch.setattr(_triton, "why_not_triton", lambda why=why: why)
        (found,) = _doctor._triton()
        assert found.verdict == verdict and found.what.startswith("Some GPU, ")
    assert found.what == "Some GPU, but triton is not installed: there operators run in plain torch, slowly"
    assert found.todo == "pip install 'triton>=3.5'"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FASTSEQ_ISA", "sse9", "wrong: isa: FASTSEQ_ISA=sse9 cannot run here; these can: "),
        ("FASTSEQ_BACKEND", "abacus", "wrong: FASTSEQ_BACKEND=abacus is none of cpu, cuda, triton, torch, reference"),
    ],
)
def test_the_environment(name: str, value: str, message: str) -> None:
    status, found = doctor(NO_TORCH, **{name: value})
    assert status == 1 and found["environment"].startswith(message) and f"unset {name}" in found["environment"]


def test_the_project_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "fastseq-0.9.dist-info").mkdir()
    (tmp_path / "fastseq-0.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fastseq\nVersion: 0.9\n")
    status, found = doctor(NO_TORCH, tmp_path)
    assert status == 1
    assert found["namesake"].startswith("wrong: the distribution fastseq 0.9 is another project with this import name")


def test_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for got, message in ((1.0, "it is off by 1"), (float("nan"), "it is off by nan")):
        monkeypatch.setattr(_doctor, "_lstm_error", lambda got=got: got)
        assert _doctor._computation(True)[1:3] == (_doctor.WRONG, message)
    monkeypatch.undo()
    monkeypatch.setattr(torch.nn.LSTM, "forward", lambda *args: (_ for _ in ()).throw(RuntimeError("broken\nmore")))
    assert _doctor._computation(True).what == "it does not run: broken"

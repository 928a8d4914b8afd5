"""What ``make gpu`` does with the persistent LSTM, without a GPU: its library, its checks, its times and targets."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import cuda, lstm, parity_persist, persist, persist_loop, tables
from benchmarks.gpu.clock import Share, shares
from benchmarks.gpu.parity import Kernels, _row
from benchmarks.gpu.part import Context
from benchmarks.gpu.targets import targets
from benchmarks.harness import CannotRun
from tests.cuda.library import decisions

DRY, REAL = (Context(torch.device("cpu"), dry) for dry in (True, False))
CALL = persist_loop.drawn(4, 3, 40, torch.bfloat16, torch.device("cpu"))


def write(folder: Path, record: dict[str, Any], *libraries: str) -> None:
    (folder / "fastseq").mkdir(exist_ok=True)
    (folder / "fastseq" / cuda.RECORD).write_text(json.dumps(record))
    for name in libraries:
        (folder / "fastseq" / name).write_text(f"{name} of {folder.name}")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package where nothing was built."""
    found = tmp_path / "tree" / "fastseq"
    found.mkdir(parents=True)
    monkeypatch.setattr(cuda, "PACKAGE", found)
    return found


def made(folder: Path, *built: str) -> Path:
    """What a build of these parts leaves."""
    missing = {name: f"no {name} here" for name in ("core", "torch", "cuda") if name not in built}
    record = {"built": built, "missing": missing, "cuda": {"source": folder.name} if "cuda" in built else None}
    folder.mkdir()
    write(folder, {**record, "flags": folder.name}, *(f"_{name}.abi3.so" for name in built if name != "core"))
    return folder


def test_a_build_of_one_part_leaves_the_others(package: Path, tmp_path: Path) -> None:
    cuda.place(made(tmp_path / "first", "core", "torch", "cuda"), ("cuda",))
    assert cuda.record(package) == {
        "built": ["cuda"],
        "missing": {},
        "cuda": {"source": "first"},
        "flags": "first",
    }
    cuda.place(made(tmp_path / "second", "core", "torch"), ("core", "torch"))
    found = cuda.record(package)
    assert found["built"] == ["core", "torch", "cuda"] and found["missing"] == {} and cuda.source() == "first"
    assert found["flags"] == "second" and (package / "_cuda.abi3.so").read_text() == "_cuda.abi3.so of first"
    cuda.place(made(tmp_path / "third", "core", "torch", "cuda"), ("cuda",))
    found = cuda.record(package)
    assert cuda.source() == "third" and found["flags"] == "second" and found["built"] == ["core", "torch", "cuda"]
    assert not list(package.glob(".*"))


def test_without_cuda_the_record_says_why(package: Path, tmp_path: Path) -> None:
    cuda.place(made(tmp_path / "only", "core", "torch"), ("core", "torch"))
    assert cuda.record(package)["missing"] == {"cuda": "no cuda here"} and cuda.source() is None


def test_the_library_is_carried_along_or_built_or_neither(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "why_no_nvcc", lambda: "there is no nvcc")
    [row] = cuda.ready(REAL)
    why = "fastseq/_cuda.abi3.so with _build.json was not carried along, and there is no nvcc"
    assert row["gate"] == f"cannot run: {why}"

    def build(folder: Path, archs: str, seconds: float) -> str | None:
        (folder / "made").mkdir()
        for path in made(folder / archs, "core", "torch", "cuda").glob("fastseq"):
            path.rename(folder / "fastseq")
        return said

    said: str | None = "nvcc could not compile"
    monkeypatch.setattr(cuda, "why_no_nvcc", lambda: None)
    monkeypatch.setattr(cuda, "compile_alone", build)
    assert cuda.ready(REAL)[0]["gate"] == "cannot run: it does not build: nvcc could not compile"
    said = None
    [row] = cuda.ready(REAL)
    assert row["gate"] == "passed" and re.fullmatch(r"built for 90a in \S+ s: 90a", row["told"])
    [row] = cuda.ready(REAL)
    assert row["told"] == f"carried along: 90a, NOT of the source in this tree, {cuda.source_here()}"
    monkeypatch.setattr(cuda, "source_here", lambda: "90a")
    assert cuda.ready(REAL)[0]["told"] == "carried along: 90a"


def test_the_hash_of_the_source_is_that_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = decisions(monkeypatch, FASTSEQ_BUILD="core")["digest"]
    assert cuda.source_here() == digest("csrc/cuda", "csrc/torch_cuda")


@pytest.mark.parametrize("gate", ["passed", "cannot run: no library"])
def test_without_its_library_it_is_left_out(gate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def part(self: Any, name: str, seconds: float, cores: Any, threads: int) -> list[dict[str, Any]]:
        begun.append(name)
        return [{"op": "tests", "gate": gate, "told": "here"}] if name == "cuda" else []

    monkeypatch.setattr(main.Run, "part", part)
    wanted = ("persist-parity", "persist", "sanitizer", "limits")
    clock = type("Clock", (), {"left": 500.0})()
    run = main.Run(tmp_path, clock, False, wanted, [], [], None, None)  # type: ignore[arg-type]
    main.lanes(run, 1.0, lambda: begun.append("verified"))
    assert run.notes[0] == "kernels for CUDA: here"
    if gate == "passed":
        count = len(main.PERSIST_PARITY)
        assert begun[0] == "cuda" and set(begun[1 : 1 + count]) == set(main.PERSIST_PARITY)
        assert begun[1 + count :] == ["verified", "persist:times", "persist:sanitizer", "limits"]
    else:
        assert begun == ["cuda", "limits"] and run.notes[1] == f"what is compiled for CUDA is left out: {gate}"


def test_what_passed_is_verified_for_the_source_that_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "source", lambda: "ab")
    checks = list(parity_persist.checks(Kernels(DRY, "bfloat16")))
    plan = {"op": "plan", "module": "lstm_persist", "dtype": "bfloat16", "cases": len(checks)}
    rows = [plan, *(row for check in checks for row in _row(check, "bfloat16"))]
    facts = dict.fromkeys(("device", "driver", "torch", "triton", "date", "commit"), "x") | {"capability": "sm_90"}
    assert main.verify(rows, facts, tmp_path / "verified.json") == ["lstm_persist: verified for bfloat16"]
    row = json.loads((tmp_path / "verified.json").read_text())["sm_90"]["lstm_persist"]
    assert row["source"] == "ab" and row["dtypes"] == ["bfloat16"]
    gates = [row["gate"] for row in rows if row["op"] == "parity"]
    assert gates.count("passed") == 7 and gates.count("cannot run: it needs a GPU") == 3


def test_ten_minutes_hold_all_shares() -> None:
    """Also where the library was built before: nothing is dropped, and the persistent LSTM has what it wants."""
    for seconds in (570.0, 400.0):
        given = shares(list(main.STAGES.values()), seconds)
        assert all(given.values()), given
    wanted: dict[str, Share] = {share.name: share for share in main.STAGES.values()}
    given = shares(list(wanted.values()), 570.0)
    assert given["persist-parity"] == wanted["persist-parity"].wanted


def spoiled(values: list[tuple[Tensor, ...]], place: int) -> list[tuple[Tensor, ...]]:
    values[0][place].add_(0.25)
    return values


@pytest.mark.parametrize(("op", "place", "name"), [("forward", 0, "h"), ("forward", 4, "c_n"), ("backward", 1, "dh0")])
def test_a_wrong_loop_is_seen(op: str, place: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(persist_loop, op)
    monkeypatch.setattr(persist_loop, op, lambda *args, **more: spoiled(right(*args, **more), place))
    kernels = Kernels(DRY, "bfloat16")
    call = next(c for c in parity_persist.checks(kernels) if c.case == "tile 0 edges")
    assert _row(call, "bfloat16")[0]["gate"].startswith(f"wrong: {name}: error")


def test_a_loop_that_differs_from_run_to_run_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right, runs = persist_loop.forward, iter(range(100))

    def forward(*args: Any) -> list[tuple[Tensor, ...]]:
        return spoiled(right(*args), 3) if next(runs) == 2 else right(*args)

    monkeypatch.setattr(persist_loop, "forward", forward)
    call = next(c for c in parity_persist.checks(Kernels(DRY, "float16")) if c.case.endswith("times"))
    assert _row(call, "float16")[0]["gate"] == "wrong: h_n: bits differ"


def test_a_tile_without_room_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persist_loop, "room", lambda *args: (133, 132))
    check = next(iter(parity_persist.checks(Kernels(DRY, "bfloat16"))))
    why = "cannot run: needs 133 blocks of threads at a time, the device holds 132"
    assert _row(check, "bfloat16")[0]["gate"] == why
    rows = persist.loops(DRY, 2, 40, torch.bfloat16)
    assert [(row["gate"], row["blocks"], row["room"]) for row in rows] == [(why, 133, 132)]


def test_every_tile_is_checked_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the table that a device has, here one deep and one shallow tile; float32 has no kernels."""
    shallow, deep = (
        type("Tile", (), dict(units=8, rows=8, depth=d, threads=256, int8_depth=int8))
        for d, int8 in ((256, 512), (2048, 0))
    )
    monkeypatch.setattr(persist_loop, "tiles", lambda dry: {0: shallow, 1: deep})
    checks = list(parity_persist.checks(Kernels(REAL, "float16")))
    names = [{c.case.removeprefix(f"tile {n} ") for c in checks if c.case.startswith(f"tile {n} ")} for n in (0, 1)]
    assert {"edges", "full", "odd", "long", "packed_reverse", "hard", "both", "NaN", "no steps"} <= names[0]
    assert names[1] - names[0] == {"100 times", "graph", "streams", "large streams"}
    assert {"int8 5x11x13", "int8 3x8x512"} <= names[0]
    assert {c.op for c in checks} == {"lstm_persist", "lstm_int8_forward", *parity_persist.OPERATORS}
    assert all(c.limit <= 60 for c in checks if c.op == "lstm_persist")
    assert not list(parity_persist.checks(Kernels(REAL, "float32")))


def test_the_refusal_of_a_call_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    no = "lstm_layer_forward: no backend can run this call (cpu: FASTSEQ_BACKEND=cuda; cuda: {}; triton: FASTSEQ)"

    def refuse(*args: Any) -> None:
        raise RuntimeError(no.format(why))

    monkeypatch.setattr(lstm, "judge", refuse)
    why = "needs 512 blocks of threads at a time, the device holds 132"
    with pytest.raises(CannotRun, match=f"^{why}$"):
        lstm._judged(*(None,) * 3)  # type: ignore[arg-type]
    why = "FASTSEQ_BACKEND=triton"
    with pytest.raises(RuntimeError, match="no backend"):
        lstm._judged(*(None,) * 3)  # type: ignore[arg-type]


SANITIZER = """#!{python}
import sys
assert sys.argv[1:5] == ["--tool", "racecheck", "--error-exitcode", "9"]
assert sys.argv[-2:] == ["-m", "benchmarks.gpu.persist_loop"]
print("tile 0: done\\ntile 1: done\\n========= ERROR SUMMARY: {errors} errors")
sys.exit({status})
"""


@pytest.mark.parametrize(("errors", "status", "gate"), [(0, 0, "passed"), (3, 9, "failed: ERROR SUMMARY: 3 errors")])
def test_sanitizer(errors: int, status: int, gate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(python=sys.executable, errors=errors, status=status))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    [row] = persist.sanitized(REAL, "racecheck")
    assert row["gate"] == gate and row["passed"] == 2


def test_targets_and_tables() -> None:
    case, low = "T1024_B16_H512", "bfloat16"
    shared = {"op": "lstm", "table": "persist", "case": case, "dtype": low, "mode": "train", "gate": "passed"}
    times = {"fastseq persist": 2.0, "fastseq": 4.0, "stock": 8.0}
    rows = [
        {**shared, "label": label, "provider": label.split()[0], "ms": ms, "us_per_step": ms, "tflops": 1.0}
        for label, ms in times.items()
    ]
    alone = {"op": "lstm_loop", "table": "persist loop", "case": case, "dtype": low, "gate": "passed"}
    alone |= {"units": 32, "rows": 8, "blocks": 32, "room": 132}
    for tile, (forward, backward) in enumerate([(1.5, 2.0), (1.25, 2.5)]):
        for mode, us in (("forward", forward), ("backward", backward)):
            rows.append({**alone, "tile": tile, "mode": mode, "label": f"{tile}", "ms": us, "us_per_step": us})
    found = {t.name: (t.value, t.verdict) for t in targets(rows)}
    start = f"persistent LSTM {case}"
    assert found[f"{start} train bf16: times faster than stock"] == (4.0, "met")
    assert found[f"{start} infer bf16: times faster than stock"] == (None, "open")
    assert found[f"{start}: step over the model's 1.1 us"] == (1.25 / 1.1, "met")
    assert found[f"{start}: backward over forward"] == (2.0 / 1.25, "met")
    assert sum(name.startswith("persistent LSTM") for name in found) == 16 * 4 + 1
    assert not any(t.name.startswith("persistent") for t in targets([]))
    drawn = {t.title: t for t in tables.of_rows(rows)}
    lines = drawn["The loop of the persistent LSTM alone, by tile"].lines
    assert lines[1] == [case, low, "1", "32", "8", "32", "132", "1.25", "2.5"]
    assert [line[3] for line in drawn["Persistent LSTM, one layer"].lines] == list(times)
    assert tables.brief_persist(rows).lines[0][:7] == [case, low, "train", "2", "4", "8", "-"]

"""``make gpu`` without a GPU: its clock, its processes, what it makes of rows, and a dry run from end to end."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import process, tables, timing, worker
from benchmarks.gpu.__main__ import SHARDS
from benchmarks.gpu.clock import Clock, Share, shares
from benchmarks.gpu.parity import Kernels, record, verdicts
from benchmarks.gpu.part import Context, Unit, backend
from benchmarks.gpu.targets import LARGE, targets

DRY = Context(torch.device("cpu"), True)
PARTS = [Share("b", 1, 20, 50), Share("a", 0, 10, 100), Share("c", 2, 30, 40)]
FACTS = {
    "device": "GPU",
    "capability": "sm_90",
    "driver": "1",
    "cuda": "13.0",
    "torch": "2",
    "triton": "3",
    "commit": "abc",
    "clean": True,
    "run": "2026-01-02T03:04:05Z",
    "date": "2026-01-02",
}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (500, {"a": 100, "b": 50, "c": 40}),
        (100, {"a": 50, "b": 20, "c": 30}),  # the least of all, and the rest to the most important
        (35, {"a": 15, "b": 20, "c": 0}),  # c has no place any more
        (9, {"a": 0, "b": 0, "c": 0}),
        (0, {"a": 0, "b": 0, "c": 0}),
    ],
)
def test_shares(seconds: float, expected: dict[str, float]) -> None:
    assert shares(PARTS, seconds) == expected


def test_the_clock_drops_the_last_cases_and_none_between() -> None:
    now = [0.0]
    clock = Clock(10, lambda: now[0])
    assert clock.has(8, "long")
    now[0] = 5
    assert clock.left == 5
    assert not clock.has(6, "longer") and not clock.has(1, "short")
    assert clock.dropped == ["longer", "short"]
    now[0] = 50
    assert clock.left == 0


def run_units(cases: list[Unit], seconds: float = 100, alive: Any = lambda: None) -> tuple[int, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    return worker.run(cases, Clock(seconds), rows.append, alive), rows


def test_a_case_that_fails_costs_no_other_its_rows() -> None:
    cases = [Unit("wrong", 1, lambda: 1 / 0), Unit("right", 1, lambda: [{"case": "right"}])]  # type: ignore[list-item]
    status, rows = run_units([*cases, Unit("long", 1000, lambda: [])])
    failed = {"op": "broken", "case": "wrong", "gate": "failed: ZeroDivisionError: division by zero"}
    assert status == 0
    assert rows == [{"begin": "wrong"}, failed, {"begin": "right"}, {"case": "right"}, {"dropped": "long"}]


def test_a_lost_device_ends_the_process() -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    status, rows = run_units([Unit("a", 1, lambda: []), Unit("b", 1, lambda: [])], alive=lost)
    assert status == worker.BROKEN
    assert rows[-1] == {"note": "the device is lost after a: RuntimeError: CUDA error: an illegal memory access"}


WORKER = """
    import json, os, sys, time
    path, skip = sys.argv[sys.argv.index("--rows") + 1], int(sys.argv[sys.argv.index("--skip") + 1])
    for n in range(skip, 4):
        with open(path, "a") as file:
            file.write(json.dumps({"begin": f"case {n}"}) + "\\n")
            if n == 1:
                file.flush()
                print("SomeError: case 1 is bad", flush=True)
                os._exit(9)
            if n == 3 and sys.argv[1] == "slow":
                file.write('{"cut o')
                file.flush()
                time.sleep(60)
            file.write(json.dumps({"case": n}) + "\\n")
"""


@pytest.mark.parametrize("part", ["quick", "slow"])
def test_a_part_goes_on_behind_the_case_it_died_in(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE", 0.0)
    monkeypatch.setattr(process, "LEAST_RESTART", 0.1)
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    seconds = 30 if part == "quick" else 4
    found = process.run(part, seconds, tmp_path, dict(os.environ), command=[sys.executable, str(script)])
    assert [row["case"] for row in found.rows] == ([0, 2, 3] if part == "quick" else [0, 2])
    assert found.notes[0] == f"{part}: process ended with 9 in case 1: SomeError: case 1 is bad"
    assert found.notes[1:] == ([] if part == "quick" else ["slow: ended in case 3, its time was over"])


def test_backend_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_BACKEND", "cpu")
    with backend("triton"):
        assert os.environ["FASTSEQ_BACKEND"] == "triton"
    with backend(None):
        assert "FASTSEQ_BACKEND" not in os.environ
    assert os.environ["FASTSEQ_BACKEND"] == "cpu"


class FakeEvent:
    """Its time is the number of calls so far."""

    calls = 0

    def __init__(self, enable_timing: bool) -> None:
        self.at = -1

    def record(self) -> None:
        self.at = FakeEvent.calls

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("cold", [False, True])
def test_a_block_times_each_call_and_no_other(cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr(timing, "SCRUB_BYTES", 64)
    timing._scrubber.cache_clear()
    before = FakeEvent.calls

    def call() -> None:
        FakeEvent.calls += 1

    assert timing.block(Context(torch.device("cpu"), False), call, 5, cold) == 1.0
    assert FakeEvent.calls - before == (5 if cold else 6), "a call before fills the cache, where it is to be full"
    timing._scrubber.cache_clear()


def test_what_is_around_calls_is_entered_once_a_block() -> None:
    inside: list[str] = []
    entered: list[str] = []

    @contextlib.contextmanager
    def around(name: str) -> Iterator[None]:
        entered.append(name)
        inside.append(name)
        yield
        inside.remove(name)

    calls = {name: (lambda n=name: inside.index(n)) for name in "ab"}  # type: ignore[misc]
    samples = timing.interleave(DRY, calls, 1.0, around=around)
    assert {name: sorted(rounds) for name, rounds in samples.items()} == {"a": [0, 1], "b": [0, 1]}
    assert sorted(entered) == ["a"] * 3 + ["b"] * 3


def parity(module: str, dtype: str, *gates: str, planned: int | None = None) -> list[dict[str, Any]]:
    shared = {"module": module, "dtype": dtype}
    rows = [{"op": "parity", **shared, "operator": "f", "case": str(n), "gate": g} for n, g in enumerate(gates)]
    return [{"op": "plan", **shared, "cases": len(gates) if planned is None else planned}, *rows]


ROWS = [
    *parity("good", "bfloat16", "passed", "cannot run: too large"),
    *parity("good", "float32", "passed", planned=2),
    *parity("bad", "bfloat16", "passed"),
    *parity("bad", "float32", "passed", "wrong: h: error 1"),
    *parity("absent", "float32", "cannot run: fastseq_kernels.absent has no f"),
]


def test_only_modules_whose_every_case_passed_are_verified() -> None:
    found = verdicts(ROWS)
    assert found["good"] == (["bfloat16"], ["float32: 1 of 2 cases have no result"], False)
    assert found["bad"] == ([], ["f 1 float32: wrong: h: error 1"], True)
    assert found["absent"] == ([], [], False)


def test_verified_json(tmp_path: Path) -> None:
    path = tmp_path / "verified.json"
    other = {"source": "0", "dtypes": ["float32"]}
    path.write_text(json.dumps({"sm_80": {"good": other}, "sm_90": {"bad": other, "rest": other}}))
    lines = record(ROWS, FACTS, path, lambda module: f"hash of {module}")
    shared = {key: FACTS[key] for key in ("device", "driver", "torch", "triton", "date", "commit")}
    good = {"source": "hash of good", "dtypes": ["bfloat16"], **shared}
    assert json.loads(path.read_text()) == {"sm_80": {"good": other}, "sm_90": {"good": good, "rest": other}}
    assert lines[0] == "bad: f 1 float32: wrong: h: error 1" and lines[1] == "good: verified for bfloat16"


def test_every_operator_has_parity() -> None:
    """A new operator needs cases in ``benchmarks/gpu/parity_*.py``, or it is never verified."""
    names = ("gemm", "lstm", "lstm_layer", "lstm_both", "lstm_lowrank", "lstm_int8", "vq", "vq_codes", "vq_residual")
    names += ("mimo", "mimo_nll", "ensemble_stats", "adt")
    tables = {name: importlib.import_module(f"fastseq.ops.{name}").BACKENDS for name in names}
    operators = {op for name, table in tables.items() for op in (table if isinstance(table, dict) else [name])}
    kernels = Kernels(Context(torch.device("cpu"), False), "float32")
    families = [importlib.import_module(f"benchmarks.gpu.parity_{family}") for family, _ in SHARDS]
    assert operators <= {check.op for family in families for check in family.checks(kernels)}


def lookup(label: str, ms: float, case: str = LARGE, **rest: Any) -> dict[str, Any]:
    row = {"op": "vq", "table": "vq", "case": case, "dtype": "bfloat16", "label": label, "ms": ms, "gate": "passed"}
    return {**row, "provider": label.split()[0], "tflops": 550.0 / ms, "mode": "lookup", "wrong": 0.0, **rest}


def verdict(rows: list[dict[str, Any]], start: str) -> tuple[float | None, str]:
    (found,) = [t for t in targets(rows) if t.name.startswith(start)]
    return found.value, found.verdict


def test_targets_of_the_lookup() -> None:
    product = {"op": "limits", "table": "limits", "case": "matmul bfloat16", "value": 800.0, "gate": "passed"}
    share = f"lookup {LARGE} bfloat16, exact"
    assert verdict([product], share) == (None, "open")
    assert verdict([product, lookup("fastseq", 1.0)], share) == (550 / 800, "met")
    assert verdict([product, lookup("fastseq", 2.0)], share) == (275 / 800, "missed")
    assert verdict([product, lookup("fastseq", 1.0, undefined=1)], share) == (None, "open"), "not exact"
    assert verdict([lookup("fastseq", 1.0, peak_mb=2147.0)], f"lookup {LARGE}: memory") == (2147.0, "missed")
    tall = {"case": "N1000000_K1024_D64"}
    rivals = [lookup("expanded bfloat16", 1.0, gate="index: excess", **tall), lookup("cdist", 4.0, **tall)]
    ours = lookup("fastseq", 3.0, ratios={"cdist": [0.7, 0.6, 0.8]}, **tall)
    value = verdict([*rivals, ours], "lookup N1000000_K1024_D64 bfloat16: time over the fastest exact rival (cdist)")
    assert value == (0.7, "met")


def test_targets_of_the_lstm() -> None:
    shared = {"op": "lstm", "table": "lstm", "case": "T1024_B16_H512", "mode": "train", "dtype": "bfloat16"}
    labels = {"fastseq": 2.0, "stock": 5.0, "fastseq binary p=0.2": 2.4, "loop": 30.0}
    rows = [
        {**shared, "label": label, "provider": label.split()[0], "ms": ms, "gate": "passed"}
        for label, ms in labels.items()
    ]
    assert verdict(rows, "LSTM T1024_B16_H512 train bf16") == (2.5, "met")
    assert verdict(rows, "LSTM T1024_B16_H512 train: binary over") == (1.2, "missed")
    assert verdict(rows, "LSTM T1024_B16_H512 train: times faster than the loop") == (15.0, "missed")
    rows[0]["gate"] = "y: error 1"
    assert verdict(rows, "LSTM T1024_B16_H512 train bf16") == (None, "open")


def test_readme_says_that_numbers_are_pending(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    with pytest.raises(SystemExit, match="README.md lacks the marks"):
        readme.write_text("nothing")
        tables.write_markdown(tmp_path, readme)
    readme.write_text(f"before\n{tables.MARKS[0]}\nold\n{tables.MARKS[1]}\nafter\n")
    (tmp_path / "cpu.jsonl").write_text('{"op": "lstm", "run": "2027"}\n')
    tables.write_markdown(tmp_path, readme)
    text = readme.read_text()
    assert "GPU numbers are pending" in text and "old" not in text
    rows = [{**lookup(label, ms), **FACTS} for label, ms in (("fastseq", 1.0), ("cdist", 4.0))]
    rows.append({**lookup("fastseq", 9.0), **FACTS, "run": "2025"})
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables.write_markdown(tmp_path, readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "pending" not in text
    assert "Measured on GPU, driver 1, CUDA 13.0, torch 2, Triton 3, commit abc, 2026-01-02." in text
    assert "| N65536_K8192_D256 | bfloat16 | 1 | 550 | - | cdist |" in text and "| 9 |" not in text
    full = (tmp_path / "gpu.md").read_text()
    assert "| N65536_K8192_D256 | bfloat16 | cdist | 4 | 137.5 | 0.00% |" in full and "| 9 |" not in full


@pytest.mark.parametrize(
    "part", ["facts", "limits", "lstm", "vq", "layers", "persist:times", "persist:sanitizer", "cuda"]
)
def test_every_part_runs_dry(part: str) -> None:
    torch.set_num_threads(1)
    status, rows = run_units(worker.units(part, DRY)[: 2 if part == "lstm" else None])
    rows = [row for row in rows if "begin" not in row]
    assert status == 0 and rows
    for row in rows:
        verdict = row.get("gate", "passed")
        assert verdict == "passed" or verdict.startswith(("not installed", "cannot run")), row
    untimed = part in ("facts", "cuda", "persist:sanitizer")
    assert untimed or any("ms" in row or "value" in row for row in rows)


def test_dry_run_from_end_to_end(tmp_path: Path) -> None:
    rows, verified = tmp_path / "rows.jsonl", tmp_path / "verified.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--parts", "parity,vq,lookup,mimo,host"]
    env = process.environment(1, {})
    env.pop("TRITON_INTERPRET", None)  # the parts that need it set it
    done = subprocess.run(
        [*command, "--rows", str(rows), "--verified", str(verified)],
        cwd=process.ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["table"] for row in found} == {"parity", "vq", "few rows", "mimo", "tests"}
    assert all(row["device"] == "dry run" and "commit" in row for row in found)
    assert "targets: 0 met" in done.stdout and "Kernels against float64" in done.stdout
    assert json.loads(verified.read_text())["sm_00"]["lstm"]["dtypes"] == ["bfloat16"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=process.ROOT, env=process.environment(1, {}), capture_output=True, text=True)
    assert done.returncode == 1
    assert f"no GPU that this torch can use (failed: RuntimeError: torch {torch.__version__} sees none)" in done.stderr


def test_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu import __main__ as main

    monkeypatch.setattr("sys.argv", ["gpu", "--parts", "lstm,dream"])
    with pytest.raises(SystemExit) as exit:
        main.arguments()
    assert exit.value.code == 2 and "--parts: dream is none of persist-parity, persist" in capsys.readouterr().err

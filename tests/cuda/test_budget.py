"""The kernels of csrc/cuda take no more of a GPU than budget.json says; see ``budget``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import budget as budgets
from tests.cuda import library
from tests.cuda.budget import Kernel, Taken
from tests.cuda.library import TARGET

pytest.importorskip("triton", reason="cuobjdump comes with triton")

FORWARD = Kernel("csrc/cuda/persist_forward_float16.cu", "tile 3", "80")


@pytest.fixture(scope="module")
def budget() -> dict[str, Any]:
    """Skips where the rows are of another compiler, or there is none."""
    reason = library.why_no_nvcc()
    found = budgets.load()
    reason = reason or budgets.why_not_comparable(found, library.kernels(TARGET, []))
    if reason is not None:
        pytest.skip(reason)
    return found


@pytest.mark.parametrize("arch", budgets.TARGETS)
def test_what_changed_is_within_its_rows(arch: str, budget: dict[str, Any]) -> None:
    """Only files that differ from those of the rows are compiled; `make check-gpu` compiles all for every target."""
    changed = budgets.changed(budget, library.kernels(arch, []).flags)
    measured = budgets.measure(library.kernels(arch, changed).objects) if changed else {}
    wrong = budgets.misnamed(budget, measured, changed)
    assert not wrong + [line for kernel, m in measured.items() for line in budgets.exceeded(budget, kernel, m)]


def test_every_row_is_of_a_file() -> None:
    """And launchers, which have no kernels, are known too."""
    found = budgets.load()
    assert set(found["sources"]) == set(budgets.sources())
    assert {f"csrc/cuda/{row.split()[0]}.cu" for row in found["rows"]} < set(found["sources"])


def row(budget: dict[str, Any], **change: Any) -> tuple[dict[str, Any], Taken]:
    """What exactly fills the row of ``FORWARD``, and the budget with that row changed."""
    changed = copy.deepcopy(budget)
    values = changed["rows"][FORWARD.row]
    taken = Taken(values["registers"], 0, values["shared"], 256)
    values.update(change)
    return changed, taken


@pytest.mark.parametrize("name", budgets.ROW)
def test_an_exceeded_row_is_named(name: str) -> None:
    budget, taken = row(budgets.load())
    assert not budgets.exceeded(budget, FORWARD, taken)
    value = getattr(taken, name)
    complaint = f"{FORWARD.row}: {value + 1} {name}, budget {value}; {budgets.REWRITE}"
    assert budgets.exceeded(budget, FORWARD, taken._replace(**{name: value + 1})) == [complaint]


@pytest.mark.parametrize(
    ("change", "values", "complaint"),
    [
        ({"runs": False}, {}, "sm_80 has room for this tile now; "),
        ({"shared": 2**18}, {"shared": 163 * 1024 + 1}, "sm_80 has no room for this tile any more; "),
        ({"registers": 300}, {"registers": 257}, "256 threads of 257 registers are more than 65536"),
    ],
)
def test_what_no_launch_can_have_is_named(change: dict[str, Any], values: dict[str, Any], complaint: str) -> None:
    budget, taken = row(budgets.load(), **change)
    (line,) = budgets.exceeded(budget, FORWARD, taken._replace(**values))
    assert line.startswith(f"{FORWARD.row}: {complaint}")


@pytest.mark.parametrize("arch", ["80", "89"])
def test_a_stack_that_is_not_listed_is_named(arch: str) -> None:
    """Of targets without rows too, which may have more registers."""
    budget, taken = row(budgets.load())
    kernel, more = FORWARD._replace(arch=arch), 0 if arch == "80" else 1
    of = taken._replace(registers=taken.registers + more, stack=8)
    (line,) = budgets.exceeded({**budget, "stack": {kernel.row: 4}}, kernel, of)
    assert line == f"{kernel.row}: 8 bytes of stack, budget 4; {budgets.REWRITE}"
    assert not budgets.exceeded({**budget, "stack": {kernel.row: 8}}, kernel, of)


def test_missing_rows_are_named() -> None:
    budget, taken = row(budgets.load())
    old = budget["rows"].pop(FORWARD.row)
    words = f"{FORWARD.row}: not in budget.json; {budgets.REWRITE}"
    assert budgets.exceeded(budget, FORWARD, taken) == [words]
    kept = {row: old for row in (FORWARD._replace(arch=arch).row for arch in budgets.TARGETS)}
    assert budgets.misnamed({"rows": {**kept, "gone": old, "other": old}}, [FORWARD], [FORWARD.source, "gone.cu"]) == [
        f"gone: there is no such kernel any more; {budgets.REWRITE}"
    ]
    del kept[FORWARD.row]
    assert budgets.misnamed({"rows": kept}, [FORWARD], [FORWARD.source]) == [words]


def test_a_changed_file_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that it includes through others too, and flags; one that is new, and one that is gone."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    for name in ("a.cu", "b.h", "c.h"):
        (tmp_path / "csrc" / "cuda" / name).write_text({"a.cu": '#include "cuda/b.h"\n'}.get(name, "\n"))
    monkeypatch.setattr(budgets, "ROOT", tmp_path)
    source = "csrc/cuda/a.cu"
    budget = {"sources": {source: budgets.digest(source, ["-O3"])}}
    (tmp_path / "csrc" / "cuda" / "c.h").write_text("other\n")
    assert budgets.changed(budget, ["-O3"]) == []
    assert budgets.changed(budget, ["-O2"]) == [source]
    assert budgets.changed({"sources": {**budget["sources"], "gone.cu": "0"}}, ["-O3"]) == ["gone.cu"]
    assert budgets.changed({"sources": {}}, ["-O3"]) == [source]
    (tmp_path / "csrc" / "cuda" / "b.h").write_text('#include "cuda/c.h"\n')
    assert budgets.changed(budget, ["-O3"]) == [source]

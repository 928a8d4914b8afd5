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


class Found:
    """The committed rows, and the build for sm_80 that the session has anyway."""

    def __init__(self) -> None:
        self.budget = budgets.load()
        self.compiled = library.kernels(TARGET)
        self.measured = budgets.measure(self.compiled.objects)


@pytest.fixture(scope="module")
def found(package: Path) -> Found:
    """Skips where the rows are of another compiler."""
    of = Found()
    reason = budgets.why_not_comparable(of.budget, of.compiled)
    if reason is not None:
        pytest.skip(reason)
    return of


def test_every_kernel_has_rows(found: Found) -> None:
    # forward and backward, of two types; and one that is of no tile
    assert len(found.measured) == 4 * (len(budgets.tiles()) - 1) + 1
    assert not budgets.misnamed(found.budget, found.measured)


def test_the_build_is_within_its_rows(found: Found) -> None:
    assert not [line for kernel, m in found.measured.items() for line in budgets.exceeded(found.budget, kernel, m)]


def test_what_changed_is_within_its_rows_of_sm_90a(found: Found) -> None:
    """Only files that differ from those of the rows are compiled."""
    kernels = [kernel._replace(arch="90a") for kernel in found.measured]
    changed = budgets.changed(found.budget, kernels, found.compiled.flags)
    measured = budgets.measure(library.kernels("90a", changed).objects) if changed else {}
    assert not [line for kernel, m in measured.items() for line in budgets.exceeded(found.budget, kernel, m)]


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
    assert budgets.misnamed({"rows": {**kept, "gone": old}}, [FORWARD]) == [
        f"gone: there is no such kernel any more; {budgets.REWRITE}"
    ]
    del kept[FORWARD.row]
    assert budgets.misnamed({"rows": kept}, [FORWARD]) == [words]


def test_a_changed_file_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that it includes through others too, and flags; not the other direction's."""
    for name in ("a.cu", "b.h", "c.h"):
        (tmp_path / "csrc" / "cuda").mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / "cuda" / name).write_text({"a.cu": '#include "cuda/b.h"\n'}.get(name, "\n"))
    monkeypatch.setattr(budgets, "ROOT", tmp_path)
    kernel = Kernel("csrc/cuda/a.cu", "tile 0", "80")
    budget = {"rows": {kernel.row: {"source": budgets.digest(kernel.source, ["-O3"])}}}
    (tmp_path / "csrc" / "cuda" / "c.h").write_text("other\n")
    assert budgets.changed(budget, [kernel], ["-O3"]) == []
    assert budgets.changed(budget, [kernel], ["-O2"]) == [kernel.source]
    (tmp_path / "csrc" / "cuda" / "b.h").write_text('#include "cuda/c.h"\n')
    assert budgets.changed(budget, [kernel], ["-O3"]) == [kernel.source]

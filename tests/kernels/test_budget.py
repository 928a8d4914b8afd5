"""Kernels compile without a warning and take no more of a GPU than budget.json says; see ``budget`` and ``compile``."""

from __future__ import annotations

import ast
import copy
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fastseq_kernels import _launch, _sources  # noqa: E402

from fastseq import ops  # noqa: E402
from tests.kernels import budget as budgets  # noqa: E402
from tests.kernels.cases import Call, written  # noqa: E402
from tests.kernels.compile import Job, Measured, jobs, launches, measure_all, record, specialise  # noqa: E402

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="TRITON_INTERPRET=1 has no compiler")
each_module = pytest.mark.parametrize("module", budgets.modules())


@pytest.fixture(scope="module")
def budget() -> dict[str, Any]:
    """The committed rows."""
    found = budgets.load()
    reason = budgets.why_not_comparable(found)
    if reason is not None:
        pytest.skip(reason)
    return found


@each_module
def test_every_launch_has_a_row(budget: dict[str, Any], module: str) -> None:
    assert not budgets.misnamed(budget, jobs([module], budgets.TARGETS), [module])


def test_every_kernel_is_launched() -> None:
    """And so has rows."""
    folder = Path(_sources.__file__).parent
    trees = [ast.parse(path.read_text()) for path in folder.glob("*.py")]
    kernels = {
        n.name for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[-7:] == "_kernel"
    }
    calls = [(m, c.name, t) for m in budgets.modules() for c in written(m) for t in budgets.TARGETS]
    assert kernels == {launch.kernel.__name__ for call in calls for launch in launches(*call)}


def test_every_operator_is_called() -> None:
    tables = [importlib.import_module(f"fastseq.ops.{m.name}") for m in pkgutil.iter_modules(ops.__path__)]
    found = [table.BACKENDS for table in tables if isinstance(getattr(table, "BACKENDS", None), dict)]
    names = {op for table in found for op, backends in table.items() if any(b.name == "triton" for b in backends)}
    names -= {"lstm_mixed_forward", "lstm_mixed_backward"}  # without kernels: on a GPU functional.lstm has another way
    assert len(names) > 15
    assert names <= {call.op for module in budgets.modules() for call in written(module)}


@each_module
def test_what_changed_is_within_its_rows(budget: dict[str, Any], module: str) -> None:
    """Only binaries that differ from those of the rows are compiled: all of them take many minutes."""
    measured = measure_all(budgets.changed(budget, jobs([module], budgets.TARGETS)))
    assert not [line for job, found in measured.items() for line in budgets.exceeded(budget, job, found)]


@pytest.fixture(scope="module")
def one() -> tuple[Job, Measured]:
    """One small binary."""
    job = next(j for j in jobs(["lstm_noise"], [80]) if j.call == "lstm_noise:odd")
    return job, measure_all([job])[job]


def test_a_compiled_kernel_is_within_its_row(budget: dict[str, Any], one: tuple[Job, Measured]) -> None:
    assert one[1].registers > 8 and one[1].instructions > 50
    assert not budgets.exceeded(budget, *one)


@pytest.mark.parametrize(
    ("name", "by", "complaint"),
    [
        ("registers", -1, "registers, budget"),
        ("shared", -1, "shared, budget"),
        ("matrix", 1, "0 matrix instructions, budget 1"),
    ],
)
def test_an_exceeded_row_is_named(
    budget: dict[str, Any], one: tuple[Job, Measured], name: str, by: int, complaint: str
) -> None:
    job, found = one
    changed = copy.deepcopy(budget)
    changed["rows"][job.row][name] = getattr(found, name) + by
    (line,) = budgets.exceeded(changed, job, found)
    assert line.startswith(f"{job.row}: ") and complaint in line and "make budget" in line


def test_no_barrier_is_gone(budget: dict[str, Any]) -> None:
    """No test sees a missing one: the interpreter has one thread, and on a GPU the order is right nearly always."""
    assert budget["barriers"] == budgets.barriers(), f"barriers in the kernels; {budgets.REWRITE}"


def test_a_missing_row_is_named(budget: dict[str, Any], one: tuple[Job, Measured]) -> None:
    job, found = one
    changed = copy.deepcopy(budget)
    del changed["rows"][job.row]
    assert budgets.exceeded(changed, job, found) == [f"{job.row}: not in budget.json; {budgets.REWRITE}"]
    assert budgets.misnamed(changed, [job], []) == [f"{job.row}: not in budget.json; {budgets.REWRITE}"]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"warnings": ["warning: slow"]}, "warning: slow"),
        ({"stack": 8}, "registers are spilled, 8 bytes of stack and 0 accesses"),
        ({"spills": 2}, "registers are spilled, 0 bytes of stack and 2 accesses"),
        ({"shared": 2**18}, "262144 bytes of shared memory, sm_80 has 166912"),
        ({"products": 3}, "3 tl.dot for matrix units, and no matrix instruction"),
    ],
)
def test_faults_are_named(
    budget: dict[str, Any], one: tuple[Job, Measured], values: dict[str, Any], complaint: str
) -> None:
    job, found = one
    assert f"{job.row}: {complaint}" in budgets.exceeded(budget, job, found._replace(**values))


def test_a_changed_kernel_is_compiled(budget: dict[str, Any], one: tuple[Job, Measured]) -> None:
    assert not budgets.changed(budget, [one[0]])
    changed = copy.deepcopy(budget)
    changed["rows"][one[0].row]["source"] = "another"
    assert budgets.changed(changed, [one[0]]) == [one[0]]


FIRST, AFTER = (1, 17, 65, 4095, 5001), (2, 16, 48, 100, 5000)


def keys(call: Call, sizes: tuple[int, ...]) -> set[str]:
    """The binaries of a call for each value of each of its sizes, one changed at a time."""
    found = set()
    for name in call.sizes:
        few = {min(size, 5) for size in sizes}  # a loop over T may launch for each step
        for size in few if name == "T" else sizes:
            found |= {specialise(launch, 90).key for launch in record(call, _launch.TARGETS[90], **{name: size})}
    return found


@each_module
def test_no_size_of_the_data_compiles_anew(module: str) -> None:
    """After a few odd values of T, B, N and K, none of the others needs another binary."""
    for call in written(module):
        new = keys(call, AFTER) - keys(call, FIRST)
        assert not new, f"{call.name}: {len(new)} more binaries for other sizes than {FIRST}"

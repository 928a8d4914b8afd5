"""What every kernel may take on sm_80 and sm_90: ``budget.json``, one row per binary, and the comparison with it.

python -m tests.kernels.budget            rewrite it
python -m tests.kernels.budget --check    compile every kernel for every target and compare
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from fastseq_kernels import _launch, _sources

from tests.kernels.cases import CALLS
from tests.kernels.compile import Job, Measured, faults, jobs, measure_all, table

FILE = Path(__file__).with_name("budget.json")
TARGETS = (80, 90)  # those with rows; the others must only be free of faults
ROW = ("registers", "shared", "matrix")
REWRITE = "if that is meant, `make budget` rewrites the row"


def load() -> dict[str, Any]:
    budget: dict[str, Any] = json.loads(FILE.read_text())
    return budget


def modules() -> list[str]:
    """Modules with an operator, those that do not import too."""
    return [m for m in _sources.modules() if m in CALLS]


def barriers() -> dict[str, int]:
    """How often each file says ``tl.debug_barrier()``."""
    folder = Path(_sources.__file__).parent
    found = {path.name: path.read_text().count("tl.debug_barrier()") for path in sorted(folder.glob("*.py"))}
    return {name: count for name, count in found.items() if count}


def exceeded(budget: dict[str, Any], job: Job, found: Measured) -> list[str]:
    """What is over the job's row, with the row's name; the faults that no budget allows come first."""
    wrong = faults(job, found)
    if job.capability not in TARGETS:
        return wrong
    row = budget["rows"].get(job.row)
    if row is None:
        return [*wrong, f"{job.row}: not in {FILE.name}; {REWRITE}"]
    for name in ("registers", "shared"):
        if getattr(found, name) > row[name]:
            wrong.append(f"{job.row}: {getattr(found, name)} {name}, budget {row[name]}; {REWRITE}")
    if bool(found.matrix) != bool(row["matrix"]):
        wrong.append(f"{job.row}: {found.matrix} matrix instructions, budget {row['matrix']}; {REWRITE}")
    return wrong


def misnamed(budget: dict[str, Any], todo: Iterable[Job], of: Iterable[str]) -> list[str]:
    """Rows that no launch has, and launches that have no row."""
    expected = {job.row for job in todo}
    rows = {row for row in budget["rows"] if row.split("/")[0] in of}
    return [
        *(f"{row}: not in {FILE.name}; {REWRITE}" for row in sorted(expected - rows)),
        *(f"{row}: no call launches this any more; {REWRITE}" for row in sorted(rows - expected)),
    ]


def changed(budget: dict[str, Any], todo: Iterable[Job]) -> list[Job]:
    """The binaries that are not those whose rows were measured: the kernel, its types or its constants differ."""
    return [job for job in todo if budget["rows"].get(job.row, {}).get("source") != job.specialised.key]


def why_not_comparable(budget: dict[str, Any]) -> str | None:
    """Another triton makes other binaries."""
    version = importlib.metadata.version("triton")
    return None if version == budget["triton"] else f"the budget is of triton {budget['triton']}, this is {version}"


def write(only: list[str]) -> int:
    """Compile what is not known, and write the rows of all that have no fault; rows of other modules stay."""
    before = load()["rows"] if FILE.exists() else {}
    measured = measure_all(jobs(only, TARGETS))
    wrong = [line for job, found in measured.items() for line in faults(job, found)]
    rows = {row: values for row, values in before.items() if row.split("/")[0] not in only}
    for job, found in measured.items():
        if not faults(job, found):
            rows[job.row] = {**{name: getattr(found, name) for name in ROW}, "source": job.specialised.key}
    lines = ",\n".join(f"    {json.dumps(row)}: {json.dumps(rows[row])}" for row in sorted(rows))
    version, waits = json.dumps(importlib.metadata.version("triton")), json.dumps(barriers())
    FILE.write_text(f'{{\n  "triton": {version},\n  "barriers": {waits},\n  "rows": {{\n{lines}\n  }}\n}}\n')
    print("\n".join([*wrong, f"{FILE}: {len(rows)} rows"]))
    return bool(wrong)


def check() -> int:
    budget = load()
    todo = jobs(modules(), _launch.TARGETS)
    measured = measure_all(todo)
    print("\n".join(table(measured)))
    wrong = misnamed(budget, (j for j in todo if j.capability in TARGETS), modules())
    wrong += [line for job, found in measured.items() for line in exceeded(budget, job, found)]
    print("\n".join(wrong) or f"{len(measured)} binaries within their budgets")
    return bool(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description="what kernels may take of a GPU")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--module", help="only these, by comma, when rewriting")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    return check() if arguments.check else write(arguments.module.split(",") if arguments.module else modules())


if __name__ == "__main__":
    sys.exit(main())

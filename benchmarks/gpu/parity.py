"""Every Triton host function on the device against its definition in float64, and what that verifies.

A part is ``parity:lstm-bfloat16-0/2``, the first of two parts of a family in a dtype: they go side by side, since most
of the time goes into compilation. It needs pytest and hypothesis, since the inputs are those of the tests. In a dry run
a few cases go through Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.gpu.part import Context, Row, Unit, reason
from benchmarks.harness import ABSENT, CannotRun
from tests.tolerance import OUTPUTS, assert_within_budget

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
SECONDS = 2.0  # of a case, roughly: one in a few compiles anew
LIMIT = 120.0  # where many compile at the same time
Definition = Callable[..., Any]


class Check(NamedTuple):
    """One call of a host function. ``run`` raises AssertionError where its result is wrong."""

    module: str
    op: str
    case: str
    run: Callable[[], None]
    limit: float = LIMIT


class Kernels(NamedTuple):
    """How the checks call host functions: on which device, and in which dtype of DTYPES."""

    context: Context
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def judged(self) -> torch.dtype:
        """The dtype whose plain computation is as exact as the kernel may be: float16 rounds as TF32 does."""
        return torch.float16 if self.dtype == "tf32" else self.torch_dtype

    def moved(self, args: Sequence[Any], stay: Sequence[Any]) -> list[Any]:
        """``args`` on the device, but for those in ``stay``."""

        def move(value: Any) -> Any:
            moves = isinstance(value, Tensor) and not any(value is s for s in stay)
            return value.to(self.context.device) if moves else value

        return list(pytree.tree_map(move, list(args)))

    def call(self, module: str, op: str, args: Sequence[Any], stay: Sequence[Any] = ()) -> list[Tensor]:
        """Results on the CPU of a host function called with ``args``, moved to the device but for those in ``stay``.

        Raises:
            CannotRun: there is no such function, or it says why not.
        """
        kernels = importlib.import_module(f"fastseq_kernels.{module}")
        if not hasattr(kernels, op):
            raise CannotRun(f"fastseq_kernels.{module} has no {op}")

        moved = self.moved(args, stay)
        why_not = getattr(kernels, f"{op}_why_not", None)
        no = None if why_not is None else why_not(*moved)
        if no is not None:
            raise CannotRun(no)
        return [v.cpu() for v in pytree.tree_leaves(getattr(kernels, op)(*moved))]

    def gradients(self, kept: list[Tensor]) -> list[Any]:
        """Random ones of all outputs, in the dtype of each."""
        from tests.ops import lstm_cases  # needs pytest, which who only reads verdicts need not have

        return list(lstm_cases.upstream(tuple(kept)))

    def within_budget(
        self,
        names: str,
        got: Sequence[Tensor],
        definition: Callable[..., Any],
        inputs: Sequence[Any],
        factor: int = OUTPUTS,
    ) -> None:
        assert_within_budget(names, [g.to(self.judged) for g in got], definition, inputs, factor)


def definition(op: str, table: Mapping[str, Any]) -> Definition:
    """The operator in plain torch."""
    return next(b.run for b in table[op] if b.name == "reference")


def _row(check: Check, dtype: str) -> list[Row]:
    row: Row = {"op": "parity", "table": "parity", "module": check.module, "operator": check.op, "case": check.case}
    try:
        check.run()
        verdict = "passed"
    except CannotRun as error:
        verdict = f"{ABSENT[1]}{error}"
    except AssertionError as error:
        print(error)
        verdict = f"wrong: {str(error).splitlines()[0][:200]}"
    except Exception as error:  # a kernel that does not compile, or that the device refuses
        traceback.print_exc()
        verdict = f"failed: {reason(error)}"
    return [{**row, "dtype": dtype, "gate": verdict}]


def units(context: Context, kind: str) -> list[Unit]:
    family, dtype, part = kind.split("-")
    first, count = (int(n) for n in part.split("/"))
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests import interpreter

        interpreter.patch()
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory is NaN until written
    if hasattr(torch.backends.cudnn, "rnn"):
        torch.backends.cudnn.rnn.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    module = importlib.import_module(f"benchmarks.gpu.parity_{family}")
    seconds = getattr(module, "SECONDS", SECONDS)
    checks = list(module.checks(Kernels(context, dtype)))
    planned = Counter(check.module for check in checks)  # in all parts: the plan of one that never began is known
    shared = {"op": "plan", "table": "parity", "dtype": dtype}
    plan = [{**shared, "module": module, "cases": count} for module, count in planned.items()]
    cases = [
        Unit(f"{c.module} {c.op} {c.case} {dtype}", seconds, functools.partial(_row, c, dtype), c.limit)
        for c in checks[first::count]
    ]
    return [Unit(f"plan {kind}", 0.0, lambda: plan), *cases]


class Verdict(NamedTuple):
    """Of one module: the dtypes of which every case passed, what is against others, and whether a case was wrong."""

    dtypes: list[str]
    reasons: list[str]
    wrong: bool = False


def verdicts(rows: Iterable[Row]) -> dict[str, Verdict]:
    """What the rows of the parity say about each module. No dtype counts where a case of any dtype was wrong."""
    planned: dict[tuple[str, str], int] = {}
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["op"] == "plan":
            planned[row["module"], row["dtype"]] = row["cases"]
        elif row["op"] == "parity":
            found.setdefault((row["module"], row["dtype"]), []).append(row)
    verdict: dict[str, Verdict] = {}
    for (module, dtype), cases in planned.items():
        own = verdict.setdefault(module, Verdict([], []))
        mine = found.get((module, dtype), [])
        absent = [r for r in mine if r["gate"].startswith(ABSENT)]
        wrong = [r for r in mine if r["gate"] != "passed" and r not in absent]
        own.reasons.extend(f"{r['operator']} {r['case']} {dtype}: {r['gate']}" for r in wrong)
        if wrong:
            verdict[module] = own._replace(wrong=True)
        if len(mine) < cases:
            own.reasons.append(f"{dtype}: {cases - len(mine)} of {cases} cases have no result")
        elif not wrong and len(absent) < cases:
            own.dtypes.append(dtype)
    return {module: v._replace(dtypes=[]) if v.wrong else v for module, v in verdict.items()}


def record(rows: Iterable[Row], facts: Row, path: Path, source_hash: Callable[[str], str]) -> list[str]:
    """Write what was verified on this compute capability into ``path``; rows of others stay. Returns lines to print.

    A module whose results are wrong loses its entry. One of which cases are missing keeps an entry for another source:
    that does not count anyway.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    own = known.setdefault(facts["capability"], {})
    lines = []
    for module, verdict in sorted(verdicts(rows).items()):
        if verdict.dtypes:
            shared = {key: facts[key] for key in ("device", "driver", "torch", "triton", "date", "commit")}
            own[module] = {"source": source_hash(module), "dtypes": sorted(verdict.dtypes), **shared}
            lines.append(f"{module}: verified for {', '.join(sorted(verdict.dtypes))}")
        elif verdict.wrong:
            own.pop(module, None)
        lines += [f"{module}: {why}" for why in verdict.reasons[:5]]
    if not own:
        del known[facts["capability"]]
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    return lines

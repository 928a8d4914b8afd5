"""``python -m benchmarks.run lstm|vq|packed|mimo``: measure, print the tables beside the targets, append the rows.

A ratio is our time over theirs: the median of the ratios of interleaved rounds, with the 95 % bootstrap interval of
that median in brackets.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import (
    base,
    harness,
    lstm,
    lstm_table,
    mimo,
    mimo_table,
    packed,
    packed_table,
    peak,
    table,
    vq,
    vq_table,
)

# an operator's providers, and what is measured of it: cases, targets, tables
OPERATORS: dict[str, tuple[Any, Any]] = {
    "lstm": (lstm, lstm_table),
    "vq": (vq, vq_table),
    "packed": (packed, packed_table),
    "mimo": (mimo, mimo_table),
}
PAGE = harness.ROOT / "docs" / "performance.md"
QUICK_FLOPS = 1e9
MARKS = "<!-- bench:{} -->", "<!-- /bench:{} -->"


def _of_each(words: Callable[[Any, Any], Iterable[str]]) -> str:
    """For the help: what ``words`` finds of each operator."""
    return "; ".join(f"{op}: {', '.join(words(*pair))}" for op, pair in OPERATORS.items())


def arguments() -> argparse.Namespace:
    modes = _of_each(lambda operator, tables: tables.TABLES)
    rivals = _of_each(lambda operator, tables: (name for name in operator.PROVIDERS if name not in operator.OURS))
    examples = _of_each(lambda operator, tables: [tables.EXAMPLE])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("op", choices=list(OPERATORS))
    parser.add_argument("--mode", help=f"comma-separated, of {modes} (default: all)")
    parser.add_argument("--cases", help=f"comma-separated, any size, such as {examples} (default: the table)")
    parser.add_argument("--providers", help=f"comma-separated rivals, of {rivals} (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every provider (default: 2)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds per case (default: 5 to 15, by their length)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of the small cases; writes no rows")
    parser.add_argument("--base", metavar="REF", help="also time this commit, built in a worktree, and print the ratio")
    parser.add_argument("--no-save", action="store_true", help="do not append the rows to benchmarks/results")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: write docs/performance.md")
    parser.add_argument("--dksplit", type=Path, metavar="FOLDER", help="where its package lies, if not installed")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="where the rows go, and come from for --markdown")
    given = parser.parse_args()
    if given.dksplit:
        sys.path.append(str(given.dksplit.resolve()))
    operator, tables = OPERATORS[given.op]
    for option, known in (("mode", tables.TABLES), ("providers", operator.PROVIDERS)):
        for name in getattr(given, option).split(",") if getattr(given, option) else []:
            if name not in known:
                parser.error(f"--{option}: {name} is none of {', '.join(known)}")
    modes = given.mode.split(",") if given.mode else tables.TABLES
    names = given.cases.split(",") if given.cases else None
    try:
        given.chosen = {mode: tables.cases(mode, names) for mode in modes}
    except ValueError as error:
        parser.error(f"--cases: {error}")
    return given


def measure(given: argparse.Namespace, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of the chosen modes; each table is printed, and its rows are kept, when its last case is done."""
    operator, tables = OPERATORS[given.op]
    target = given.rows or (None if given.no_save or given.quick else harness.results_file())
    only = given.providers.split(",") if given.providers else tables.QUICK if given.quick else None
    rounds = 3 if given.quick and given.rounds is None else given.rounds
    rows: list[dict[str, Any]] = []
    for mode, cases in given.chosen.items():
        for case in cases:
            if given.quick and case.flops > QUICK_FLOPS:
                continue
            for count in tables.thread_counts(mode, given.threads):
                _progress(f"{mode} {case.name}, {count} threads")
                providers = tables.providers(mode, case, only)
                rest = count, rounds, tables.SECONDS[mode], tables.memory_of(mode)
                found = harness.measure(operator, case, providers, *rest)
                rows += [{**row, "table": mode, **shared} for row in found]
        _progress("")
        if not cases:
            continue
        mine = [row for row in rows if row["table"] == mode]
        print(table.text(tables.TABLES[mode](mine)), end="\n\n", flush=True)
        if target:
            harness.append(mine, target)
            print(f"{len(mine)} rows appended to {os.path.relpath(target)}\n", flush=True)
    return rows


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def print_machine(backend: str, shared: dict[str, Any], thread_count: int) -> None:
    """The machine, its limits, and a warning where others use it."""
    tree = {True: "clean", False: "with uncommitted changes", None: "no git"}[shared["clean"]]
    print(f"{shared['device']}; torch {shared['torch']}; fastseq/{backend}; commit {shared['commit']}, {tree}")
    try:
        rates = peak.fma_by_width(thread_count)
        print(f"limits with {thread_count} threads: FMA {max(rates.values()):.0f} GFLOP/s; reading ", end="")
        sizes = {"1 MB": 1 << 20, "4 MB": 4 << 20, "16 MB": 16 << 20, "256 MB": 256 << 20}
        print(", ".join(f"{name} {peak.read_bandwidth(size, thread_count):.0f} GB/s" for name, size in sizes.items()))
    except peak.NoCompiler as error:
        print(error)
    if (shared["load"] or 0) > 0.5:
        print(f"WARNING: the machine is busy (load {shared['load']}); these figures are not worth keeping")
    print(flush=True)


def _source(rows: list[dict[str, Any]]) -> str:
    """Where the rows of one run were measured."""
    first = rows[0]
    commit = f"{first['commit']}{'' if first['clean'] else ' with uncommitted changes'}"
    day = first["run"][:10]
    count = max(row["threads"] for row in rows)
    threads = f"{count} thread{'s'[: count > 1]}"
    return f"Measured on {first['device']}, {threads}, torch {first['torch']}, commit {commit}, {day}."


def markdown(op: str, rows_file: Path) -> str:
    """The newest rows of each table, and where they were measured.

    Raises:
        SystemExit: without rows.
    """
    rows = [row for row in harness.read(rows_file) if row["op"] == op]
    parts, sources = [], []
    for mode, draw in OPERATORS[op][1].TABLES.items():
        mine = [row for row in rows if row["table"] == mode]
        newest = max((row["run"] for row in mine), default=None)
        mine = [row for row in mine if row["run"] == newest]
        if mine:
            parts.append(table.markdown(draw(mine)))
            sources.append(_source(mine))
    if not parts:
        sys.exit(f"no rows in {rows_file}; first run: python -m benchmarks.run {op}")
    if len(set(sources)) == 1:
        parts.append(sources[0])
    else:
        parts = [f"{part}\n\n{source}" for part, source in zip(parts, sources, strict=True)]
    return "\n\n".join(parts)


def write_markdown(op: str, rows_file: Path, page: Path) -> None:
    """Put the newest rows of each table between the marks in ``page``.

    Raises:
        SystemExit: without rows or without marks.
    """
    begin, end = (mark.format(op) for mark in MARKS)
    text = page.read_text()
    block = "\n\n".join([begin, markdown(op, rows_file), end])
    if begin not in text or end not in text:
        sys.exit(f"{page.name} lacks the marks {begin} and {end}")
    page.write_text(re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.S))


def main() -> None:
    given = arguments()
    if given.markdown:
        write_markdown(given.op, given.rows or harness.results_file(), PAGE)
        return
    begin = time.perf_counter()
    if given.base:
        base.compare(given.base, sys.argv[1:])
        return
    operator = OPERATORS[given.op][0]
    shared = harness.provenance(given.threads, operator.PACKAGES)
    print_machine(operator.backend(), shared, given.threads)
    rows = measure(given, shared)
    print(f"{time.perf_counter() - begin:.0f} s")
    failed = [r for r in rows if r["provider"].startswith("fastseq") and r["gate"] != "passed"]
    failed = [r for r in failed if not r["gate"].startswith(harness.ABSENT)]
    if failed:
        sys.exit(f"fastseq failed the gate in {len(failed)} rows")


if __name__ == "__main__":
    main()

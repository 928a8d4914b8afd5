"""``python -m benchmarks.run lstm``: measure, print the tables beside the targets, append the rows.

A ratio is our time over theirs: the median of the ratios of interleaved rounds, with the 95 % bootstrap interval of
that median in brackets.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import base, harness, lstm, lstm_table, peak

README = harness.ROOT / "README.md"
QUICK_FLOPS = 1e9
MARKS = "<!-- bench:{} -->", "<!-- /bench:{} -->"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("op", choices=["lstm"])
    parser.add_argument("--mode", help=f"comma-separated, of: {', '.join(lstm_table.TABLES)} (default: all)")
    parser.add_argument("--cases", help="comma-separated, such as T100_B1_H128; any size will do (default: the table)")
    parser.add_argument("--providers", help="comma-separated rivals, of: stock, loop, compile, onnxruntime, openvino")
    parser.add_argument("--threads", type=int, default=2, help="threads of every provider (default: 2)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds per case (default: 5 to 15, by their length)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of the small cases; writes no rows")
    parser.add_argument("--base", metavar="REF", help="also time this commit, built in a worktree, and print the ratio")
    parser.add_argument("--no-save", action="store_true", help="do not append the rows to benchmarks/results")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: write README's table from the rows")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="where the rows go, and come from for --markdown")
    given = parser.parse_args()
    for option, known in (("mode", lstm_table.TABLES), ("providers", lstm.PROVIDERS)):
        for name in getattr(given, option).split(",") if getattr(given, option) else []:
            if name not in known:
                parser.error(f"--{option}: {name} is none of {', '.join(known)}")
    for name in given.cases.split(",") if given.cases else []:
        try:
            lstm.Case.parse(name, "train")
        except ValueError as error:
            parser.error(f"--cases: {error}")
    return given


def chosen_cases(given: argparse.Namespace, mode: str) -> list[lstm.Case]:
    cases = lstm_table.cases(mode)
    if given.cases:
        kind = cases[0].mode
        cases = [lstm.Case.parse(name, kind) for name in given.cases.split(",")]
        if mode == "stream":
            cases = [case._replace(T=1) for case in cases]
    return [case for case in cases if case.flops <= QUICK_FLOPS] if given.quick else cases


def measure(given: argparse.Namespace, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of the chosen modes; each table is printed, and its rows are kept, when its last case is done."""
    target = given.rows or (None if given.no_save or given.quick else harness.results_file())
    only = given.providers.split(",") if given.providers else None
    if only is None and given.quick:
        only = ["stock", "loop", "onnxruntime", "openvino"]
    rows: list[dict[str, Any]] = []
    for mode in given.mode.split(",") if given.mode else lstm_table.TABLES:
        counts = sorted({1, given.threads}) if mode == "scaling" else [given.threads]
        for case in chosen_cases(given, mode):
            for count in counts:
                _progress(f"{mode} {case.name}, {count} threads")
                providers = lstm_table.providers(mode, case, only)
                rounds = 3 if given.quick and given.rounds is None else given.rounds
                seconds = lstm_table.SECONDS[mode]
                found = harness.measure(lstm, case, providers, count, rounds, seconds, mode == "memory")
                rows += [{**row, "table": mode, **shared} for row in found]
        _progress("")
        mine = [row for row in rows if row["table"] == mode]
        print(lstm_table.text(lstm_table.TABLES[mode](mine)), end="\n\n", flush=True)
        for row in mine:
            if row["gate"] != "passed":
                outcome = "beyond the error budget" if "ms" in row else "no time"
                print(f"  {row['label']} on {row['case']}: {outcome}, {row['gate']}", flush=True)
        if target:
            harness.append(mine, target)
            print(f"{len(mine)} rows appended to {os.path.relpath(target)}\n", flush=True)
    return rows


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def print_machine(shared: dict[str, Any], thread_count: int) -> None:
    """The machine, its limits, and a warning where others use it."""
    tree = {True: "clean", False: "with uncommitted changes", None: "no git"}[shared["clean"]]
    print(f"{shared['device']}; torch {shared['torch']}; fastseq/{lstm.backend()}; commit {shared['commit']}, {tree}")
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
    return f"Measured on {first['device']}, {count} threads, torch {first['torch']}, commit {commit}, {day}."


def write_markdown(op: str, rows_file: Path, readme: Path) -> None:
    """Put the newest rows of each table between the marks in ``readme``.

    Raises:
        SystemExit: without rows or without marks.
    """
    rows = harness.read(rows_file)
    parts, sources = [], []
    for mode, draw in lstm_table.TABLES.items():
        mine = [row for row in rows if row["table"] == mode]
        newest = max((row["run"] for row in mine), default=None)
        mine = [row for row in mine if row["run"] == newest]
        if mine:
            parts.append(lstm_table.markdown(draw(mine)))
            sources.append(_source(mine))
    if len(set(sources)) == 1:
        parts.append(sources[0])
    else:
        parts = [f"{part}\n\n{source}" for part, source in zip(parts, sources, strict=True)]
    begin, end = (mark.format(op) for mark in MARKS)
    text = readme.read_text()
    if not parts:
        sys.exit(f"no rows in {rows_file}; first run: python -m benchmarks.run {op}")
    if begin not in text or end not in text:
        sys.exit(f"README.md lacks the marks {begin} and {end}")
    block = "\n\n".join([begin, *parts, end])
    readme.write_text(re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.S))


def main() -> None:
    given = arguments()
    if given.markdown:
        write_markdown(given.op, given.rows or harness.results_file(), README)
        return
    begin = time.perf_counter()
    if given.base:
        base.compare(given.base, sys.argv[1:])
        return
    shared = harness.provenance(given.threads)
    print_machine(shared, given.threads)
    rows = measure(given, shared)
    print(f"{time.perf_counter() - begin:.0f} s")
    failed = [r for r in rows if r["provider"].startswith("fastseq") and r["gate"] != "passed"]
    if failed:
        sys.exit(f"fastseq failed the gate in {len(failed)} rows")


if __name__ == "__main__":
    main()

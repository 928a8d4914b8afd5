"""``python -m benchmarks.quality characters|words``: whether gates trained towards 0 and 1 lose less by compression.

That is the claim of G2-LSTM (Li et al., ICML 2018). Models that differ in the gates alone are trained on one text for
the same number of steps, and evaluated on other text as they are, compressed by ``fastseq.compress``, and with hard
gates. Trainings are kept under build/quality and go on where they stopped; rows are appended as they come, and what
there is a row for is not done again. With one thread characters take about half an hour, words about two.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, quality_compressed, quality_table, table
from benchmarks.experiment import say
from benchmarks.quality_case import KINDS, Task, train

TASKS = ("characters", "words")
RESULTS = harness.RESULTS / "quality.jsonl"
SAME = ("task", "model", "seed", "steps")  # what rows of one model share


def known(rows: list[dict[str, Any]], task: str, model: str, seed: int, steps: int) -> dict[str, dict[str, Any]]:
    """Way -> row, of one model."""
    return {row["way"]: row for row in rows if tuple(row[name] for name in SAME) == (task, model, seed, steps)}


def run(task: Task, names: list[str], seeds: list[int], steps: int, out: Path) -> None:
    shared = harness.provenance(torch.get_num_threads(), [])
    for seed in seeds:
        for name in names:
            there = known(harness.read(out), task.name, name, seed, steps)
            if not set(quality_compressed.ways(task.ranks)) - set(there):
                continue
            trained = train(task, KINDS[name], seed, steps, say)
            for row in quality_compressed.rows(task, KINDS[name], seed, steps, trained, there):
                harness.append([{**row, **shared}], out)
                say(f"{name}, seed {seed}, {row['way']}: {row['test']:.4f} {task.metric} ({row['cost']:+.4f})")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--table", action="store_true", help="print the table of the rows, train nothing")
    parser.add_argument("--models", nargs="+", choices=list(KINDS), help="default: those of the task")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: as many as the task has, from 0")
    parser.add_argument("--steps", type=int, help="of training; default: those of the task")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    found = parser.parse_args()
    for name in ("steps", "threads"):
        if getattr(found, name) is not None and getattr(found, name) < 1:
            parser.error(f"--{name}: expected a positive number, got {getattr(found, name)}")
    return found


def main() -> None:
    args = arguments()
    if not args.table:
        torch.set_num_threads(args.threads)
        task: Task = importlib.import_module(f"benchmarks.quality_{args.task}").task()
        seeds = list(range(task.seeds)) if args.seeds is None else args.seeds
        run(task, args.models or list(task.kinds), seeds, args.steps or task.steps, args.out)
    rows = [row for row in harness.read(args.out) if row["task"] == args.task]
    for found in quality_table.tables(rows):
        print(f"\n{table.markdown(found) if args.table else table.text(found)}")


if __name__ == "__main__":
    main()

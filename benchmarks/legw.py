"""``python -m benchmarks.legw``: what LEGW keeps of a model's quality as its batch grows, on real data.

The rate is tuned once, at the base batch; then the batch grows up to 64 times, with as many epochs, under four rules.
Rows are appended as they come, and what there is a row for is not done again. Times are of the processor, which others
that use the machine do not change much. An hour on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import experiment, harness, legw_table, table
from benchmarks.experiment import say
from benchmarks.legw_tasks import TASKS, Data, Splits, Task

RESULTS = harness.RESULTS / "legw.jsonl"
FACTORS = (1, 4, 16, 64)
SEEDS = 3
LEGW, LINEAR, BARE, NONE = RULES = legw_table.RULES
FIXED = 1 / 16  # of the training is the warm-up of the linear rule; Goyal et al. have 5 epochs of 90


class Trained(NamedTuple):
    model: nn.Module
    steps: int
    seconds: float  # of the processor, per epoch


def scheduled(task: Task, rule: str, k: int, rate: float, parameters: Any, examples: int) -> tuple[Any, Any]:
    """The optimizer and its scheduler; with the other rules LEGW is told that the batch is that of the base."""
    from fastseq.recipes import LEGW as Scheduler

    batch = k * task.base_batch
    base = task.base_batch if rule == LEGW else batch
    warmup = {LEGW: task.base_warmup_epochs, LINEAR: FIXED * task.epochs}.get(rule, 0.0)
    optimizer = task.optimizer(parameters, rate * {LINEAR: k, BARE: math.sqrt(k)}.get(rule, 1.0))
    steps = examples // batch
    return optimizer, Scheduler(optimizer, base, batch, warmup, steps, task.epochs, **task.schedule)


def train(task: Task, rule: str, k: int, rate: float, seed: int, data: Data) -> Trained:
    torch.manual_seed(seed)
    model, order = task.network(), torch.Generator().manual_seed(seed)
    optimizer, scheduler = scheduled(task, rule, k, rate, model.parameters(), len(data.x))
    begin, steps = time.process_time(), 0
    for _ in range(task.epochs):
        for which in torch.randperm(len(data.x), generator=order).split(k * task.base_batch):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(data.x[which]), data.labels[which]).backward()
            if task.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), task.clip)
            optimizer.step()
            scheduler.step()
            steps += 1
    return Trained(model.eval(), steps, (time.process_time() - begin) / task.epochs)


@torch.no_grad()
def judged(task: Task, model: nn.Module, data: Data) -> dict[str, float | None]:
    """The figure and the loss; None where training ran away."""
    logits: Tensor = model(data.x)
    loss = float(F.cross_entropy(logits, data.labels))
    if not math.isfinite(loss):
        return {"figure": None, "loss": None}
    return {"figure": round(task.figure(logits, data.labels), 4), "loss": round(loss, 5)}


def tuned(task: Task, splits: Splits, out: Path, shared: dict[str, Any]) -> float:
    """The rate of the least loss on held-out examples, at the base batch with its warm-up, of seed 0."""
    there = {row["rate"]: row for row in harness.read(out) if (row["task"], row["kind"]) == (task.name, "grid")}
    for rate in task.rates:
        if rate not in there:
            found = train(task, LEGW, 1, rate, 0, splits.training)
            row = {"task": task.name, "kind": "grid", "rate": rate, **judged(task, found.model, splits.held_out)}
            harness.append([{**row, **shared}], out)
            there[rate] = row
            say(f"{task.name}, rate {rate:g}: held-out loss {row['loss']}")
    return min(task.rates, key=lambda rate: math.inf if there[rate]["loss"] is None else there[rate]["loss"])


def run(task: Task, seed: int, out: Path) -> None:
    """Every rule with every batch; with k = 1 the two without a warm-up are one."""
    shared = harness.provenance(torch.get_num_threads(), ["mlxtend"])
    splits = task.load()
    rate = tuned(task, splits, out, shared)
    rows = [row for row in harness.read(out) if (row["task"], row["kind"], row.get("seed")) == (task.name, "run", seed)]
    done = {(row["rule"], row["k"]) for row in rows}
    for rule, k in itertools.product(RULES, FACTORS):
        if (rule, k) in done or (rule, k) == (BARE, 1):
            continue
        found = train(task, rule, k, rate, seed, splits.training)
        cell = {"task": task.name, "kind": "run", "rule": rule, "k": k, "batch": k * task.base_batch, "seed": seed}
        facts = {"rate": rate, "epochs": task.epochs, "steps": found.steps, "epoch_s": round(found.seconds, 3)}
        row = {**cell, **facts, "unit": task.unit, **judged(task, found.model, splits.test)}
        harness.append([{**row, **shared}], out)
        say(f"{task.name}, seed {seed}, batch x{k}, {rule}: {task.unit} {row['figure']}, {row['epoch_s']} s an epoch")


def arguments() -> argparse.Namespace:
    parser = experiment.parser("legw", __doc__, "tasks", TASKS, SEEDS, RESULTS)
    return experiment.parsed(parser, "tasks", TASKS)


def main() -> None:
    args = arguments()
    if not args.table:
        torch.set_num_threads(args.threads)
        for seed in args.seeds:
            for name in args.tasks or TASKS:
                try:
                    run(TASKS[name], seed, args.out)
                except harness.CannotRun as reason:
                    say(f"{name}: {reason}")
    for found in legw_table.tables(harness.read(args.out)):
        print(f"\n{table.markdown(found) if args.table else table.text(found)}")


if __name__ == "__main__":
    main()

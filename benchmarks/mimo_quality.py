"""``python -m benchmarks.mimo_quality``: what MIMO is worth on real data, against a plain model and a deep ensemble.

All models of a task are trained for the same number of steps on the same number of distinct examples a step; those with
M slots see each of them R = 4 times in every slot, as in the paper. Each is judged on clean and on shifted examples, as
it is and with a temperature that was fitted on examples held out. Rows are appended as they come, and what there is a
row for is not done again. Times are of the processor, which others that use the machine do not change much. An hour on
one thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import experiment, harness, mimo_quality_table, table
from benchmarks.experiment import say
from benchmarks.mimo_models import KINDS, Kind, Model
from benchmarks.mimo_tasks import TASKS, Data, Splits, Task

RESULTS = harness.RESULTS / "mimo_quality.jsonl"
MEMBERS = 3  # of the deep ensemble
SEEDS = 5


def train(task: Task, kind: Kind, seed: int, data: Data) -> tuple[Model, float]:
    """A trained model, ready to predict, and the processor's seconds of a step."""
    from fastseq.nn import fold

    torch.manual_seed(seed)
    model = kind.make(task)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=task.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, total_steps=task.steps)
    model.network.train()
    begin = time.process_time()
    for _ in range(task.steps):
        which = torch.randint(len(data.x), (task.batch,), generator=generator)
        part = Data(data.x[which], data.labels[which], None if data.lengths is None else data.lengths[which])
        optimizer.zero_grad(set_to_none=True)
        model.loss(part, generator).backward()
        nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = (time.process_time() - begin) / task.steps
    model.network.eval()
    if kind.name.startswith("MIMO"):
        fold(model.network)
    return model, seconds


def judged(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, Any]:
    """Figures of [B, M, K] logits, as they are and at this temperature."""
    from fastseq.functional import ensemble_stats

    found, warm = ensemble_stats(logits, labels), ensemble_stats(logits / temperature, labels)
    figures = {
        "accuracy": found.accuracy,
        "nll": found.mean_nll,
        "ece": found.ece,
        "brier": found.mean_brier,
        "member_accuracy": found.member_accuracy.mean(),
        "disagreement": found.mean_disagreement,
        "warm_accuracy": warm.accuracy,
        "warm_nll": warm.mean_nll,
        "warm_ece": warm.ece,
    }
    return {name: round(float(value), 5) for name, value in figures.items()}


def rows(
    task: Task, kind: Kind, seed: int, splits: Splits, models: list[Model], seconds: float
) -> list[dict[str, Any]]:
    """Of clean and of shifted examples, of one model or of an ensemble of them."""
    from fastseq.calibration import fit_temperature

    @torch.no_grad()
    def predict(data: Data) -> Tensor:
        return torch.cat([model.predict(data) for model in models], 1)

    begin = time.process_time()
    predict(splits.test)
    per_example = (time.process_time() - begin) / len(splits.test.x)
    temperature = float(fit_temperature(predict(splits.held_out), splits.held_out.labels))
    parameters = sum(p.numel() for model in models for p in model.network.parameters())
    shared = {"task": task.name, "model": kind.name, "seed": seed, "steps": task.steps, "parameters": parameters}
    shared |= {"step_ms": round(seconds * 1e3, 3), "example_us": round(per_example * 1e6, 2)}
    shared |= {"temperature": round(temperature, 4)}
    parts = {"clean": splits.test, "shifted": splits.shifted}
    return [
        {**shared, "inputs": name, **judged(predict(part), part.labels, temperature)} for name, part in parts.items()
    ]


def run(task: Task, kinds: list[Kind], seeds: list[int], out: Path) -> None:
    shared = harness.provenance(torch.get_num_threads(), ["torch-uncertainty", "mlxtend", "aeon", "scikit-learn"])
    splits = task.load()
    for seed in seeds:
        there = {row["model"] for row in harness.read(out) if (row["task"], row["seed"]) == (task.name, seed)}
        for kind in kinds:
            if kind.name in there or (kind.tasks and task.name not in kind.tasks):
                continue
            # an ensemble of a seed begins with the plain model of that seed
            members = [1000 * n + seed for n in range(MEMBERS if kind.name == "ensemble" else 1)]
            try:
                trained = [train(task, kind, member, splits.train) for member in members]
            except harness.CannotRun as reason:
                say(f"{task.name}, {kind.name}: {reason}")
                continue
            found = rows(task, kind, seed, splits, [model for model, _ in trained], sum(s for _, s in trained))
            harness.append([{**row, **shared} for row in found], out)
            figures = " ".join(f"{row['accuracy']:.3f}/{row['nll']:.3f}/{row['ece']:.3f}" for row in found)
            say(f"{task.name}, seed {seed}, {kind.name}: {figures}")


def arguments() -> argparse.Namespace:
    parser = experiment.parser("mimo_quality", __doc__, "tasks", TASKS, SEEDS, RESULTS)
    parser.add_argument("--models", nargs="+", choices=[kind.name for kind in KINDS], help="default: all")
    return experiment.parsed(parser, "tasks", TASKS)


def main() -> None:
    args = arguments()
    if not args.table:
        torch.set_num_threads(args.threads)
        kinds = [kind for kind in KINDS if args.models is None or kind.name in args.models]
        for name in args.tasks or TASKS:
            run(TASKS[name], kinds, args.seeds, args.out)
    for found in mimo_quality_table.tables(harness.read(args.out)):
        print(f"\n{table.markdown(found) if args.table else table.text(found)}")


if __name__ == "__main__":
    main()

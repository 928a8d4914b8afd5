"""``python -m benchmarks.adt``: what ADT withstands and what it costs, on real data, beside other trainings.

Each training is attacked in ways that it has not seen. Rows are appended as they come, and what there is a row for is
not done again. Seconds are of the processor, which others that use the machine do not change much. ``--speed`` times
the search for perturbations alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import adt_speed, adt_table, experiment, harness, table
from benchmarks.adt_tasks import TASKS, Data, Task
from benchmarks.experiment import say
from fastseq.recipes import ADT, attacks

RESULTS = harness.RESULTS / "adt.jsonl"
SEEDS = 3
STANDARD, PGD, *VARIANTS = METHODS = adt_table.METHODS
RAMP = 0.5  # of the epochs: eps grows from 0, since with all of it small networks do not start to learn
AMORTIZED_RATE = 1e-3  # of Adam, for the generator; the authors' 2e-4 is for 76 epochs


def losses(task: Task, method: str, model: nn.Module, seed: int) -> tuple[Callable[[Data, float], Tensor], list[Any]]:
    """From a batch and a part of eps to the loss, and the parameters of a generator."""
    if method == STANDARD:
        return lambda batch, part: F.cross_entropy(model(batch.x, *batch.args), batch.labels), []
    if method == PGD:
        count = iter(range(10**9))

        def attacked(batch: Data, part: float) -> Tensor:
            threat = dataclasses.replace(task.threat, eps=part * task.threat.eps)
            steps = {"steps": 7, "step": 0.25, "seed": 10**6 * seed + next(count)}
            x = attacks.pgd(model, batch.x, batch.labels, threat, *batch.args, mask=batch.mask, **steps)
            return F.cross_entropy(model(x, *batch.args), batch.labels)

        return attacked, []
    t = task.threat
    shape = {"channels": task.channels, "dims": task.dims, "clamp": t.clamp, "normalise": t.normalise}
    lam = 1.0 if method == "imp_am" else 0.01
    adt = ADT(model, t.eps, lam, method, seed=seed, **shape)

    def distributional(batch: Data, part: float) -> Tensor:
        adt.threat = dataclasses.replace(t, eps=part * t.eps)
        return adt(batch.x, batch.labels, *batch.args, mask=batch.mask)

    return distributional, list(adt.parameters())


def train(task: Task, method: str, seed: int, data: Data) -> tuple[nn.Module, float]:
    """The model, and seconds of an epoch."""
    torch.manual_seed(seed)
    model, order = task.network(), torch.Generator().manual_seed(seed)
    loss, generator = losses(task, method.removeprefix("ADT "), model, seed)
    optimizers = [torch.optim.Adam(model.parameters(), task.rate)]
    if generator:
        optimizers.append(torch.optim.Adam(generator, AMORTIZED_RATE, betas=(0.5, 0.999)))
    steps = task.epochs * (len(data.x) // task.batch)
    begin, done = time.process_time(), 0
    for _ in range(task.epochs):
        for which in torch.randperm(len(data.x), generator=order).split(task.batch)[: len(data.x) // task.batch]:
            done += 1
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss(data.rows(which), min(1.0, done / (RAMP * steps))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
    return model.eval(), (time.process_time() - begin) / task.epochs


def judged(task: Task, model: Any, data: Data) -> dict[str, float]:
    """Accuracies in %, by attack; worst is what withstands all of them."""
    common = {"mask": data.mask}
    base = (model, data.x, data.labels, task.threat, *data.args)
    versions = {
        "natural": data.x,
        "FGSM": attacks.fgsm(*base, **common),
        "PGD-20": attacks.pgd(*base, **common, seed=7),
        "PGD-100": attacks.pgd(*base, **common, steps=100, step=0.1, seed=8),
        "MIM": attacks.mim(*base, **common),
        "C&W": attacks.cw(*base, **common, seed=9),
        "SPSA": attacks.spsa(*base, **common, steps=10, samples=16, rate=0.2),
        "features": attacks.feature(model.features, *base[1:], **common, module=model),
    }
    each = {k: attacks.withstood(model, data.labels, [x], *data.args) for k, x in versions.items()}
    each["worst"] = torch.stack(list(each.values())).all(0)
    return {name: round(100 * float(right.double().mean()), 2) for name, right in each.items()}


def run(task: Task, seed: int, out: Path) -> None:
    shared = harness.provenance(torch.get_num_threads(), ["mlxtend", "aeon"])
    training, test = task.load()
    found = harness.read(out)
    done = {(r["task"], r["method"], r["seed"]) for r in found if r["kind"] == "quality"}
    for method in METHODS:
        if (task.name, method, seed) in done:
            continue
        model, seconds = train(task, method, seed, training)
        cell = {"kind": "quality", "task": task.name, "method": method, "seed": seed, "eps": task.threat.eps}
        facts = {"epochs": task.epochs, "epoch_s": round(seconds, 3), **judged(task, model, test)}
        harness.append([{**cell, **facts, **shared}], out)
        say(f"{task.name}, seed {seed}, {method}: {facts}")


def arguments() -> argparse.Namespace:
    parser = experiment.parser("adt", __doc__, "tasks", TASKS, SEEDS, RESULTS)
    parser.add_argument("--speed", action="store_true", help="only time the search for perturbations")
    return experiment.parsed(parser, "tasks", TASKS)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.speed:
        harness.append(adt_speed.rows(args.threads), args.out)
    elif not args.table:
        for seed in args.seeds:
            for name in args.tasks or TASKS:
                try:
                    run(TASKS[name], seed, args.out)
                except harness.CannotRun as reason:
                    say(f"{name}: {reason}")
    for found in adt_table.tables(harness.read(args.out)):
        print(f"\n{table.markdown(found) if args.table else table.text(found)}")


if __name__ == "__main__":
    main()

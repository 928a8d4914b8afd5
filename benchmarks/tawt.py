"""``python -m benchmarks.tawt``: what learned task weights are worth, against the schedule alone, and what they cost.

Rows are appended as they come, and what there is a row for is not done again. Half an hour on one thread; ``speed``
alone takes seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import experiment, harness, table, tawt_table
from benchmarks.experiment import say
from benchmarks.tawt_tasks import TASKS, load

RESULTS = harness.RESULTS / "tawt.jsonl"
SEEDS = 5
PARTS = ("speed", *TASKS)
GRADIENTS = 4


def run(name: str, seed: int, out: Path) -> None:
    """Every kind of training."""
    from fastseq.demo import python_tags, tawt_training

    shared, setting = harness.provenance(torch.get_num_threads(), []), TASKS[name]
    rows = [row for row in harness.read(out) if row["kind"] == "run"]
    done = {(row["task"], row["paradigm"], row["weighting"], row["seed"]) for row in rows}
    for kind in tawt_training.KINDS:
        if (name, *kind, seed) in done:
            continue
        found = tawt_training.train(kind, seed, setting, load())
        row: dict[str, Any] = {"kind": "run", "task": name, "paradigm": kind[0], "weighting": kind[1], "seed": seed}
        row |= {"accuracy": round(found.accuracy, 5), "steps": found.steps, "seconds": round(found.seconds, 2)}
        row |= {"source": setting.source, "epochs": setting.epochs, "tasks": list(python_tags.TASKS)}
        row["weights"] = [[round(w, 5) for w in weights] for weights in found.weights]
        harness.append([{**row, **shared}], out)
        say(f"{name}, seed {seed}, {', '.join(kind)}: {100 * found.accuracy:.2f} %, {found.seconds:.1f} s")


def gradients() -> list[list[Tensor]]:
    """Of an LSTM of about five million parameters, one list for each task."""
    shapes = [p.shape for p in nn.LSTM(512, 512, 2, bias=True).parameters()]
    shapes += [torch.Size([2048, 384]), torch.Size([100, 512])]
    return [[torch.randn(shape) for shape in shapes] for _ in range(GRADIENTS)]


def ours(found: list[list[Tensor]]) -> Tensor:
    """As ``TaskWeights.observe`` does it; its copy of the target's gradient is not counted."""
    from fastseq.recipes import tawt

    own = tawt.square(found[0])
    cosines = [tawt.dot(g, found[0]) / (own.sqrt() * tawt.square(g).sqrt()) for g in found[1:]]
    return torch.stack([torch.ones_like(own), *cosines])


def products(found: list[list[Tensor]]) -> Tensor:
    """Only the inner products, from lists of products: torch has no other way for lists."""
    return torch.stack([torch.stack([p.sum() for p in torch._foreach_mul(g, found[0])]).sum() for g in found])


def lists(found: list[list[Tensor]]) -> Tensor:
    norms = [torch.stack(torch._foreach_norm(g)).norm() for g in found]
    return products(found) / torch.stack([norm * norms[0] for norm in norms])


def flattened(found: list[list[Tensor]]) -> Tensor:
    flat = [torch.cat([g.reshape(-1) for g in of_one]) for of_one in found]
    return torch.stack([torch.cosine_similarity(flat[0], row, dim=0) for row in flat])


def speed(out: Path, rounds: int) -> None:
    found = gradients()
    truth = flattened([[g.double() for g in of_one] for of_one in found])
    ways = {"fastseq": ours, "_foreach, inner products": products, "_foreach, cosines": lists, "flattened": flattened}
    budget = harness.Budget(truth, harness.relative_error(flattened(found), truth))
    verdict = harness.gate({"cosines": ours(found)}, {"cosines": budget}, frozenset())
    if verdict != "passed":
        raise SystemExit(f"tawt: {verdict}")
    samples = harness.interleave({label: lambda way=way: way(found) for label, way in ways.items()}, rounds)
    ratios = {label: harness.ratio(samples["fastseq"], samples[label]) for label in ways if label != "fastseq"}
    row: dict[str, Any] = {"kind": "speed", "gradients": GRADIENTS, "size": sum(g.numel() for g in found[0])}
    row["ms"] = {label: round(1e3 * harness.quantile(samples[label], 0.5), 3) for label in ways}
    row["ratios"] = {label: [round(v, 4) for v in ratio] for label, ratio in ratios.items()}
    harness.append([{**row, **harness.provenance(torch.get_num_threads(), [])}], out)


def arguments() -> argparse.Namespace:
    parser = experiment.parser("tawt", __doc__, "parts", PARTS, SEEDS, RESULTS)
    parser.add_argument("--rounds", type=int, default=15, help="of speed (default: 15)")
    return experiment.parsed(parser, "parts", PARTS)


def main() -> None:
    args = arguments()
    parts = args.parts or PARTS
    if not args.table:
        torch.set_num_threads(args.threads)
        if "speed" in parts:
            speed(args.out, args.rounds)
        for seed in args.seeds:
            for name in parts:
                if name in TASKS:
                    run(name, seed, args.out)
    for found in tawt_table.tables(harness.read(args.out)):
        print(f"\n{table.markdown(found) if args.table else table.text(found)}")


if __name__ == "__main__":
    main()

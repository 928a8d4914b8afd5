"""A trained MIMO model as a file, run by a process that never imports torch."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import fastseq
from fastseq import deploy
from fastseq.calibration import Temperature
from fastseq.demo.mimo_digits import Images
from fastseq.demo.mimo_training import Run, predict
from fastseq.demo.report import Sample, Section, Table, Text
from fastseq.functional import ensemble_stats

ORDER = ["mimo.backbone.lstm", "mimo.backbone.head", "temperature"]
SHOWN = 6  # images whose answers are in the table
SCRIPT = """\
import sys
import numpy as np
from fastseq import deploy

file, images, answers = sys.argv[1:]
model = deploy.Model.load(file)
y, _ = model.run(np.load(images))  # [8 rows, images, 8 pixels]
probability, disagreement = deploy.split_ensemble(y[-1])  # after the last row
assert "torch" not in sys.modules
np.savez(answers, probability=probability, disagreement=disagreement)
"""


class Answers(NamedTuple):
    """Of the process without torch: [N, K] and [N]."""

    probability: torch.Tensor
    disagreement: torch.Tensor
    bytes: int  # of the file
    microseconds: float  # for one image


def section(run: Run, images: Images) -> Section:
    """The script, how close its answers are to torch's, and some of them."""
    (network,), kind = run.networks, run.kind
    found = answers(network, run.temperature, images)
    expected = ensemble_stats(predict([network], images.x) / run.temperature, images.labels)
    assert expected.probability is not None
    apart = float((found.probability - expected.probability).abs().max())
    same = float((found.probability.argmax(1) == expected.prediction).double().mean())
    right = float((found.probability.argmax(1) == images.labels).double().mean())
    story = (
        f"fastseq.export_state folds {kind} with its temperature, and fastseq.deploy.save writes one file of "
        f"{found.bytes / 1e3:.0f} kB. The script below read it in a process of its own, which has numpy and never "
        f"imports torch, and answered the {len(images.x)} shifted images: {right:.1%} right, the digit that torch says "
        f"for {same:.1%} of them, probabilities at most {apart:.1e} away from torch's. One image takes "
        f"{found.microseconds:.0f} µs from Python, all members, their mean and their disagreement in it."
    )
    return Section("The same ensemble without torch", [Text(story), Sample(SCRIPT, ""), _table(found, images)])


def answers(network: nn.Module, temperature: float, images: Images) -> Answers:
    """What the script says in a process of its own, and the time that one image takes in this one."""
    with tempfile.TemporaryDirectory() as folder:
        file, asked, told = (str(Path(folder) / name) for name in ("mimo.fastseq", "images.npy", "answers.npz"))
        whole = nn.ModuleDict({"mimo": network, "temperature": Temperature(temperature)})
        deploy.save(fastseq.export_state(whole, ORDER), file)
        rows = np.ascontiguousarray(images.x.numpy().swapaxes(0, 1))
        np.save(asked, rows)
        paths = (str(Path(fastseq.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        subprocess.run([sys.executable, "-c", SCRIPT, file, asked, told], check=True, env=environment)
        with np.load(told) as found:
            parts = [torch.from_numpy(found[name]) for name in ("probability", "disagreement")]
        model, one, taken = deploy.Model.load(file), np.ascontiguousarray(rows[:, :1]), []
        for _ in range(300):
            begin = time.perf_counter()
            model.run(one)
            taken.append(time.perf_counter() - begin)
        return Answers(parts[0], parts[1], Path(file).stat().st_size, 1e6 * statistics.median(taken))


def _table(found: Answers, images: Images) -> Table:
    """The images that the members disagree on most, and those that they are surest of."""
    confidence, said = found.probability.max(1)
    order = (found.disagreement - confidence).argsort(descending=True, stable=True)
    rows = [
        (
            f"image {n}",
            f"{int(images.labels[n])}",
            f"{int(said[n])}",
            f"{float(confidence[n]):.3f}",
            f"{float(found.disagreement[n]):.2f}",
        )
        for n in (*order[: SHOWN // 2].tolist(), *order[-(SHOWN - SHOWN // 2) :].tolist())
    ]
    head = ("shifted image", "is a", "said to be a", "with probability", "disagreement")
    caption = (
        "The images that the members disagree on most and those that they are surest of. Disagreement: the share of "
        "the pairs of members that name different digits."
    )
    return Table(head, rows, caption)

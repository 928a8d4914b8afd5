"""One BiLSTM that tags Python's tokens, trained for a target of few examples with and without the other tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq.nn
from fastseq.demo.python_tags import NONE, SYMBOLS, TAGS, TASKS, Corpus
from fastseq.demo.seeds import that_fit
from fastseq.recipes import TaskWeights, joint, normalized_joint, pretraining

TARGET = TASKS.index("name role")
SINGLE, LONG, PRETRAINING = "single task", "single task, long", "pre-training"
JOINT, NORMALIZED = "joint", "normalized joint"
FIXED, SCHEDULE, LEARNED = WEIGHTS = ("fixed", "schedule only", "learned")
# in pre-training the target is not in the sum, and the schedule leaves the weights of the sources equal
KINDS = (
    (SINGLE, FIXED),
    (LONG, FIXED),
    (PRETRAINING, SCHEDULE),
    (PRETRAINING, LEARNED),
    *((paradigm, weights) for paradigm in (JOINT, NORMALIZED) for weights in WEIGHTS),
)

Kind = tuple[str, str]
Places = tuple[Tensor, Tensor]  # windows [N, T], and numbers of tokens among all of them
Report = Callable[[float, str], None]  # fraction done, remark


@dataclass(frozen=True)
class Setting:
    """H: units of each direction. target, source: windows of training, of the target and of each source. total:
    eta * c of all updates together. sources_total: the same of pre-training. tuning: steps on the target after it."""

    H: int = 64
    target: int = 100
    source: int = 1000
    batch: int = 32
    epochs: int = 6
    tuning: int = 300
    rate: float = 3e-3
    total: float = 3.0
    sources_total: float = 30.0


@dataclass(frozen=True)
class Run:
    """accuracy: of the target on test windows. weights: [updates + 1][tasks]. seconds: of the training."""

    kind: Kind
    seed: int
    accuracy: float
    weights: Sequence[Sequence[float]]
    steps: int
    seconds: float


class Tagger(nn.Module):
    """Logits [B, T, tags] of one task, from a shared BiLSTM."""

    def __init__(self, H: int) -> None:
        super().__init__()
        embedding, lstm = nn.Embedding(SYMBOLS, 32), fastseq.nn.LSTM(32, H, batch_first=True, bidirectional=True)
        self.encoder = nn.ModuleDict({"embedding": embedding, "lstm": lstm})
        self.heads = nn.ModuleList(nn.Linear(2 * H, len(TAGS[task])) for task in TASKS)

    def features(self, x: Tensor) -> Tensor:
        """[B, T, 2*H]."""
        found: Tensor = self.encoder["lstm"](self.encoder["embedding"](x))[0]
        return found

    def forward(self, t: int, x: Tensor) -> Tensor:
        logits: Tensor = self.heads[t](self.features(x))
        return logits

    def loss(self, t: int, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy over the tokens that task ``t`` says something of."""
        x, labels = batch
        return F.cross_entropy(self(t, x).flatten(0, 1), labels.flatten(), ignore_index=NONE)


class Shuffled:
    """Batches of windows [N, T] and their labels, in another order each time."""

    def __init__(self, x: Tensor, labels: Tensor, batch: int) -> None:
        self.x, self.labels, self.batch = x, labels, batch

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for which in torch.randperm(len(self.x)).split(self.batch):
            yield self.x[which], self.labels[which]


def batches(seed: int, setting: Setting, corpus: Corpus) -> list[Shuffled]:
    """Of each task, on windows of its own."""
    order = torch.randperm(len(corpus.training.x), generator=torch.Generator().manual_seed(seed))
    sizes = [setting.target if t == TARGET else setting.source for t in range(len(TASKS))]
    parts = order[: sum(sizes)].split(sizes)
    x, labels = corpus.training
    return [Shuffled(x[part], labels[task][part], setting.batch) for task, part in zip(TASKS, parts, strict=True)]


def train(kind: Kind, seed: int, setting: Setting, corpus: Corpus) -> Run:
    """One training: a pass of all tasks each epoch. The long one of a single task has as many steps as the joint ones,
    all on the target; that after pre-training has ``tuning`` of them. Rates fall to 0 in each stage."""
    torch.manual_seed(seed)
    model, tasks, s = Tagger(setting.H), batches(seed, setting, corpus), setting
    paradigm, weighting = kind
    own = len(tasks[TARGET])
    everything = s.epochs * sum(len(b) for b in tasks)
    tuning = -(-s.tuning // own)
    stages = {SINGLE: [s.epochs * own], PRETRAINING: [everything - s.epochs * own, tuning * own]}
    stage = stages.get(paradigm, [everything])
    optimizer = torch.optim.Adam(model.parameters(), s.rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _left(step, stage))
    history: list[list[float]] = []

    def after_epoch(weights: TaskWeights) -> None:
        history.append(weights.weights.tolist())

    total = s.sources_total if paradigm == PRETRAINING else s.total
    signal, eta = "none" if weighting == SCHEDULE else "cosine", 0.0 if weighting == FIXED else 1.0
    options: dict[str, Any] = {"eta": eta, "c": total / s.epochs, "signal": signal}
    options |= {"after_step": scheduler.step, "after_epoch": after_epoch}
    shared, begin = model.encoder, time.perf_counter()
    if paradigm in (SINGLE, LONG):
        epochs = stage[0] // own
        joint(
            [tasks[TARGET]], 0, lambda _, b: model.loss(TARGET, b), optimizer, shared, epochs, after_step=scheduler.step
        )
    elif paradigm == PRETRAINING:
        pretraining(tasks, TARGET, model.loss, optimizer, shared, model, s.epochs, tuning, **options)
    else:
        loop = joint if paradigm == JOINT else normalized_joint
        loop(tasks, TARGET, model.loss, optimizer, shared, s.epochs, **options)
    seconds = time.perf_counter() - begin
    return Run(kind, seed, accuracy(model, corpus), history, sum(stage), seconds)


def _left(step: int, stages: Sequence[int]) -> float:
    """Of the stage that a step is in, the share that is left."""
    for steps in stages[:-1]:
        if step < steps:
            return 1 - step / steps
        step -= steps
    return max(0.0, 1 - step / stages[-1])


@torch.no_grad()
def accuracy(model: Tagger, corpus: Corpus) -> float:
    """Of the target, on test windows."""
    labels = corpus.test.labels[TASKS[TARGET]]
    known = labels != NONE
    return float((model.eval()(TARGET, corpus.test.x).argmax(-1) == labels)[known].double().mean())


def train_all(
    seeds: Sequence[int], kinds: Sequence[Kind], setting: Setting, corpus: Corpus, seconds: float, report: Report
) -> list[Run]:
    """Every kind for as many of the seeds as fit into the time, at least for one."""
    runs = list[Run]()
    for done, seed in that_fit(seeds, seconds, report):
        for j, kind in enumerate(kinds):
            report(done + j / len(kinds) / len(seeds), f"seed {seed}, {kind[0]}, {kind[1]} weights")
            runs.append(train(kind, seed, setting, corpus))
    return runs


def encoders(seed: int, setting: Setting, corpus: Corpus) -> list[Tagger]:
    """One model for each task, trained on it alone with as many examples as a source has, for ``task_distances``."""
    found = []
    for t, task in enumerate(batches(seed, replace(setting, target=setting.source), corpus)):
        torch.manual_seed(seed)
        model = Tagger(setting.H)
        optimizer = torch.optim.Adam(model.parameters(), setting.rate)
        joint([task], 0, _loss_of(model, t), optimizer, model.encoder, setting.epochs)
        found.append(model.eval())
    return found


def features(model: Tagger) -> Callable[[Places], Tensor]:
    """An encoder of tokens, for ``task_distances``."""
    return lambda places: model.features(places[0]).flatten(0, 1)[places[1]]


def examples(corpus: Corpus, task: str, count: int) -> tuple[Places, Tensor]:
    """Test windows, which of their tokens the task says something of, at most ``count``, and what it says."""
    labels = corpus.test.labels[task].flatten()
    known = (labels != NONE).nonzero()[:count, 0]
    return (corpus.test.x, known), labels[known]


def _loss_of(model: Tagger, t: int) -> Callable[[int, tuple[Tensor, Tensor]], Tensor]:
    return lambda _, batch: model.loss(t, batch)

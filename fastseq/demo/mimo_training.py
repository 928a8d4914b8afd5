"""One LSTM, three of them and MIMO trained on the rows of digits, seed after seed, and what they say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq.nn
from fastseq.calibration import fit_temperature
from fastseq.demo.mimo_digits import Digits, Images, turned
from fastseq.demo.seeds import that_fit
from fastseq.functional import ensemble_stats

PLAIN, ENSEMBLE = "one LSTM", "three LSTMs"
RHO = {"MIMO, ρ = 0": 0.0, "MIMO, ρ = 0.5": 0.5}  # kind -> share of rows with one image in all slots
KINDS = (PLAIN, ENSEMBLE, *RHO)
ANGLES = tuple(range(0, 91, 15))  # degrees by which all test images are turned
M = 3  # slots of MIMO, and LSTMs of the ensemble

Report = Callable[[float, str], None]  # fraction done, remark


@dataclass(frozen=True)
class Setting:
    """H: units. batch: distinct images per step. R: rows that each of them lies in, in every slot. rate: highest."""

    H: int = 64
    steps: int = 400
    batch: int = 64
    R: int = 4
    rate: float = 1e-2


@contextmanager
def one_thread() -> Iterator[None]:
    """A step of networks as small as these is too short to be shared among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class RowLSTM(nn.Module):
    """Reads the 8 rows of an image as 8 steps; logits from the state after the last one."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.lstm = fastseq.nn.LSTM(8, H, batch_first=True)
        self.head = nn.Linear(H, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


@dataclass(frozen=True)
class Figures:
    """Of the mean over members of the probabilities; member_accuracy is the mean over members of theirs."""

    accuracy: float
    nll: float
    ece: float
    brier: float
    member_accuracy: float
    disagreement: float
    confidence: float
    histogram: Tensor  # of ensemble_stats

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Figures:
        """Of logits [N, M, K] and labels [N]."""
        found = ensemble_stats(logits, labels)
        return cls(
            accuracy=float(found.accuracy),
            nll=float(found.mean_nll),
            ece=float(found.ece),
            brier=float(found.mean_brier),
            member_accuracy=float(found.member_accuracy.mean()),
            disagreement=float(found.mean_disagreement),
            confidence=float(found.confidence.mean()),
            histogram=found.histogram,
        )


@dataclass(frozen=True)
class Run:
    """A trained kind of one seed and its figures. steps: seconds of each training step, of all networks together."""

    kind: str
    seed: int
    networks: Sequence[nn.Module]
    steps: Sequence[float]
    temperature: float
    held_out: Figures
    clean: Figures
    shifted: Figures
    warm_clean: Figures  # with the temperature
    warm_shifted: Figures
    at_angles: Sequence[Figures]  # in the order of ANGLES

    @property
    def parameters(self) -> int:
        """Of all networks together."""
        return sum(p.numel() for network in self.networks for p in network.parameters())

    @property
    def milliseconds(self) -> float:
        """Median of the training steps."""
        return 1e3 * statistics.median(self.steps)


def members(network: nn.Module, x: Tensor) -> Tensor:
    """Logits [N, M, K], M = 1 of one LSTM."""
    logits: Tensor = network(x)
    return logits if logits.dim() == 3 else logits[:, None]


@torch.no_grad()
def predict(networks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Logits [N, M, K] of all members of all networks."""
    return torch.cat([members(network, x) for network in networks], 1)


def train(rho: float | None, seed: int, setting: Setting, data: Images) -> tuple[nn.Module, list[float]]:
    """A network, folded where it is MIMO, and the seconds of each step; rho None: an LSTM of its own."""
    torch.manual_seed(seed)
    network: nn.Module = RowLSTM(setting.H)
    if rho is not None:
        network = fastseq.nn.MIMO(network, M, inplace=True)
    rows = fastseq.nn.MIMOIndex(setting.batch, M, setting.R, rho or 0.0)
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), setting.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, setting.rate, total_steps=setting.steps)
    seconds = []
    for _ in range(setting.steps):
        which = torch.randperm(len(data.x), generator=order)[: setting.batch]
        x, labels = data.x[which], data.labels[which]
        begin = time.perf_counter()
        if isinstance(network, fastseq.nn.MIMO):
            index = rows.draw(order)
            loss = network.loss(network(x, index), labels, index)
        else:
            loss = F.cross_entropy(network(x), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        seconds.append(time.perf_counter() - begin)
        schedule.step()
    network.eval()
    return (network.fold() if isinstance(network, fastseq.nn.MIMO) else network), seconds


def judge(kind: str, seed: int, networks: Sequence[nn.Module], steps: Sequence[float], data: Digits) -> Run:
    """All figures of a kind."""
    held_out, clean, shifted = (predict(networks, part.x) for part in (data.held_out, data.test, data.shifted))
    temperature = fit_temperature(held_out, data.held_out.labels)
    labels = data.test.labels
    every = (turned(data.test.x, torch.full((len(labels),), float(angle))) for angle in ANGLES)
    return Run(
        kind,
        seed,
        networks,
        steps,
        temperature,
        held_out=Figures.of(held_out, data.held_out.labels),
        clean=Figures.of(clean, labels),
        shifted=Figures.of(shifted, labels),
        warm_clean=Figures.of(clean / temperature, labels),
        warm_shifted=Figures.of(shifted / temperature, labels),
        at_angles=[Figures.of(predict(networks, x), labels) for x in every],
    )


def train_all(seeds: Sequence[int], setting: Setting, data: Digits, seconds: float, report: Report) -> list[Run]:
    """All kinds for as many of the seeds as fit into the time, at least for one. Of a seed, the one LSTM is the first
    of the three."""
    runs, parts = list[Run](), len(seeds) * (M + len(RHO))
    for done, seed in that_fit(seeds, seconds, report):
        plain = []
        for k in range(M):
            report(done + k / parts, f"seed {seed}, LSTM {k + 1} of {M}")
            plain.append(train(None, 1000 * k + seed, setting, data.training))
        together = [sum(step) for step in zip(*(steps for _, steps in plain), strict=True)]
        runs.append(judge(PLAIN, seed, [plain[0][0]], plain[0][1], data))
        runs.append(judge(ENSEMBLE, seed, [network for network, _ in plain], together, data))
        for k, (kind, rho) in enumerate(RHO.items()):
            report(done + (M + k) / parts, f"seed {seed}, {kind}")
            network, steps = train(rho, seed, setting, data.training)
            runs.append(judge(kind, seed, [network], steps, data))
    return runs

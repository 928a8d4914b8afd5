"""``python -m benchmarks.speech FOLDER``: codes of speech, plain codebooks against each ingredient of the recipe.

The recipe is that of Lancucki et al., IJCNN 2020: batch norm before the codes, a raised learning rate of the codes, and
codes made anew from the data. FOLDER holds a folder of wav files per language, as Debian's packages
``asterisk-core-sounds-*-wav`` put them into ``/usr/share/asterisk/sounds``. An autoencoder of log-mel frames is trained
on nine tenths of the recordings; measured are, on the others, the error of reconstruction, the use of the codes, and
how well the language can be told from them. Rows are appended to a file as they come; the table is printed at the end,
after about an hour.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
import wave
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq.nn
from benchmarks.harness import provenance

RATE = 8000  # samples per second
WINDOW, HOP, MELS = 200, 80, 40  # 25 ms, 10 ms
CHUNK, BATCH = 128, 32  # frames of a training chunk, chunks of a step
HIDDEN, D = 192, 64
EPOCHS, FIRST, LAST = 10, 2, 5  # codes are made anew at the start of epochs FIRST to LAST; before the first, none


@dataclass(frozen=True)
class Recipe:
    """How a codebook learns. average: by moving averages, else by gradient; the others are the ingredients."""

    average: bool = False
    batch_norm: bool = False
    multiplier: float = 1.0
    reinit: bool = False


RECIPES = {
    "plain, by gradient": Recipe(),
    "plain, by averages": Recipe(average=True),
    "batch norm": Recipe(batch_norm=True),
    "learning rate x10": Recipe(multiplier=10.0),
    "re-initialization": Recipe(reinit=True),
    "all three": Recipe(batch_norm=True, multiplier=10.0, reinit=True),
}


@dataclass(frozen=True)
class Recording:
    """language: number of its folder. frames: log-mel energies [T, MELS], normalized."""

    language: int
    frames: Tensor


@dataclass(frozen=True)
class Row:
    """What one training gave, on recordings held out from it.

    error: root mean squared, in dB of mel energy. used, perplexity: of the codes. language: share of recordings told
    right from how often each code occurs. language_of_code: share of frames told right from their code alone.
    """

    recipe: str
    K: int
    seed: int
    error: float
    used: int
    perplexity: float
    language: float
    language_of_code: float
    ms_per_step: float


def mel_filters() -> Tensor:
    """Triangles, evenly spaced on the mel scale: [bins, MELS]."""
    frequency = torch.linspace(0, RATE / 2, 256 // 2 + 1)
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, MELS + 2) / 2595) - 1)
    rising = (frequency[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequency[:, None]) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp_min(0)


def log_mel(path: Path, filters: Tensor) -> Tensor | None:
    """[T, MELS] in dB; None for what is shorter than a training chunk."""
    with wave.open(str(path)) as file:
        form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if form != (RATE, 1, 2):
            raise SystemExit(f"{path}: {form[0]} Hz, {form[1]} channels, {form[2]} bytes; expected {RATE} Hz, 1, 2")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 2**15
    if len(samples) < WINDOW + HOP * CHUNK:
        return None
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(torch.from_numpy(samples), 256, HOP, WINDOW, window, return_complex=True)
    return 10 * torch.log10(spectrum.abs().square().mT @ filters + 1e-6)


def recordings(folder: Path) -> tuple[list[str], list[Recording], float]:
    """Languages, recordings, and the scale: dB of one unit of the normalized frames."""
    languages = sorted(p.name for p in folder.iterdir() if p.is_dir())
    filters, found = mel_filters(), []
    for number, language in enumerate(languages):
        for path in sorted((folder / language).rglob("*.wav")):
            frames = log_mel(path, filters)
            if frames is not None:
                found.append((number, frames))
    if len({number for number, _ in found}) < 2:
        raise SystemExit(f"{folder}: expected folders of wav files, one per language, at least two; got {languages}")
    together = torch.cat([frames for _, frames in found])
    mean, scale = together.mean(0), together.std().item()
    return languages, [Recording(number, (frames - mean) / scale) for number, frames in found], scale


class Autoencoder(nn.Module):
    """Two convolutions, one of stride 2; a code for every two frames; the same backwards."""

    def __init__(self, K: int, recipe: Recipe, reservoir: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(MELS, HIDDEN, 4, stride=2, padding=1), nn.ReLU(), nn.Conv1d(HIDDEN, D, 3, padding=1)
        )
        self.decoder = nn.Sequential(
            nn.Conv1d(D, HIDDEN, 3, padding=1), nn.ReLU(), nn.ConvTranspose1d(HIDDEN, MELS, 4, stride=2, padding=1)
        )
        own: dict[str, Any] = {}
        if not recipe.average:
            own |= {"learnable_codebook": True, "ema_update": False}
        if recipe.batch_norm:
            own |= {"batch_norm": "codes"}
        if recipe.reinit:
            schedule = fastseq.nn.AfterWarmup(from_epoch=FIRST, max_epoch=LAST - 1)
            own |= {"reinit": fastseq.nn.Reinit(schedule, reservoir_size=reservoir)}
        self.quantizer = fastseq.nn.VectorQuantize(D, K, commitment_weight=0.25, rotation_trick=False, **own)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, MELS], T even; returns its like, the codes [B, T / 2] and the loss."""
        z = self.encoder(x.mT).mT
        quantized, index, loss = self.quantizer(z)
        return self.decoder(quantized.mT).mT, index, loss


def batches(training: Sequence[Recording], seed: int) -> Iterator[Tensor]:
    """[BATCH, CHUNK, MELS] from anywhere in the recordings, long ones more often."""
    generator = np.random.default_rng(seed)
    frames = torch.cat([r.frames for r in training])
    ends = np.cumsum([len(r.frames) for r in training])
    starts = np.concatenate(
        [np.arange(end - len(r.frames), end - CHUNK + 1) for r, end in zip(training, ends, strict=True)]
    )
    while True:
        yield torch.stack([frames[s : s + CHUNK] for s in generator.choice(starts, BATCH)])


def train(recipe: Recipe, K: int, seed: int, training: Sequence[Recording], steps: int) -> tuple[Autoencoder, float]:
    """The trained model, and the median of the milliseconds of a step that quantizes."""
    torch.manual_seed(seed)
    reservoir = max(4096, 4 * K)
    model = Autoencoder(K, recipe, reservoir)
    rate = 2e-3
    if recipe.average:
        adam = torch.optim.Adam(model.parameters(), rate)
    else:
        adam = torch.optim.Adam(fastseq.nn.codebook_parameter_groups(model, rate, recipe.multiplier))
        fastseq.nn.attach(model, adam)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - 0.9 * step / steps)
    spent = []
    for step, x in enumerate(itertools.islice(batches(training, seed), steps)):
        if step and step % (steps // EPOCHS) == 0:
            fastseq.nn.next_epoch(model)
        begin = time.perf_counter()
        y, _, loss = model(x)
        adam.zero_grad(set_to_none=True)
        (F.mse_loss(y, x) + loss.sum()).backward()
        adam.step()
        spent.append(1e3 * (time.perf_counter() - begin))
        schedule.step()
    return model.eval(), statistics.median(spent[len(spent) // 2 :])


@torch.no_grad()
def encode(model: Autoencoder, found: Sequence[Recording]) -> tuple[list[np.ndarray[Any, Any]], float]:
    """Codes of each recording, and the root mean squared error over all frames."""
    codes, squares, count = [], 0.0, 0
    for r in found:
        x = r.frames[None, : len(r.frames) // 2 * 2]
        y, index, _ = model(x)
        codes.append(index[0].numpy())
        squares += (y - x).square().sum().item()
        count += x.numel()
    return codes, math.sqrt(squares / count)


def probe(codes: list[np.ndarray[Any, Any]], labels: list[int], unseen: list[np.ndarray[Any, Any]], K: int) -> Any:
    """A linear classifier of how often each code occurs in a recording; predicts the languages of ``unseen``."""

    def histogram(recording: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.sqrt(np.bincount(recording, minlength=K) / len(recording))

    model = make_pipeline(StandardScaler(with_std=False), LogisticRegression(C=10.0, max_iter=2000))
    model.fit(np.stack([histogram(c) for c in codes]), labels)
    return model.predict(np.stack([histogram(c) for c in unseen]))


def measure(
    name: str, K: int, seed: int, training: list[Recording], unseen: list[Recording], scale: float, steps: int
) -> Row:
    model, ms = train(RECIPES[name], K, seed, training, steps)
    (codes, _), (unseen_codes, error) = encode(model, training), encode(model, unseen)
    usage = fastseq.nn.CodebookUsage()
    usage.update(torch.from_numpy(np.concatenate(unseen_codes)), K)
    use = usage.compute()
    labels, truth = [r.language for r in training], np.array([r.language for r in unseen])
    guessed = probe(codes, labels, unseen_codes, K)
    votes = np.zeros((max(labels) + 1, K))
    for language, c in zip(labels, codes, strict=True):
        np.add.at(votes[language], c, 1)
    by_code = (votes / votes.sum(1, keepdims=True)).argmax(0)
    right = np.concatenate([by_code[c] == language for language, c in zip(truth, unseen_codes, strict=True)])
    return Row(
        name,
        K,
        seed,
        scale * error,
        int(use.used),
        use.perplexity.item(),
        float((guessed == truth).mean()),
        float(right.mean()),
        ms,
    )


def show(rows: Sequence[Row], console: Console) -> None:
    """Means over the seeds."""
    table = Table("K", "codebook", "error, dB", "used", "perplexity", "language", "of one code", "ms a step")
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.K, row.recipe].append(row)
    for (K, name), group in groups.items():
        mean = {key: statistics.fmean(getattr(r, key) for r in group) for key in asdict(group[0]) if key != "recipe"}
        table.add_row(
            str(K),
            name,
            f"{mean['error']:.2f}",
            f"{mean['used']:.0f}",
            f"{mean['perplexity']:.0f}",
            f"{mean['language']:.1%}",
            f"{mean['language_of_code']:.1%}",
            f"{mean['ms_per_step']:.1f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speech", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder of wav files, 8 kHz, 16 bit, mono, per language")
    parser.add_argument("--codes", type=int, nargs="+", default=[512, 1024, 2048, 4096], metavar="K")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--steps", type=int, default=1000, help="of training (default: 1000)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vq_speech.jsonl")
    args = parser.parse_args()
    if args.steps < 2 * EPOCHS:
        parser.error(f"--steps: expected at least {2 * EPOCHS}, got {args.steps}")
    if args.seeds < 1 or min(args.codes) < 1:
        parser.error(f"--seeds, --codes: expected positive numbers, got {args.seeds}, {args.codes}")
    if not args.folder.is_dir():
        parser.error(f"folder: expected a folder of wav files per language, got {args.folder}")
    console = Console()
    languages, found, scale = recordings(args.folder)
    training = [r for i, r in enumerate(found) if i % 10]
    unseen = [r for i, r in enumerate(found) if not i % 10]
    minutes = [sum(len(r.frames) for r in part) * HOP / RATE / 60 for part in (training, unseen)]
    console.print(
        f"{', '.join(languages)}: {len(training)} recordings to train on ({minutes[0]:.0f} min), {len(unseen)} held "
        f"out ({minutes[1]:.0f} min); the largest language is {max_share(unseen):.1%} of those"
    )
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    kinds = list(itertools.product(range(args.seeds), args.codes, RECIPES))
    shared = {
        **provenance(torch.get_num_threads(), []),
        "languages": languages,
        "minutes": minutes,
        "steps": args.steps,
    }
    try:
        with Progress(*columns, console=console) as progress, args.out.open("a") as file:
            task = progress.add_task("", total=len(kinds))
            for seed, K, name in kinds:
                progress.update(task, description=f"seed {seed}, K {K}, {name}")
                rows.append(measure(name, K, seed, training, unseen, scale, args.steps))
                file.write(json.dumps({**asdict(rows[-1]), **shared}) + "\n")
                file.flush()  # a run that is stopped keeps what it has
                progress.advance(task)
    finally:
        show(rows, console)
    console.print(f"rows: {args.out}")


def max_share(found: Sequence[Recording]) -> float:
    """Of the recordings, those of the most frequent language: what guessing would get."""
    return max(np.bincount([r.language for r in found])) / len(found)


if __name__ == "__main__":
    main()

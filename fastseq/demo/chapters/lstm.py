"""The LSTM with binary gates (G2-LSTM, Li et al., ICML 2018) against stock ``nn.LSTM`` on real text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import fastseq.nn
from fastseq.demo import Budget, compressed, deployed, gates, pictures
from fastseq.demo.character_model import Batches, CharacterModel, Corpus, chunks, corpus
from fastseq.demo.race import Chunk, Runner, race, time_in_turns
from fastseq.demo.report import Block, Picture, Sample, Section, Table, Text
from fastseq.demo.step_loop import StepLoop

TITLE = "An LSTM with binary gates learns English"
ABOUT = (
    "An LSTM is a network that reads text character by character; its gates decide in every step what is kept and "
    "what is forgotten. Binary gates (G2-LSTM, Li et al. 2018) get noise while training, so that they learn to be "
    "nearly open or nearly closed; such a model should bear coarser weights. Stock means torch's own LSTM, which has "
    "plain gates. The measure is bits per character of text that was not seen in training: lower is better."
)
FULL_SECONDS, QUICK_SECONDS = 125.0, 14.0

STOCK, LOOP = "stock nn.LSTM", "step loop (binary gates)"
BINARY, PLAIN = "fastseq (binary gates)", "fastseq (plain gates)"
_COLOURS = {STOCK: "orange", BINARY: "blue", PLAIN: "green", LOOP: "violet"}
_NOISE = (0.9, 0.2)  # tau and noise_probability, the defaults of fastseq.nn.LSTM
_TEMPERATURE = 0.6


@dataclass(frozen=True)
class Sizes:
    """T steps, B rows, E embedding, H hidden, L layers; held_out: at most so many chunks for the curve."""

    T: int = 100
    B: int = 8
    E: int = 128
    H: int = 256
    L: int = 1
    held_out: int = 1000


def run(budget: Budget, sizes: Sizes = Sizes()) -> list[Section]:
    """Train, measure and describe; see ``fastseq.demo``."""
    data = corpus()
    held_out = chunks(data.held_out, sizes.T, sizes.B)[: sizes.held_out]
    runners = {name: _runner(name, data, sizes, budget.seed) for name in (STOCK, BINARY, PLAIN)}
    seconds, wall = 0.7 * budget.seconds / len(runners), 0.82 * budget.seconds
    race(list(runners.values()), held_out, seconds, wall, lambda done, note: budget.progress("training", done, note))
    seconds = min(seconds, max(runner.seconds for runner in runners.values()))
    times = _timing(data, sizes, budget)
    two = {name: runners[name] for name in (STOCK, BINARY)}
    costs = compressed.section(two, held_out, lambda done, note: budget.progress("compressing", done, note))
    small = deployed.section(runners[BINARY].model, held_out, lambda done, note: budget.progress("saving", done, note))
    budget.progress("looking at gates", 0.0, "")
    torch.manual_seed(budget.seed)
    sections = [
        _in_short(runners, times),
        _setting(data, sizes, seconds),
        _result(runners, seconds),
        _speed(times, sizes),
        _histograms(runners, held_out),
        _heat_maps(runners, data),
        costs,
        small,
        _restarts(runners[BINARY].model, data, 10 * sizes.T),
        _samples(runners, data, budget),
    ]
    budget.progress("looking at gates", 1.0, "")
    return sections


def _lstm(name: str, sizes: Sizes) -> nn.Module:
    shape = (sizes.E, sizes.H, sizes.L)
    if name == STOCK:
        return nn.LSTM(*shape)
    if name == LOOP:
        return StepLoop(*shape, tau=_NOISE[0], noise_probability=_NOISE[1])
    if name == PLAIN:
        return fastseq.nn.LSTM(*shape, gates="sigmoid")
    return fastseq.nn.LSTM(*shape, gates="binary", tau=_NOISE[0], noise_probability=_NOISE[1])


def _runner(name: str, data: Corpus, sizes: Sizes, seed: int) -> Runner:
    """Equal seeds give equal first weights and an equal order of the text, whatever the LSTM."""
    torch.manual_seed(seed)
    model = CharacterModel(_lstm(name, sizes), len(data.alphabet))
    batches = Batches(data.training, sizes.T, sizes.B, seed)
    return Runner(name, pictures.COLOURS[_COLOURS[name]], model, batches, name in (BINARY, PLAIN))


def _in_short(runners: dict[str, Runner], times: dict[str, dict[str, list[float]]]) -> Section:
    alone = {name: statistics.median(found) for name, found in times["LSTM alone"].items()}
    ratio = alone[LOOP] / alone[BINARY]
    word = "slower" if ratio > 1 else "not slower"
    loop = (
        f"The same binary gates as a step loop in plain torch are {word}: {alone[LOOP]:.1f} ms forward and backward "
        f"against {alone[BINARY]:.1f} ms, {ratio:.1f} times the time."
    )
    lines = [*(_compare(runners[name], runners[STOCK]) for name in (BINARY, PLAIN)), loop]
    lines.append("One run with one seed on one machine: run it again with another --seed to see the spread.")
    return Section("In short", [Text(line) for line in lines])


def _setting(data: Corpus, sizes: Sizes, seconds: float) -> Section:
    kept = sum(map(len, data.training))
    held = sum(map(len, data.held_out))
    text = (
        f"The text is the help that CPython ships (pydoc_data.topics): {data.shipped:,} characters. Paragraphs that "
        "stand under several topics are kept once, so that no paragraph is both learnt and asked for: "
        f"{kept:,} characters of {len(data.training)} topics for training, {held:,} of {len(data.held_out)} other "
        "topics held out."
    )
    model = (
        f"Every model is an embedding of {sizes.E}, an LSTM of {sizes.H} units in {sizes.L} layer"
        f"{'s' if sizes.L > 1 else ''}, and a softmax over {len(data.alphabet)} characters, trained with Adam and "
        f"gradient clipping on {sizes.B} rows of {sizes.T} characters (state carried from chunk to chunk). First "
        "weights, text, order of the text, optimiser and learning rates over the budget are the same; only the LSTM "
        "differs."
    )
    rules = (
        f"Each model trains for {seconds:.0f} seconds on its own clock. They take turns, so that whatever else the "
        "machine does falls on all alike. Held-out text is evaluated off the clock, without noise. Where a topic "
        "begins the state starts from zero: fastseq takes a reset mask, stock nn.LSTM can only be given a new state "
        "between calls, so topics are cut to whole chunks for all of them."
    )
    names = Table(
        ("model", "input and forget gates while training", "gates at evaluation"),
        (
            (STOCK, "sigmoid(a)", "sigmoid(a)"),
            (BINARY, f"sigmoid((a + B·logit U) / {_NOISE[0]}), B = 1 for {_NOISE[1]:.0%} of them", "sigmoid(a)"),
            (PLAIN, "sigmoid(a): the same function as stock", "sigmoid(a)"),
        ),
    )
    return Section("What is compared", [Text(text), Text(model), Text(rules), names])


def _result(runners: dict[str, Runner], seconds: float) -> Section:
    rows = []
    for name, runner in runners.items():
        bits = [point[2] for point in runner.curve]
        fast, slow = np.quantile(runner.steps, (0.2, 0.8)) * 1e3
        counts = (f"{len(runner.steps):,}", f"{runner.milliseconds:.1f} ({fast:.1f} to {slow:.1f})")
        rows.append((name, *counts, f"{bits[-1]:.3f}", f"{min(bits):.3f}"))
    head = (
        "model",
        f"steps in {seconds:.0f} s",
        "ms per step, median (20 to 80 %)",
        "bits per character",
        "best on the way",
    )
    steps = min(len(runner.steps) for runner in runners.values())
    by_time = {n: (r.colour, [p[0] for p in r.curve[1:]], [p[2] for p in r.curve[1:]]) for n, r in runners.items()}
    by_step = {
        n: (r.colour, [float(p[1]) for p in r.curve[1:]], [p[2] for p in r.curve[1:]]) for n, r in runners.items()
    }
    picture = Picture(
        pictures.curves(
            [("seconds of training", "held-out bits per character", by_time), ("training steps", "", by_step)]
        ),
        "Held-out bits per character over training time and over training steps",
        "Lower is better. Left: over time, what the user waits for. Right: over steps, what a step is worth; all "
        f"models made at least {steps:,}.",
    )
    return Section("Bits per character over time", [Table(head, rows), picture])


def _compare(runner: Runner, other: Runner) -> str:
    """Two sentences from the measured values, whichever way they point."""
    ratio = runner.milliseconds / other.milliseconds
    if abs(ratio - 1) < 0.02:
        speed = f"is as fast per training step as {other.label} ({ratio:.2f} of its time)"
    else:
        word = "faster" if ratio < 1 else "slower"
        speed = f"takes {ratio:.2f} of the time of {other.label} per training step: {word}"
    mine, theirs = runner.curve[-1][2], other.curve[-1][2]
    quality = "better" if mine < theirs else "worse"
    verdict = f"{abs(mine - theirs):.3f} {quality}" if abs(mine - theirs) >= 0.0005 else "the same"
    reached = next((seconds for seconds, _, bits in runner.curve if bits <= theirs), None)
    arrival = (
        f"It reached the final value of {other.label} after {reached:.0f} of {other.curve[-1][0]:.0f} seconds."
        if reached is not None
        else f"It did not reach the final value of {other.label} within its time."
    )
    return (
        f"{runner.label} {speed}. At the end of the same time it stands at {mine:.3f} bits per character "
        f"against {theirs:.3f}: {verdict}. {arrival}"
    )


def _timing(data: Corpus, sizes: Sizes, budget: Budget) -> dict[str, dict[str, list[float]]]:
    """Whole training steps and the LSTM alone, of fresh models, in turns."""
    names = (STOCK, BINARY, PLAIN, LOOP)
    fresh = {name: _runner(name, data, sizes, budget.seed) for name in names}
    x = torch.randn(sizes.T, sizes.B, sizes.E, requires_grad=True)
    gradient = torch.randn(sizes.T, sizes.B, sizes.H)

    def alone(lstm: nn.Module) -> Callable[[], object]:
        return lambda: lstm(x)[0].backward(gradient)

    whole: dict[str, Callable[[], object]] = {name: lambda r=runner: r.step(0.0) for name, runner in fresh.items()}  # type: ignore[misc]
    part = {name: alone(_lstm(name, sizes)) for name in names}
    seconds = 0.03 * budget.seconds
    return {
        "training step": time_in_turns(whole, seconds, lambda done, note: budget.progress("timing", done / 2, note)),
        "LSTM alone": time_in_turns(part, seconds, lambda done, note: budget.progress("timing", 0.5 + done / 2, note)),
    }


def _speed(times: dict[str, dict[str, list[float]]], sizes: Sizes) -> Section:
    medians = {kind: {name: statistics.median(v) for name, v in found.items()} for kind, found in times.items()}
    whole, alone = medians["training step"], medians["LSTM alone"]
    rows = [
        (
            name,
            *(text for found in (whole, alone) for text in (f"{found[name]:.1f}", f"{found[name] / found[STOCK]:.2f}")),
        )
        for name in whole
    ]
    head = ("model", "training step, ms", "to stock", "LSTM alone, ms", "to stock")
    counts = min(len(v) for found in times.values() for v in found.values())
    caption = (
        f"Medians of at least {counts} calls in turns on a slice of the same text. Alone: forward and backward of the "
        f"LSTM, gradients of input and weights, T {sizes.T}, B {sizes.B}, {sizes.E} inputs, {sizes.H} units."
    )
    sentence = (
        "The step loop is the same binary-gate LSTM in plain torch, with the input product and the noise of a whole "
        "chunk computed at once and only the recurrence in Python. The LSTM of fastseq with binary gates takes "
        f"{alone[BINARY] / alone[STOCK]:.2f} of the time of stock nn.LSTM, which has no such gates."
    )
    drawn = {name: (pictures.COLOURS[_COLOURS[name]], value) for name, value in alone.items()}
    picture = Picture(
        pictures.bars("milliseconds, forward and backward of the LSTM alone", drawn),
        "Milliseconds per forward and backward of the LSTM: " + ", ".join(f"{n} {v:.1f}" for n, v in alone.items()),
    )
    return Section("Milliseconds per step", [Table(head, rows, caption), Text(sentence), picture])


def _histograms(runners: dict[str, Runner], held_out: Sequence[Chunk]) -> Section:
    text = held_out[0][0]
    panels: list[pictures.Panel] = []
    rows = []
    edges: dict[tuple[str, str, str], tuple[float, float]] = {}
    for mode, noise in (("at evaluation", None), ("under training noise", _NOISE)):
        found = {name: gates.gates_of(runners[name].model, text, None, noise)[0] for name in (STOCK, BINARY)}
        for kind in ("input", "forget"):
            series = {}
            for name, gate in found.items():
                values = gates.shares(gate.i if kind == "input" else gate.f)
                series[name] = (runners[name].colour, values)
                edges[mode, kind, name] = (values[0], values[-1])
                ends = (values[0], values[-1], values[0] + values[-1])
                rows.append((f"{kind} gate, {name}, {mode}", *(f"{share:.1%}" for share in ends)))
            panels.append((f"{kind} gate, {mode}", series))
    sentences = []
    for kind in ("input", "forget"):
        stock, binary = (sum(edges["at evaluation", kind, name]) for name in (STOCK, BINARY))
        more = "more" if binary > stock else "no more"
        sentences.append(
            f"{kind} gates of the model trained with binary gates are {more} often within 0.1 of 0 or 1 than those of "
            f"stock nn.LSTM at evaluation: {binary:.1%} against {stock:.1%}."
        )
    picture = Picture(
        pictures.histograms(panels),
        "Histograms of input and forget gates of both models, at evaluation and under training noise",
        f"{text.numel():,} characters of held-out text, all units of the top layer, bins of 0.1. Under training noise "
        "means the same noise on both models, although stock nn.LSTM was not trained with it.",
    )
    table = Table(("gates", "below 0.1", "above 0.9", "together"), rows)
    told = " ".join(s[0].upper() + s[1:] for s in sentences)
    why = (
        "The idea of G2-LSTM: noise on the gates while training makes values in the middle unreliable, so that "
        "training should push gates towards 0 and 1. What came out here:"
    )
    return Section("How binary the gates are", [Text(why), Text(told), picture, table])


def _heat_maps(runners: dict[str, Runner], data: Corpus) -> Section:
    context, sentence = gates.sentence(data)
    means, units = [], []
    for name in (STOCK, BINARY):
        model = runners[name].model
        _, state = gates.gates_of(model, context[:, None])
        found, _ = gates.gates_of(model, sentence[:, None], state)
        for kind, gate in (("input", found.i[:, 0]), ("forget", found.f[:, 0])):
            short = name.partition(" ")[0]
            means.append((f"{short}, {kind}", gate.mean(1)[None].numpy()))
            units.append((f"{short}, {kind}", gates.liveliest(gate, 12).numpy()))
    spoken = data.decode(sentence)
    labels = gates.visible(spoken)
    low, high = (float(function([rows for _, rows in means])) for function in (np.min, np.max))
    return Section(
        "Gates over a sentence",
        [
            Text(f"The sentence, from the held-out text: {spoken}"),
            Picture(
                pictures.heat_map(labels, means, limits=(low, high)),
                "Heat map of the mean input and forget gate of both models at every character",
                "Mean over all units of the top layer as each character is read; colours span the means that occur. "
                "fastseq: the model with binary gates.",
            ),
            Picture(
                pictures.heat_map(labels, units, 0.11),
                "Heat map of single gates of both models at every character",
                "For each gate and model the 12 units whose gate changes most over the sentence.",
            ),
        ],
    )


@torch.no_grad()
def _restarts(model: CharacterModel, data: Corpus, longest: int) -> Section:
    """The beginnings of topics in one stream with a reset mask, against each alone."""
    model.eval()
    topics = [topic[: longest + 1] for topic in data.held_out]
    text = torch.cat([topic[:-1] for topic in topics])[:, None]
    target = torch.cat([topic[1:] for topic in topics])
    starts = torch.tensor([0] + [len(topic) - 1 for topic in topics[:-1]]).cumsum(0)
    reset = torch.zeros(text.shape, dtype=torch.bool)
    reset[starts] = True
    begin = time.perf_counter()
    together = model(text, None, reset=reset)[0]
    one_call = time.perf_counter() - begin
    alone = torch.cat([model(topic[:-1, None])[0] for topic in topics])
    carried = model(text)[0]
    first = torch.cat([torch.arange(start, start + 50) for start in starts.tolist()])

    def bits(logits: Tensor) -> str:
        loss = nn.functional.cross_entropy(logits[first, 0], target[first]).item()
        return f"{loss / torch.log(torch.tensor(2.0)).item():.3f}"

    difference = (together - alone).abs().max().item()
    equal = "bit for bit the same" if difference == 0 else f"the same up to {difference:.1e}"
    lines = (
        f"The beginnings of {len(topics)} held-out topics stand in one stream of {len(text):,} characters, and "
        "fastseq.nn.LSTM.forward(..., reset=mask) starts again at each of them, anywhere inside a call. The logits are "
        f"{equal} as when each topic is run alone. The call took {1e3 * one_call:.0f} ms."
    )
    table = Table(
        ("state at the beginning of a topic", "bits per character, first 50 characters"),
        (("zero, by the reset mask", bits(together)), ("what the topic before it left", bits(carried))),
    )
    return Section("Restarts inside a sequence", [Text(lines), table])


def _samples(runners: dict[str, Runner], data: Corpus, budget: Budget) -> Section:
    n = max(120, min(500, int(3 * budget.seconds)))
    blocks: list[Block] = []
    for name in (BINARY, STOCK):
        text, seconds = _generate(runners[name].model, data, "The ", n, budget.seed)
        steps = len(runners[name].steps)
        caption = f"{name}, after {steps:,} steps; {1e6 * seconds / n:.0f} microseconds per character"
        blocks.append(Sample(text, caption))
    told = (
        "Written one character at a time (T 1, B 1, the state handed from call to call) at temperature "
        f"{_TEMPERATURE}, from the same beginning and the same random numbers."
    )
    return Section("Text it writes", [Text(told), *blocks])


@torch.no_grad()
def _generate(model: CharacterModel, data: Corpus, prompt: str, n: int, seed: int) -> tuple[str, float]:
    """The prompt with n characters more, and the seconds they took."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    numbers = data.encode(prompt)
    logits, state = model(numbers[:, None])
    written = [numbers]
    begin = time.perf_counter()
    for _ in range(n):
        probabilities = torch.softmax(logits[-1, 0] / _TEMPERATURE, -1)
        character = torch.multinomial(probabilities, 1, generator=generator)
        written.append(character)
        logits, state = model(character[:, None], state)
    return data.decode(torch.cat(written)), time.perf_counter() - begin

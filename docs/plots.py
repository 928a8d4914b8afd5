"""Plots in the pages, drawn from the rows in ``benchmarks/results`` when the pages are built."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot  # noqa: E402

from benchmarks import harness, legw_table  # noqa: E402
from benchmarks.gpu import tables as gpu_tables  # noqa: E402
from benchmarks.table import Row  # noqa: E402
from docs.tables import newest, rows  # noqa: E402

COLOURS = ("#3b6fb6", "#d1603d", "#4d9a6a", "#8a63a8", "#b08a2e")
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 100,
    "font.size": 11,
    "grid.alpha": 0.3,
    "svg.fonttype": "path",
    "svg.hashsalt": "fastseq",  # equal rows give equal files
}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _ratios(series: dict[str, dict[str, Sequence[float]]], label: str) -> Any:
    """Of each series and case a median with its interval; left of the line at 1 is faster."""
    cases = list(dict.fromkeys(case for found in series.values() for case in found))
    figure, axes = _figure(5.8, 0.5 + 0.42 * len(cases))
    for n, (name, found) in enumerate(series.items()):
        at = [cases.index(case) + 0.16 * (n - (len(series) - 1) / 2) for case in found]
        middle, low, high = zip(*found.values(), strict=True)
        around = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        axes.errorbar(middle, at, xerr=around, fmt="o", ms=5, lw=1.5, color=COLOURS[n], label=name)
    axes.axvline(1, color="black", lw=1)
    axes.set(xscale="log", xlabel=label, yticks=range(len(cases)))
    axes.set_yticklabels(cases)
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=len(series), frameon=False)
    return figure


def _against(op: str, part: str, pairs: dict[str, tuple[str, str]], label: str) -> Any:
    """One series for each of ``pairs``: our label, and theirs."""
    found = newest(op, part)
    series: dict[str, dict[str, Sequence[float]]] = {}
    for name, (ours, theirs) in pairs.items():
        mine = [r for r in found if r["label"] == ours and theirs in r.get("ratios", {})]
        series[name] = {r["case"]: r["ratios"][theirs] for r in mine}
    return _ratios(series, label)


def lstm_training() -> Any:
    pairs = {"nn.LSTM": ("fastseq p=0.2", "stock"), "a loop over steps": ("fastseq p=0.2", "loop p=0.2")}
    return _against("lstm", "train", pairs, "time of a training step with binary gates, ours over theirs")


def lstm_inference() -> Any:
    names = {"nn.LSTM": "stock", "ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}
    pairs = {name: ("fastseq", label) for name, label in names.items()}
    return _against("lstm", "infer", pairs, "time of inference, ours over theirs")


def vq_lookup() -> Any:
    names = {"faiss": "faiss", "torch.cdist": "cdist", "an expanded product": "expanded"}
    pairs = {name: ("fastseq", label) for name, label in names.items()}
    return _against("vq", "lookup", pairs, "time of a lookup, ours over theirs")


def mimo_statistics() -> Any:
    pairs = {"plain torch": ("fastseq", "eager"), "torch.compile": ("fastseq", "compile")}
    found = [row | {"case": f"{row['case']}, {row['threads']} threads"} for row in newest("mimo", "stats")]
    series = {
        name: {r["case"]: r["ratios"][theirs] for r in found if r["label"] == ours and theirs in r.get("ratios", {})}
        for name, (ours, theirs) in pairs.items()
    }
    return _ratios(series, "time of ensemble_stats, ours over theirs")


def gpu_lstm() -> Any:
    """Microseconds a step, a group of bars for each case and mode."""
    found = [r for r in gpu_tables.newest(harness.RESULTS) if r.get("table") == "lstm" and "us_per_step" in r]
    keys = list(dict.fromkeys((r["case"], r["mode"]) for r in found if r["label"] == "fastseq"))
    figure, axes = _figure(5.8, 0.6 + 0.34 * len(keys))
    for n, (label, name) in enumerate({"fastseq": "fastseq", "stock": "cuDNN through nn.LSTM"}.items()):
        times = {(r["case"], r["mode"]): r["us_per_step"] for r in found if r["label"] == label}
        axes.barh(
            [y + 0.38 * (n - 0.5) for y in range(len(keys))],
            [times[k] for k in keys],
            0.36,
            label=name,
            color=COLOURS[n],
        )
    axes.set(xlabel="microseconds a step, bfloat16, one H100", yticks=range(len(keys)))
    axes.set_yticklabels([f"{case.replace('_', ' ')}, {mode}" for case, mode in keys])
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def compression() -> Any:
    """What the paper's ways cost each kind of gates: characters, mean over seeds."""
    found = [row for row in rows("quality") if row["task"] == "characters"]
    ways = ("i, f to 0.2", "i, f to 0.2, clip 0.4", "i, f rank 64", "i, f rank 32", "i, f rank 16")
    models = ("stock", "sharpened", "binary", "binary-all-noise", "binary-cold")
    figure, axes = _figure(5.8, 3.6)
    for n, model in enumerate(models):
        costs = [statistics.fmean(r["cost"] for r in found if (r["way"], r["model"]) == (way, model)) for way in ways]
        axes.bar([x + 0.17 * (n - 2) for x in range(len(ways))], costs, 0.16, label=model, color=COLOURS[n])
    axes.set(
        yscale="log",
        ylabel="bits per character lost",
        xlabel="how input and forget gates are compressed",
        xticks=range(len(ways)),
    )
    axes.set_xticklabels([way.replace("i, f ", "").replace(", clip", ",\nclip") for way in ways])
    axes.legend(frameon=False, ncols=2)
    return figure


def legw() -> Any:
    """One panel for each task: the figure over the batch, a line for each rule."""
    found = [row for row in rows("legw") if row["kind"] == "run" and row["figure"] is not None]
    tasks = list(dict.fromkeys(row["task"] for row in found))
    figure, all_axes = pyplot.subplots(1, len(tasks), figsize=(8, 3.2), layout="constrained")
    for axes, task in zip(all_axes, tasks, strict=True):
        for n, rule in enumerate(legw_table.RULES):
            means = {}
            for k in sorted({row["k"] for row in found}):
                own = [r["figure"] for r in found if (r["task"], r["rule"], r["k"]) == (task, rule, k)]
                if own:
                    means[k] = statistics.fmean(own)
            axes.plot(list(means), list(means.values()), "o-", color=COLOURS[n], label=rule)
        axes.set(xscale="log", title=task, xlabel="times the base batch", xticks=sorted(means))
        axes.set_xticks(sorted(means), [str(k) for k in sorted(means)])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_ylabel(next(r["unit"] for r in found if r["task"] == task))
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def codebooks() -> Any:
    """How much of a codebook is used, by recipe."""
    found = rows("vq_speech")
    recipes = list(dict.fromkeys(row["recipe"] for row in found))
    sizes = sorted({row["K"] for row in found})
    figure, axes = _figure(5.8, 3.2)
    for n, K in enumerate(sizes):
        used = [next(r["used"] / K for r in found if (r["recipe"], r["K"]) == (recipe, K)) for recipe in recipes]
        axes.barh(
            [y + 0.27 * (n - 1) for y in range(len(recipes))], used, 0.25, label=f"of {K:,} codes", color=COLOURS[n]
        )
    axes.set(xlabel="share of the codebook in use", yticks=range(len(recipes)), xlim=(0, 1))
    axes.set_yticklabels(recipes)
    axes.invert_yaxis()
    axes.legend(frameon=False)
    return figure


def mimo_quality() -> Any:
    """Likelihood of each model on each task, clean and shifted."""
    found = rows("mimo_quality")
    shown = ("plain", "ensemble", "MIMO M=2 rho=0.5", "MIMO M=3 rho=0", "MIMO M=3 rho=0.5")
    tasks = list(dict.fromkeys(row["task"] for row in found))
    figure, all_axes = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for axes, inputs in zip(all_axes, dict.fromkeys(row["inputs"] for row in found), strict=True):
        for n, model in enumerate(shown):
            mine = {task: _mean_nll(found, task, model, inputs) for task in tasks}
            axes.bar(
                [x + 0.17 * (n - 2) for x in range(len(tasks))],
                list(mine.values()),
                0.16,
                label=model,
                color=COLOURS[n],
            )
        axes.set(title=f"{inputs} examples", xticks=range(len(tasks)), ylabel="negative log-likelihood")
        axes.set_xticks(range(len(tasks)), [task.replace(" ", "\n") for task in tasks])
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _mean_nll(found: list[Row], task: str, model: str, inputs: str) -> float:
    return statistics.fmean(
        row["nll"] for row in found if (row["task"], row["model"], row["inputs"]) == (task, model, inputs)
    )


def robustness() -> Any:
    """What each training withstands, of the tasks that have several."""
    found = [row for row in rows("adt") if row["kind"] == "quality"]
    counts = Counter(task for task, _ in dict.fromkeys((row["task"], row["method"]) for row in found))
    tasks = [task for task, count in counts.items() if count > 1]
    figure, all_axes = pyplot.subplots(
        1, len(tasks), figsize=(3.7 * len(tasks), 3.2), layout="constrained", squeeze=False
    )
    for axes, task in zip(all_axes[0], tasks, strict=True):
        mine = [row for row in found if row["task"] == task]
        methods = list(dict.fromkeys(row["method"] for row in mine))
        for n, figure_name in enumerate(("natural", "PGD-100", "worst")):
            values = [statistics.fmean(r[figure_name] for r in mine if r["method"] == method) for method in methods]
            axes.barh(
                [y + 0.27 * (n - 1) for y in range(len(methods))], values, 0.25, label=figure_name, color=COLOURS[n]
            )
        axes.set(title=task, xlabel="accuracy %", yticks=range(len(methods)), xlim=(0, 100))
        axes.set_yticklabels(methods)
        axes.invert_yaxis()
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def tasks() -> Any:
    """Accuracy of each kind of training, by the number of windows of the target."""
    found = [row for row in rows("tawt") if row["kind"] == "run"]
    sizes = list(dict.fromkeys(row["task"] for row in found))
    kinds = list(dict.fromkeys((row["paradigm"], row["weighting"]) for row in found))
    figure, axes = _figure(5.8, 0.8 + 0.32 * len(kinds))
    for n, size in enumerate(sizes):
        means = {}
        for y, kind in enumerate(kinds):
            own = [r["accuracy"] for r in found if r["task"] == size and (r["paradigm"], r["weighting"]) == kind]
            if own:
                means[y] = 100 * statistics.fmean(own)
        axes.plot(list(means.values()), list(means), "o", color=COLOURS[n], label=size)
    axes.set(xlabel="accuracy %", yticks=range(len(kinds)))
    axes.set_yticklabels([f"{paradigm}, {weighting}" for paradigm, weighting in kinds])
    axes.invert_yaxis()
    axes.legend(frameon=False)
    return figure


PLOTS: dict[str, Callable[[], Any]] = {
    plot.__name__: plot
    for plot in (
        *(lstm_training, lstm_inference, vq_lookup, mimo_statistics, gpu_lstm),
        *(compression, legw, codebooks, mimo_quality, robustness, tasks),
    )
}


def draw(folder: Path) -> list[Path]:
    """Every plot as an SVG file in ``folder``."""
    folder.mkdir(exist_ok=True)
    found = []
    with matplotlib.rc_context(STYLE):
        for name, plot in PLOTS.items():
            figure = plot()
            found.append(folder / f"{name}.svg")
            figure.savefig(found[-1], metadata={"Date": None})
            pyplot.close(figure)
    return found

"""DKSplit as a deployed model beside the package: answers, what float32 says where they differ, names per second."""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fastseq
from fastseq.convert import from_onnx
from fastseq.deploy import Model

State = dict[str, Any]
Array = NDArray[Any]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
LONGEST = 64  # what DKSplit reads of a name
BATCHES = (1, 16, 64)
ROUNDS = 3  # of timing, in turn
FORMS = ("int8", "float16")  # as it is published; and its integers times their scales, for float32 arithmetic


def dksplit_model(onnx_path: str | Path, npz_path: str | Path, dequantize: bool = False) -> State:
    """Labels of letters, 1 where a word begins. dequantize: with the float32 values of the integers."""
    found = from_onnx(onnx_path, dequantize=dequantize)
    saved = np.load(npz_path)
    crf = {"transitions": "transitions", "start": "start_transitions", "end": "end_transitions"}
    tensors = {f"crf.{name}": saved[key].astype(np.float32) for name, key in crf.items()}
    layer = {"type": "crf", "name": "crf", "labels": len(tensors["crf.start"])}
    return {"layers": [*found["layers"], layer], "tensors": found["tensors"] | tensors}


def halved(state: State) -> State:
    """Its matrices in float16."""
    kept = {n: v.astype(np.float16) for n, v in state["tensors"].items() if v.ndim == 2 and not n.startswith("crf.")}
    return {"layers": state["layers"], "tensors": state["tensors"] | kept}


def without_crf(state: State) -> State:
    """Scores of labels in place of labels."""
    tensors = {name: value for name, value in state["tensors"].items() if not name.startswith("crf.")}
    return {"layers": [layer for layer in state["layers"] if layer["type"] != "crf"], "tensors": tensors}


def dksplit_input(names: Sequence[str]) -> tuple[Array, Array]:
    """Indices of letters [T, B], time-major, and the lengths [B]."""
    lengths = np.array([len(name) for name in names], np.int64)
    index = np.zeros((lengths.max(initial=0), len(names)), np.int32)
    for b, name in enumerate(names):
        index[: len(name), b] = [LETTERS.find(letter) + 2 for letter in name]  # 1: none of them
    return index, lengths


def dksplit_words(name: str, labels: Sequence[int] | Array) -> list[str]:
    """The words of a name from its labels."""
    starts = [0, *(t for t in range(1, len(name)) if labels[t] == 1)]
    return [name[a:z] for a, z in zip(starts, [*starts[1:], len(name)], strict=True)]


def joined_names(count: int, seed: int = 0) -> list[str]:
    """Names of two to four words of Python's own documentation, joined; 64 letters at most."""
    from pydoc_data import topics

    words = sorted(set(re.findall(r"[a-z]{3,12}", " ".join(topics.topics.values()).lower())))
    draw = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choices(words, k=draw.randint(2, 4)))[:LONGEST]] = None
    return list(names)


def loaded(state: State) -> tuple[Model, int]:
    """Written, read again; and the bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dksplit.fastseq"
        fastseq.deploy.save(state, path)
        return Model.load(str(path)), path.stat().st_size


def answers(model: Model, names: Sequence[str], batch: int, order: Sequence[int] | None = None) -> list[Array]:
    """Of each name what the model gives for its letters; by default those of like length go together."""
    order = sorted(range(len(names)), key=lambda n: len(names[n])) if order is None else order
    found: list[Array] = [np.empty(0)] * len(names)
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        index, lengths = dksplit_input([names[n] for n in part])
        y = model.run(index, lengths)[0]
        for b, n in enumerate(part):
            found[n] = y[: lengths[b], b]
    return found


class Crf(NamedTuple):
    start: Array
    transitions: Array
    end: Array

    def score(self, scores: Array, path: Sequence[int] | Array) -> float:
        """Of one path through scores [T, labels], in float64."""
        given = (
            scores.astype(np.float64)[np.arange(len(path)), path].sum() + self.transitions[path[:-1], path[1:]].sum()
        )
        return float(self.start[path[0]] + given + self.end[path[-1]])

    def best(self, scores: Array, count: int = 2) -> list[list[int]]:
        """The ``count`` best paths, the best first."""
        labels = range(len(self.start))
        kept = [[(float(self.start[j] + scores[0, j]), [j])] for j in labels]
        for row in scores[1:].astype(np.float64):
            kept = [
                sorted(
                    ((s + self.transitions[i, j] + row[j], [*p, j]) for i in labels for s, p in kept[i]), reverse=True
                )
                for j in labels
            ]
            kept = [paths[:count] for paths in kept]
        ends = sorted(((s + float(self.end[j]), p) for j in labels for s, p in kept[j]), reverse=True)
        return [path for _, path in ends[:count]]


class Product:
    """The package, on one thread: row by row, which is what it calls exact, since batches change its answers."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        import dksplit  # type: ignore[import-not-found]

        self.splitter = dksplit.Splitter(num_threads=1)
        models = folder / "dksplit/models"
        self.state, self.floats = (
            dksplit_model(models / "dksplit-int8.onnx", models / "dksplit.npz", dequantize)
            for dequantize in (False, True)
        )
        tensors = self.state["tensors"]
        self.crf = Crf(*(tensors[f"crf.{name}"].astype(np.float64) for name in ("start", "transitions", "end")))

    def words(self, names: Sequence[str], exact: bool = True) -> list[list[str]]:
        found: list[list[str]] = self.splitter.split_batch(list(names), exact=exact)
        return found

    def scores(self, names: Sequence[str]) -> list[Array]:
        index = (dksplit_input([name])[0].T.astype(np.int64) for name in names)
        return [self.splitter.session.run(None, {"chars": chars})[0][0] for chars in index]


def same_bits(model: Model, names: Sequence[str]) -> bool:
    """Whether every name gets the same bits alone, among names of like length, and among any."""
    order = list(range(len(names)))
    random.Random(1).shuffle(order)
    alone = answers(model, names, 1)
    others = answers(model, names, 64), answers(model, names, 64, order)
    return all(a.tobytes() == b.tobytes() for found in others for a, b in zip(alone, found, strict=True))


def explained(crf: Crf, names: Sequence[str], ours: list[Array], theirs: list[Array], true: list[Array]) -> State:
    """Scores of both beside those of float32, and every name whose labels differ.

    The margin of an answer over another is the difference of their paths' scores; that of float32 is near 0 where
    roundings decide.
    """
    best = [[np.array(path) for path in crf.best(scores)] for scores in true]
    found: State = {"equal_to_float32": {}, "rms_error_of_scores": {}, "rms_error_of_margin": {}}
    margin = np.array([crf.score(s, p) - crf.score(s, q) for s, (p, q) in zip(true, best, strict=True)])
    paths = {}
    for who, given in (("deployed", ours), ("product", theirs)):
        paths[who] = [np.array(crf.best(scores, 1)[0]) for scores in given]
        own = np.array([crf.score(s, p) - crf.score(s, q) for s, (p, q) in zip(given, best, strict=True)])
        error = np.concatenate([(a - b).ravel() for a, b in zip(given, true, strict=True)]).astype(np.float64)
        found["equal_to_float32"][who] = sum(np.array_equal(p, b[0]) for p, b in zip(paths[who], best, strict=True))
        found["rms_error_of_scores"][who] = float(np.sqrt(np.square(error).mean()))
        found["rms_error_of_margin"][who] = float(np.sqrt(np.square(own - margin).mean()))
    found["median_margin"] = float(np.median(margin))
    found["differ"] = []
    for n, name in enumerate(names):
        a, b = paths["deployed"][n], paths["product"][n]
        if not np.array_equal(a, b):
            row: State = {who: " ".join(dksplit_words(name, path)) for who, path in (("deployed", a), ("product", b))}
            right = [who for who, path in (("deployed", a), ("product", b)) if np.array_equal(path, best[n][0])]
            margins = {w: round(crf.score(s, a) - crf.score(s, b), 5) for w, s in _named(ours[n], theirs[n], true[n])}
            found["differ"].append(row | {"float32": right[0] if right else "neither", "margin": margins})
    return found


def _named(ours: Array, theirs: Array, true: Array) -> Iterator[tuple[str, Array]]:
    yield from (("deployed", ours), ("product", theirs), ("float32", true))


def per_second(calls: Mapping[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Names per second, the median of rounds that take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begin)
    return {name: round(count / float(np.median(seconds)), 1) for name, seconds in taken.items()}


def rows(folder: Path, count: int) -> Iterator[State]:
    product, names = Product(folder), joined_names(count)
    words, theirs = product.words(names), product.scores(names)
    true = answers(loaded(without_crf(product.floats))[0], names, 64)
    for form, state in zip(FORMS, (product.state, halved(product.floats)), strict=True):
        (model, size), (scorer, _) = loaded(state), loaded(without_crf(state))
        ours = [dksplit_words(name, labels) for name, labels in zip(names, answers(model, names, 64), strict=True)]
        calls: dict[str, Callable[[], object]] = {"product, exact": lambda: product.words(names[:600])}
        calls["product, exact=False"] = lambda: product.words(names[:600], exact=False)
        for batch in BATCHES:
            calls[f"deployed, {batch}"] = lambda n=batch, m=model: answers(m, names[:600], n)  # type: ignore[misc]
        yield {
            "form": form,
            "bytes": size,
            "names": count,
            "letters": sum(map(len, names)),
            "equal_words": sum(a == b for a, b in zip(ours, words, strict=True)),
            "same_bits_alone_and_in_batches": same_bits(model, names) and same_bits(scorer, names),
            "names_per_second": per_second(calls, len(names[:600])),
            **explained(product.crf, names, answers(scorer, names, 64), theirs, true),
        }


def line(row: State) -> str:
    speed, exact = row["names_per_second"], row["names_per_second"]["product, exact"]
    fast = ", ".join(f"{name}: {speed[name]:,.0f} ({speed[name] / exact:.1f}x)" for name in speed)
    right = [sum(d["float32"] == who for d in row["differ"]) for who in ("deployed", "product")]
    near = max((abs(d["margin"]["float32"]) for d in row["differ"]), default=0.0)
    return "\n".join(
        (
            f"{row['form']}: {row['bytes']:,} bytes, {row['equal_words']} of {row['names']} names equal",
            f"  of {len(row['differ'])} that differ float32 gives the deployed answer {right[0]} times, the product's "
            f"{right[1]}; largest margin there {near:.3f}, median of all names {row['median_margin']:.2f}",
            *(f"  {name}: {row[name]}" for name in ("equal_to_float32", "rms_error_of_scores", "rms_error_of_margin")),
            f"  the same bits alone and in batches: {row['same_bits_alone_and_in_batches']}",
            f"  names per second: {fast}",
        )
    )

"""A published product as a deployed model, and as its package runs it; see ``benchmarks.products``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import lstm_onnx, packed_layer, products_dksplit
from benchmarks.packed_case import Case, Provider, Work

EQUAL = 0.9  # least share of the names that get the words of the package's exact mode
JUDGED = 100  # least names that this is judged by
Words = list[list[str]]


class Package(NamedTuple):
    """The product's two files, and the model that is made of them."""

    onnx: Path
    splitter: Callable[[int], Any]  # threads -> the package's own Splitter
    model: Any  # fastseq.deploy.Model: letters [T, B] to labels [T, B]


@functools.cache
def package() -> Package:
    """
    Raises:
        ModuleNotFoundError: dksplit, or what reads its file, is not installed.
    """
    import dksplit  # type: ignore[import-not-found]

    folder = Path(dksplit.__file__).parent / "models"
    onnx = folder / "dksplit-int8.onnx"
    model = packed_layer.deployed(products_dksplit.dksplit_model(onnx, folder / "dksplit.npz"))
    return Package(onnx, lambda threads: dksplit.Splitter(num_threads=threads), model)


@functools.lru_cache(maxsize=4)
def names(case: Case) -> list[str]:
    """B names of T letters each."""
    found = products_dksplit.joined_names(4 * case.B + 100, seed=case.T)
    while len(long := [name[: case.T] for name in found if len(name) >= case.T]) < case.B:
        found = [a + b for a, b in zip(found, reversed(found), strict=True)] + found
    return long[: case.B]


@functools.lru_cache(maxsize=4)
def exact(case: Case) -> Words:
    """The words that the package finds name by name."""
    words: Words = package().splitter(1).split_batch(names(case), exact=True)
    return words


def _words(case: Case, index: np.ndarray, threads: int) -> Words:
    labels = package().model.run(index, threads=threads)[0]
    return [products_dksplit.dksplit_words(name, labels[:, b]) for b, name in enumerate(names(case))]


def _fastseq(case: Case, provider: Provider, threads: int) -> Work:
    model, given = package().model, names(case)
    index = products_dksplit.dksplit_input(given)[0]

    def words() -> Words:
        return _words(case, products_dksplit.dksplit_input(given)[0], threads)

    run = words if provider.form == "words" else lambda: model.run(index, threads=threads)
    return Work(run, words)


def _onnxruntime(case: Case, provider: Provider, threads: int) -> Work:
    """The network alone: labels of these scores are found by the package in Python."""
    import onnxruntime

    options = lstm_onnx.onnxruntime_options(threads)
    session = onnxruntime.InferenceSession(str(package().onnx), options, providers=["CPUExecutionProvider"])
    letters = np.ascontiguousarray(products_dksplit.dksplit_input(names(case))[0].T, np.int64)
    rows = [letters[b : b + 1] for b in range(case.B)]
    if provider.form == "row by row":
        return Work(lambda: [session.run(None, {"chars": row}) for row in rows], lambda: exact(case))
    return Work(lambda: session.run(None, {"chars": letters}), lambda: _decoded(session, case, letters))


def _decoded(session: Any, case: Case, letters: np.ndarray) -> Words:
    split = importlib.import_module("dksplit.split")  # the package's attribute of this name is a function
    splitter = package().splitter(1)
    scores = session.run(None, {"chars": letters})[0]
    rest = splitter.transitions, splitter.start_transitions, splitter.end_transitions
    words: Words = split._decode_predictions_batch(names(case), split._crf_decode(scores, *rest))
    return words


def _dksplit(case: Case, provider: Provider, threads: int) -> Work:
    splitter, given = package().splitter(threads), names(case)

    def words() -> Words:
        found: Words = splitter.split_batch(given, exact=provider.form == "exact=True")
        return found

    return Work(words, words)


def judge(case: Case, provider: Provider, work: Work) -> tuple[str, dict[str, Any]]:
    """Ours: every name alone as among others, to the bit; and of many most as in the exact mode of the package."""
    got, wanted = work.outputs(), exact(case)
    facts = {"equal": round(sum(a == b for a, b in zip(got, wanted, strict=True)) / case.B, 4), "names": case.B}
    return (_verdict(case._replace(B=max(case.B, JUDGED))) if provider.name == "fastseq" else "passed"), facts


@functools.lru_cache(maxsize=4)
def _verdict(case: Case) -> str:
    index = products_dksplit.dksplit_input(names(case))[0]
    run = package().model.run
    labels = run(index)[0]
    other = sum(not np.array_equal(run(index[:, b : b + 1])[0][:, 0], labels[:, b]) for b in range(case.B))
    if other:
        return f"labels: {other} of {case.B} names get others alone"
    equal = sum(a == b for a, b in zip(_words(case, index, 1), exact(case), strict=True)) / case.B
    return "passed" if equal >= EQUAL else f"words: {equal:.0%} as in the exact mode, at least {EQUAL:.0%} expected"


PROVIDERS: dict[str, Callable[[Case, Provider, int], Work]] = {
    "fastseq": _fastseq,
    "onnxruntime": _onnxruntime,
    "dksplit": _dksplit,
}

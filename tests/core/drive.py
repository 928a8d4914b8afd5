"""Drives the numpy door over every layout, option and odd size, without torch, and tells what came out.

    python drive.py [--core PATH] [--spread full|few] [--only lstm|vq|packed|mimo|labelled|adt] [--threads N] [--fresh]

prints one line per result: its name and a hash of its bits. Two runs with other instruction sets, threads or builds can
be compared line by line. Every result must be finite, so memory that was never written shows where fresh memory is NaN.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

SIZES = [(1, 1, 1), (3, 2, 7), (2, 13, 8), (3, 5, 33), (2, 27, 17), (2, 3, 65), (0, 3, 4), (3, 0, 4)]
LARGE = [(2, 33, 130), (2, 2, 300)]
PRODUCTS = [(1, 1, 1), (3, 5, 7), (13, 33, 17), (12, 32, 16), (1, 67, 300), (67, 1, 9), (490, 40, 270), (0, 3, 2)]
PRODUCTS += [(3, 0, 2), (3, 4, 0), (25, 64, 257)]
# rows, codes, dimensions, codebooks
LOOKUPS = [(1, 1, 1, 1), (4, 7, 3, 2), (5, 40, 17, 1), (19, 33, 33, 2), (70, 20, 9, 3), (33, 65, 64, 1), (0, 5, 4, 2)]
# rows, and rows and columns of the weights; how each gate is kept: storage, group, rank of factors
PACKED = [(1, 1, 1), (3, 5, 7), (2, 16, 8), (5, 33, 37), (13, 50, 65), (35, 16, 130), (0, 5, 3)]
LARGE_PACKED = [(70, 100, 513), (8, 300, 64)]
INTEGERS = {
    "int8": [("int8", 0, 0)],
    "int8 by 8": [("int8", 8, 0)],
    "int8 by 64": [("int8", 64, 0)],
    "int4": [("int4", 0, 0)],
    "int4 by 32": [("int4", 32, 0)],
    "int8 factors": [("int8", 0, 5)],
    "integers": [("int4", 8, 3), ("int8", 0, 0), ("int4", 8, 18), ("int4", 16, 0)],
}
FORMS = {
    **INTEGERS,
    "float32": [("float32", 0, 0)],
    "bfloat16": [("bfloat16", 0, 0)],
    "mixed": [("float32", 0, 3), ("float32", 0, 17), ("bfloat16", 0, 0), ("int8", 0, 0)],
}
# steps, examples, rows, places, slots, channels, columns of the weight
ROWS = [(1, 1, 1, 1, 1, 1, 1), (3, 5, 20, 1, 3, 7, 33), (2, 5, 5, 3, 2, 40, 65), (2, 7, 9, 2, 4, 200, 31)]
ROWS += [(2, 3, 0, 2, 2, 5, 6), (2, 3, 4, 2, 2, 0, 5), (0, 3, 4, 1, 2, 5, 3)]
LARGE_ROWS = [(11, 32, 128, 1, 3, 100, 140), (2, 250, 600, 1, 2, 60, 40)]
# rows, slots and classes
LABELLED = [(1, 1, 1), (3, 2, 7), (35, 1, 16), (5, 3, 33), (40, 4, 100), (2, 5, 1000), (0, 2, 3), (3, 2, 9001)]
# samples, rows, and numbers of a row
MOVED = [(1, 1, 1), (3, 2, 33), (2, 3, 129), (5, 2, 700), (2, 0, 3), (2, 3, 0), (3, 40, 1000)]
LARGE_LOOKUPS = [(600, 70, 20, 1), (20, 420, 100, 1), (2, 900, 140, 1)]


class Call(NamedTuple):
    """Arguments of ``lstm_forward`` up to c0, the optional ones by name, and those of them that backward takes."""

    tensors: list[np.ndarray]
    options: dict[str, Any]
    shared: dict[str, Any]


def load(path: str | None) -> ModuleType:
    """``fastseq._core``, or the module in the file at ``path``."""
    if path is None:
        from fastseq import _core

        return _core
    spec = importlib.util.spec_from_file_location("_core", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fresh:
    """A door whose calls run on a new Python thread each, so that none finds scratch larger than it asked for."""

    def __init__(self, core: ModuleType) -> None:
        self.core = core

    def __getattr__(self, name: str) -> Any:
        def on_new_thread(*args: Any, **kwargs: Any) -> Any:
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(getattr(self.core, name), *args, **kwargs).result()

        return on_new_thread


def call(random: np.random.Generator, size: tuple[int, int, int], dtype: Any, options: dict[str, Any]) -> Call:
    """Random arguments; ``options`` says layout, P, reset, start, noise, tau, hard and reverse."""
    T, B, H = size
    P = max(1, H // 2) if options["projection"] else H
    lengths = random.integers(0, T + 1, B)
    lengths[:1] = T
    live = np.arange(T)[:, None] < -np.sort(-lengths)
    lead: tuple[int, ...] = (int(live.sum()),) if options["layout"] == "packed" else (T, B)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (random.standard_normal(shape) * scale).astype(dtype)

    shared: dict[str, Any] = {
        "weight_hr": normal(P, H, scale=1 / math.sqrt(H)) if options["projection"] else None,
        "lengths": lengths.astype(np.int64) if options["layout"] == "lengths" else None,
        "batch_sizes": live.sum(1).astype(np.int64) if options["layout"] == "packed" else None,
        "reset": random.random(lead) < 0.3 if options["reset"] else None,
        "h_start": normal(P) if options["start"] else None,
        "c_start": normal(H) if options["start"] else None,
        "tau": options["tau"],
        "hard": options["hard"],
        "reverse": options["reverse"],
    }
    noise: dict[str, Any] = {}
    if options["noise"]:
        rows = random.permutation(B).astype(np.int64)
        noise = {"seed": 77 << 40, "rows": rows, "row_offset": 3, "stream": 5, "noise_probability": 0.5}
    weight_hh = normal(4 * H, P, scale=1 / math.sqrt(P))
    tensors = [normal(*lead, 4 * H), weight_hh, normal(B, P), normal(B, H)]
    return Call(tensors, {**shared, **noise}, shared)


def spread(few: bool) -> Iterator[tuple[tuple[int, int, int], Any, dict[str, Any]]]:
    """Sizes, dtypes and options: each option alone in each layout, and all of them together, at every size."""
    plain = dict(projection=False, reset=False, start=False, noise=False, tau=1.0, hard=False)
    every = dict(projection=True, reset=True, start=True, noise=True, tau=0.9)
    changes: list[dict[str, Any]] = [{}, every]
    if not few:
        changes += [{name: value} for name, value in every.items()] + [{"hard": True}, {"reset": True, "start": True}]
    for size, dtype in itertools.product(SIZES, (np.float32, np.float64)):
        for layout, reverse, change in itertools.product(("dense", "lengths", "packed"), (False, True), changes):
            yield size, dtype, {**plain, **change, "layout": layout, "reverse": reverse}
    for size, dtype, layout in itertools.product(LARGE, (np.float32, np.float64), ("dense", "packed")):
        for projection in (True, False):
            last = {"projection": projection, "layout": layout, "reverse": layout == "packed"}
            yield size, dtype, {**plain, **every, **last}


def lstm(core: Any, c: Call, random: np.random.Generator, threads: int) -> Iterator[tuple[str, np.ndarray]]:
    """Forward with all it can keep, rebuilt gates, backward with and without weights and some upstream gradients."""
    out = core.lstm_forward(*c.tensors, **c.options, save=2, threads=threads)
    yield from zip(("h", "c", "gates", "h_n", "c_n"), out, strict=True)
    for save in (0, 1):
        part = core.lstm_forward(*c.tensors, **c.options, save=save, threads=threads)
        yield from zip((f"h save={save}", f"c save={save}", f"gates save={save}"), part[:3], strict=True)
    h, c_all, gates = out[:3]
    rebuilt = core.lstm_gates(c.tensors[0], h, c_all, *c.tensors[1:], **c.options, threads=threads)
    assert rebuilt.tobytes() == gates.tobytes(), "rebuilt gates differ"
    upstream = [random.standard_normal(v.shape).astype(v.dtype) for v in out]
    some = [upstream[0], None, None, None, upstream[4]]
    names = ("dx_gates", "dweight_hh", "dh0", "dc0", "dweight_hr", "dh_start", "dc_start")
    for label, grads, weights in (("", upstream, True), (" some", some, False), (" none", [None] * 5, True)):
        found = core.lstm_backward(
            *grads, gates, h, c_all, *c.tensors[1:], **c.shared, weights=weights, threads=threads
        )
        yield from zip((f"{n}{label}" for n in names), found, strict=True)


FACTORS: list[tuple[int, ...]] = [(3, 3, 3, 3), (1, -1, 40, 0)]  # ranks of the gates, -1 for a full one


def lowrank(core: Any, c: Call, random: np.random.Generator, threads: int) -> Iterator[tuple[str, np.ndarray]]:
    """Forward and backward with factors, shared, of each gate, and of some gates beside full ones."""
    (x, _, h0, c0), H, dtype = c.tensors, c.tensors[3].shape[1], c.tensors[0].dtype
    options, shared = ({k: v for k, v in d.items() if k != "weight_hr"} for d in (c.options, c.shared))

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / math.sqrt(max(H, 1))).astype(dtype)

    calls: list[tuple[str, tuple[Any, ...]]] = [("lowrank", (normal(4, H, 3), normal(n, 3, H))) for n in (1, 4)]
    for ranks in FACTORS:
        values, full = sum(r for r in ranks if r > 0), ranks.count(-1)
        weights = (normal(full * H, H) if full else None, normal(H, values), normal(values, H))
        calls.append(("mixed", (*weights, *ranks)))
    for n, (kind, weights) in enumerate(calls):
        out = getattr(core, f"lstm_{kind}_forward")(x, *weights, h0, c0, **options, save=2, threads=threads)
        yield from ((f"{kind} {n} output {i}", v) for i, v in enumerate(out))
        upstream = [random.standard_normal(v.shape).astype(v.dtype) for v in out]
        kept = (out[2], *out[:2])
        for label, grads, wanted in (("", upstream, True), (" some", [upstream[0], *[None] * 4], False)):
            run = getattr(core, f"lstm_{kind}_backward")
            found = run(*grads, *kept, *weights, h0, c0, **shared, weights=wanted, threads=threads)
            yield from ((f"{kind} {n} gradient {i}{label}", v) for i, v in enumerate(found))


def spoilt(random: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """With some numbers that are not finite, nearly so, or nearly zero."""
    values = values.copy()
    places = random.random(values.shape) < 0.5 / values.shape[-1]
    values[places] = random.choice([np.nan, np.inf, -np.inf, 3e38, 1e19, 1e-19, 1e-40, 0.0], int(places.sum()))
    return values


def lookups(core: Any, size: tuple[int, ...], dtype: Any, threads: int) -> Iterator[tuple[str, np.ndarray]]:
    """The nearest codes by every way there is, sums by code, all levels of a residual quantizer."""
    N, K, D, G = size
    random = np.random.default_rng(N + K)
    x, c = (random.standard_normal((G, n, D)).astype(dtype) for n in (N, K))
    c[:, K // 2 :] = c[:, : K - K // 2]  # ties
    mask, best = random.random((G, N)) < 0.7, min(5, K)
    strange = spoilt(random, x), spoilt(random, c)
    ways = itertools.product((None, mask), (False, True), ((1, 0), (1, 1), (1, 2), (best, 0)), (16, 64))
    for valid, dot, (many, screen), bits in ways:
        label = f"mask={valid is not None} dot={dot} best={many} screen={screen} bits={bits}"
        found = core.vq_nearest(x, c, valid, dot, many, bits, True, valid is None, screen, threads=threads)
        yield from zip((f"index {label}", f"distance {label}", f"score {label}"), found, strict=True)
        yield f"strange {label}", core.vq_nearest(*strange, valid, dot, many, bits, screen=screen, threads=threads)[0]
    prepared = core.Codebook(c)
    yield from zip(("prepared", "distance"), prepared.nearest(x, best, 32, True, threads=threads), strict=True)
    names = ("codes", "index", "distance", "counts", "sums")
    for valid, sums in itertools.product((None, mask), (False, True)):
        found = core.vq_quantize(x, c, valid, False, sums, threads=threads)
        yield from zip((f"{n} {valid is not None} {sums}" for n in names), found, strict=True)
    index = random.integers(-1, K, (G, N))
    yield from zip(("counts", "sums"), core.vq_sums(x, index, K, threads=threads), strict=True)
    books, levels = [c[0], c[0, : K // 2 + 1] / 3, c[-1] / 9], random.integers(0, 5, N)
    for valid, used, sums in itertools.product((None, mask[0]), (None, levels), (False, True)):
        found = core.vq_residual(x[0], books, valid, used, sums, threads=threads)
        yield from zip(
            (f"residual {n} {valid is not None} {used is not None} {sums}" for n in names), found, strict=True
        )
    for bits in (1, 7, 10, 32):
        packed = core.vq_pack(np.abs(index) % 2**bits, bits)
        yield f"packed {bits}", packed
        yield f"unpacked {bits}", core.vq_unpack(packed, bits, N)


def vq_results(core: Any, few: bool, threads: int) -> Iterator[tuple[str, np.ndarray]]:
    """Everything of vector quantization, by name."""
    for size, dtype in itertools.product(LOOKUPS if few else LOOKUPS + LARGE_LOOKUPS, (np.float32, np.float64)):
        for name, value in lookups(core, size, dtype, threads):
            # the sign of a zero depends on which of equal scores was the first: it means nothing
            yield f"vq {size} {np.dtype(dtype).name} {name}", value + 0.0 if name.startswith("score") else value


def mimo_results(core: Any, few: bool, threads: int) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of several examples, by name: with many rows of each example and few, of either layer's way."""
    for size, dtype in itertools.product(ROWS if few else ROWS + LARGE_ROWS, (np.float32, np.float64)):
        A, B, N, S, M, C, G = size
        random = np.random.default_rng(A + B + N)

        def normal(*shape: int) -> np.ndarray:
            return random.standard_normal(shape).astype(dtype)  # noqa: B023

        index = random.integers(0, B, (M, N), dtype=np.int32)
        x, weight, bias, d = normal(A, B, S, C), normal(G, M * C), normal(G), normal(A, N, S, G)
        label = f"mimo {size} {np.dtype(dtype).name}"
        taken = core.mimo_gather(x, index, np.arange(3 * B, dtype=np.int16).reshape(B, 3), threads=threads)
        yield from zip((f"{label} rows", f"{label} labels"), taken, strict=True)
        yield f"{label} gather_backward", core.mimo_gather_backward(taken[0], index, B, threads=threads)
        yield f"{label} combine", core.mimo_combine(normal(A, B, S, M * G), index, bias, threads=threads)
        yield f"{label} combine_backward", core.mimo_combine_backward(d, index, B, threads=threads)
        yield f"{label} project", core.mimo_project(x, weight, bias, index, threads=threads)
        yield f"{label} project alone", core.mimo_project(x, weight, None, index, threads=threads)
        grads = core.mimo_project_backward(d, x, weight, index, threads=threads)
        yield from zip((f"{label} {n}" for n in ("dx", "dweight", "dbias")), grads, strict=True)
        alone = core.mimo_project_backward(d, x, weight, index, False, True, False, threads=threads)
        yield f"{label} dweight alone", alone[1]


def lstm_results(core: Any, few: bool, threads: int) -> Iterator[tuple[str, np.ndarray]]:
    """Everything of the LSTM and what it is made of, by name."""
    for n, (size, dtype, options) in enumerate(spread(few)):
        random = np.random.default_rng(n)
        label = " ".join(f"{k}={v}" for k, v in options.items() if v)
        for name, value in lstm(core, call(random, size, dtype, options), random, threads):
            yield f"lstm {size} {np.dtype(dtype).name} {label} {name}", value
        if not options["projection"]:
            for name, value in lowrank(core, call(random, size, dtype, options), random, threads):
                yield f"lstm {size} {np.dtype(dtype).name} {label} {name}", value
    for n, (size, dtype, bias) in enumerate(itertools.product(PRODUCTS, (np.float32, np.float64), (False, True))):
        random = np.random.default_rng(n)
        M, N, K = size
        for ta, tb in itertools.product((False, True), repeat=2):
            a, b = random.standard_normal((K, M) if ta else (M, K)), random.standard_normal((N, K) if tb else (K, N))
            add = random.standard_normal(N).astype(dtype) if bias else None
            out = core.gemm(a.astype(dtype), b.astype(dtype), add, ta, tb, threads=threads)
            yield f"gemm {size} {np.dtype(dtype).name} bias={bias} {ta} {tb}", out
    for size, probability in itertools.product([*SIZES, *LARGE], (0.0, 0.3, 1.0)):
        yield f"noise {size} {probability}", core.lstm_noise(-9, *size, None, 4, 1, probability, threads=threads)
    counter = np.random.default_rng(0).integers(0, 2**32, (7, 4), dtype=np.uint32)
    yield "philox", core.philox(counter, 2**63 + 5)


def stored(random: np.random.Generator, N: int, K: int, storage: str, group: int) -> tuple[Any, Any, int]:
    """Values, scales and group of one array of weights."""
    group = group if group < K else 0
    scale = random.uniform(0.5, 1.5, (N, math.ceil(K / (group or K)))).astype(np.float32) / (100 * math.sqrt(K))
    if storage == "int8":
        return random.integers(-128, 128, (N, K)).astype(np.int8), scale, group
    if storage == "int4":
        return random.integers(0, 256, (N, (K + 1) // 2)).astype(np.uint8), 16 * scale, group
    values = (random.standard_normal((N, K)) / math.sqrt(K)).astype(np.float32)
    wide = values if storage == "float32" else (values.view(np.uint32) >> 16).astype(np.uint16)
    return wide, scale.ravel()[:0], 0


def packed(core: Any, random: np.random.Generator, size: tuple[int, int], form: str, gates: int, bounded: bool) -> Any:
    """A packed matrix of random weights; ``size`` is of all gates."""
    (N, K), parts, nothing = size, [], np.zeros(0, np.float32)
    for g in range(gates):
        storage, group, rank = FORMS[form][g % len(FORMS[form])]
        rows = stored(random, N // gates, rank or K, storage, 0 if rank else group)
        parts.append((*rows, *(stored(random, rank, K, storage, group) if rank else (nothing, nothing, 0))))
    columns = [list(v) for v in zip(*parts, strict=True)]
    return core.pack_matrix(*columns, K, bounded)


def packed_results(core: Any, few: bool, threads: int) -> Iterator[tuple[str, np.ndarray]]:
    """Everything over packed weights, by name."""
    for n, (size, form) in enumerate(itertools.product(PACKED if few else PACKED + LARGE_PACKED, FORMS)):
        M, N, K = size
        random = np.random.default_rng(n)
        x, bias = random.standard_normal((M, K)).astype(np.float32), random.standard_normal(4 * N).astype(np.float32)
        for gates in (1, 4):
            w = packed(core, random, (N * gates, K), form, gates, False)
            yield f"packed {form} {size} {gates} bytes", w
            yield f"packed {form} {size} {gates}", core.linear_packed(x, w, bias[: N * gates], threads=threads)
    every = dict(noise=False, reset=True, start=True, tau=0.9, hard=False)
    options = itertools.product(("dense", "lengths", "packed"), (False, True), (False, True), (0, 20), FORMS)
    for n, (layout, reverse, projection, width, form) in enumerate(options):
        chosen = SIZES[n % len(SIZES)] if n % 9 or few else LARGE[n % 2]
        random = np.random.default_rng(n)
        c = call(random, chosen, np.float32, {**every, "layout": layout, "reverse": reverse, "projection": projection})
        (x, _, h0, c0), (H, P) = c.tensors, (c.tensors[3].shape[1], c.tensors[2].shape[1])
        given = {name: value for name, value in c.options.items() if name != "weight_hr"}
        if projection:
            given["weight_hr"] = packed(core, random, (P, H), "int4 by 32" if n % 2 else "int8", 1, True)
        w = packed(core, random, (4 * H, P), form, 4, not projection)
        if width:
            x = random.standard_normal((*x.shape[:-1], width)).astype(np.float32)
            given["weight_ih"] = packed(core, random, (4 * H, width), form, 4, False)
            given["bias"] = random.standard_normal(4 * H).astype(np.float32)
        for save in (0, 2):
            out = core.lstm_packed(x, w, h0, c0, **given, save=save, threads=threads)
            label = f"packed {form} lstm {chosen} {layout} {reverse} {projection} {width} {save}"
            yield from zip((f"{label} {name}" for name in ("h", "c", "gates", "h_n", "c_n")), out, strict=True)


def labelled_results(core: Any, few: bool, threads: int) -> Iterator[tuple[str, np.ndarray]]:
    """The loss of slots and its gradient, and the figures of an ensemble, by name."""
    figures = "probability prediction confidence members disagreement nll brier histogram totals".split()
    for n, (size, dtype) in enumerate(itertools.product(LABELLED, (np.float32, np.float64))):
        random, label = np.random.default_rng(n), f"labelled {size} {np.dtype(dtype).name}"
        N, M, K = size
        logits, dnll = (4 * random.standard_normal(shape).astype(dtype) for shape in (size, (N, M)))
        logits[random.random(size) < 0.01] = -1000
        labels = random.integers(-1, K, (N, M))
        for smoothing in (0.0, 0.1):
            out = core.mimo_nll(logits, labels, smoothing, -1, threads=threads)
            yield from zip(
                (f"{label} {smoothing} {name}" for name in ("loss", "nll", "top", "logsum")), out, strict=True
            )
            d = core.mimo_nll_backward(out[0], dnll, logits, labels, *out[2:], smoothing, -1, threads=threads)
            yield f"{label} {smoothing} dlogits", d
        for given, mean in itertools.product((None, labels[:, 0].copy()), (False, True)):
            out = core.ensemble_stats(logits, given, 15, -1, mean, threads=threads)
            yield from zip((f"{label} {given is None} {mean} {f}" for f in figures), out, strict=True)


def adt_results(core: Any, few: bool, threads: int) -> Iterator[tuple[str, np.ndarray]]:
    """ADT's noise, samples, gradients and steps, by name."""
    for n, (size, dtype, own) in enumerate(
        itertools.product(MOVED[: 4 if few else None], (np.float32, np.float64), (False, True))
    ):
        random, label = np.random.default_rng(n), f"adt {size} {np.dtype(dtype).name} {own}"
        S, B, N = size
        g, x, mu, rho, totals = (
            random.standard_normal(shape).astype(dtype) for shape in (size, *[(B, N)] * 3, (2, B, N))
        )
        eps = random.random((B if own else 1, N)).astype(dtype) * (np.arange(N) % 5 != 2)
        eps, weight = eps.astype(dtype), random.random(B).astype(dtype)
        state = (x, mu, 20 * rho, 5 - 2**50, eps)
        yield f"{label} noise", core.adt_noise(x, 5, S, 2, threads=threads)
        for low, high in ((-math.inf, math.inf), (0.0, 1.0)):
            yield f"{label} {low} sample", core.adt_sample(*state, S, 3, low, high, threads=threads)
            yield f"{label} {low} d", core.adt_backward(g, *state, weight, 3, low, high, threads=threads)
            for given in (None, totals):
                out = core.adt_ascend(g, *state, weight, given, 3, 0.3, low, high, threads=threads)
                names = (f"{label} {low} {given is None} {name}" for name in ("mu", "rho", "totals"))
                yield from zip(names, out, strict=True)


PARTS = {
    "lstm": lstm_results,
    "vq": vq_results,
    "packed": packed_results,
    "mimo": mimo_results,
    "labelled": labelled_results,
    "adt": adt_results,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--core", help="file of another build of fastseq._core")
    parser.add_argument("--spread", choices=("full", "few"), default="full")
    parser.add_argument("--only", choices=PARTS, help="one part of the core instead of all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="a new Python thread for each call")
    arguments = parser.parse_args()
    core: Any = load(arguments.core)
    core = Fresh(core) if arguments.fresh else core
    print("isa", core.isa())
    for part in [arguments.only] if arguments.only else PARTS:
        for name, value in PARTS[part](core, arguments.spread == "few", arguments.threads):
            assert value.dtype.kind != "f" or np.isfinite(value).all(), f"{name}: not finite"
            print(name, hashlib.sha256(value.tobytes()).hexdigest()[:16])


if __name__ == "__main__":
    main()

"""Streaming without Python: steps that a C program times, beside what other runtimes take for theirs."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import lstm_onnx, packed_layer
from benchmarks.harness import CannotRun, SelfTimed
from benchmarks.packed_case import Case, Provider, Work, inputs

SOURCE = Path(__file__).with_name("packed_stream.c")
INT8_TAG = 0x000D4B38  # of a matrix of int8 in a file of ncnn; 0: float32
Step = Callable[[np.ndarray], np.ndarray]  # x [H] to y [H]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Of the program and its models, while this process lives."""
    return tempfile.TemporaryDirectory(prefix="fastseq-packed-")


@functools.cache
def program() -> str:
    """packed_stream.c, compiled.

    Raises:
        CannotRun: without a C compiler, or without libfastseq.so.
    """
    from fastseq import deploy

    compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise CannotRun("no C compiler (cc, gcc, clang or $CC)")
    try:
        library = deploy.library()
    except FileNotFoundError as error:
        raise CannotRun(str(error)) from None
    made = str(Path(_folder().name) / "packed_stream")
    flags = ["-O2", "-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{deploy.include()}"]
    link = [f"-L{library}", "-lfastseq", f"-Wl,-rpath,{library}"]
    done = subprocess.run([*compiler.split(), *flags, str(SOURCE), "-o", made, *link], capture_output=True, text=True)
    if done.returncode:
        raise CannotRun(f"{SOURCE.name} does not compile: {done.stderr}")
    return made


def timed(program: str, model: str, x: str, steps: int, y: str | None = None) -> tuple[float, dict[str, float]]:
    """Seconds of a mean step, and what else the program tells."""
    command = [program, model, x, str(steps), *([y] if y else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    load, mean, median, late = map(float, done.stdout.split())
    return mean, {"load_ms": load * 1e3, "p50_us": median * 1e6, "p99_us": late * 1e6}


def _fastseq(case: Case, provider: Provider, threads: int) -> Work:
    from fastseq import deploy

    given = inputs(case)
    state = packed_layer.exported(given.stock, provider.form)
    paths = (Path(_folder().name) / f"{case.H} {provider.form}{end}" for end in (".fastseq", ".x", ".y"))
    model, x, y = map(str, paths)
    deploy.save(state, model)
    given.x.numpy().tofile(x)
    made = program()

    def outputs() -> Tensor:
        timed(made, model, x, len(given.x), y)
        return torch.from_numpy(np.fromfile(y, np.float32)).view(given.x.shape)

    return Work(SelfTimed(lambda: timed(made, model, x, case.T)), outputs, state)


def _each_timed(case: Case, step: Step) -> tuple[float, dict[str, float]]:
    """The same from Python."""
    clock, spans = time.perf_counter_ns, [0] * case.T
    rows = list(inputs(case).x[:, 0].numpy())
    for t in range(case.T):
        x = rows[t % len(rows)]
        begin = clock()
        step(x)
        spans[t] = clock() - begin
    median, late = np.quantile(spans, (0.5, 0.99))
    return float(np.mean(spans)) / 1e9, {"p50_us": float(median) / 1e3, "p99_us": float(late) / 1e3}


def _python(fresh: Callable[[nn.LSTM, str], Callable[[], Step]], case: Case, provider: Provider, threads: int) -> Work:
    """``fresh``: what makes functions of a step with a state of zeros."""
    given = inputs(case)
    make = fresh(given.stock, provider.form)

    def outputs() -> Tensor:
        step = make()
        return torch.stack([torch.from_numpy(step(x).copy()) for x in given.x[:, 0].numpy()])[:, None]

    step = make()
    return Work(SelfTimed(lambda: _each_timed(case, step)), outputs)


def _onnxruntime(stock: nn.LSTM, form: str) -> Callable[[], Step]:
    """Through IO binding: it reads and writes the same memory again and again, states go back and forth."""
    import onnxruntime

    data = packed_layer.onnx_bytes(stock, 1, 1, form, state=True)
    options = lstm_onnx.onnxruntime_options(1)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def fresh() -> Step:
        x, y, *states = np.zeros((6, 1, 1, stock.hidden_size), np.float32)
        pairs = []
        for (h0, c0), (h1, c1) in ((states[:2], states[2:]), (states[2:], states[:2])):
            binding = session.io_binding()
            for name, value in {"x": x, "h0": h0, "c0": c0}.items():
                binding.bind_input(name, "cpu", 0, np.float32, value.shape, value.ctypes.data)
            for name, value in {"y": y, "h_n": h1, "c_n": c1}.items():
                binding.bind_output(name, "cpu", 0, np.float32, value.shape, value.ctypes.data)
            pairs.append(binding)
        run, turn = session.run_with_iobinding, 0

        def step(row: np.ndarray) -> np.ndarray:
            nonlocal turn
            x[...] = row
            run(pairs[turn])
            turn = 1 - turn
            return y[0, 0]

        return step

    return fresh


def _ncnn_model(stock: nn.LSTM, form: str) -> tuple[str, bytes]:
    """The layer as ncnn's two files: gates i, f, o, g; a matrix of int8 has a factor for each row."""

    def reordered(value: Tensor) -> np.ndarray:
        i, f, g, o = value.detach().chunk(4)
        return torch.cat((i, f, o, g)).numpy()

    H, tag = stock.hidden_size, (0).to_bytes(4, "little")
    int8 = form == "int8"
    lines = ["7767517", "4 6", "Input x 0 1 x", "Input h0 0 1 h0", "Input c0 0 1 c0"]
    lines.append(f"LSTM lstm 3 3 x h0 c0 y h c 0={H} 1={4 * H * stock.input_size} 2=0 3={H}{' 8=2' if int8 else ''}")
    matrices, factors = [], b""
    for weight in (reordered(stock.weight_ih_l0), reordered(stock.weight_hh_l0)):
        if not int8:
            matrices.append(tag + weight.tobytes())
            continue
        scale = 127 / np.abs(weight).max(1, keepdims=True)
        values = np.rint(weight * scale).astype(np.int8).tobytes()
        matrices.append(INT8_TAG.to_bytes(4, "little") + values + bytes(-len(values) % 4))
        factors += scale.astype(np.float32).tobytes()
    bias = tag + reordered(stock.bias_ih_l0 + stock.bias_hh_l0).tobytes()
    return "\n".join(lines) + "\n", matrices[0] + bias + matrices[1] + factors


def _ncnn(stock: nn.LSTM, form: str) -> Callable[[], Step]:
    import ncnn

    net: Any = ncnn.Net()
    net.opt.num_threads = 1
    paths = [Path(_folder().name) / f"{stock.hidden_size} {form}{end}" for end in (".param", ".bin")]
    text, data = _ncnn_model(stock, form)
    paths[0].write_text(text)
    paths[1].write_bytes(data)
    if net.load_param(str(paths[0])) or net.load_model(str(paths[1])):
        raise RuntimeError("ncnn does not load the LSTM")

    def fresh() -> Step:
        h, c = (ncnn.Mat(np.zeros((1, stock.hidden_size), np.float32)).clone() for _ in range(2))

        def step(row: np.ndarray) -> np.ndarray:
            nonlocal h, c
            extractor = net.create_extractor()
            extractor.input("x", ncnn.Mat(row[None]))
            extractor.input("h0", h)
            extractor.input("c0", c)
            y = extractor.extract("y")[1]
            h, c = extractor.extract("h")[1], extractor.extract("c")[1]
            return np.array(y)[0]

        return step

    return fresh


PROVIDERS: dict[str, Callable[[Case, Provider, int], Work]] = {
    "fastseq": _fastseq,
    "onnxruntime": functools.partial(_python, _onnxruntime),
    "ncnn": functools.partial(_python, _ncnn),
}

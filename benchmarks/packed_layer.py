"""One LSTM layer by every runtime, in one call or step by step."""

from __future__ import annotations

import functools
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import lstm_onnx
from benchmarks.packed_case import FORMS, Case, Provider, Work, inputs

Step = Callable[[Any], Any]  # x of a step to y


def exported(stock: nn.LSTM, form: str) -> dict[str, Any]:
    """The layer in a form, as it is deployed."""
    import fastseq

    options = FORMS[form][0]
    if options is None:
        return fastseq.export_state(stock)
    if "gates" in options:
        options = {**options, "rank": max(1, stock.hidden_size // 8)}
    return fastseq.export_state(fastseq.compress(stock, **options).model)


def deployed(state: Any) -> Any:
    from fastseq import deploy

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "layer.fastseq")
        deploy.save(state, path)
        return deploy.Model.load(path)


def onnx_bytes(stock: nn.LSTM, T: int, B: int, form: str, state: bool) -> bytes:
    """The layer as an ONNX model, in integers as ONNX Runtime's own quantization makes them."""
    data = lstm_onnx.model(stock, T, B, state)
    return lstm_onnx.quantized(data) if form == "int8" else data


def torch_module(stock: nn.LSTM, form: str) -> Callable[..., Any]:
    """``stock``, or what torch's dynamic quantization makes of it."""
    if form == "float32":
        return stock
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch 2.13 in favour of torchao, which has no LSTM
        quantize: Any = torch.ao.quantization.quantize_dynamic
        found: Any = quantize(nn.Sequential(stock), {nn.LSTM}, dtype=torch.qint8)
    if type(found[0]) is nn.LSTM:
        raise RuntimeError("torch.ao.quantization.quantize_dynamic left the LSTM as it was")
    module: Callable[..., Any] = found[0]
    return module


def _whole(run: Callable[[], Any], **rest: Any) -> Work:
    return Work(run, lambda: torch.as_tensor(run()).clone(), **rest)


def _steps(rows: Iterable[Any], fresh: Callable[[], Step], **rest: Any) -> Work:
    """``fresh``: a function of a step, with a state of zeros."""
    rows = list(rows)
    step, feed = fresh(), itertools.cycle(rows)

    def outputs() -> Tensor:
        first = fresh()
        return torch.stack([torch.as_tensor(first(x)).flatten().clone() for x in rows])[:, None]

    return Work(lambda: step(next(feed)), outputs, **rest)


def _fastseq(case: Case, provider: Provider, threads: int) -> Work:
    given = inputs(case)
    state = exported(given.stock, provider.form)
    model, x = deployed(state), given.x.numpy()
    if case.streams:
        return _steps(x[:, 0], lambda: model.stream().step, state=state)
    return _whole(lambda: model.run(x, threads=threads)[0], state=state)


def _torch(case: Case, provider: Provider, threads: int) -> Work:
    given = inputs(case)
    module = torch_module(given.stock, provider.form)

    def whole() -> Tensor:
        with torch.no_grad():
            y: Tensor = module(given.x)[0]
            return y

    def fresh() -> Step:
        state: Any = None

        def step(x: Tensor) -> Tensor:
            nonlocal state
            with torch.no_grad():
                y, state = module(x, state)
            return y

        return step

    return _steps(given.x[:, None], fresh) if case.streams else _whole(whole)


def _onnx(
    session: Callable[[bytes, int], Callable[[dict[str, np.ndarray]], list[np.ndarray]]],
    keep: Callable[[np.ndarray], np.ndarray],
    case: Case,
    provider: Provider,
    threads: int,
) -> Work:
    """``keep``: what makes of a result an array that the next call does not overwrite."""
    given = inputs(case)
    T = 1 if case.streams else case.T
    call = session(onnx_bytes(given.stock, T, case.B, provider.form, case.streams), threads)
    x = given.x.numpy()

    def fresh() -> Step:
        h = c = np.zeros((1, case.B, case.H), np.float32)

        def step(x: np.ndarray) -> np.ndarray:
            nonlocal h, c
            y, h, c = call({"x": x, "h0": h, "c0": c})
            h, c = keep(h), keep(c)
            return y

        return step

    return _steps(x[:, None], fresh) if case.streams else _whole(lambda: call({"x": x})[0])


PROVIDERS: dict[str, Callable[[Case, Provider, int], Work]] = {
    "fastseq": _fastseq,
    "onnxruntime": functools.partial(_onnx, lstm_onnx.onnxruntime_session, np.asarray),
    "openvino": functools.partial(_onnx, lstm_onnx.openvino_session, np.array),
    "torch": _torch,
}

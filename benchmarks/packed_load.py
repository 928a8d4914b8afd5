"""How long it takes until a process has run a small model, and how much of a runtime lies on the disk."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import packed_layer
from benchmarks.harness import ROOT, SelfTimed
from benchmarks.packed_case import Case, Provider, Work, inputs

# what a process does: import a runtime, load MODEL, make y of x; numpy comes before, and its time is taken apart
CODE = {
    "fastseq": (
        "import fastseq.deploy as runtime",
        "run = runtime.Model.load(MODEL).run",
        "y = run(x)[0]",
    ),
    "onnxruntime": (
        "import onnxruntime as runtime",
        "session = runtime.InferenceSession(MODEL, providers=['CPUExecutionProvider'])",
        "y = session.run(['y'], {'x': x})[0]",
    ),
    "openvino": (
        "import openvino as runtime",
        "compiled = runtime.Core().compile_model(MODEL, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})",
        "y = compiled({'x': x})['y']",
    ),
    "torch": (
        "import torch as runtime",
        "layer = runtime.nn.LSTM(x.shape[2], x.shape[2]); layer.load_state_dict(runtime.load(MODEL))",
        "y = layer(runtime.from_numpy(x))[0].detach().numpy()",
    ),
}
MARKS = "numpy", "import", "load", "first"  # the parts in order: numpy, then the three of CODE


def _script(name: str) -> str:
    parts = ["import numpy", *CODE[name]]
    # x is read after numpy is imported, and not within the time of what follows
    between = {0: "x = numpy.load(X); begin = clock()"}
    lines = [
        "import json, resource, sys, time",
        "MODEL, X, Y = sys.argv[1:]",
        "clock = time.perf_counter",
        "found = {}",
    ]
    for n, (mark, part) in enumerate(zip(MARKS, parts, strict=True)):
        lines += ["begin = clock()", part, f"found['{mark}_ms'] = (clock() - begin) * 1e3", between.get(n, "")]
    lines += [
        # not ru_maxrss, which begins with what the parent had
        "status = open('/proc/self/status').read().split() if sys.platform == 'linux' else ['VmHWM:', 'nan']",
        "found['resident_mb'] = float(status[status.index('VmHWM:') + 1]) / 1024",
        "numpy.save(Y, y)",
        "print(json.dumps(found))",
    ]
    return "\n".join(lines)


def _model(case: Case, name: str, folder: Path) -> Path:
    stock = inputs(case).stock
    path = folder / f"model.{'onnx' if name == 'openvino' else name}"
    if name == "fastseq":
        from fastseq import deploy

        deploy.save(packed_layer.exported(stock, "float32"), path)
    elif name == "torch":
        torch.save(stock.state_dict(), path)
    else:
        path.write_bytes(packed_layer.onnx_bytes(stock, case.T, case.B, "float32", state=False))
    return path


@functools.cache
def disk(name: str) -> float:
    """Megabytes of the package on the disk, with its own libraries, without numpy and what else it needs.

    Ours is what a build without torch installs.
    """
    folder = Path(str(importlib.util.find_spec(name).origin)).parent  # type: ignore[union-attr]
    folders = [folder, *folder.parent.glob(f"{name}.libs")]
    files = [path for part in folders for path in part.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return sum(path.stat().st_size for path in files if not (name, path.name[:6]) == ("fastseq", "_torch")) / 1e6


def _start(name: str, model: Path, x: Path, y: Path) -> tuple[float, dict[str, float]]:
    """Seconds from the import of numpy to the first result, and their parts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _script(name), *map(str, (model, x, y))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=x.parent)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    found["disk_mb"] = disk(name)
    if name == "fastseq":
        found["library_mb"] = (ROOT / "fastseq/libfastseq.so").stat().st_size / 1e6
    return sum(found[f"{mark}_ms"] for mark in MARKS) / 1e3, found


def _process(case: Case, provider: Provider, threads: int) -> Work:
    name = provider.name
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(name=name)
    held = tempfile.TemporaryDirectory(prefix="fastseq-packed-")
    folder = Path(held.name)
    model, x, y = _model(case, name, folder), folder / "x.npy", folder / "y.npy"
    np.save(x, inputs(case).x.numpy())

    def start() -> tuple[float, dict[str, float]]:
        assert held  # the folder lives as long as this function
        return _start(name, model, x, y)

    def outputs() -> Tensor:
        start()
        return torch.from_numpy(np.load(y))

    state: dict[str, Any] = packed_layer.exported(inputs(case).stock, "float32") if name == "fastseq" else {}
    return Work(SelfTimed(start), outputs, state)


PROVIDERS: dict[str, Callable[[Case, Provider, int], Work]] = dict.fromkeys(CODE, _process)

"""``fastseq doctor``: what of a set-up is broken, in words, and what to do about it. Works without torch and numpy."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastseq._config import build_record, instruction_set

FINE, NOTE, WRONG = "fine", "note", "wrong"
LEAST_TORCH = (2, 10)  # setup.py says why
_HERE = Path(__file__).parent
_REBUILD = "in the folder of the sources: pip install --no-build-isolation ."
_PACKAGE = "pip install --force-reinstall --no-build-isolation fastseq-kernels"


class Finding(NamedTuple):
    """What one check found."""

    name: str
    verdict: str  # FINE, NOTE (something works less well, or is not there and need not be) or WRONG
    what: str
    todo: str = ""


def examine() -> list[Finding]:
    """All checks, in the order in which one builds upon another; what is broken does not stop them."""
    core = _core()
    torch = _torch()
    found = [_python(), *_distributions(), core, torch]
    if torch.verdict == FINE:
        found += [_library(), *_triton()]
    needed = any(f.verdict == WRONG for f in found if f.name in (core.name, "kernels for torch"))
    found += [_compiler(needed), _environment()]
    if all(f.verdict != WRONG for f in found):
        found.append(_computation(torch.verdict == FINE))
    return [*found, _openmp()]


def as_text(found: list[Finding]) -> str:
    """A line each, what to do below it, and a closing line that says how many things are wrong."""
    width = max(len(f.name) for f in found)
    lines = []
    for f in found:
        lines.append(f"{f.verdict:<6} {f.name:<{width}}  {f.what}")
        lines += [f"{'':<6} {'':<{width}}  -> {line}" for line in f.todo.splitlines()]
    wrong = [f.name for f in found if f.verdict == WRONG]
    return "\n".join([*lines, "", f"wrong: {', '.join(wrong)}" if wrong else "nothing is wrong"])


def _python() -> Finding:
    version = sys.version.split()[0]
    return Finding("Python", FINE, f"{version}, {sys.executable}")


def _distributions() -> Iterator[Finding]:
    """What fastseq needs always, and the project of the same name."""
    for name in ("numpy", "safetensors"):
        try:
            importlib.import_module(name)
            yield Finding(name, FINE, importlib.metadata.version(name))
        except ImportError as error:
            todo = f"pip install {name}" if isinstance(error, ModuleNotFoundError) else f"pip install --upgrade {name}"
            yield Finding(name, WRONG, f"it cannot be imported: {_first_line(error)}", todo)
    try:
        other = importlib.metadata.version("fastseq")
    except importlib.metadata.PackageNotFoundError:
        return
    todo = f"pip uninstall fastseq\n{_PACKAGE}"
    what = f"the distribution fastseq {other} is another project with this import name; their files mix"
    yield Finding("namesake", WRONG, what, todo)


def _core() -> Finding:
    name = "kernels for numpy"
    try:
        importlib.import_module("fastseq._core")
    except ImportError as error:
        others = sorted(p.name for p in _HERE.glob("_core.*") if p.suffix in (".so", ".pyd"))
        if others and isinstance(error, ModuleNotFoundError):
            what = f"built for another Python ({', '.join(others)}), and this is {sys.implementation.cache_tag}"
        else:
            what = "not built" if not others else f"they do not load: {_first_line(error)}"
        return Finding(name, WRONG, what, _REBUILD)
    found = instruction_set()
    if found["runs"] is None:
        return Finding(name, FINE, "built; which instruction set runs is told below")
    return Finding(name, FINE, f"built, {found['runs']} runs: {found['why']}")


def _torch() -> Finding:
    install = "pip install torch"
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            return Finding("torch", WRONG, f"it cannot be imported: {error}", f"pip install {error.name}")
        what = "not installed: fastseq.deploy runs without it, but fastseq.nn and all training need it"
        return Finding("torch", NOTE, what, f"{install}, and then {_REBUILD}")
    except Exception as error:  # a broken torch raises anything
        return Finding("torch", WRONG, f"it cannot be imported: {_first_line(error)}", f"{install} --force-reinstall")
    version = str(getattr(torch, "__version__", "without a version"))
    number = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if number < LEAST_TORCH:
        wanted = ".".join(map(str, LEAST_TORCH))
        todo = f'pip install "torch>={wanted}", and then {_REBUILD}'
        return Finding("torch", WRONG, f"{version} is older than {wanted}", todo)
    return Finding("torch", FINE, f"{version}, {torch.get_num_threads()} threads")


def _library() -> Finding:
    """That of torch's operators: there, for this torch, and of this version of fastseq."""
    import torch

    from fastseq.ops import _library as ops

    name, record = "kernels for torch", build_record()
    if ops.why_not_compiled is not None:
        there = any(_HERE.glob("_torch*.so"))
        why = record.get("missing", {}).get("torch")
        built = record.get("torch")
        what = ops.why_not_compiled if there else f"not built{f': {why}' if why else ''}"
        if there and built and built != torch.__version__:
            what = f"built with torch {built}, and this is {torch.__version__}: {what}"
        todo = f"{_REBUILD}\nuntil then FASTSEQ_BACKEND=reference computes everything in plain torch, slowly"
        return Finding(name, WRONG, " ".join(what.split()), todo)
    import fastseq.nn  # noqa: F401  # registers all operators

    probe = torch.empty(0)
    table = {op: b.why_not(probe) for op, backends in ops.TABLES.items() for b in backends if b.name == "cpu"}
    if old := [op for op, why in table.items() if why and "older version" in why]:
        return Finding(name, WRONG, f"an older version built them: {', '.join(old)} are not in it", _REBUILD)
    return Finding(name, FINE, f"built with torch {record.get('torch', 'unknown')}")


def _triton() -> Iterator[Finding]:
    import torch

    from fastseq.ops._triton import why_not_triton

    why = why_not_triton()
    if not torch.cuda.is_available():
        yield Finding("GPU", NOTE, "none that torch can use: everything runs on the CPU")
    elif why is None:
        yield Finding("GPU", FINE, f"{torch.cuda.get_device_name()}, triton {importlib.metadata.version('triton')}")
    else:
        what = f"{torch.cuda.get_device_name()}, but {why.split(';')[0]}: there operators run in plain torch, slowly"
        yield Finding("GPU", WRONG, what, why.partition("; ")[2])


def _compiler(needed: bool) -> Finding:
    """Whether fastseq could be built here, which matters only where something is not built."""
    name, verdict = "compiler", WRONG if needed else NOTE
    command = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()
    more = "" if needed else "; what needs one is built already"
    todo = "Debian, Ubuntu: apt install g++\nelsewhere: any C++20 compiler, and CXX=its name"
    if shutil.which(command[0]) is None:
        return Finding(name, verdict, f"'{command[0]}' is not there{more}", todo)
    test = [*command, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    run = subprocess.run(test, input="#include <concepts>\nint main() {}\n", capture_output=True, text=True, timeout=60)
    if run.returncode:
        return Finding(name, verdict, f"'{command[0]}' does not compile C++20: {_first_line(run.stderr)}{more}", todo)
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        what = f"the C headers of Python are not there{more}"
        return Finding(name, verdict, what, "Debian, Ubuntu: apt install python3-dev")
    return Finding(name, FINE, f"{command[0]}, C++20")


def _environment() -> Finding:
    """Variables that ask for what cannot be."""
    name = "environment"
    found = instruction_set()
    if os.environ.get("FASTSEQ_ISA") and found["runs"] is None and "FASTSEQ_ISA" in found["why"]:
        return Finding(name, WRONG, found["why"], "unset FASTSEQ_ISA")
    known = ("cpu", "cuda", "triton", "torch", "reference")  # fastseq.ops._select, which needs torch
    asked = os.environ.get("FASTSEQ_BACKEND")
    if asked and asked not in known:
        return Finding(name, WRONG, f"FASTSEQ_BACKEND={asked} is none of {', '.join(known)}", "unset FASTSEQ_BACKEND")
    given = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("FASTSEQ_")]
    return Finding(name, NOTE if given else FINE, ", ".join(given) or "no FASTSEQ_ variable is set")


def _computation(with_torch: bool) -> Finding:
    """That numbers come out, and the right ones."""
    name = "an LSTM" if with_torch else "a product"
    try:
        off = _lstm_error() if with_torch else _product_error()
    except Exception as error:  # whatever is broken, its message is what helps
        return Finding(name, WRONG, f"it does not run: {_first_line(error)}", _REBUILD)
    if not off < 1e-5:
        return Finding(name, WRONG, f"it is off by {off:g}", _REBUILD)
    return Finding(name, FINE, "it gives what torch.nn.LSTM gives" if with_torch else "of numpy arrays, it is right")


def _product_error() -> float:
    import numpy as np

    from fastseq import _core

    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    return float(np.abs(_core.gemm(a, np.eye(3, dtype=np.float32)) - a).max())


def _lstm_error() -> float:
    import torch

    from fastseq import nn

    stock, ours = torch.nn.LSTM(3, 4), nn.LSTM(3, 4)
    ours.load_state_dict(stock.state_dict())
    x = torch.ones(5, 2, 3)
    with torch.no_grad():
        return float((ours(x)[0] - stock(x)[0]).abs().max())


def _openmp() -> Finding:
    """Last, when all is loaded: the OpenMP runtimes of this process."""
    maps = Path("/proc/self/maps")
    return openmp(maps.read_text().splitlines() if maps.exists() else ())


def openmp(maps: Iterable[str]) -> Finding:
    """What the lines of /proc/self/maps say of OpenMP."""
    names = re.compile(r"lib(gomp|iomp5|omp)[-.]")
    paths = sorted({line.split()[-1] for line in maps if names.search(os.path.basename(line.split()[-1]))})
    if len(paths) > 1:
        what = f"{len(paths)} runtimes in one process, whose threads compete for the cores: {', '.join(paths)}"
        todo = (
            "take torch and what it is used with from one source, pip or conda, not from both\n"
            "check LD_PRELOAD and LD_LIBRARY_PATH; OMP_NUM_THREADS=1 avoids the worst until then"
        )
        return Finding("OpenMP", WRONG, what, todo)
    return Finding("OpenMP", FINE, f"one runtime, {paths[0]}" if paths else "no runtime is loaded")


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]

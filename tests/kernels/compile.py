"""Kernels compiled for a GPU that is not there: what they take of it, and how many instructions are for matrices.

A host function called on tensors without values (``no_device``) lists its launches (``_launch.recording``). Each is
compiled as triton would for real tensors, with triton's own choice of what is a constant, and the machine code is read.

    python -m tests.kernels.compile --module lstm_noise --targets 80,90
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from fastseq_kernels import _launch, _sources
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from tests.kernels.cases import CALLS, Call, written
from tests.kernels.no_device import pretending

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CACHE = Path(__file__).parents[2] / "build" / "kernels"
MATRIX = re.compile(r"\b(?:[A-Z]MMA|[A-Z]+GMMA|UTC[A-Z]*MMA)\b")  # mma.sync, wgmma, tcgen05
PRODUCT = re.compile(r"tt\.dot (?:.*inputPrecision|(?!.*xf32> \*))")
SPILL = re.compile(r"\b(?:LDL|STL)\b")
PROCESSES = 2


class Specialised(NamedTuple):
    """One launch as triton's compiler takes it."""

    source: ASTSource
    options: dict[str, Any]
    target: GPUTarget

    @property
    def key(self) -> str:
        """Content hash of everything that decides the binary, but for triton's version and where it is installed."""
        options = sorted((name, value) for name, value in self.options.items() if name != "extern_libs")
        told = (self.source.hash(), options, self.target)
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    @property
    def file(self) -> Path:
        """Where what was measured is kept: for this triton and this file."""
        tool = importlib.metadata.version("triton").encode() + Path(__file__).read_bytes()
        return CACHE / f"{self.key}-{hashlib.sha256(tool).hexdigest()[:8]}.json"


class Measured(NamedTuple):
    """What one binary takes."""

    registers: int
    stack: int  # bytes per thread; 0: nothing is spilled
    spills: int  # loads from and stores to the stack, counted in the code
    shared: int  # bytes
    products: int  # tl.dot that are meant for matrix units: all but those of float32 in full precision
    matrix: int  # matrix instructions in the code
    instructions: int
    warnings: list[str]


class Job(NamedTuple):
    """One binary to make, in words that another process understands."""

    module: str
    call: str
    place: int  # which launch of the call
    capability: int
    row: str  # its name in the budget

    @property
    def launch(self) -> _launch.Launch:
        return launches(self.module, self.call, self.capability)[self.place]

    @property
    def specialised(self) -> Specialised:
        return specialised(self.module, self.call, self.capability, self.place)


@functools.cache
def launches(module: str, call: str, capability: int) -> tuple[_launch.Launch, ...]:
    """What one call of a host function would launch on that device."""
    return tuple(record(next(c for c in CALLS[module] if c.name == call), _launch.TARGETS[capability]))


def record(call: Call, target: _launch.Target, **sizes: int) -> list[_launch.Launch]:
    """The launches of ``call``; ``sizes`` replace its own."""
    with pretending(), _launch.recording(target) as found:
        call.run(**sizes)
    return found


def specialise(launch: _launch.Launch, capability: int) -> Specialised:
    """Types, constants and divisibility as triton finds them for these arguments."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    args = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, Tensor) else a for a in launch.args]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "debug": False}
    given = {**launch.constexprs, **options}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = binder(*args, **given)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, given, bound, specialization, rest)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return Specialised(source, parsed.__dict__, target)


@functools.cache
def specialised(module: str, call: str, capability: int, place: int) -> Specialised:
    return specialise(launches(module, call, capability)[place], capability)


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """Collects what Python's warnings, triton's C++ and ptxas say."""
    said: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        os.dup2(log.fileno(), 2)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                yield said
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        log.seek(0)
        lines = (log.read().decode(errors="replace") + printed.getvalue()).splitlines()
        said += [line for line in lines if re.search(r"warning|remark|performance", line, re.I)]
        said += [str(w.message) for w in caught]


def _tool(*command: str) -> str:
    environment = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([str(TOOLS / command[0]), *command[1:]], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _read(cubin: bytes) -> dict[str, int]:
    """Registers, stack and counts of instructions from a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = _tool("cuobjdump", "-res-usage", file.name), _tool("cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", code, re.M)
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": sum(bool(SPILL.search(line)) for line in lines),
        "matrix": sum(bool(MATRIX.search(line)) for line in lines),
        "instructions": len(lines),
    }


def measure(specialised: Specialised) -> Measured:
    """Compile, or take what was found for the same content before."""
    known = specialised.file
    if known.exists():
        return Measured(**json.loads(known.read_text()))
    with _listening() as said, triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = True  # what triton has kept comes without its warnings
        triton.knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(specialised.source, target=specialised.target, options=specialised.options)
    measured = _read(binary.asm["cubin"])
    products = len(PRODUCT.findall(binary.asm["ttir"]))
    found = Measured(**measured, shared=binary.metadata.shared, products=products, warnings=said)
    CACHE.mkdir(parents=True, exist_ok=True)
    part = known.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(found._asdict()))
    part.replace(known)
    return found


def jobs(modules: Iterable[str], capabilities: Iterable[int]) -> list[Job]:
    """Every binary of these modules, each one once."""
    found: dict[tuple[str, str], Job] = {}
    for module in modules:
        for capability in capabilities:
            for call in written(module):
                names: Counter[str] = Counter()
                for place, launch in enumerate(launches(module, call.name, capability)):
                    key = (module, specialised(module, call.name, capability, place).key)
                    if key not in found:
                        name = launch.kernel.__name__
                        names[name] += 1
                        again = f" {names[name]}" if names[name] > 1 else ""
                        row = f"{module}/{name} sm_{capability} {call.name}{again}"
                        found[key] = Job(module, call.name, place, capability, row)
    return list(found.values())


def measure_job(job: Job) -> Measured:
    try:
        return measure(job.specialised)
    except Exception as error:
        raise RuntimeError(f"{job.row} does not compile: {error}") from error


def measure_all(todo: list[Job], processes: int = PROCESSES) -> dict[Job, Measured]:
    """Compile what is not known yet, in a few processes."""
    new = [job for job in todo if not job.specialised.file.exists()]
    if len(new) > 3 and processes > 1:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(measure_job, new))
    return {job: measure_job(job) for job in todo}


def faults(job: Job, found: Measured) -> list[str]:
    """What is wrong with a binary whatever its budget says."""
    limit = _launch.TARGETS[job.capability].shared
    wrong = [f"{job.row}: {line}" for line in found.warnings]
    if found.stack or found.spills:
        wrong.append(f"{job.row}: registers are spilled, {found.stack} bytes of stack and {found.spills} accesses")
    if found.products and not found.matrix:
        wrong.append(f"{job.row}: {found.products} tl.dot for matrix units, and no matrix instruction")
    if found.shared > limit:
        wrong.append(f"{job.row}: {found.shared} bytes of shared memory, sm_{job.capability} has {limit}")
    return wrong


def table(measured: dict[Job, Measured]) -> Iterator[str]:
    yield f"{'row':<72} regs stack spills shared matrix  code"
    for job, m in measured.items():
        numbers = f"{m.registers:4} {m.stack:5} {m.spills:6} {m.shared:6} {m.matrix:6} {m.instructions:5}"
        constants = " ".join(f"{name}={value}" for name, value in job.launch.constexprs.items())
        yield f"{job.row:<72} {numbers}  {constants} warps={job.launch.num_warps}"


def main() -> int:
    parser = argparse.ArgumentParser(description="compile kernels without a GPU and print what they take")
    parser.add_argument("--module", help="one or more, by comma; all without it")
    parser.add_argument("--targets", default="80,90", help="by comma, or all")
    parser.add_argument("--call", default="", help="only calls whose name contains this")
    arguments = parser.parse_args()
    if _launch.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 has no compiler")
    torch.set_num_threads(1)
    modules = arguments.module.split(",") if arguments.module else [m for m in _sources.modules() if m in CALLS]
    every = arguments.targets == "all"
    targets = list(_launch.TARGETS) if every else [int(t) for t in arguments.targets.split(",")]
    measured = measure_all([j for j in jobs(modules, targets) if arguments.call in j.call])
    print("\n".join(table(measured)))
    wrong = [line for job, m in measured.items() for line in faults(job, m)]
    print("\n".join(wrong) or f"{len(measured)} binaries, no warnings, no spills")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

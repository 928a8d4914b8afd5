"""What every kernel of csrc/cuda may take on sm_80 and sm_90a: ``budget.json``, one row per kernel and target.

No kernel has a stack, where spilled registers would be, but for those that the file lists, of all targets.

python -m tests.cuda.budget            rewrite it
python -m tests.cuda.budget --check    compile every kernel for every target and compare
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.cuda import emulated, library
from tests.cuda.library import ROOT, Compiled

FILE = Path(__file__).with_name("budget.json")
LIMITS = {"80": 163, "86": 99, "89": 99, "90a": 227, "100": 227, "120": 99}  # KiB of shared memory of a block
TARGETS = ("80", "90a")  # those with rows; the others must only have no stack that is not listed
ROW = ("registers", "shared")
REGISTERS = 65536  # of a multiprocessor, handed out by eights
RESERVED = 1024  # bytes of shared memory that a block of sm_90 and later has beside those of the limit
REWRITE = "if that is meant, `make budget` rewrites the row"


class Kernel(NamedTuple):
    source: str  # csrc/cuda/NAME.cu
    tile: str
    arch: str

    @property
    def row(self) -> str:
        return f"{Path(self.source).stem} {self.tile} sm_{self.arch}"

    @property
    def exists(self) -> bool:
        """Clusters begin with sm_90; before, their kernels are empty."""
        return not self.tile.startswith("cluster") or number_of(self.arch) >= 90


class Taken(NamedTuple):
    """What one kernel takes."""

    registers: int
    stack: int  # bytes per thread, where spilled registers are too
    shared: int  # bytes of a block, those of the launch too
    threads: int

    def runs(self, arch: str) -> bool:
        """Whether the GPU has room for a block; if not, the cost model takes another tile there."""
        return self.shared <= LIMITS[arch] << 10


class Tile(NamedTuple):
    name: str
    threads: int
    shared: dict[str, int]  # of each direction


@functools.cache
def tiles() -> dict[str, Tile]:
    """By their types, as they stand in the names of kernels; what is of no tile by its kernel's name."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "tiles"
        emulated.compile_cpp("tiles.cpp", program, 0)
        lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    found = {}
    for kind, sizes, name, threads, forward, backward in (line.split(";") for line in lines):
        shared = {"forward": int(forward), "backward": int(backward)}
        numbers = "".join(f"Li{n.strip()}E" for n in sizes.split(",") if n)
        found[f"{len(kind)}{kind}I{numbers}E" if numbers else kind] = Tile(name, int(threads), shared)
    return found


def _resources(path: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Target, name, and registers, stack, shared and local memory of each function of an object."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None, "cuobjdump comes with triton, which is not installed"
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "--dump-resource-usage", path]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for section in listing.split("Fatbin elf code:")[1:]:
        arch = re.search(r"^arch = sm_(\w+)$", section, re.M)
        assert arch is not None, section[:500]
        for name, *numbers in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", section):
            yield arch[1], name, list(map(int, numbers))


def number_of(arch: str) -> int:
    return int(arch.rstrip("af"))


def measure(objects: dict[str, str]) -> dict[Kernel, Taken]:
    found = {}
    for source, path in objects.items():
        direction = "backward" if "backward" in Path(source).stem else "forward"
        for arch, name, (registers, stack, shared, local) in _resources(ROOT / path):
            tile = next((tile for text, tile in tiles().items() if text in name), None)
            assert tile is not None, f"{source}: {name} is of no tile"
            static = shared - (RESERVED if number_of(arch) >= 90 else 0)
            taken = Taken(registers, stack + local, static + tile.shared[direction], tile.threads)
            found[Kernel(source, tile.name, arch)] = taken
    return dict(sorted((kernel, taken) for kernel, taken in found.items() if kernel.exists))


def load() -> dict[str, Any]:
    budget: dict[str, Any] = json.loads(FILE.read_text())
    return budget


def exceeded(budget: dict[str, Any], kernel: Kernel, found: Taken) -> list[str]:
    """What is over the kernel's row, with the row's name; what no GPU can launch comes first."""
    wrong = []
    if -(-found.registers // 8) * 8 * found.threads > REGISTERS:
        wrong.append(f"{kernel.row}: {found.threads} threads of {found.registers} registers are more than {REGISTERS}")
    known = budget["stack"].get(kernel.row, 0)
    if found.stack > known:
        wrong.append(f"{kernel.row}: {found.stack} bytes of stack, budget {known}; {REWRITE}")
    if kernel.arch not in TARGETS:
        return wrong
    row = budget["rows"].get(kernel.row)
    if row is None:
        return [*wrong, f"{kernel.row}: not in {FILE.name}; {REWRITE}"]
    for name in ROW:
        if getattr(found, name) > row[name]:
            wrong.append(f"{kernel.row}: {getattr(found, name)} {name}, budget {row[name]}; {REWRITE}")
    if found.runs(kernel.arch) != row["runs"]:
        words = "has room for this tile now" if found.runs(kernel.arch) else "has no room for this tile any more"
        wrong.append(f"{kernel.row}: sm_{kernel.arch} {words}; {REWRITE}")
    return wrong


def misnamed(budget: dict[str, Any], kernels: Iterable[Kernel], sources: Iterable[str]) -> list[str]:
    """Rows that no kernel of ``sources`` has, and kernels that have no row, of all targets with rows."""
    every = {kernel._replace(arch=arch) for kernel in kernels for arch in TARGETS}
    expected = {kernel.row for kernel in every if kernel.exists}
    stems = {Path(source).stem for source in sources}
    rows = {row for row in budget["rows"] if row.split()[0] in stems}
    return [
        *(f"{row}: not in {FILE.name}; {REWRITE}" for row in sorted(expected - rows)),
        *(f"{row}: there is no such kernel any more; {REWRITE}" for row in sorted(rows - expected)),
    ]


def sources() -> list[str]:
    """All that nvcc is given."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


def _included(source: str, found: set[str]) -> set[str]:
    """``source`` and what it includes of csrc, through any number of files."""
    if source not in found:
        found.add(source)
        for name in re.findall(r'^#include "([^"]+)"', (ROOT / source).read_text(), re.M):
            _included(f"csrc/{name}", found)
    return found


def digest(source: str, flags: list[str]) -> str:
    """Of everything that decides the machine code of a file but the compiler."""
    told = hashlib.sha256(repr(flags).encode())
    for name in sorted(_included(source, set())):
        told.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return told.hexdigest()[:16]


def changed(budget: dict[str, Any], flags: list[str]) -> list[str]:
    """Sources that are not those of which the rows are, and sources that there are no more."""
    now = {source: digest(source, flags) for source in sources()}
    return sorted(source for source in {*now, *budget["sources"]} if budget["sources"].get(source) != now.get(source))


def why_not_comparable(budget: dict[str, Any], compiled: Compiled) -> str | None:
    """Another compiler makes other binaries."""
    same = compiled.nvcc == budget["nvcc"]
    return None if same else f"the budget is of nvcc {budget['nvcc']}, this is {compiled.nvcc}"


def table(measured: dict[Kernel, Taken]) -> Iterator[str]:
    yield f"{'row':<44} regs stack shared threads"
    for kernel, m in measured.items():
        room = "" if m.runs(kernel.arch) else f"  does not run there: {LIMITS[kernel.arch] << 10} bytes shared"
        yield f"{kernel.row:<44} {m.registers:4} {m.stack:5} {m.shared:6} {m.threads:7}{room}"


def write() -> None:
    rows, stack = {}, {}
    for arch in LIMITS:
        compiled = library.kernels(arch)
        for kernel, found in measure(compiled.objects).items():
            if found.stack:
                stack[kernel.row] = found.stack
            if arch in TARGETS:
                rows[kernel.row] = {**{name: getattr(found, name) for name in ROW}, "runs": found.runs(arch)}
    known = {source: digest(source, compiled.flags) for source in sources()}
    save({"nvcc": compiled.nvcc, "sources": known, "stack": stack, "rows": rows})


def save(budget: dict[str, Any]) -> None:
    parts = {name: budget[name] for name in ("sources", "stack", "rows")}
    written = [f'  "nvcc": {json.dumps(budget["nvcc"])}']
    for name, part in parts.items():
        lines = ",\n".join(f"    {json.dumps(row)}: {json.dumps(values)}" for row, values in part.items())
        written.append(f'  "{name}": {{\n{lines}\n  }}')
    FILE.write_text("{\n" + ",\n".join(written) + "\n}\n")
    print(f"{FILE}: {len(parts['rows'])} rows, {len(parts['stack'])} kernels with a stack")


def check() -> int:
    budget = load()
    compiled = {arch: library.kernels(arch) for arch in LIMITS}
    measured = {kernel: m for arch in LIMITS for kernel, m in measure(compiled[arch].objects).items()}
    print("\n".join(table(measured)))
    reason = why_not_comparable(budget, compiled[TARGETS[0]])
    if reason is not None:
        print(f"not compared: {reason}")
        return 0
    wrong = misnamed(budget, measured, [*sources(), *budget["sources"]])
    wrong += [line for kernel, m in measured.items() for line in exceeded(budget, kernel, m)]
    print("\n".join(wrong) or f"{len(measured)} kernels within their budgets")
    return bool(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description="what the kernels of csrc/cuda may take of a GPU")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    reason = library.why_no_nvcc()
    if reason is not None:
        print(f"csrc/cuda is not compiled: {reason}")
        return 0
    if arguments.check:
        return check()
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())

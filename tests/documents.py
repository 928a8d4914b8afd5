"""Blocks of code in Markdown, run as they stand: Python with torch, Python that cannot import it, and shell.

A page is a story: its blocks run one after the other in one folder, and blocks of Python that follow each other share
their names. After the mark <!-- without torch --> and up to the next heading Python cannot import torch. A block of C
is saved under the name of the file that the text after it gives.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)
WITHOUT = "<!-- without torch -->"
RUNS = ("python", "sh", "c")
IMPORTED = (  # what several pages use and takes seconds, once
    *("torch", "torch._dynamo", "fastseq.nn", "fastseq.recipes", "fastseq.exporting", "fastseq._explain"),
    *("matplotlib.pyplot", "sklearn.datasets", "vector_quantize_pytorch"),
)


class Part(NamedTuple):
    """What runs in one go, with the place of its first line."""

    page: str
    line: int
    language: str
    torch: bool
    code: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


class Outcome(NamedTuple):
    """How a part ended, and what it said on standard error."""

    status: int
    said: str


def parts(page: Path) -> list[Part]:
    """Of a page, in order. Lines of code keep their numbers."""
    text, found = page.read_text(), list[Part]()
    for block in FENCE.finditer(text):
        language, code = block[1], block[2]
        if language not in RUNS:
            continue
        before = text[: block.start()]
        line = before.count("\n") + 2
        torch = WITHOUT not in re.split(r"^#+ ", before, flags=re.M)[-1]
        last = found[-1] if found else None
        if last and language == "python" == last.language and torch == last.torch:
            joined = last.code + "\n" * (line - last.line - last.code.count("\n")) + code
            found[-1] = last._replace(code=joined)
        else:
            name = re.search(r"`(\w+\.c)`", text[block.end() :]) if language == "c" else None
            code = f"cat > {name[1]} <<'END'\n{code}END\n" if name else code
            found.append(Part(str(page.relative_to(ROOT)), line, language, torch, code))
    return found


FORKS = """
import gc, importlib, json, os, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
gc.freeze()
for name, line, folder, code in json.loads(sys.stdin.read()):
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(write, 2)
        os.chdir(folder)
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")  # as of torchrun
        os.dup2(os.open("printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        exec(compile("\\n" * (line - 1) + code, name, "exec"), {"__name__": "__main__"})
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)  # what was imported is not taken down
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    print("ended", json.dumps([os.wait()[1], said]), flush=True)
"""


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    one = {"OMP_NUM_THREADS": "1"}  # what runs here is small, and the tests share the cores with others
    return {**os.environ, **one, "PYTHONPATH": paths, "PATH": programs, "MPLBACKEND": "agg"}


def run_forked(jobs: Iterable[tuple[str, int, Path, str]], imported: Sequence[str] = ("torch",)) -> list[Outcome]:
    """Each (name, first line, folder, code) in a process of its own that has imported these modules and no others.

    What it prints goes into ``printed.txt`` of its folder.
    """
    given = json.dumps([(name, line, str(folder), code) for name, line, folder, code in jobs])
    command = [sys.executable, "-c", FORKS, *imported]
    run = subprocess.run(command, env=_environment(), input=given, capture_output=True, text=True, check=False)
    found = re.findall(r"^ended (.*)$", run.stdout, re.M)
    assert len(found) == len(json.loads(given)), run.stderr
    return [Outcome(*json.loads(line)) for line in found]


def run_alone(part: Part, folder: Path) -> Outcome:
    """Shell, or Python that cannot import torch."""
    if part.language == "python":
        blocked = "import sys; sys.modules['torch'] = None\n" + "\n" * (part.line - 2)
        command = [sys.executable, "-c", blocked + part.code]
    else:
        command = ["bash", "-euo", "pipefail", "-c", part.code]
    run = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
    return Outcome(run.returncode, run.stderr)


def outcomes(pages: Iterable[Path], folder: Path) -> dict[str, Outcome]:
    """Of every part of the pages, by its name: first those with torch, then the others, each page in its own folder."""
    found = [part for page in pages for part in parts(page)]
    where = {part.page: folder / re.sub(r"\W", "-", part.page) for part in found}
    for place in where.values():
        place.mkdir(exist_ok=True)
    forked = [part for part in found if part.language == "python" and part.torch]
    ended = run_forked(((part.page, part.line, where[part.page], part.code) for part in forked), IMPORTED)
    result = {part.name: outcome for part, outcome in zip(forked, ended, strict=True)}
    for part in found:
        if part.name not in result:
            result[part.name] = run_alone(part, where[part.page])
    return result

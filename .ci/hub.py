"""Writes what the Hugging Face Hub expects of a repository of kernels: https://huggingface.co/docs/kernels.

    python .ci/hub.py FOLDER        FOLDER is made anew

FOLDER/build/torch-cuda holds the Triton kernels and all that calls them in Python, the folder for torch's stable ABI on
this processor the compiled kernels for the CPU too. The loader imports a variant from wherever it lies, under the name
that its metadata.json gives it, and several versions may be in one process. So here every import of the project's own
modules is made a relative one, and torch's operators get a namespace that names the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
NAME = "fastseq"
VERSION = 0  # the Hub's number for what may still change its interface
PARTS = ("_check.py", "functional", "nn", "ops", "reference")  # that need nothing but torch and each other
CAPABILITIES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]  # those that the kernels are compiled for in tests
GLIBC = (2, 28)  # the newest that a compiled variant may ask for
MODULE = """\"\"\"{title}\"\"\"

from . import functional, nn

__all__ = ["functional", "nn"]
"""
BESIDE = '''"""The package in the folder above, for loaders that look for it here."""

import importlib.util
import sys
from pathlib import Path

_file = Path(__file__).resolve().parents[1] / "__init__.py"
_spec = importlib.util.spec_from_file_location("{id}", _file)
_module = importlib.util.module_from_spec(_spec)
sys.modules["{id}"] = _module
_spec.loader.exec_module(_module)
__all__ = _module.__all__
globals().update((name, getattr(_module, name)) for name in __all__)
'''
SOURCES = '''"""Content hashes of the kernels' source as it is in the project, where imports are not relative."""

HASHES = {hashes}


def source_hash(module: str) -> str:
    return HASHES[module]
'''
CARD = """---
license: apache-2.0
library_name: kernels
tags: [kernels]
---
# {name}

{title} In `functional`, and as modules in `nn`:

```python
from kernels import get_kernel

fastseq = get_kernel("<owner>/{name}", version={version})
lstm = fastseq.nn.LSTM(64, 128, gates="binary")
```
"""


def fail(message: str) -> NoReturn:
    sys.exit(f"hub: {message}")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def namespace() -> str:
    """Of the operators: another for every commit."""
    return f"_{NAME}_{git('rev-parse', '--short=10', 'HEAD')}{'_dirty' if git('status', '--porcelain') else ''}"


def title() -> str:
    found = re.search(r'^description = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    return f"{found[1]}." if found else fail("no description in pyproject.toml")


def relative(text: str, depth: int) -> str:
    """A module's text, ``depth`` folders below the package, with relative imports of the project's own modules."""
    dots = "." * (depth + 1)
    text = re.sub(r"^( *)from fastseq\.([\w.]+) import", rf"\1from {dots}\2 import", text, flags=re.M)
    text = re.sub(r"^( *)from fastseq import", rf"\1from {dots} import", text, flags=re.M)
    return re.sub(r"^( *)from (fastseq_kernels[\w.]*) import", rf"\1from {dots}\2 import", text, flags=re.M)


def renamed(text: str, operators: str) -> str:
    """A module's text with the operators in another namespace of torch's."""
    text = re.sub(r"\btorch\.ops\.fastseq\b", f"torch.ops.{operators}", text)
    text = re.sub(r"\bfastseq::", f"{operators}::", text)
    return text.replace('Library("fastseq"', f'Library("{operators}"')


def write_python(folder: Path, operators: str) -> None:
    """The package without what is compiled."""
    ignore = shutil.ignore_patterns("__pycache__")
    for part in (ROOT / "fastseq" / name for name in PARTS):
        if part.is_dir():
            shutil.copytree(part, folder / part.name, ignore=ignore)
        else:
            shutil.copy(part, folder)
    shutil.copytree(ROOT / "kernels" / "fastseq_kernels", folder / "fastseq_kernels", ignore=ignore)
    for file in folder.rglob("*.py"):
        text = renamed(relative(file.read_text(), len(file.relative_to(folder).parts) - 1), operators)
        if re.search(r"^ *(from|import) fastseq", text, re.M):
            fail(f"{file.relative_to(folder)} has an import that is not made relative")
        file.write_text(text)
    loading = folder / "ops" / "_triton.py"
    plain = 'import_module(f"fastseq_kernels.{module}")'
    own = 'import_module(f"..fastseq_kernels.{module}", __package__)'
    if plain not in loading.read_text():
        fail(f"ops/_triton.py has no {plain}")
    loading.write_text(loading.read_text().replace(plain, own))
    sys.path.insert(0, str(ROOT / "kernels"))
    from fastseq_kernels._sources import modules, source_hash

    hashes = json.dumps({module: source_hash(module) for module in modules()}, indent=4)
    (folder / "fastseq_kernels" / "_sources.py").write_text(SOURCES.format(hashes=hashes))
    (folder / "__init__.py").write_text(MODULE.format(title=title()))
    (folder / NAME).mkdir()
    (folder / NAME / "__init__.py").write_text(BESIDE.format(id=f"{operators}_beside"))
    shutil.copy(ROOT / "LICENSE", folder)


def write_metadata(folder: Path, operators: str, backend: dict[str, object]) -> None:
    """metadata.json, with a hash of every other file."""
    files = {
        str(file.relative_to(folder)): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    content = {
        "name": NAME,
        "id": operators,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / "metadata.json").write_text(json.dumps(content, indent=2) + "\n")


def compiled(operators: str) -> Path:
    """The door to torch, with its operators in that namespace."""
    built = ROOT / "build" / "hub"
    environment = {"FASTSEQ_BUILD": "torch", "FASTSEQ_BUILD_TEST_ISA": "0", "FASTSEQ_OPERATORS": operators}
    command = [sys.executable, "setup.py", "--quiet", "build_clib", "build_ext", "--build-lib", built]
    (built / "fastseq").mkdir(parents=True, exist_ok=True)
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    return built / "fastseq" / "_torch.abi3.so"


def newest_glibc(library: Path) -> tuple[int, int]:
    """The newest version of the C library that a shared library asks for."""
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return max((int(major), int(minor)) for major, minor in re.findall(r"@GLIBC_(\d+)\.(\d+)", symbols.stdout))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1]).resolve()
    shutil.rmtree(target, ignore_errors=True)
    setup = re.search(r"TORCH_MINIMUM = \((\d+), (\d+)\)", (ROOT / "setup.py").read_text())
    assert setup
    machine = f"{platform.machine()}-{platform.system().lower()}"
    variants = {"torch-cuda": {"type": "cuda", "archs": CAPABILITIES}}
    variants[f"torch-stable-abi{setup[1]}{setup[2]}-cpu-{machine}"] = {"type": "cpu"}
    for variant, backend in variants.items():
        folder, operators = target / "build" / variant, f"{namespace()}_{backend['type']}"
        folder.mkdir(parents=True)
        write_python(folder, operators)
        if backend["type"] == "cpu":
            library = compiled(operators)
            shutil.copy(library, folder)
            if newest_glibc(library) > GLIBC:
                found = ".".join(map(str, newest_glibc(library)))
                print(
                    f"hub: the compiled variant needs glibc {found}, the Hub accepts 2.28: for release build it there"
                )
        write_metadata(folder, operators, backend)
        print(folder)
    (target / "README.md").write_text(CARD.format(name=NAME, title=title(), version=VERSION))


if __name__ == "__main__":
    main()

"""The compiled doors ask of torch nothing but its stable ABI as of the oldest torch that they are for, and bring none
of torch's libraries along."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOORS = sorted((ROOT / "fastseq").glob("_[tc]*.abi3.so"))  # _torch, and _cuda where it is built
HEADERS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
LIBRARIES = {"libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so"}  # those of torch in the process
SYSTEM = r"lib(stdc\+\+|gcc_s|gomp|m|c|rt|dl|pthread)\.so\.\d+|ld-linux-[\w-]+\.so\.\d"


def oldest() -> str:
    """Of the torch that is supported, as a target for torch's headers."""
    major, minor = re.search(r"TORCH_MINIMUM = \((\d+), (\d+)\)", (ROOT / "setup.py").read_text()).groups()  # type: ignore[union-attr]
    return f"0x{int(major):02x}{int(minor):02x}000000000000"


def promised(version: str) -> set[str]:
    """The C functions that the headers of this torch declare for that one; later ones are left out by their guards."""
    include = Path(torch.__file__).parent / "include"
    command = [
        os.environ.get("CXX") or sysconfig.get_config_var("CXX").split()[0],
        "-std=c++20",
        "-E",
        "-x",
        "c++",
        "-",
    ]
    command += [f"-I{include}", f"-DTORCH_TARGET_VERSION={version}"]
    text = "".join(f"#include <{header}>\n" for header in HEADERS)
    found = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\b(\w*torch_\w+)\s*\(", found))


def undefined(library: Path) -> set[str]:
    """The symbols that nobody but torch gives: those without a version, and not optional."""
    command = ["nm", "-D", "--undefined-only", library]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1] for line in lines if "@" not in line and line.split()[-2] == "U"}


def test_later_functions_are_not_promised() -> None:
    """Else the test below would pass for any."""
    newest = promised("0x{:02x}{:02x}000000000000".format(*map(int, torch.__version__.split(".")[:2])))
    assert promised(oldest()) < newest


@pytest.mark.parametrize("library", DOORS, ids=lambda path: path.name)
def test_what_is_asked_of_torch(library: Path) -> None:
    found = undefined(library)
    assert {"torch_library_impl", "aoti_torch_get_dtype"} <= found
    assert found - promised(oldest()) == set()


@pytest.mark.parametrize("library", DOORS, ids=lambda path: path.name)
def test_what_is_loaded_with_a_door(library: Path) -> None:
    """By names that the process has loaded already, from nowhere in particular."""
    listing = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", listing))
    assert needed & LIBRARIES
    assert [name for name in needed - LIBRARIES if not re.fullmatch(SYSTEM, name)] == []
    assert not re.search(r"\((RPATH|RUNPATH)\)", listing)

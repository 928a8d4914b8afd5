"""What ``fastseq convert`` does: a checkpoint, an ONNX file or a deployed model, to a deployed model or an ONNX file.

Imports what it needs when it is called.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastseq import _check, conversion_official

DESCRIPTION = """SOURCE is read as what it is: an ONNX file (.onnx), a deployed model, else a checkpoint: .safetensors,
or a file of torch.save, which is read with weights_only=True and so runs no code. What cannot be converted is listed
by name. TARGET is written as a whole or not at all, and then told as by fastseq inspect. With --from, SOURCE is a
checkpoint of the code that came with a paper."""
TARGETS = (".safetensors", ".fastseq", ".onnx")
_OFFICIAL_TARGETS = (*TARGETS, conversion_official.STATE, conversion_official.SCHEDULE)
_OPTIONS = {  # of arguments that only one kind of source has
    "a checkpoint": ("prefix", "order", "field"),
    "an ONNX file": ("input", "output", "dequantize"),
    "a deployed model": (),
}


class ConversionFailed(Exception):
    """What the user can act on, as text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the subcommand."""
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET", help=f"ends in {', '.join(TARGETS)}")
    parser.add_argument("--force", action="store_true", help="replace TARGET if it is there")
    weights = parser.add_argument_group("weights", "keep matrices in fewer bits; integers stay as they are")
    weights.add_argument("--weights", choices=("int8", "int4", "bfloat16"))
    weights.add_argument("--group", type=int, metavar="N", help="integers: columns that share a scale, a multiple of 8")
    checkpoint = parser.add_argument_group("checkpoints", "what a checkpoint does not tell")
    checkpoint.add_argument("--prefix", metavar="TEXT", help="of the names to take; it is removed")
    checkpoint.add_argument(
        "--order", metavar="NAMES", help="modules in their order, with commas; relu, tanh, sigmoid, softmax are known"
    )
    checkpoint.add_argument(
        "--field",
        action="append",
        type=_field,
        metavar="MODULE.NAME=VALUE",
        help="such as conv.left=2, head.type=linear or lstm.hard=true; may be repeated",
    )
    onnx = parser.add_argument_group("ONNX files")
    onnx.add_argument("--input", metavar="NAME", help="the tensor that the model is given (default: the first input)")
    onnx.add_argument("--output", metavar="NAME", help="the tensor that it gives (default: the first output)")
    onnx.add_argument("--dequantize", action="store_true", help="take the float32 values of integer weights")
    conversion_official.add_arguments(parser)


def _field(text: str) -> tuple[str, str, Any]:
    """Module, field and value, which is JSON if it can be."""
    key, equals, value = text.partition("=")
    module, _, name = key.rpartition(".")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"must be MODULE.NAME=VALUE, got {text!r}")
    try:
        return module, name, json.loads(value)
    except ValueError:
        return module, name, value


def convert(arguments: argparse.Namespace) -> list[str]:
    """Write the target; returns what the user should know, one sentence each.

    Raises:
        ConversionFailed: nothing was written.
    """
    source, target = arguments.source, arguments.target
    targets = _OFFICIAL_TARGETS if arguments.family else TARGETS
    if target.suffix not in targets:
        raise ConversionFailed(f"TARGET must end in {', '.join(targets)}, got {target}")
    if not target.resolve().parent.is_dir():
        raise ConversionFailed(f"{target}: there is no such folder")
    if target.is_dir() or (os.path.lexists(target) and not arguments.force):
        raise ConversionFailed(f"{target} is there already" + ("" if target.is_dir() else "; --force replaces it"))
    if arguments.group is not None and arguments.weights not in ("int8", "int4"):
        raise ConversionFailed("--group needs --weights int8 or int4")
    if wrong := conversion_official.problem(arguments):
        raise ConversionFailed(wrong)
    with _failures(source):
        notes: list[str] = []
        model = _read(arguments, notes)
        if arguments.weights:
            from fastseq.convert import stored

            model = stored(model, arguments.weights, arguments.group)
    write = _WRITERS.get(target.suffix, _write_deployed)
    with _failures(target), _whole_file(target, arguments.force) as path:
        write(model, path, notes)
    return notes


def _read(arguments: argparse.Namespace, notes: list[str]) -> dict[str, Any]:
    source = arguments.source
    if not source.is_file():
        raise ConversionFailed(f"{source}: there is no such file")
    if arguments.family:
        return conversion_official.read(arguments, notes)
    kind = _kind(source)
    for other, names in _OPTIONS.items():
        wrong = [f"--{name}" for name in names if getattr(arguments, name) and other != kind]
        if wrong:
            raise ConversionFailed(f"{source} is {kind}: for {other} only: {', '.join(wrong)}")
    return _READERS[kind](arguments, notes)


def _kind(source: Path) -> str:
    if source.suffix == ".onnx":
        return "an ONNX file"
    from fastseq.deploy.inspection import other_contents

    found = other_contents(source) or {"metadata": {}}
    deployed = source.suffix == ".fastseq" or found["metadata"].get("format", "").startswith("fastseq ")
    return "a deployed model" if deployed else "a checkpoint"


def _read_checkpoint(arguments: argparse.Namespace, notes: list[str]) -> dict[str, Any]:
    from fastseq.convert import from_checkpoint

    fields: dict[str, dict[str, Any]] = {}
    for module, name, value in arguments.field or ():
        fields.setdefault(module, {})[name] = value
    order = arguments.order.split(",") if arguments.order else None
    return from_checkpoint(arguments.source, prefix=arguments.prefix or "", order=order, fields=fields)


def _read_onnx(arguments: argparse.Namespace, notes: list[str]) -> dict[str, Any]:
    from fastseq.convert import from_onnx

    model = from_onnx(arguments.source, input=arguments.input, output=arguments.output, dequantize=arguments.dequantize)
    if model["batch_first"]:
        notes.append("the ONNX file takes the batch before the steps; what was made of it takes the steps first")
    return model


def _read_deployed(arguments: argparse.Namespace, notes: list[str]) -> dict[str, Any]:
    from fastseq.deploy import read_state

    return read_state(arguments.source)


_READERS: dict[str, Callable[[argparse.Namespace, list[str]], dict[str, Any]]] = {
    "a checkpoint": _read_checkpoint,
    "an ONNX file": _read_onnx,
    "a deployed model": _read_deployed,
}


def _write_onnx(model: dict[str, Any], path: Path, notes: list[str]) -> None:
    from fastseq.convert import to_onnx

    notes += to_onnx(model["layers"], model["tensors"], path)


def _write_deployed(model: dict[str, Any], path: Path, notes: list[str]) -> None:
    from fastseq.deploy import save

    save(model, path)


def _write_state(state: dict[str, Any], path: Path, notes: list[str]) -> None:
    import torch

    torch.save({name: torch.as_tensor(value) for name, value in state.items()}, path)


def _write_schedule(found: dict[str, Any], path: Path, notes: list[str]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


_WRITERS = {
    ".onnx": _write_onnx,
    conversion_official.STATE: _write_state,
    conversion_official.SCHEDULE: _write_schedule,
}


@contextmanager
def _whole_file(target: Path, force: bool) -> Iterator[Path]:
    """A path to write to, which becomes ``target`` at the end."""
    folder = Path(tempfile.mkdtemp(dir=target.resolve().parent, prefix=".fastseq-"))
    try:
        path = folder / target.name
        yield path
        if not force and os.path.lexists(target):  # since the conversion began
            raise ConversionFailed(f"{target} is there already; --force replaces it")
        os.replace(path, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _failures(path: Path) -> Iterator[None]:
    """Failures as ``ConversionFailed``. The packages that read foreign files raise anything on broken ones."""
    from fastseq.deploy import ModelError
    from fastseq.deploy.inspection_text import printable

    try:
        yield
    except (ConversionFailed, _check.ArgumentError) as error:
        raise ConversionFailed("\n".join(map(printable, str(error).split("\n")))) from error
    except ImportError as error:
        torch = "files of torch.save need torch: pip install fastseq-kernels[torch]"
        raise ConversionFailed(torch if error.name == "torch" else str(error)) from error
    except pickle.UnpicklingError as error:
        why = "broken, or it holds more than tensors and is not read, because that could run code; save a state_dict()"
        raise ConversionFailed(f"{path}: {why}") from error
    except OSError as error:
        raise ConversionFailed(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        told = printable((str(error).splitlines() or [""])[0])
        kind = "" if isinstance(error, ModelError) else f"{type(error).__name__}: "
        raise ConversionFailed(f"{path}: {kind}{told.removeprefix(f'{path}: ')}") from error

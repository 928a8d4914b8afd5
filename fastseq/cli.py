"""The ``fastseq`` command. Imports torch only inside the subcommands that need it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_DEMO_NEEDS = {  # module -> distribution
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "torch": "torch",
}


class CommandError(Exception):
    """A failure that the user can act on: printed as one line, without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None means those of the process.

    Returns:
        The exit status: 0, 1 after a ``CommandError``, 130 when interrupted. Wrong usage exits with 2.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except CommandError as error:
        print(f"fastseq {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fastseq {arguments.command}: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    from fastseq import __version__

    parser = argparse.ArgumentParser(
        prog="fastseq", description="Fast LSTMs with binary gates, and fast vector quantization."
    )
    parser.add_argument("--version", action="version", version=f"fastseq {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    from fastseq import demo

    parser = commands.add_parser("demo", help="train on real data, print what was measured and write a report")
    parser.add_argument(
        "name", nargs="?", metavar="NAME", choices=demo.names(), help=f"one of {', '.join(demo.names())}; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="less than a minute instead of a few")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the report, HTML (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="of every random choice (default: %(default)s)")
    parser.set_defaults(run=_demo)


def _seed(text: str) -> int:
    """An integer that ``torch.manual_seed`` takes and that is not negative."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be in 0..2**63-1, got {value}")
    return value


def _demo(arguments: argparse.Namespace) -> None:
    missing = [name for module, name in _DEMO_NEEDS.items() if find_spec(module) is None]
    if missing:
        extras = "demo,torch" if "torch" in missing else "demo"
        raise CommandError(f"needs {' and '.join(missing)}: pip install fastseq-kernels[{extras}]")
    if arguments.out.is_dir() or not arguments.out.resolve().parent.is_dir():
        raise CommandError(f"--out must name a file in an existing folder, got {arguments.out}")
    from rich.console import Console

    from fastseq import demo
    from fastseq.demo import facts, report, terminal

    console = Console()
    with terminal.progress(console) as progress:
        names = [arguments.name] if arguments.name else demo.names()
        chapters = demo.run(names, arguments.quick, arguments.seed, progress)
    known = facts.collect(arguments.seed)
    terminal.show(console, known, chapters)
    try:
        report.write(arguments.out, "fastseq demo", known, chapters, facts.about(arguments.quick))
    except OSError as error:
        raise CommandError(f"--out {arguments.out}: {error.strerror}") from None
    console.print(f"\nreport: {arguments.out.resolve()}", markup=False, highlight=False, soft_wrap=True)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="tell what was built, and which backend and instruction set run and why")
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> None:
    import fastseq

    fastseq.show_config()


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor", help="say what of this set-up is broken and what to do about it", description=_DOCTOR
    )
    parser.set_defaults(run=_doctor)


_DOCTOR = """Looks at compiled kernels, torch, compiler, Triton, OpenMP and environment, and runs an LSTM.
The exit status is 1 if something is wrong. Needs neither torch nor numpy."""


def _doctor(arguments: argparse.Namespace) -> None:
    from fastseq import _doctor as doctor

    found = doctor.examine()
    print(doctor.as_text(found))
    wrong = sum(finding.verdict == doctor.WRONG for finding in found)
    if wrong:
        raise CommandError(f"{wrong} of {len(found)} checks say that something is wrong; what to do stands above")


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect", help="tell what is in the file of a deployed model, and whether it is right", description=_INSPECT
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="written by fastseq.deploy.save or fastseq convert")
    parser.add_argument("--json", action="store_true", help="print the same as data")
    parser.set_defaults(run=_inspect)


_INSPECT = """Layers, how every matrix is kept, its bytes, and those of whole matrices of float32; then what checks say.
The exit status is 1 if one fails, or if FILE is no deployed model. Needs no torch."""


def _inspect(arguments: argparse.Namespace) -> None:
    from fastseq.deploy import ModelError, inspection, inspection_text

    path = arguments.file
    try:
        found = inspection.contents(path)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None
    except ModelError as error:
        other = inspection.other_contents(path)
        if other is None or other["metadata"].get("format", "").startswith("fastseq "):
            raise CommandError(inspection_text.printable(str(error))) from None
        print(json.dumps(other, indent=1) if arguments.json else inspection_text.other_text(other))
        raise CommandError(f"{path}: not a fastseq model, but a safetensors file of other tensors") from None
    print(json.dumps(found, indent=1) if arguments.json else inspection_text.contents_text(found))
    failed = [check["name"] for check in found["checks"] if not check["passed"]]
    if failed:
        raise CommandError(f"{path}: checks failed: {', '.join(failed)}")


def _add_convert(commands: Any) -> None:
    from fastseq import conversion

    parser = commands.add_parser(
        "convert",
        help="make a deployed model out of a checkpoint or an ONNX file, or an ONNX file out of either",
        description=conversion.DESCRIPTION,
    )
    conversion.add_arguments(parser)
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from fastseq import conversion
    from fastseq.deploy.inspection_text import printable

    try:
        notes = conversion.convert(arguments)
    except conversion.ConversionFailed as error:
        raise CommandError(str(error)) from None
    for note in notes:
        print(f"note: {printable(note)}")
    kind = {".onnx": "ONNX", ".pt": "a state_dict", ".json": "a schedule"}.get(arguments.target.suffix)
    if kind is not None:
        print(f"{arguments.target}: {kind}, {arguments.target.stat().st_size:,} bytes")
    else:
        _inspect(argparse.Namespace(file=arguments.target, json=False))


def _add_completion(commands: Any) -> None:
    parser = commands.add_parser(
        "completion", help="print what makes a shell complete this command", description=_COMPLETION
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    parser.set_defaults(run=_completion)


_COMPLETION = """For bash: fastseq completion bash > ~/.local/share/bash-completion/completions/fastseq. For zsh, into
a file _fastseq in a folder of $fpath. Needs shtab; the script does not. A new version of fastseq needs a new script."""


def _completion(arguments: argparse.Namespace) -> None:
    if find_spec("shtab") is None:
        raise CommandError("needs shtab: pip install fastseq-kernels[completion]")
    import shtab  # type: ignore[import-not-found, unused-ignore]

    parser = _parser()
    for one in (parser, *_subparsers(parser)):
        for action in one._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, arguments.shell))


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [one for action in actions for one in action.choices.values()]


# one function per subcommand
COMMANDS: tuple[Callable[[Any], None], ...] = (
    _add_demo,
    _add_info,
    _add_doctor,
    _add_inspect,
    _add_convert,
    _add_completion,
)


if __name__ == "__main__":
    sys.exit(main())

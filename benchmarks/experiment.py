"""What the command lines of experiments share, which train models and append a row for each as it comes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def parser(
    name: str, doc: str | None, what: str, known: Iterable[str], seeds: int, out: Path
) -> argparse.ArgumentParser:
    """Of ``python -m benchmarks.<name>``; ``what`` its positional arguments are called, each one of ``known``."""
    found = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc)
    found.add_argument(what, nargs="*", help=f"of {', '.join(known)} (default: all)")
    found.add_argument("--table", action="store_true", help="print the tables of the rows, train nothing")
    found.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    found.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    found.add_argument("--out", type=Path, default=out)
    return found


def parsed(of: argparse.ArgumentParser, what: str, known: Iterable[str]) -> argparse.Namespace:
    found = of.parse_args()
    for name in getattr(found, what):
        if name not in known:
            of.error(f"{what}: {name} is none of {', '.join(known)}")
    return found

"""``python -m benchmarks.products dksplit|silero``: published products as deployed models beside the products.

- DKSplit (PyPI: dksplit, by ABTdomain, https://abtdomain.com, CC BY 4.0) splits names like "openaikey" into words:
  lookup, three bidirectional LSTM layers of 8 bits, a linear layer, a CRF.
- Silero VAD (PyPI: silero-vad, MIT) tells speech from the rest: an LSTM cell and one output behind a small encoder.

    python -m benchmarks.products dksplit
    python -m benchmarks.products silero RECORDINGS... --source "Debian asterisk-core-sounds-en-wav 1.6.1"

RECORDINGS are WAV files, and folders of them, of one channel, 16 bits, and 8 or 16 kHz. ONNX Runtime runs the product.
Every run prints a line and appends a row for each form of the weights. All is done on one thread.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, products_dksplit, products_silero

RESULTS = harness.RESULTS / "products.jsonl"
PACKAGES = {"dksplit": "dksplit", "silero": "silero-vad"}
LICENCES = {"dksplit": "CC BY 4.0, ABTdomain, https://abtdomain.com", "silero": "MIT"}


def installed(product: str, folder: Path | None) -> tuple[Path, str]:
    """Where the package of a product is, and its version. Raises ``PackageNotFoundError``."""
    name = PACKAGES[product]
    for found in importlib.metadata.distributions(name=name, path=sys.path if folder is None else [str(folder)]):
        return Path(str(found.locate_file("."))), found.version
    raise importlib.metadata.PackageNotFoundError(name)


def recordings(given: list[Path]) -> list[Path]:
    """Files, and all WAV files of folders."""
    found = [[path] if path.is_file() else sorted(path.rglob("*.wav")) for path in given]
    return [path for paths in found for path in paths]


def run(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    folder, version = installed(given.product, given.folder)
    shared = {"product": given.product, "package": f"{PACKAGES[given.product]} {version}"}
    shared |= {"licence": LICENCES[given.product], "threads": 1}
    if given.product == "dksplit":
        rows = products_dksplit.rows(folder, given.names)
    else:
        rows = products_silero.rows(folder, recordings(given.recordings), given.source)
    told = harness.provenance(1, ["onnxruntime", "numpy"])
    for row in rows:
        yield {**shared, **row, **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("product", choices=tuple(PACKAGES))
    parser.add_argument("recordings", type=Path, nargs="*")
    parser.add_argument("--folder", type=Path, help="that holds the package; default: where it is installed")
    parser.add_argument("--names", type=int, default=2400)
    parser.add_argument("--source", help="what the recordings are, for the row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if (given.product == "silero") != bool(recordings(given.recordings)):
        parser.error("recordings are for silero, which needs them")
    line = products_dksplit.line if given.product == "dksplit" else products_silero.line
    with harness.threads(1), torch.no_grad():
        for row in run(given):
            print(line(row), flush=True)
            harness.append([row], given.out)


if __name__ == "__main__":
    main()

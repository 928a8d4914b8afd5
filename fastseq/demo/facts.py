"""Where and with what a demonstration ran."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import time
from pathlib import Path

import torch

import fastseq


def about(quick: bool) -> list[str]:
    """How the report is to be read, in paragraphs."""
    paragraphs = [
        "fastseq is a library of parts for neural networks in torch: LSTMs with binary gates, vector quantizers, "
        "ensembles inside one network, and training recipes, each from a paper. On this page it trains small models on "
        "data that every installation has, and compares them with what is usual. All of it was measured in one run, on "
        "the machine in the table below.",
        "Each chapter begins with what it is about; In short says what came out, for better or worse. A seed is the "
        "start of all random choices: with other seeds the numbers differ. Where several were run, ± is the 95 % "
        "interval of the mean, and differences smaller than it say nothing. Times are those of this machine, whatever "
        "else it did.",
    ]
    if quick:
        paragraphs.append(
            "This is a quick run (--quick): trainings are cut short, so the numbers show what is measured, not how "
            "good the methods are. The full run takes a few minutes: fastseq demo."
        )
    return paragraphs


def collect(seed: int) -> list[tuple[str, str]]:
    """Pairs of name and value: date, machine, versions, backend and instruction set."""
    with contextlib.redirect_stdout(io.StringIO()):
        config = fastseq.show_config()
    backend, instructions = config["backend"], config["instruction_set"]
    runs = f"{backend['runs']} ({backend['why']})"
    if backend["runs"] == "reference":
        runs += f"; not the compiled one: {backend['not'].get('cpu', 'unknown')}"
    if instructions["runs"]:
        runs += f", instruction set {instructions['runs']} ({instructions['why']})"
    return [
        ("date", time.strftime("%Y-%m-%d %H:%M %Z")),
        ("machine", f"{_processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
        ("versions", f"fastseq {config['version']}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("fastseq backend", runs),
        ("seed", str(seed)),
    ]


def _processor() -> str:
    """The processor's name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

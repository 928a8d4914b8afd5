"""The same cases on another commit: built in a worktree, timed in turns with this tree, compared by ratio."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT

TURNS = 3


def _git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, stdout=subprocess.DEVNULL)


def _rows(folder: Path, arguments: list[str], target: Path) -> dict[str, float]:
    """Label -> milliseconds of one turn in ``folder``."""
    command = [sys.executable, "-m", "benchmarks.run", *arguments, "--rows", str(target)]
    target.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    return {_name(row): row["ms"] for row in rows if "ms" in row}


def _name(row: dict[str, Any]) -> str:
    kind = " ".join(dict.fromkeys((row["table"], row["mode"])))
    return f"{kind} {row['case']} {row['threads']} threads {row['label']}"


def compare(ref: str, arguments: list[str]) -> None:
    """Print this tree's time over that of ``ref``, per case and provider.

    Two versions of one operator library cannot share a process, so they take turns, three each; the ratio is the median
    over turns. The rivals are the same code on both sides: how far theirs is from 1 is the noise of the comparison.
    """
    words = iter(arguments)
    here = []
    for word in words:
        if word == "--base":
            next(words)
        elif not word.startswith("--base="):
            here.append(word)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", str(tree), ref)
        try:
            shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", dirs_exist_ok=True)  # one harness for both
            build = [sys.executable, "setup.py", "--quiet", "build_clib", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, check=True)
            turns = []
            for _ in range(TURNS):
                theirs = _rows(tree, here, Path(folder) / "base.jsonl")
                ours = _rows(ROOT, here, Path(folder) / "here.jsonl")
                turns.append({label: ours[label] / theirs[label] for label in ours if label in theirs})
        finally:
            _git("worktree", "remove", "--force", str(tree))
    ratios = {label: statistics.median(turn[label] for turn in turns if label in turn) for label in turns[0]}
    for label, value in ratios.items():
        spread = [turn[label] for turn in turns if label in turn]
        print(f"{label:<60} {value:.3f} [{min(spread):.3f}, {max(spread):.3f}]")
    ours = [value for label, value in ratios.items() if "fastseq" in label]
    if ours:
        mean = math.exp(statistics.fmean(map(math.log, ours)))
        print(f"fastseq here over {ref}: geometric mean {mean:.3f}, worst {max(ours):.3f} of {len(ours)}")

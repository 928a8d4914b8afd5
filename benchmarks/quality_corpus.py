"""The King James Bible as Debian packs it, in words: 31,102 verses of 1,189 chapters."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality_case import KEPT

PACKAGE = "bible-kjv-text"
DATA = KEPT / "bible.data"
RARE = 5  # a word that training has less often is <unk>
UNKNOWN = "<unk>"
EVERY = 20  # of so many chapters one is for validation and one for the test
WORD = r"[a-z]+(?:'[a-z]+)?|[^\sa-z]"
COUNT_AT = 0x58  # in the file: number of blocks, then where each begins
MAGIC = b"\x1f\x9d\x90"  # of compress(1); it stands before the first block, and the others do without


@dataclass(frozen=True)
class Words:
    """Each part as word numbers [N]; ``vocabulary`` begins with UNKNOWN."""

    vocabulary: list[str]
    training: Tensor
    validation: Tensor
    test: Tensor


def fetch(path: Path = DATA) -> None:
    """Get the file from Debian's package, where there is apt.

    Raises:
        SystemExit: there is none, or it fails; the message says what to do by hand.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    ask = f"put usr/lib/bible.data of Debian's package {PACKAGE} at {path}"
    if not all(map(shutil.which, ("apt-get", "dpkg"))):
        raise SystemExit(f"words: no apt-get here; {ask}")
    done = subprocess.run(["apt-get", "download", PACKAGE], cwd=path.parent, capture_output=True, text=True)
    found = sorted(path.parent.glob(f"{PACKAGE}_*.deb"))
    if done.returncode or not found:
        raise SystemExit(f"words: apt-get download {PACKAGE} failed: {done.stderr.strip()}\n{ask}")
    unpacked = path.parent / PACKAGE
    subprocess.run(["dpkg", "-x", str(found[-1]), str(unpacked)], check=True)
    shutil.copy(unpacked / "usr" / "lib" / "bible.data", path)


def decoded(data: bytes) -> str:
    """The text: blocks of 64 KB, each compressed by compress(1), which gzip reads."""
    count = struct.unpack_from(">I", data, COUNT_AT)[0]
    starts = struct.unpack_from(f">{count}I", data, COUNT_AT + 4)
    blocks = [data[begin:end] for begin, end in zip(starts, (*starts[1:], len(data)), strict=True)]
    parts = [
        subprocess.run(["gzip", "-dc"], input=MAGIC + block, capture_output=True, check=True).stdout for block in blocks
    ]
    return b"".join(parts).decode("ascii")


def chapters(text: str) -> list[list[str]]:
    """Words and punctuation of each chapter, in lower case; a line is a verse, as in ``Ge1:1 In the beginning ...``."""
    found: dict[str, list[str]] = {}
    for name, verse in re.findall(r"^(\d?[A-Z][A-Za-z]*\d+):\d+ (.*)$", text, re.MULTILINE):
        found.setdefault(name, []).extend(re.findall(WORD, verse.lower()))
    return list(found.values())


def split(found: list[list[str]], every: int = EVERY, rare: int = RARE) -> Words:
    """Chapters to three parts, and words to numbers; the vocabulary is that of the training part."""
    parts: list[list[str]] = [[], [], []]  # training, validation, test
    for k, chapter in enumerate(found):
        parts[{every // 2 - 1: 1, every - 1: 2}.get(k % every, 0)].extend(chapter)
    counts = Counter(parts[0])
    vocabulary = [UNKNOWN, *(word for word, count in counts.most_common() if count >= rare)]
    number = {word: k for k, word in enumerate(vocabulary)}
    return Words(vocabulary, *(torch.tensor([number.get(word, 0) for word in part]) for part in parts))


def corpus() -> Words:
    fetch()
    return split(chapters(decoded(DATA.read_bytes())))

"""What TAWT is tried on: tags of Python's standard library, a target of few examples and three sources of many."""

from __future__ import annotations

from fastseq.demo.python_tags import Corpus, corpus
from fastseq.demo.tawt_training import Setting

FILES, WINDOWS, TESTS = 120, 6000, 1000  # modules, and windows of 32 tokens
TASKS = {f"{count} examples": Setting(target=count) for count in (100, 400, 1000)}


def load() -> Corpus:
    """Of this Python; a version more or less moves what is in its library a little."""
    return corpus(FILES, WINDOWS, TESTS)

"""CHANGELOG.md is in the form of keepachangelog.com, so that people and programs find what a version changed."""

from __future__ import annotations

import re
from pathlib import Path

import fastseq

KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
TEXT = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()


def test_versions() -> None:
    """What is coming, then the released ones with their dates, the newest first."""
    found = re.findall(r"^## (.*)$", TEXT, re.M)
    released = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", heading) for heading in found[1:]]
    assert TEXT.startswith("# Changelog\n") and found[0] == "[Unreleased]" and all(released)
    numbers = [tuple(map(int, version.groups())) for version in released if version]
    assert numbers == sorted(set(numbers), reverse=True)
    assert not numbers or numbers[0] <= tuple(map(int, fastseq.__version__.split(".")[:3]))


def test_kinds_of_changes() -> None:
    for part in TEXT.split("\n## ")[1:]:
        kinds = re.findall(r"^### (.*)$", part, re.M)
        assert kinds == [kind for kind in KINDS if kind in kinds], "each once, in this order"
        entries = [line for line in part.splitlines()[1:] if line and not line.startswith("### ")]
        assert entries and all(line.startswith(("- ", "  ")) for line in entries)

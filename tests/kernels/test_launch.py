"""A launch that a loop repeats: the binary is looked for once, and given the same arguments as by triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastseq_kernels import _launch


class Binary:
    """What a kernel returns, with the calls that it got."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.calls.append((grid, *args))


class Kernel:
    arg_names = ("x", "t", "HARD", "BLOCK")

    def __init__(self) -> None:
        self.binary, self.calls = Binary(), []  # type: ignore[var-annotated]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Binary:
            self.calls.append((grid, *args, options))
            return self.binary

        return run


X = torch.zeros(1)
OPTIONS = {"BLOCK": 16, "HARD": True, "num_warps": 4, "num_stages": 2, "maxnreg": 255}


def test_the_first_is_found_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    kernel = Kernel()
    repeated = _launch.Repeated(kernel, (2, 3), **OPTIONS)
    for t in range(3):
        repeated(X, t)
    assert kernel.calls == [((2, 3), X, 0, OPTIONS)]
    assert kernel.binary.calls == [((2, 3, 1), X, t, True, 16) for t in (1, 2)]


def test_interpreted_ones_go_through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETED", True)
    kernel = Kernel()
    repeated = _launch.Repeated(kernel, (2, 3), **OPTIONS)
    for t in range(2):
        repeated(X, t)
    assert [call[2] for call in kernel.calls] == [0, 1] and not kernel.binary.calls


def test_every_launch_is_recorded_and_empty_ones_are_none() -> None:
    kernel = Kernel()
    with _launch.recording(_launch.TARGETS[80]) as found:
        for grid in ((2, 3), (0, 3)):
            repeated = _launch.Repeated(kernel, grid, **OPTIONS)
            repeated(X, 0)
            repeated(X, 1)
    assert [launch.args[1] for launch in found] == [0, 1] and not kernel.calls

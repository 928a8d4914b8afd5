"""Our LSTM by a route of choice, whatever its plan says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from benchmarks.harness import CannotRun


@contextmanager
def route(name: str | None) -> Iterator[None]:
    """Inside, every call takes this route of ``fastseq_kernels.lstm.plan``; None: the one of the plan.

    Raises:
        CannotRun: a call cannot go that way.
    """
    if name is None:
        yield
        return
    from fastseq_kernels import lstm as kernels

    usual = kernels.plan

    def plan(*args: Any) -> Any:
        found = usual(*args)
        if found.route == name:
            return found
        if name == "resident":
            raise CannotRun(found.why)
        return found._replace(route=name)

    with mock.patch.object(kernels, "plan", plan):
        yield

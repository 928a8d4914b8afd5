"""The providers of one case side by side: made ready, judged, timed in common rounds, a row for each."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.part import Context, Row, backend, reason
from benchmarks.harness import ABSENT, CannotRun

Call = Callable[[], Any]
OURS = "fastseq"  # how the labels of ours begin
CUDA = f"{OURS} cuda"  # by csrc/cuda, which a dry run has not


def is_ours(label: str) -> bool:
    return label.startswith(OURS)


def forced(context: Context, label: str) -> AbstractContextManager[None]:
    """Ours by its Triton kernels, or those of csrc/cuda where the label says so, whatever else could run; where there
    is no GPU, by what runs there."""
    if not is_ours(label) or context.dry:
        return backend(None)
    return backend("cuda" if label == CUDA else "triton")


def measure(
    context: Context,
    shared: Row,
    labels: Sequence[str],
    prepare: Callable[[str], tuple[Call, Row]],
    seconds: float,
    cold: bool = False,
    around: Callable[[str], AbstractContextManager[None]] | None = None,
) -> list[Row]:
    """A row for each provider. Ours has no time where it fails the gate, a rival keeps it beside the reason.

    Args:
        shared: fields of all rows.
        prepare: of a label, what is timed and what is known of it, with the verdict of the gate as ``gate``.
        around: of a label, what its calls need around them; by default ``forced``.
    """
    around = around or functools.partial(forced, context)
    calls: dict[str, Call] = {}
    facts: dict[str, Row] = {}
    for label in labels:
        try:
            if label == CUDA and context.dry:
                raise CannotRun("it needs a GPU")
            with around(label):
                call, facts[label] = prepare(label)
                if facts[label]["gate"] == "passed" or not is_ours(label):
                    facts[label] |= timing.peak_mb(context, call)
                    calls[label] = call
        except ModuleNotFoundError as error:
            facts[label] = {"gate": f"{ABSENT[0]}{error.name}"}
        except CannotRun as error:
            facts[label] = {"gate": f"{ABSENT[1]}{error}"}
        except Exception as error:
            traceback.print_exc()
            timing.synchronize(context)  # raises where the device is lost
            facts[label] = {"gate": f"failed: {reason(error)}"}
    samples = timing.interleave(context, calls, seconds, cold, around)
    rows = []
    for label in labels:
        provider = OURS if is_ours(label) else label
        row = {**shared, "label": label, "provider": provider, "threads": torch.get_num_threads()}
        rows.append(row | (timing.timed(samples, label) if label in samples else {}) | facts[label])
    return rows

"""Calibration of ensembles: one temperature, diagrams, and metrics for torchmetrics' collections."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastseq.calibration.diagram import reliability_diagram
from fastseq.calibration.temperature import Temperature, fit_temperature

if TYPE_CHECKING:
    from fastseq.calibration.metrics import (
        Disagreement,
        EnsembleAccuracy,
        EnsembleBrier,
        EnsembleECE,
        EnsembleNLL,
    )

__all__ = [
    "Disagreement",
    "EnsembleAccuracy",
    "EnsembleBrier",
    "EnsembleECE",
    "EnsembleNLL",
    "Temperature",
    "fit_temperature",
    "reliability_diagram",
]


def __getattr__(name: str) -> Any:
    """The metrics load on first use, since they need torchmetrics."""
    if name in __all__:
        return getattr(importlib.import_module("fastseq.calibration.metrics"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

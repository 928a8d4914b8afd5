"""LSTMs with binary gates, vector quantization and ensembles inside one network for torch, and training recipes.

Submodules load on first use; importing this package loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastseq import calibration as calibration
    from fastseq import convert as convert
    from fastseq import deploy as deploy
    from fastseq import functional as functional
    from fastseq import nn as nn
    from fastseq import ops as ops
    from fastseq import recipes as recipes
    from fastseq import reference as reference
    from fastseq._config import show_config as show_config
    from fastseq._explain import explain as explain
    from fastseq.compression import compress as compress
    from fastseq.exporting import export_state as export_state
    from fastseq.replacement import replace as replace
    from fastseq.replacement import replaced as replaced

__version__ = "0.1.0"

_MODULES = (
    "calibration",
    "compression",
    "convert",
    "deploy",
    "functional",
    "nn",
    "ops",
    "recipes",
    "reference",
    "replacement",
)
_NAMES = {
    "compress": "compression",
    "explain": "_explain",
    "export_state": "exporting",
    "replace": "replacement",
    "replaced": "replacement",
    "show_config": "_config",
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})


def _warn_of_namesake() -> None:
    """The distribution is fastseq-kernels; the one called fastseq is another project with the same import name."""
    try:
        other = importlib.metadata.distribution("fastseq")
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"the distribution 'fastseq' {other.version} is installed beside 'fastseq-kernels'. It is another project with "
        "the same import name, so their files can overwrite each other. To use this one: pip uninstall fastseq, "
        "then pip install --force-reinstall --no-deps --no-build-isolation fastseq-kernels",
        RuntimeWarning,
        stacklevel=3,
    )


_warn_of_namesake()

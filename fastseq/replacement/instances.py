"""What may have been done to an instance of any class."""

from __future__ import annotations

from torch import nn


def changed(module: nn.Module) -> str | None:
    """Why another module cannot stand in for ``module``, whatever its class; or None."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return "it was compiled in place; replace first, then compile" if module._compiled_call_impl is not None else None

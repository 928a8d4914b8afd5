"""The matrices of an LSTM as ``fastseq.reference`` takes them, whether its parameters are these or factors of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastseq.functional import Gate, Matrix, Part


def matrices_of(module: nn.Module) -> dict[str, tuple[Matrix, int]]:
    """By the names that they have without ``rank``: gate by gate (a projection whole), with their columns.

    The arrays are views of the parameters.
    """
    found: dict[str, tuple[Matrix, int]] = {}
    for name, value in module.named_parameters(recurse=False):
        if not name.startswith("weight_") or value.dim() != 2 or name.startswith("weight_hh_up"):
            continue
        if name.startswith("weight_hh_down"):
            suffix = name.removeprefix("weight_hh_down")
            found[f"weight_hh{suffix}"] = _factored(module, suffix), value.shape[1]
        else:
            parts = [value.detach()] if name.startswith("weight_hr") else value.detach().chunk(4)
            found[name] = [Gate(Part(part)) for part in parts], value.shape[1]
    return found


def _factored(module: Any, suffix: str) -> Matrix:
    ranks = module._ranks
    lows = [rank for rank in ranks if rank > 0]
    up, down = (getattr(module, f"weight_hh_{kind}{suffix}").detach() for kind in ("up", "down"))
    factors = iter(zip(up.split(lows, 1), down.split(lows), strict=True))
    full = iter(getattr(module, f"weight_hh{suffix}").detach().split(len(up)) if len(lows) < 4 else ())
    return [Gate(Part(next(full))) if r < 0 else Gate(*(Part(v) for v in next(factors))) for r in ranks]

"""``from_adaptdl``: the learning rate of petuum/adaptdl's ``LEGWScale`` as arguments of ``fastseq.recipes.LEGW``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastseq import _check
from fastseq.convert.onnx_read import ConversionError

_NAME = "from_adaptdl"
# numbers of numpy lie in the file; these names make arrays of plain types and call nothing else
_NUMPY = ("_reconstruct", "scalar")


def from_adaptdl(
    source: Any, *, base_batch: int, batch: int, base_warmup_epochs: float, examples: int, epochs: float
) -> dict[str, Any]:
    """What its ``AdaptiveDataParallel`` saved, and what its script was given, as a schedule that goes on from there.

    Both multiply the tuned rate by sqrt(k) * min(1, progress / (k * warm-up)), with k = batch / base batch. adaptdl
    counts progress in steps of the base batch, by its estimate of what a step is worth, and a step takes the rate of
    the progress before it. LEGW counts the steps made, k for a step, and takes the rate of the progress behind it.

    Args:
        source: its file "adaptdl-dataparallel" (or of another name that it was given), or what torch.load gives of it.
        base_batch: ``batch_size`` of its AdaptiveDataLoader.
        batch: examples of an optimizer step from here on, of all processes together.
        base_warmup_epochs, examples: ``base_warmup_epochs`` and ``data_size`` of its LEGWScale.
        epochs: of the whole training.

    Returns:
        "rates": the tuned rate of each parameter group, which the groups need as "lr" and "initial_lr"; "arguments": of
        ``LEGW`` behind the optimizer, ``last_epoch`` among them; "progress": as in the file, in steps of the base
        batch; "notes": what the file does not tell, one sentence each.

    Raises:
        ConversionError: it is no such file.
        ArgumentError: for a value out of its range.
    """
    for name, value in (("base_batch", base_batch), ("batch", batch), ("examples", examples)):
        _check.count(_NAME, name, value)
    _check.not_negative(_NAME, "base_warmup_epochs", base_warmup_epochs)
    _check.positive(_NAME, "epochs", epochs)
    if batch > examples:
        _check.fail(_NAME, "batch", f"<= examples = {examples}", batch)
    optimizer, scheduler = _states(_read(source) if isinstance(source, (str, Path)) else source)
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer["param_groups"]]
    progress = float(optimizer["state"]["gns"]["progress"])
    steps = progress * base_batch / batch
    arguments = {
        "base_batch": base_batch,
        "batch": batch,
        "base_warmup_epochs": base_warmup_epochs,
        "steps_per_epoch": examples // batch,
        "epochs": epochs,
        "decay": "constant",
        "last_epoch": round(steps) - 1,
    }
    notes = [
        "base_batch, base_warmup_epochs, examples and epochs stand in the training script, not in the file: taken as "
        "given",
        f"{progress:g} steps of the base batch, as adaptdl estimated them, are taken as {steps:g} of the new batch",
    ]
    if scheduler is not None:
        notes.append("the file has a scheduler of its own beside LEGWScale: give its decay to LEGW (decay=...)")
    return {"rates": rates, "arguments": arguments, "progress": progress, "notes": notes}


def _states(found: Any) -> tuple[Mapping[str, Any], Any]:
    """The optimizer's state and the scheduler's or None."""
    states = found[0] if isinstance(found, (tuple, list)) and len(found) == 3 else None
    if not isinstance(states, (tuple, list)) or len(states) != 4 or not isinstance(states[1], Mapping):
        expected = "([model, optimizer, scheduler, scaler], gain, lr_factor), as AdaptiveDataParallel saves them"
        raise ConversionError(f"{_NAME}: the file must hold {expected}, got {type(found).__name__}")
    optimizer = states[1]
    gns = optimizer.get("state", {}).get("gns")
    if not isinstance(gns, Mapping) or "progress" not in gns or not optimizer.get("param_groups"):
        raise ConversionError(f"{_NAME}: the optimizer's state has no gns.progress, which AdaptiveDataParallel keeps")
    return optimizer, states[2]


def _read(path: Path | str) -> Any:
    if not Path(path).is_file():
        _check.fail(_NAME, "source", "a file, or what torch.load gives of it", repr(str(path)))
    import numpy as np
    import torch

    made: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32))]
    core: Any = getattr(np, "_core", None) or np.core  # numpy 2, or 1
    for name in _NUMPY:  # files of numpy 1 and of numpy 2 say another module
        made += [(getattr(core.multiarray, name), f"numpy.{module}.multiarray.{name}") for module in ("core", "_core")]
    with torch.serialization.safe_globals(made):
        return torch.load(path, map_location="cpu", weights_only=True)

"""``replace(model)``: swaps layers of ``torch.nn`` and vector-quantize-pytorch inside a model for ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from torch import nn

from fastseq.replacement import quantizers, recurrent
from fastseq.replacement.instances import changed

logger = logging.getLogger("fastseq")
M = TypeVar("M", bound=nn.Module)


class Replaced(NamedTuple):
    """One module that ``replace`` swapped: its name in the model, the class it had, and what stands there now.

    Of one that it leaves alone: its class, itself, and the reason.
    """

    name: str
    was: str
    module: nn.Module
    reason: str | None = None


def replace(model: M, gates: str = "sigmoid", **options: Any) -> M:
    """Swap the layers inside ``model`` that we have for ours; without options its outputs stay equal.

    These are ``LSTM`` and ``LSTMCell`` of ``torch.nn``, and ``VectorQuantize``, ``ResidualVQ``, ``GroupedResidualVQ``,
    ``FSQ`` and ``SimVQ`` of vector-quantize-pytorch. That package is not imported here: a model that has none of its
    layers does not need it. Its other classes stay, with all that is inside them.

    Parameters stay the same objects (so optimizers and tied weights go on), and so do buffers, hooks,
    parametrizations, dtype, device, requires_grad and training mode. A module used in several places is swapped once.
    Subclasses, modules whose forward was replaced, compiled and complex ones, and those with options that ours do not
    have, are left alone with a logged reason, see ``replaced``. Each swap is logged.

    Args:
        model: changed in place. gates, tau, noise_probability, hard_eval: of the LSTMs, as in ``fastseq.nn.LSTM``.
        weight_dropout, variational_dropout, recompute: the same, for ``nn.LSTM`` only.

    Returns:
        ``model``, or the new module where ``model`` itself is one to swap; the old one should not be used on.

    Raises:
        ArgumentError: a bad option; nothing has been swapped then.
        TypeError: ``model`` is no module, or an option is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model should be of type nn.Module, got: {type(model).__name__}")
    known = (*recurrent.GATE_OPTIONS, *recurrent.LAYER_OPTIONS)
    for name in options:
        if name not in known:
            raise TypeError(f"replace: unknown option {name!r}; expected one of {', '.join(('gates', *known))}")
    options["gates"] = gates
    swaps: dict[int, nn.Module] = {}
    log = []
    for kind, found in _candidates(model):
        place, name = found.name or "the model", found.was.rpartition(".")[2]
        if found.reason is not None:
            log.append((logging.WARNING, f"replace: {place}: left alone, because {found.reason}"))
            continue
        pairs = kind.swap(found.module, options)
        swaps.update((id(old), new) for new, old in pairs)
        pairs[0][0].__dict__["_replaced"] = found.was
        with_gates = f", gates={gates!r}" if kind is recurrent else ""
        log.append((logging.INFO, f"replace: {place}: {name} swapped{with_gates}"))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in swaps:
                parent._modules[name] = swaps[id(child)]
    for level, message in log:
        logger.log(level, message)
    return swaps.get(id(model), model)  # type: ignore[return-value]


def replaced(model: nn.Module, left_alone: bool = False) -> list[Replaced]:
    """What ``replace`` swapped inside ``model``, in the order of ``named_modules``.

    Args:
        model: any.
        left_alone: list what it leaves alone instead: modules of the classes that it knows but cannot swap, and those
            of other classes of vector-quantize-pytorch. Whether ``replace`` has run does not matter.
    """
    if left_alone:
        return [found for _, found in _candidates(model) if found.reason is not None]
    return [
        Replaced(name, str(module.__dict__["_replaced"]), module)
        for name, module in model.named_modules()
        if "_replaced" in module.__dict__
    ]


def _candidates(model: nn.Module) -> Iterator[tuple[ModuleType, Replaced]]:
    """Modules to swap or, with a reason, to leave alone; what is inside a quantizer goes or stays with it."""
    theirs = [module for module in model.modules() if quantizers.known(module) is not None]
    inside = {id(part) for module in theirs for part in module.modules() if part is not module}
    outer = {id(module) for module in theirs} - inside
    for path, module in model.named_modules():
        kind = quantizers if id(module) in outer else recurrent
        was = kind.known(module)
        if was is not None:
            yield kind, Replaced(path, was, module, changed(module) or kind.why_not(module))

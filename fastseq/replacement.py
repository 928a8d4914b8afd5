"""``replace(model)``: swaps the LSTMs of ``torch.nn`` inside a model for ours, weights carried over."""

from __future__ import annotations

import logging
import weakref
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from fastseq.nn import LSTM, LSTMCell

logger = logging.getLogger("fastseq")
M = TypeVar("M", bound=nn.Module)

_OURS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
_GATE_OPTIONS = ("tau", "noise_probability", "hard_eval")
_LAYER_OPTIONS = ("weight_dropout", "variational_dropout", "recompute")  # those that a cell does not have


class Replaced(NamedTuple):
    """One module that ``replace`` swapped: its name in the model, the class it had, and what stands there now."""

    name: str
    was: str
    module: nn.Module


def replace(model: M, gates: str = "sigmoid", **options: Any) -> M:
    """Swap every ``nn.LSTM`` and ``nn.LSTMCell`` inside ``model`` for ours; without options its outputs stay equal.

    Parameters stay the same objects (so optimizers and tied weights go on), and so do hooks, parametrizations, dtype,
    device, requires_grad and training mode. A module used in several places is swapped once. Subclasses, modules whose
    forward was replaced, compiled and complex ones are left alone with a logged reason. Each swap is logged.

    Args:
        model: changed in place. gates, tau, noise_probability, hard_eval: as in ``fastseq.nn.LSTM``.
        weight_dropout, variational_dropout, recompute: the same, for ``nn.LSTM`` only.

    Returns:
        ``model``, or the new module where ``model`` itself is one to swap; the old one should not be used on.

    Raises:
        ArgumentError: a bad option; nothing has been swapped then.
        TypeError: ``model`` is no module, or an option is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model should be of type nn.Module, got: {type(model).__name__}")
    for name in options:
        if name not in (*_GATE_OPTIONS, *_LAYER_OPTIONS):
            expected = ", ".join(("gates", *_GATE_OPTIONS, *_LAYER_OPTIONS))
            raise TypeError(f"replace: unknown option {name!r}; expected one of {expected}")
    options["gates"] = gates
    swaps: dict[int, nn.Module] = {}
    log = []
    for path, module in model.named_modules():
        stock = next((s for s in _OURS if isinstance(module, s)), None)
        if stock is None:
            continue
        reason = _why_not(module, stock)
        if reason is None:
            swaps[id(module)] = _swap(module, stock, options)
            log.append((logging.INFO, f"replace: {path or 'the model'}: {stock.__name__} swapped, gates={gates!r}"))
        else:
            log.append((logging.WARNING, f"replace: {path or 'the model'}: left alone, because {reason}"))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in swaps:
                parent._modules[name] = swaps[id(child)]
    for level, message in log:
        logger.log(level, message)
    return swaps.get(id(model), model)  # type: ignore[return-value]


def replaced(model: nn.Module) -> list[Replaced]:
    """What ``replace`` swapped inside ``model``, in the order of ``named_modules``."""
    return [
        Replaced(name, str(module._replaced), module)
        for name, module in model.named_modules()
        if isinstance(module, (LSTM, LSTMCell)) and "_replaced" in module.__dict__
    ]


def _why_not(module: nn.Module, stock: type[nn.Module]) -> str | None:
    """Why this instance cannot be swapped, or None."""
    kind = type(module)
    if kind is not stock and not (parametrize.is_parametrized(module) and kind.__bases__ == (stock,)):
        return f"{kind.__module__}.{kind.__qualname__} is a subclass of {stock.__name__} and may do more"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if module._compiled_call_impl is not None:
        return "it was compiled in place; replace first, then compile"
    strange = next((p.dtype for p in module.parameters() if not p.is_floating_point()), None)
    return None if strange is None else f"{strange} is not supported"


def _swap(module: nn.Module, stock: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    """Ours with the state of ``module``: the same parameters, hooks and parametrizations."""
    ours: type[nn.Module] = _OURS[stock]
    if type(module) is not stock:  # parametrized: a class made for this instance, with one property per tensor
        special = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", "__module__")}
        ours = type(f"Parametrized{ours.__name__}", (ours,), {**special, "__module__": ours.__module__})
    new: Any = ours.__new__(ours)
    new.__dict__.update(module.__dict__)
    hook: Any
    for hook in module._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)  # torch keeps a reference to the module that dies with it
    if isinstance(new, LSTM):  # what a parametrization computed last is no parameter, and keeps deepcopy from working
        new._flat_weights = [new._parameters.get(name) for name in new._flat_weights_names]
        new._flat_weight_refs = [None if w is None else weakref.ref(w) for w in new._flat_weights]
    new._replaced = f"{stock.__module__.removesuffix('.modules.rnn')}.{stock.__name__}"
    gates: dict[str, Any] = {"tau": None, "noise_probability": 0.2, "hard_eval": False}
    gates |= {k: v for k, v in options.items() if k not in _LAYER_OPTIONS}
    if isinstance(new, LSTM):
        layer: dict[str, Any] = {"weight_dropout": 0.0, "variational_dropout": 0.0, "recompute": False}
        layer |= {k: v for k, v in options.items() if k in _LAYER_OPTIONS}
        new._set_options(forget_bias=None, learnable_state=False, **gates, **layer)
    else:
        new._set_gates(**gates)
        new.forget_bias, new.learnable_state = None, False
    return new  # type: ignore[no-any-return]

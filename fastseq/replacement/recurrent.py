"""The LSTMs of ``torch.nn``: which of them can be swapped, and the swap."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fastseq.nn import LSTM, LSTMCell

_OURS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
GATE_OPTIONS = ("tau", "noise_probability", "hard_eval")
LAYER_OPTIONS = ("weight_dropout", "variational_dropout", "recompute")  # those that a cell does not have


def known(module: nn.Module) -> str | None:
    """The name of the class of ``torch.nn`` that ``module`` is or inherits from, if there is one of ours for it."""
    return next((f"torch.nn.{stock.__name__}" for stock in _OURS if isinstance(module, stock)), None)


def why_not(module: nn.Module) -> str | None:
    """Why this instance cannot be swapped, or None."""
    kind, stock = type(module), _stock(module)
    if kind is not stock and not (parametrize.is_parametrized(module) and kind.__bases__ == (stock,)):
        return f"{kind.__module__}.{kind.__qualname__} is a subclass of {stock.__name__} and may do more"
    strange = next((p.dtype for p in module.parameters() if not p.is_floating_point()), None)
    return None if strange is None else f"{strange} is not supported"


def swap(module: nn.Module, options: dict[str, Any]) -> list[tuple[nn.Module, nn.Module]]:
    """Ours with the state of ``module`` beside it: the same parameters, hooks and parametrizations."""
    stock = _stock(module)
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
    gates: dict[str, Any] = {"tau": None, "noise_probability": 0.2, "hard_eval": False}
    gates |= {k: v for k, v in options.items() if k not in LAYER_OPTIONS}
    if isinstance(new, LSTM):
        layer: dict[str, Any] = {"weight_dropout": 0.0, "variational_dropout": 0.0, "recompute": False}
        layer |= {k: v for k, v in options.items() if k in LAYER_OPTIONS}
        new._set_options(forget_bias=None, learnable_state=False, **gates, **layer)
    else:
        new._set_gates(**gates)
        new.forget_bias, new.learnable_state = None, False
    return [(new, module)]


def _stock(module: nn.Module) -> type[nn.Module]:
    return next(stock for stock in _OURS if isinstance(module, stock))

"""What the optimizer of a model with learnable codebooks needs: a rate of their own, and moments that can be reset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import _check

# what the state of torch's optimizers is before the first step; with another state it is deleted
_START = dict.fromkeys(
    ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta"), 0.0
) | {"mu_product": 1.0}


def codebook_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are codes: those of the modules with a method ``set_codes`` themselves, each once."""
    seen: set[int] = set()
    for module in model.modules():
        if callable(getattr(module, "set_codes", None)):
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter


def codebook_parameter_groups(
    model: nn.Module, lr: float | Tensor, multiplier: float = 10.0, **options: Any
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: codes learn at ``multiplier`` times the rate of the rest.

    A schedule that multiplies rates keeps the ratio; give one that sets them (``OneCycleLR``, ``CyclicLR``) a list.
    Lancucki et al. 2020 ("Robust training of vector quantized bottleneck models") use 10.

    Args:
        model: with at least one learnable codebook.
        lr: of all other parameters, > 0.
        multiplier: > 0.
        options: entries of both groups, such as ``weight_decay``.

    Returns:
        [the rest, the codes], for ``torch.optim.Adam(groups)``; parameters without requires_grad are left out.

    Raises:
        ArgumentError: when the model has no learnable codebook (one kept by moving averages has no rate), or for a
            number that is not finite and > 0.
    """
    f = "codebook_parameter_groups"
    _check.positive(f, "lr", float(lr))
    _check.positive(f, "multiplier", multiplier)
    codes = [p for p in codebook_parameters(model) if p.requires_grad]
    if not codes:
        _check.fail(f, "model", "one with a learnable codebook (learnable_codebook=True)", "one without")
    known = {id(p) for p in codes}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [{"params": rest, "lr": lr, **options}, {"params": codes, "lr": multiplier * lr, **options}]


@torch.no_grad()
def reset_codebook_moments(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Make the optimizer forget the codes of ``module``, as if it had not stepped them yet.

    To be called when codes were overwritten: their moments belong to the codes that were there before. State of known
    names is reset in place, which captured graphs see; any other is deleted, to be made anew by the next step.

    Args:
        optimizer: of ``torch.optim``; parameters that it does not hold are passed over.
        module: a model, layer or codebook.
    """
    for parameter in codebook_parameters(module):
        state = optimizer.state.get(parameter)
        if not state:
            continue
        if not state.keys() <= _START.keys():
            del optimizer.state[parameter]
            continue
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.fill_(_START[name])
            else:
                state[name] = type(value)(_START[name])

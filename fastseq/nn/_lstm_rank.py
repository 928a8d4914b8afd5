"""Recurrent weights of ``LSTM`` as factors: their parameters, initial values, and the way from dense ones and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastseq import _check, functional

Ranks = tuple[int, int, int, int]  # of each gate, -1 for a full one

GATES = "ifgo"
_logger = logging.getLogger("fastseq")


def check_rank(rank: Any, hidden_size: int) -> None:
    """``rank`` is None, a whole number in 1 .. hidden_size, or one for each of some gates."""
    whole = f"a whole number in 1 .. hidden_size = {hidden_size}"
    if isinstance(rank, Mapping) and (not rank or set(rank) - set(GATES)):
        _check.fail("LSTM", "rank", f"{whole}, or one for each of some gates i, f, g, o", repr(rank))
    for value in rank.values() if isinstance(rank, Mapping) else () if rank is None else (rank,):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= hidden_size:
            _check.fail("LSTM", "rank", f"{whole}, or one for each of some gates i, f, g, o", repr(rank))


def check_others(rank: Any, **options: Any) -> None:
    """What needs a recurrent matrix, or its own kernel, is not there beside factors."""
    for name, value in options.items():
        if rank is not None and value:
            _check.fail("LSTM", name, f"{value.__class__(0)} beside rank={rank}", value)


def ranks_of(rank: int | Mapping[str, int]) -> Ranks:
    """The rank of each gate, -1 for a full one."""
    i, f, g, o = (rank.get(gate, -1) if isinstance(rank, Mapping) else rank for gate in GATES)
    return i, f, g, o


def factor_names(suffix: str) -> tuple[str, str]:
    return f"weight_hh_up{suffix}", f"weight_hh_down{suffix}"


def use_factors(module: nn.RNNBase, ranks: Ranks) -> None:
    """Put factors, not yet initialised, where the recurrent matrices of a new module are."""
    H, full, values = module.hidden_size, ranks.count(-1), sum(_lows(ranks))
    parameters = dict(module._parameters)
    module._parameters.clear()
    for names in module._all_weights:
        suffix = names[0].removeprefix("weight_ih")
        like: Any = parameters[names[1]]
        shapes = dict(zip(factor_names(suffix), ((H, values), (values, H)), strict=True))
        shapes = ({names[1]: (full * H, H)} if full else {}) | shapes
        for name in (names[0], *shapes, *names[2:]):
            value = nn.Parameter(like.detach().new_empty(shapes[name])) if name in shapes else parameters[name]
            module.register_parameter(name, value)
        names[1:2] = list(shapes)
    module._flat_weights_names = [name for names in module._all_weights for name in names]
    module._init_flat_weights()


def draw_up(up: Tensor, ranks: Ranks) -> None:
    """Uniform, so that products with factors ``down`` have the variance that a recurrent matrix is drawn with."""
    lows = _lows(ranks)
    for part, rank in zip(up.detach().split(lows, 1), lows, strict=True):
        nn.init.uniform_(part, -math.sqrt(3 / rank), math.sqrt(3 / rank))


def _lows(ranks: Ranks) -> list[int]:
    return [r for r in ranks if r > 0]


def factor_state(state: dict[str, Any], prefix: str, suffixes: Sequence[str], ranks: Ranks, H: int) -> None:
    """Replace dense recurrent matrices in a state_dict by what a module with factors holds, and say how near it is."""
    error = size = 0.0
    for suffix in suffixes:
        key = f"{prefix}weight_hh{suffix}"
        names = [f"{prefix}{name}" for name in factor_names(suffix)]
        weight = state.get(key)
        if not isinstance(weight, Tensor) or weight.shape != (4 * H, H) or any(name in state for name in names):
            continue
        full, factors = functional.best_factors(weight.detach(), ranks)
        state |= dict(zip(names, factors[:2], strict=True))
        state[key] = full
        if not len(full):
            del state[key]
        if not weight.is_meta:
            near = functional.dense_weight(full, factors)
            error += float((near - weight).double().square().sum())
            size += float(weight.double().square().sum())
    if size:
        _logger.warning("LSTM: dense recurrent weights became factors, relative error %.3g", math.sqrt(error / size))

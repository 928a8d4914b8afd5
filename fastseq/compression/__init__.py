"""``compress(model)``: a copy of a trained model whose LSTM matrices take fewer bytes, and a report of the cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastseq import _check
from fastseq.compression.forms import GATES, Form, Kept, keep
from fastseq.compression.measure import outputs, step_errors, times
from fastseq.compression.moments import Moments, moments
from fastseq.compression.report import Matrix, Report
from fastseq.nn import LSTM, MIMOLSTM, CompressedLSTM, LSTMCell, StoredMatrix
from fastseq.nn._matrices import matrices_of
from fastseq.reference import Matrix as Gates

__all__ = ["Compressed", "Form", "Matrix", "Report", "compress"]

Rank = int | float
Place = tuple[int, int]
WEIGHTS = ("int8", "int4", "bfloat16")
MATRICES = ("weight_ih", "weight_hh", "weight_hr")
Storage = str | Mapping[str, str]  # of all gates, or by gate
NEAREST = ("weights", "outputs")


class Compressed(NamedTuple):
    """What ``compress`` returns."""

    model: nn.Module
    report: Report


def compress(
    model: nn.Module,
    weights: Storage | Mapping[str, Storage] | None = None,
    rank: Rank | Mapping[str, Rank] | None = None,
    *,
    step: float | None = None,
    clip: float | None = None,
    gates: str = "if",
    group: int | None = None,
    nearest: str = "weights",
    trainable: bool = False,
    inputs: Any = None,
    metric: Callable[[nn.Module], float] | None = None,
) -> Compressed:
    """A copy of ``model`` with compressed matrices in its LSTMs, and what it saves and costs; ``model`` stays as it is.

    ``torch.nn.LSTM`` and ours become ``fastseq.nn.CompressedLSTM``, which is called in the same way, keeps the matrices
    compressed, and computes with them: where they are integers, inputs and states are rounded to 8 bits too. Cells,
    subclasses, and all that is rounded with ``step``, keep their class and hold in their dtype the values that
    compressed matrices stand for. Factors of an ``LSTM`` with ``rank`` stay factors, stored as ``weights`` says. A
    folded ``MIMOLSTM`` becomes what an ``LSTM`` with its folded weights does, for the ensemble mode alone.

    Rounding with ``step`` and ``clip``, and a ``rank``, are what G2-LSTM (Li et al., ICML 2018) does to models that
    were trained as usual: by default to the input and forget gates alone, to each matrix of each gate on its own.
    Biases stay.

    Args:
        model: holds ``torch.nn.LSTM``, ``LSTMCell``, or ours. What else it holds stays, and is listed in the report.
        weights: how all four gates (and projections) are stored: "int8" and "int4" with a scale for each row, or each
            ``group`` neighbours in it; "bfloat16"; or one of these for each of some gates, {"i": "int4", "g": "int8"};
            or one of all that for each of some matrices, {"weight_ih": "bfloat16", "weight_hh": {"o": "int8"}}, of
            every layer; a projection ("weight_hr") has no gates. None, and what is not named: as it is. A tied matrix
            is stored as where it comes first. With a rank the factors are stored so, and all lower factors of a matrix
            in the most bits that a gate with a rank asks for.
        rank: of ``gates``: a whole number, or a share of the sum of squares in (0, 1) that the factors must keep; or
            one of these for each gate, {"i": 16, "f": 16, "g": 0.9}. What factors would not make smaller has none.
        step: values of ``gates`` become multiples of it; clip: and are moved into -clip .. clip. Not with others.
        gates: letters of i, f, g, o, for ``step`` and for one ``rank``; ranks by gate name theirs.
        group: a multiple of 8.
        nearest: factors are nearest to the "weights" in the sum of squares, or to their "outputs" for what the LSTMs
            meet in a call with ``inputs``.
        trainable: keep the weights before rounding too, as parameters, to train them on with the rounding in place.
        inputs: for a call of the model, a tensor or a tuple: then the report has the error of each LSTM's output at
            the first, middle and last step, and milliseconds.
        metric: a number for a model, such as its loss; called with both.

    Returns:
        ``Compressed``: model, report.

    Raises:
        ArgumentError: naming the argument, or the matrix that cannot be compressed.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress: model should be of type nn.Module, got: {type(model).__name__}")
    forms = _forms(weights, rank, step, clip, gates, group)
    form = forms["weight_hh"]  # they differ in weights alone
    _check.one_of("compress", "nearest", nearest, NEAREST)
    if nearest == "outputs" and (inputs is None or not form.ranks):
        _check.fail("compress", "nearest", "'weights' without a rank and inputs", repr(nearest))
    if trainable and form.step is not None:
        _check.fail("compress", "trainable", "False beside step", trainable)
    model = _with_plain(model)
    mine = recurrent(model)
    if not mine:
        _check.fail("compress", "model", "a module with an LSTM or LSTMCell inside", type(model).__name__)
    for name, module in mine.items():
        _check_module(name, module, form)
    given = inputs if type(inputs) is tuple else (inputs,)  # a PackedSequence is a tuple too
    met = moments(model, mine, given) if nearest == "outputs" else {}
    small, matrices = _compressed(copy.deepcopy(model), forms, trainable, met)
    return Compressed(small, _report(model, small, matrices, inputs, metric))


def _compressed(
    small: nn.Module, forms: Mapping[str, Form], trainable: bool, met: Mapping[str, Moments]
) -> tuple[nn.Module, list[Matrix]]:
    """The copy changed, and what was done."""
    told: list[Matrix] = []
    kept: dict[Place, list[Kept]] = {}  # a tied matrix is compressed once
    stored: dict[tuple[Place, bool], StoredMatrix] = {}
    for name, module in recurrent(small).items():
        parts = {}
        for parameter, (matrix, K) in matrices_of(module).items():
            seen = (matrix[0].rows.values.data_ptr(), K)  # an empty one has no address
            if seen not in kept:
                full = f"{name}.{parameter}" if name else parameter
                moment = met[name].get(parameter) if name in met else None
                kept[seen], rows = _compress_matrix(full, matrix, forms[parameter[:9]], moment)
                told += rows
            parts[parameter] = (K, seen)
        if forms["weight_hh"].step is not None or type(module) not in (nn.LSTM, LSTM):
            for parameter, (_, seen) in parts.items():
                getattr(module, parameter).data.copy_(torch.cat([k.values for k in kept[seen]]))
            continue
        found = {}
        for parameter, (K, seen) in parts.items():
            bounded = parameter.startswith("weight_hr") or (parameter.startswith("weight_hh") and not module.proj_size)
            if (seen, bounded) not in stored:
                stored[seen, bounded] = _stored(kept[seen], K, bounded, trainable)
            found[parameter] = stored[seen, bounded]
        small = _replaced(small, module, CompressedLSTM(module, found))  # type: ignore[arg-type]
    return small, told


def _stored(kept: list[Kept], K: int, bounded: bool, trainable: bool) -> StoredMatrix:
    masters = [m.clone() for k in kept for m in k.masters] if trainable else None
    return StoredMatrix([k.gate for k in kept if k.gate is not None], K, bounded, masters)


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """``model`` with ``new`` wherever it has ``old``."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return new if model is old else model


def recurrent(model: nn.Module) -> dict[str, nn.Module]:
    """The LSTMs and cells in a model, by name; one that is used in several places once."""
    kinds = (nn.LSTM, nn.LSTMCell, LSTM, LSTMCell)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def _with_plain(model: nn.Module) -> nn.Module:
    """``model``, or a copy that has an ``LSTM`` of its folded weights for each ``MIMOLSTM``."""
    plain: dict[int, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, MIMOLSTM):
            if not module.is_folded:
                told = f"model.{name}" if name else "model"
                _check.fail("compress", told, "folded (with fastseq.nn.fold)", "a MIMOLSTM with weights of each slot")
            plain[id(module)] = module.to_plain()
    return copy.deepcopy(model, plain) if plain else model


def _check_module(name: str, module: nn.Module, form: Form) -> None:
    told = f"model.{name}" if name else "model"
    if isinstance(module, CompressedLSTM):
        _check.fail("compress", told, "not compressed yet", "a CompressedLSTM")
    if parametrize.is_parametrized(module):
        _check.fail("compress", told, "without parametrizations (remove them first)", "a parametrized module")
    if getattr(module, "rank", None) is not None and (form.step is not None or type(module) is not LSTM):
        _check.fail("compress", told, "without rank (load its dense_state_dict() into one)", "one that holds factors")
    for parameter, value in module.named_parameters(recurse=False):
        if not value.is_floating_point():
            _check.fail("compress", f"{told}.{parameter}", "of a floating-point dtype", value.dtype)
        if not bool(value.isfinite().all()):
            _check.fail("compress", f"{told}.{parameter}", "finite", "a matrix with NaN or infinity")


def _forms(weights: Any, rank: Any, step: Any, clip: Any, gates: Any, group: Any) -> dict[str, Form]:
    """The checked options, by matrix."""
    if not isinstance(gates, str) or not gates or len(set(gates)) < len(gates) or set(gates) - set(GATES):
        _check.fail("compress", "gates", "different letters of 'ifgo'", repr(gates))
    storages = _storages(weights)
    for name, value in (("step", step), ("clip", clip)):
        if value is not None:
            _check.positive("compress", name, value)
    if step is not None and (weights is not None or rank is not None):
        _check.fail("compress", "step", "None beside weights or rank", step)
    if clip is not None and (step is None or clip < step):
        _check.fail("compress", "clip", "None, or at least step" if step else "None without step", clip)
    integers = {"int8", "int4"} & {storage for own in storages.values() for storage in own.values()}
    if group is not None and (not integers or not _is_whole(group) or group % 8):
        _check.fail("compress", "group", "None, or a multiple of 8 with weights 'int8' or 'int4'", repr(group))
    if weights is None and rank is None and step is None:
        _check.fail("compress", "weights", "given, or rank, or step", "none of them")
    ranks = dict(rank) if isinstance(rank, Mapping) else {} if rank is None else dict.fromkeys(gates, rank)
    if rank is not None and (not ranks or set(ranks) - set(GATES)):
        _check.fail("compress", "rank", "a number, or one for each of some gates i, f, g, o", repr(rank))
    for value in ranks.values():
        if not (_is_whole(value) or (isinstance(value, float) and 0 < value < 1)):
            _check.fail("compress", "rank", "a whole number > 0, or a share of the squares in (0, 1)", repr(value))
    return {m: Form(own, ranks, step, clip, gates, group, frozenset(ranks)) for m, own in storages.items()}


def _storages(weights: Any) -> dict[str, dict[str, str]]:
    """By matrix, and then by gate, that of projections under ""."""
    if weights is None:
        return dict.fromkeys(MATRICES, {})
    if not isinstance(weights, Mapping) or not set(weights) & set(MATRICES):
        return dict.fromkeys(MATRICES, _storages_of("weights", weights, GATES))
    if set(weights) - set(MATRICES):
        _check.fail("compress", "weights", f"for each of some matrices {', '.join(MATRICES)}", repr(weights))
    gated = {m: "" if m == "weight_hr" else GATES for m in MATRICES}
    return {m: _storages_of(f"weights[{m!r}]", weights[m], gated[m]) if m in weights else {} for m in MATRICES}


def _storages_of(name: str, weights: Any, gates: str) -> dict[str, str]:
    if not isinstance(weights, Mapping) or not gates:
        _check.one_of("compress", name, weights, WEIGHTS)
        return dict.fromkeys((*GATES, ""), weights)
    if not weights or set(weights) - set(gates):
        _check.fail("compress", name, "a form, or one for each of some gates i, f, g, o", repr(weights))
    for gate, storage in weights.items():
        _check.one_of("compress", f"{name}[{gate!r}]", storage, WEIGHTS)
    return dict(weights)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _compress_matrix(name: str, matrix: Gates, form: Form, moment: Tensor | None) -> tuple[list[Kept], list[Matrix]]:
    """A matrix gate by gate, or a projection as a whole; and the lines of the report."""
    kept, rows = [], []
    letters = GATES if len(matrix) == 4 else ""
    have = {letter for letter, gate in zip(letters, matrix, strict=False) if gate.down is not None}
    form = form._replace(factored=form.factored | have)
    for letter, gate in zip(letters or [""], matrix, strict=True):
        found = keep(gate, letter, form, moment)
        kept.append(found)
        if found.how:
            before = [part.values for part in gate if part is not None]
            size = sum(value.numel() * value.element_size() for value in before)
            true = before[0] if gate.down is None else before[0].double() @ before[1].double()
            rows.append(Matrix(name, letter, found.how, size, found.size, _snr(true, found.values.to(before[0].dtype))))
    return kept, rows


def _snr(true: Tensor, found: Tensor) -> float:
    """Decibels; infinite where nothing changed."""
    noise = (found.double() - true.double()).square().sum()
    return float(10 * torch.log10(true.double().square().sum() / noise)) if noise > 0 else float("inf")


def _report(
    model: nn.Module, small: nn.Module, matrices: list[Matrix], inputs: Any, metric: Callable[[nn.Module], float] | None
) -> Report:
    inside = {id(p) for m in recurrent(model).values() for p in m.parameters()}
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
    names = [
        f"{name}: {type(m).__name__}"
        for name, m in model.named_modules()
        if any(id(p) not in inside for p in m.parameters(recurse=False))
    ]
    values = None if metric is None else (float(metric(model)), float(metric(small)))
    if inputs is None:
        return Report(matrices, [], values, None, names, rest)
    given = inputs if type(inputs) is tuple else (inputs,)  # a PackedSequence is a tuple too
    found = [outputs(m, recurrent(m), given) for m in (model, small)]
    return Report(matrices, step_errors(*found), values, times((model, small), given), names, rest)

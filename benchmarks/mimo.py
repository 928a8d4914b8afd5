"""MIMO: who computes losses and statistics of slots, first layers, training steps and predictions, and the gate."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness, mimo_plain
from benchmarks.mimo_case import CLASSES, ROWS, Case, Provider, Work, inputs

NAME = "mimo"
PACKAGES = ("torch-uncertainty",)
OURS = ("fastseq",)  # the others are rivals, some of them by our own layers
BINS = 15
PROVIDERS = (*OURS, "gathered", "plain", "tiled", "ensemble", "eager", "compile", "stock")
STATS = ("probability", "prediction", "confidence", "members", "disagreement", "nll", "brier", "histogram", "totals")


def _stats(call: Callable[[Tensor, Tensor], Any], case: Case) -> Work:
    given = inputs(case)

    def outputs() -> dict[str, Tensor]:
        return {name: value.float() for name, value in zip(STATS, call(given.x, given.labels), strict=True)}

    return Work(lambda: call(given.x, given.labels), outputs)


def _nll(call: Callable[[Tensor, Tensor], Tensor], case: Case) -> Work:
    """Forward and backward."""
    given = inputs(case)
    logits = given.x.clone().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        logits.grad = None
        loss = call(logits, given.labels)
        loss.backward()
        assert logits.grad is not None
        return loss.detach(), logits.grad

    return Work(run, lambda: dict(zip(("loss", "dlogits"), run(), strict=True)))


def _steps(case: Case, leaves: list[nn.Parameter], call: Callable[[], Tensor]) -> Work:
    """Forward and backward of a layer with one output and the gradients of its parameters."""
    dy = inputs(case).dy

    def run() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        y = call()
        y.backward(dy)
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    names = ["y", "dweight_ih", "dbias", "dweight_hh"]
    return Work(run, lambda: dict(zip(names, run(), strict=False)))


def _project(make: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], case: Case) -> Work:
    given = inputs(case)
    weight, bias = (nn.Parameter(given.weights[name].clone()) for name in ("weight_ih", "bias"))
    return _steps(case, [weight, bias], lambda: make(given.x, weight, bias, given.index))


def _gathered(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    from fastseq import functional
    from fastseq.ops.gemm import gemm

    rows = functional.mimo_gather(x, index, batch_dim=1)
    return gemm(rows.flatten(0, 1), weight, bias, False, True).view(*rows.shape[:2], -1)


def _projected(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    from fastseq import functional

    return functional.mimo_project(x, weight, bias, index, batch_dim=1)


def _eager_project(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    return F.linear(mimo_plain.rows(x, index), weight, bias)


def _filled(lstm: nn.Module, case: Case, width: int) -> Any:
    """An LSTM with the weights of the case; of the first ``width`` columns where it is a narrow one."""
    given = inputs(case).weights
    with torch.no_grad():
        for name, value in (("weight_ih", given["weight_ih"][:, :width]), ("weight_hh", given["weight_hh"])):
            getattr(lstm, f"{name}_l0").copy_(value)
        lstm.bias_ih_l0.copy_(given["bias"])
        lstm.bias_hh_l0.zero_()
    return lstm.to(case.device)


def _train(name: str, case: Case) -> Work:
    import fastseq

    given, wide = inputs(case), case.M * case.C
    if name == "plain":  # as many rows of one example each
        lstm, x = _filled(fastseq.nn.LSTM(case.C, case.H), case, case.C), given.x.repeat(1, case.R, 1)
        return _steps(case, _parameters(lstm), lambda: lstm(x)[0])
    if name == "fastseq":
        lstm = _filled(fastseq.nn.MIMOLSTM(case.C, case.H, M=case.M), case, wide)
        return _steps(case, _parameters(lstm), lambda: lstm(given.x, index=given.index)[0])
    lstm = _filled((fastseq.nn.LSTM if name == "tiled" else nn.LSTM)(wide, case.H), case, wide)
    return _steps(case, _parameters(lstm), lambda: lstm(mimo_plain.rows(given.x, given.index))[0])


def _parameters(lstm: Any) -> list[nn.Parameter]:
    return [lstm.weight_ih_l0, lstm.bias_ih_l0, lstm.weight_hh_l0]


def _infer(name: str, case: Case) -> Work:
    """Logits [B, M, K] after the last step; of the plain model [B, 1, K]."""
    import fastseq

    given, wide, M = inputs(case), case.M * case.C, case.M
    heads = given.weights["head"]
    if name == "fastseq":
        lstm = _filled(fastseq.nn.MIMOLSTM(case.C, case.H, M=M), case, wide).eval()
        lstm.fold()
    elif name in ("tiled", "eager"):
        lstm = _filled((fastseq.nn.LSTM if name == "tiled" else nn.LSTM)(wide, case.H), case, wide)
    else:
        lstm = _filled((nn.LSTM if name == "stock" else fastseq.nn.LSTM)(case.C, case.H), case, case.C)
        heads = heads[:CLASSES] if name == "plain" else heads
    count = M if name in ("ensemble", "stock") else 1  # of models, each with a head
    models = [(copy.deepcopy(lstm), part) for part in heads.chunk(count)]

    @torch.no_grad()
    def run() -> Tensor:
        x = given.x.repeat(1, 1, M) if name in ("tiled", "eager") else given.x
        logits = [F.linear(member(x)[0][-1], part) for member, part in models]
        return torch.stack(logits, 1) if count > 1 else logits[0].unflatten(1, (-1, CLASSES))

    return Work(run, lambda: {"logits": run()})


def setup(case: Case, provider: Provider, threads: int) -> Work:
    """The callable of one provider on one case.

    Raises:
        ModuleNotFoundError: when the provider's package is not installed.
    """
    from fastseq import functional

    name = provider.name
    if case.mode == "stats":
        ours = functools.partial(functional.ensemble_stats, bins=BINS)
        return _stats({"fastseq": ours, "eager": mimo_plain.stats}.get(name) or torch.compile(mimo_plain.stats), case)
    if case.mode == "nll":
        calls = {"fastseq": functional.mimo_nll, "eager": mimo_plain.nll}
        return _nll(calls.get(name) or torch.compile(mimo_plain.nll), case)
    if case.mode == "project":
        return _project({"fastseq": _projected, "gathered": _gathered, "eager": _eager_project}[name], case)
    return _train(name, case) if case.mode == "train" else _infer(name, case)


def _defined(case: Case, dtype: torch.dtype, slots: int) -> dict[str, Tensor]:
    """By the definitions, in this dtype. slots: M, or 1 of a plain model."""
    from fastseq import reference

    given = inputs(case)
    x = given.x.to(dtype)
    if case.mode == "stats":
        found = reference.ensemble_stats(x, given.labels, BINS)
        return {name: value.to(dtype) for name, value in zip(STATS, found, strict=True)}
    if case.mode == "nll":
        logits = x.clone().requires_grad_()
        loss = reference.mimo_nll(logits, given.labels)[0]
        return {"loss": loss.detach(), "dlogits": torch.autograd.grad(loss, logits)[0]}
    weights = {name: value.to(dtype) for name, value in given.weights.items()}
    wide = weights["weight_ih"][:, : slots * case.C]
    if case.mode == "infer":
        folded = wide.unflatten(1, (slots, case.C)).sum(1)
        h = _recurrence(x @ folded.mT + weights["bias"], weights["weight_hh"])
        return {"logits": (h[-1] @ weights["head"][: slots * CLASSES].mT).unflatten(1, (-1, CLASSES))}
    leaves = [v.clone().requires_grad_() for v in (wide, weights["bias"], weights["weight_hh"])]
    rows = mimo_plain.rows(x, given.index) if slots > 1 else x.repeat(1, case.R, 1)
    y = rows @ leaves[0].mT + leaves[1]
    leaves = leaves[:2] if case.mode == "project" else leaves
    y = y if case.mode == "project" else _recurrence(y, leaves[2])
    grads = torch.autograd.grad(y, leaves, given.dy.to(dtype))
    return dict(zip(("y", "dweight_ih", "dbias", "dweight_hh"), (y.detach(), *grads), strict=False))


def _recurrence(gates: Tensor, weight_hh: Tensor) -> Tensor:
    from fastseq import reference

    zeros = gates.new_zeros(gates.shape[1], weight_hh.shape[1])
    return reference.lstm(gates, weight_hh, zeros, zeros)[0]


@functools.lru_cache(maxsize=4)
def _budgets(case: Case, slots: int) -> Mapping[str, harness.Budget]:
    truth, naive = (_defined(case, dtype, slots) for dtype in (torch.float64, torch.float32))
    return {name: harness.Budget(v, harness.relative_error(naive[name], v)) for name, v in truth.items()}


def judge(case: Case, provider: Provider, work: Work) -> tuple[str, dict[str, Any]]:
    """The verdict of the gate. Members of an ensemble share their weights here: its output is the plain model's."""
    alone = provider.name in ("plain", "ensemble", "stock") and case.mode not in ROWS
    budgets = _budgets(case, 1 if alone else case.M)
    got = dict(work.outputs())
    if alone and case.mode == "infer":
        got["logits"] = got["logits"][:, :1]
    gradients = frozenset(name for name in budgets if name.startswith("d") and name != "disagreement")
    return harness.gate(got, budgets, gradients), {}


def describe(provider: Provider) -> dict[str, Any]:
    """What a row says about its provider."""
    return {"provider": f"fastseq/{backend()}" if provider.name == "fastseq" else provider.name}


def every(case: Case, provider: Provider) -> int:
    return 1


def flops(case: Case, provider: Provider) -> int:
    return case.flops


def reads(case: Case, provider: Provider) -> harness.Reads:
    """Logits, or weights and input, once."""
    size = case.N * case.M * case.K if case.mode in ROWS else 4 * case.H * (case.M * case.C + case.H)
    return harness.Reads(4 * size, 4 * size)


def backend() -> str:
    from fastseq.ops import ensemble_stats

    return harness.backend("ensemble_stats", ensemble_stats.BACKENDS["ensemble_stats"])

"""The gate of vector quantization: indices against float64, and what follows from them against the definition.

An index cannot be nearly right, but where two codes are almost equally near rounding decides. So a row may take a code
whose score (c*c/2 - x*c, in float64) exceeds the smallest by twice the largest error that plain float32 scores of the
case have, plus four roundings of the largest score: the rule of the tests. All else, quantized rows, losses, gradients
and moving averages, is judged for the indices that the provider found.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import vq_plain
from benchmarks.harness import Budget, gate, relative_error
from benchmarks.vq_case import Case, Inputs, inputs

DECAY, EPS = 0.99, 1e-5  # of the moving averages; counts begin at 1
GRADIENTS = frozenset({"dx", "dweight_in", "dbias_in", "dweight_out", "dbias_out"})
_SCORES = 1 << 22  # of rows by codes that are formed at a time


class Nearest(NamedTuple):
    """The best codes of the rows in float64."""

    index: Tensor  # [N]
    score: Tensor  # [N]
    budget: float  # by how much another code's score may exceed that


def judge(case: Case, rotation: bool, got: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The verdict, and in how many rows (of all levels) the index is not that of float64.

    Args:
        got: index [N, M], and in the modes of layers what ``_defined`` returns.
    """
    index = got["index"]
    if index.shape != (case.N, case.M):
        return f"index: shape {list(index.shape)}, expected {[case.N, case.M]}", {}
    if index.is_floating_point() or not bool(((index >= 0) & (index < case.K)).all()):
        return f"index: {index.dtype} in {index.min()}..{index.max()}, expected integers in 0..{case.K - 1}", {}
    index = index.long()
    given = inputs(case)
    rest = {name: value for name, value in got.items() if name != "index"}
    true, plain = (_defined(case, rotation, index, dtype) for dtype in (torch.float64, torch.float32))
    others = 0
    for m in range(case.M):
        near = _of_case(case) if case.M == 1 else nearest(true.rows[m], plain.rows[m], given.codebooks[m])
        codes = given.codebooks[m].double()[index[:, m]]
        excess = codes.square().sum(1) / 2 - (true.rows[m] * codes).sum(1) - near.score
        others += int((index[:, m] != near.index).sum())
        if not float(excess.max()) <= near.budget:
            worst = f"the score of row {int(excess.argmax())} exceeds the smallest by {float(excess.max()):.1e}"
            return f"index: {worst}, budget {near.budget:.1e}", {"not_nearest": others}
    budgets = {n: Budget(true.outputs[n], relative_error(plain.outputs[n], true.outputs[n])) for n in rest}
    return gate(rest, budgets, GRADIENTS), {"not_nearest": others}


def nearest(rows: Tensor, plain_rows: Tensor, codebook: Tensor) -> Nearest:
    """Rows [N, D] in float64 and in float32, codebook [K, D] in float32."""
    n = max(1, _SCORES // len(codebook))
    index, score, error, largest = [], [], 0.0, 0.0
    for wide, plain in zip(rows.split(n), plain_rows.split(n), strict=True):
        scores = _scores(wide, codebook.double())
        found = scores.min(1)
        index.append(found.indices)
        score.append(found.values)
        largest = max(largest, float(scores.abs().max()))
        error = max(error, float((scores - _scores(plain, codebook)).abs().max()))
    return Nearest(torch.cat(index), torch.cat(score), 2 * error + 4 * torch.finfo(torch.float32).eps * largest)


def _scores(rows: Tensor, codebook: Tensor) -> Tensor:
    return codebook.square().sum(1) / 2 - rows @ codebook.mT


def _of_case(case: Case) -> Nearest:
    return _of_shape(case._replace(mode="words" if case.mode == "words" else "lookup"))


@functools.cache
def _of_shape(case: Case) -> Nearest:
    given = inputs(case)
    return nearest(given.x.double(), given.x, given.codebooks[0])


class Defined(NamedTuple):
    rows: list[Tensor]  # [N, D], what each level quantizes
    outputs: dict[str, Tensor]  # by name


def _defined(case: Case, rotation: bool, index: Tensor, dtype: torch.dtype) -> Defined:
    """What follows from the indices [N, M]: by ``fastseq.reference`` in float64, in float32 by plain torch.

    The plain forms of the straight-through and of the rotated codes round, as they do in a layer; the reference gives
    the codes themselves.
    """
    from fastseq import reference

    given = inputs(case)
    form = getattr(reference, "vq_rotation" if rotation else "vq_straight_through")
    if dtype == torch.float32:
        form = lambda x, codes, _: (vq_plain.rotated if rotation else vq_plain.straight_through)(x, codes)  # noqa: E731
    x = given.x.to(dtype)[None].requires_grad_(case.trains)
    weights = _weights(given, dtype, case.trains)
    rest = F.linear(x, weights["weight_in"], weights["bias_in"]) if weights else x
    rows, losses, total = [], [], torch.zeros_like(rest)
    for codebook, place in zip(given.codebooks.to(dtype), index.t()[:, None], strict=True):
        rows.append(rest.detach()[0])
        codes = reference.vq_gather(codebook[None], place)
        losses.append((rest - codes).square().mean())
        chosen = form(rest, codes, place) if case.trains else codes
        total = total + chosen
        rest = rest - chosen.detach()
    quantized = F.linear(total, weights["weight_out"], weights["bias_out"]) if weights else total
    outputs = {"quantized": quantized[0]}
    if case.trains:
        loss = torch.stack(losses)
        torch.autograd.backward((quantized, loss), (given.dy.to(dtype)[None], torch.ones_like(loss)))
        outputs |= {"loss": loss, "dx": x.grad[0], **{f"d{name}": w.grad for name, w in weights.items()}}
        outputs |= _followed(given.codebooks.to(dtype), rows, index)
    return Defined(rows, {name: value.detach() for name, value in outputs.items()})


def _weights(given: Inputs, dtype: torch.dtype, trains: bool) -> dict[str, Tensor]:
    layers = zip(("in", "out"), given.project or (), strict=False)
    named = {f"{name}_{end}": p for end, layer in layers for name, p in layer.named_parameters()}
    return {name: p.detach().to(dtype).requires_grad_(trains) for name, p in named.items()}


def _followed(codebooks: Tensor, rows: list[Tensor], index: Tensor) -> dict[str, Tensor]:
    """Counts [M, K] and codes [M, K, D] after one step of the moving averages (van den Oord et al. 2017, A.1)."""
    from fastseq import reference

    K = codebooks.shape[1]
    counts, sums = reference.vq_sums(torch.stack(rows), index.t(), K)
    size = torch.ones_like(counts).lerp(counts, 1 - DECAY)
    total = size.sum(-1, keepdim=True)
    smoothed = (size + EPS) / (total + K * EPS) * total
    return {"cluster_size": size, "codebook": codebooks.lerp(sums, 1 - DECAY) / smoothed[..., None]}

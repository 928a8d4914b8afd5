"""A vector quantizer as layers of a deployed model: what is linear before it, the codes, what is linear after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastseq import _check
from fastseq.nn._exporting import Arrays, array
from fastseq.nn.codebook import Codebook
from fastseq.nn.residual_vq import ResidualVQ
from fastseq.nn.vector_quantize import VectorQuantize


class _Affine(NamedTuple):
    """x to weight @ x + bias, in float64."""

    weight: Tensor
    bias: Tensor


@torch.no_grad()
def vq_state(module: VectorQuantize | ResidualVQ, name: str, last: bool) -> dict[str, Any]:
    """``export_state`` of one module: its indices where it comes ``last``, else what it returns as quantized.

    Batch normalization and the projection in are one linear layer.
    """
    _check_options(name, module)
    levels: list[Any] = list(module.layers) if isinstance(module, ResidualVQ) else [module]
    codebooks = torch.cat([level._codebook.codes() for level in levels]).float()
    L, K, D = codebooks.shape
    layers: list[dict[str, Any]] = []
    tensors: Arrays = {}
    before = _before(module)
    if before is not None:
        _add_linear(layers, tensors, f"{name}.project_in", before.weight.float(), before.bias.float())
    metric, output = "cosine" if levels[0].use_cosine_sim else "euclidean", "codes" if last else "vectors"
    sizes = {"dim": D, "size": K, "levels": L, "metric": metric, "output": output}
    layers.append({"type": "residual_vq", "name": name, **sizes})
    tensors[f"{name}.codebooks"] = array(codebooks)
    after = module.project_out
    if not last and isinstance(after, nn.Linear):
        _add_linear(layers, tensors, f"{name}.project_out", after.weight, after.bias)
    return {"layers": layers, "tensors": tensors}


def _check_options(name: str, module: Any) -> None:
    """Of what has no place in a deployed model."""
    levels: list[Any] = list(module.layers) if isinstance(module, ResidualVQ) else [module]
    wrong = {
        "heads": max(level.heads for level in levels) > 1,
        "layernorm_after_project_in": isinstance(module.project_in, nn.Sequential),
        "affine_param": any(type(level._codebook) is not Codebook for level in levels),
        "implicit_neural_codebook": getattr(module, "implicit_neural_codebook", False),
        "eval_beam_size": (getattr(module, "eval_beam_size", None) or 1) > 1,
        "codebook_size": len({level.codebook_size for level in levels}) > 1,
        "use_cosine_sim": len(levels) > 1 and levels[0].use_cosine_sim,
    }
    for option, there in wrong.items():
        if there:
            got = [level.codebook_size for level in levels] if option == "codebook_size" else "another"
            expected = "the same on all levels" if option == "codebook_size" else "as by default in a deployed model"
            _check.fail("export_state", f"{name}.{option}", expected, got)


def _before(module: Any) -> _Affine | None:
    """What is done to a row before it is compared with codes."""
    at = getattr(module, "batch_norm_at", None)
    steps = [
        _normalization(module.batch_norm) if at == "input" else None,
        _linear(module.project_in) if isinstance(module.project_in, nn.Linear) else None,
        _normalization(module.batch_norm) if at == "codes" else None,
    ]
    return _composed(steps)


def _composed(steps: Sequence[_Affine | None]) -> _Affine | None:
    """One after the other as one."""
    found = None
    for step in steps:
        if step is not None and found is not None:
            found = _Affine(step.weight @ found.weight, step.weight @ found.bias + step.bias)
        else:
            found = step or found
    return found


@torch.no_grad()
def normalized(norm: nn.Module, layer: nn.Linear) -> nn.Linear:
    """A linear layer that does what both do in evaluation, in float32."""
    both = _composed([_normalization(norm), _linear(layer)])
    assert both is not None
    made = nn.Linear(layer.in_features, layer.out_features)
    made.weight.copy_(both.weight)
    made.bias.copy_(both.bias)
    return made


def _linear(layer: nn.Linear) -> _Affine:
    weight = layer.weight.double()
    return _Affine(weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double())


def _normalization(norm: Any) -> _Affine:
    """Of evaluation."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return _Affine(torch.diag(scale), shift if norm.bias is None else shift + norm.bias.double())


def _add_linear(layers: list[dict[str, Any]], tensors: Arrays, name: str, weight: Tensor, bias: Tensor) -> None:
    layers.append({"type": "linear", "name": name, "in": weight.shape[1], "out": weight.shape[0]})
    tensors |= {f"{name}.weight": array(weight), f"{name}.bias": array(bias.float())}

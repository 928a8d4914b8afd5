"""The layers of vector-quantize-pytorch: which of them can be swapped, and the swap.

Their constructor arguments are read from what their constructors leave in them. Nothing here imports that package.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastseq._check import ArgumentError
from fastseq.nn.codebook import Codebook
from fastseq.nn.fsq import FSQ
from fastseq.nn.grouped_residual_vq import GroupedResidualVQ
from fastseq.nn.residual_vq import ResidualVQ
from fastseq.nn.sim_vq import SimVQ
from fastseq.nn.vector_quantize import VectorQuantize
from fastseq.replacement.instances import changed

PACKAGE = "vector_quantize_pytorch"
_PLAIN = (bool, int, float, str, type(None))


class _Refused(Exception):
    """Why a module cannot be swapped."""


def known(module: nn.Module) -> str | None:
    """The name of the class of vector-quantize-pytorch that ``module`` is or inherits from."""
    names = (f"{PACKAGE}.{kind.__qualname__}" for kind in type(module).__mro__ if _is_theirs(kind))
    return next(names, None)


def why_not(module: nn.Module) -> str | None:
    """Why this instance cannot be swapped, or None."""
    try:
        _pairs_of(module)
    except _Refused as reason:
        return str(reason)
    return None


def swap(module: nn.Module, options: dict[str, Any]) -> list[tuple[nn.Module, nn.Module]]:
    """Ours with the state of ``module`` beside it: the same parameters, buffers, hooks, and modules of other packages.

    First the module itself, then, in the same way, what it has inside.
    """
    pairs = _pairs_of(module)
    for new, old in pairs:
        _adopt(new, old)
    return pairs


def _is_theirs(kind: type) -> bool:
    return kind.__module__.split(".")[0] == PACKAGE


def _pairs_of(module: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """A new one of ours beside ``module``, and so on inwards."""
    kind = type(module)
    name = kind.__qualname__
    if not _is_theirs(kind):
        stock = str(known(module)).rpartition(".")[2]
        raise _Refused(f"{kind.__module__}.{name} is a subclass of {stock} and may do more")
    if name not in _READ:
        raise _Refused(f"there is none of ours for {PACKAGE}.{name}")
    ours, read = _READ[name]
    try:
        arguments = read(module)
    except (AttributeError, KeyError) as error:
        raise _Refused(f"it is not as {PACKAGE} 1.32 makes it ({error})") from error
    try:
        with torch.random.fork_rng(devices=[]):
            new = ours(**arguments)
    except (ArgumentError, NotImplementedError, TypeError) as error:
        raise _Refused(str(error)) from error
    return list(_pairs(new, module))


def _pairs(new: nn.Module, old: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Ours and theirs, from outside inwards, where both have the same parts."""
    for one, other, what in (
        (set(new._parameters), set(old._parameters), "parameters"),
        (_kept(new), _kept(old), "buffers"),
        (set(new._modules), set(old._modules), "modules"),
    ):
        if one != other:
            raise _Refused(f"its {what} are not as {PACKAGE} 1.32 makes them ({', '.join(sorted(one ^ other))})")
    counts = old._buffers.get("cluster_size")
    if counts is not None and counts.grad is not None:
        raise _Refused("it holds updates of its codebook that were accumulated and not applied")
    yield new, old
    for name, child in old._modules.items():
        ours = new._modules[name]
        if child is None or ours is None or not _is_ours(ours, child):
            continue
        for part in _container(child):
            if not _is_theirs(type(part)) or changed(part) is not None:
                raise _Refused(f"{name} in it is not as {PACKAGE} 1.32 makes it ({changed(part) or type(part)})")
        yield from _pairs(ours, child)


def _is_ours(new: nn.Module, old: nn.Module) -> bool:
    """Whether we made ``new``; otherwise what was in its place is taken as it is."""
    return new is not old and any(type(part).__module__.split(".")[0] == "fastseq" for part in _container(new))


def _container(module: nn.Module) -> list[nn.Module]:
    """A list of modules counts as what is in it."""
    return [*module] if isinstance(module, nn.ModuleList) else [module]


def _kept(module: nn.Module) -> set[str]:
    """Names of the buffers that belong to the state_dict."""
    return {n for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}


def _adopt(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` what ``old`` has: the same tensors, hooks, and modules that are not of that package."""
    device = next((t.device for t in (*old.parameters(), *old.buffers())), torch.device("cpu"))
    new._parameters.update(old._parameters)
    for name, buffer in new._buffers.items():
        moved = None if buffer is None else buffer.to(device)
        new._buffers[name] = old._buffers.get(name, moved)
    for name, child in old._modules.items():
        ours = new._modules[name]
        if child is None or ours is None or not _is_ours(ours, child):
            new._modules[name] = child
    for name, value in old.__dict__.items():
        if "_hooks" in name or name in ("_is_full_backward_hook", "training", "in_place_codebook_optimizer"):
            new.__dict__[name] = value
        elif name not in new.__dict__ and not hasattr(type(new), name) and isinstance(value, _PLAIN):
            new.__dict__[name] = value
    hook: Any
    for hook in old._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)  # torch keeps a reference to the module that dies with it
    if isinstance(new, Codebook):
        new.ready = not new.initted.is_meta and bool(new.initted)


def _vector_quantize(old: Any) -> dict[str, Any]:
    codebook = old._codebook
    sample = codebook.gumbel_sample.keywords
    distributed = codebook.use_ddp
    arguments = {name: getattr(old, name) for name in _SAME}
    arguments |= {name: getattr(codebook, name) for name in _SAME_OF_CODEBOOK}
    if codebook.affine_param:
        arguments |= {name: getattr(codebook, name) for name in _SAME_OF_AFFINE}
    return arguments | {
        "codebook_dim": codebook.embed.shape[-1],
        "kmeans_init": not codebook.initted.is_meta and not bool(codebook.initted),
        "sync_kmeans": not distributed or codebook.sample_fn.__name__ == "sample_vectors_distributed",
        "layernorm_after_project_in": isinstance(old.project_in, nn.Sequential),
        "sync_codebook": distributed,
        "stochastic_sample_codes": sample["stochastic"],
        "straight_through": sample["straight_through"],
    }


def _residual_vq(old: Any) -> dict[str, Any]:
    layers = [_vector_quantize(layer) for layer in old.layers]
    own = ("codebook_size", "kmeans_init")
    common = [{name: value for name, value in layer.items() if name not in own} for layer in layers]
    different = sorted({name for layer in common for name, value in layer.items() if value != common[0][name]})
    if different:
        raise _Refused(f"its levels differ in {', '.join(different)}")
    arguments = {name: value for name, value in common[0].items() if name not in _OF_LEVELS}
    arguments |= {name: getattr(old, name) for name in _SAME_OF_RESIDUAL}
    projected = isinstance(old.project_in, nn.Linear)
    arguments |= {
        "dim": old.project_in.in_features if projected else old.codebook_dim,
        "codebook_size": tuple(old.codebook_sizes),
        "kmeans_init": any(layer["kmeans_init"] for layer in layers),
        "eval_beam_size": None if old.beam_size is None else old.eval_beam_size,
        "beam_score_quantizer_weights": old.beam_score_weights.tolist(),
    }
    if old.implicit_neural_codebook and old.num_quantizers > 1:
        network = old.mlps[0]
        hidden = network.layers[0][0].out_features if len(network.layers) else None
        arguments["mlp_kwargs"] = {"depth": len(network.layers), "dim_hidden": hidden}
    return arguments


def _grouped_residual_vq(old: Any) -> dict[str, Any]:
    groups = [_residual_vq(rvq) for rvq in old.rvqs]
    common = [{name: value for name, value in group.items() if name != "kmeans_init"} for group in groups]
    if any(group != common[0] for group in common):
        raise _Refused("its groups differ")
    started = {"kmeans_init": any(group["kmeans_init"] for group in groups)}
    return {**common[0], **started, "dim": old.dim, "groups": old.groups}


def _fsq(old: Any) -> dict[str, Any]:
    biased = isinstance(old.project_in, nn.Linear) and old.project_in.bias is not None
    return {name: getattr(old, name) for name in _SAME_OF_FSQ} | {
        "levels": old._levels.tolist(),
        "projection_has_bias": biased,
        "noise_dropout": 0.5 if old.noise_dropout else 0.0,  # what 1.32 does for every value
    }


def _sim_vq(old: Any) -> dict[str, Any]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        code: Tensor = old.code_transform(old.frozen_codebook[:1])
    arguments = {name: getattr(old, name) for name in _SAME_OF_SIM}
    return arguments | {
        "dim": code.shape[-1],
        "codebook_transform": old.code_transform,
        "frozen_codebook_dim": old.frozen_codebook.shape[-1],
    }


_SAME = (  # attributes of a VectorQuantize that are named as the arguments
    *("dim", "codebook_size", "heads", "separate_codebook_per_head", "eps", "freeze_codebook", "use_cosine_sim"),
    *("channel_last", "accept_image_fmap", "accept_3d_fmap", "commitment_weight", "commitment_use_cross_entropy_loss"),
    *("orthogonal_reg_weight", "orthogonal_reg_active_codes_only", "orthogonal_reg_max_codes"),
    *("codebook_diversity_loss_weight", "codebook_diversity_temperature", "rotation_trick", "directional_reparam"),
    *("directional_reparam_variance", "learnable_codebook", "manual_in_place_optimizer_update", "sync_update_v"),
    *("return_zeros_for_masked_padding", "route_gradients_to_input"),
)
_SAME_OF_CODEBOOK = (
    *("decay", "kmeans_iters", "threshold_ema_dead_code", "sample_codebook_temp", "ema_update", "manual_ema_update"),
    *("vq_bridge", "affine_param"),
)
_SAME_OF_AFFINE = ("sync_affine_param", "affine_param_batch_decay", "affine_param_codebook_decay")
_SAME_OF_RESIDUAL = (
    *(
        "num_quantizers",
        "codebook_dim",
        "shared_codebook",
        "diveq",
        "quantize_dropout",
        "quantize_dropout_cutoff_index",
    ),
    *("quantize_dropout_multiple_of", "accept_image_fmap", "implicit_neural_codebook", "beam_size", "quant_grad_frac"),
    "return_zeros_for_masked_padding",
)
_OF_LEVELS = ("dim", "heads", "separate_codebook_per_head", "layernorm_after_project_in", "channel_last")
_SAME_OF_FSQ = (
    *("dim", "num_codebooks", "keep_num_codebooks_dim", "allowed_dtypes", "channel_first", "return_indices"),
    *("force_quantization_f32", "preserve_symmetry", "bound_hard_clamp", "orthogonal_rotation"),
)
_SAME_OF_SIM = (
    *("codebook_size", "channel_first", "rotation_trick", "input_to_quantize_commit_loss_weight", "commitment_weight"),
)
_READ: dict[str, tuple[Callable[..., nn.Module], Callable[[Any], dict[str, Any]]]] = {
    "VectorQuantize": (VectorQuantize, _vector_quantize),
    "ResidualVQ": (ResidualVQ, _residual_vq),
    "GroupedResidualVQ": (GroupedResidualVQ, _grouped_residual_vq),
    "FSQ": (FSQ, _fsq),
    "SimVQ": (SimVQ, _sim_vq),
}
